//! What stays, and why.

use super::*;

#[test]
fn what_belongs_to_files_and_to_shared_memory_stays() {
    in_own_process(|| {
        let rig = Rig::new();
        let (memory, disk) = (memory_file(8), disk_file(8));
        let mut mappings = vec![Mapping::new(8, Backing::Shared, RW)];
        for file in [&memory, &disk] {
            mappings.push(Mapping::new(8, Backing::File(file.as_fd(), 0), RW));
            mappings.push(Mapping::new(8, Backing::PrivateFile(file.as_fd(), 0), RW));
        }
        for mapping in &mappings {
            rig.assert_stays(mapping.range(), StayReason::FileBacked);
            // A private mapping has copies of its own by then.
            fill(mapping);
            rig.assert_stays(mapping.range(), StayReason::FileBacked);
            assert_filled(mapping);
        }
        let pages = Order::HUGE.pages();
        let reserved = Mapping::try_at(place(pages), Backing::HugetlbUnreserved, RW);
        match reserved {
            Ok(mapping) => rig.assert_stays(mapping.range(), StayReason::FileBacked),
            Err(error) => common::loudly(&format!("no hugetlb memory: {error}")),
        }
        // The program itself.
        let code = mapping_at(assert_filled as *const () as u64);
        rig.assert_stays(code, StayReason::FileBacked);
    });
}

#[test]
fn what_nobody_may_store_to_stays() {
    in_own_process(|| {
        let rig = Rig::new();
        let mapping = Mapping::anonymous(8);
        fill(&mapping);
        protect(mapping.range(), R).expect("it is mapped");
        rig.assert_stays(mapping.range(), StayReason::ReadOnly);
        assert_filled(&mapping);
        protect(mapping.range(), NONE).expect("it is mapped");
        rig.assert_stays(mapping.range(), StayReason::Denied);
        protect(mapping.range(), W).expect("it is mapped");
        rig.assert_stays(mapping.range(), StayReason::Unsupported);
        protect(mapping.range(), R | ProtFlags::EXEC).expect("it is mapped");
        rig.assert_stays(mapping.range(), StayReason::ReadOnly);
        protect(mapping.range(), RW | ProtFlags::EXEC).expect("it is mapped");
        rig.assert_stays(mapping.range(), StayReason::Unsupported);
        protect(mapping.range(), RW).expect("it is mapped");
        assert_goes_and_comes(&rig, &mapping);
    });
}

#[test]
fn what_is_locked_stays() {
    in_own_process(|| {
        let rig = Rig::new();
        let mapping = Mapping::anonymous(16);
        fill(&mapping);
        lock(mapping.part(4, 8)).expect("root may");
        rig.assert_moves(mapping.part(0, 4));
        rig.assert_stays(mapping.part(4, 8), StayReason::Locked);
        let report = rig.migrate(mapping.range());
        assert_eq!(report.moved, 4, "{report:?}");
        assert_filled(&mapping);
        unlock(mapping.range()).expect("root may");
        assert_goes_and_comes(&rig, &mapping);
    });
}

#[test]
fn what_is_pinned_stays() {
    in_own_process(|| {
        let Some(mut ring) = Ring::new() else {
            return common::loudly("there is no io_uring here: nothing was tested");
        };
        let rig = Rig::new();
        let mapping = Mapping::anonymous(16);
        fill(&mapping);
        // What is out comes home to be pinned.
        rig.assert_moves(mapping.range());
        ring.register(mapping.part(4, 8)).expect("it can be pinned");
        let report = rig.migrate(mapping.range());
        assert_eq!(report.moved, 0, "{report:?}");
        for page in mapping.range().iter() {
            let pinned = mapping.part(4, 8).contains(page);
            let reason = if pinned { StayReason::Pinned } else { StayReason::AlreadyThere };
            assert_eq!(report.reason(page), Some(reason), "{report:?}");
            assert_eq!(is_home(&rig.process, page), pinned, "{page}");
        }
        // So that what the kernel writes to it is seen.
        let file = memory_file(1);
        rustix::io::pwrite(&file, &77_u64.to_ne_bytes(), 0).expect("it is a file");
        assert_eq!(ring.read_fixed(&file, mapping.word(5), 8), 8);
        assert_eq!(mapping.peek(5), 77);
        mapping.poke(5, 6);
        assert_filled(&mapping);
        ring.unregister().expect("it was registered");
        // The kernel lets go a moment later.
        assert!(eventually(|| rig.migrate(mapping.range()).is_complete()));
        assert_filled(&mapping);
    });
}

#[test]
fn what_is_the_kernels_own_stays() {
    in_own_process(|| {
        let rig = Rig::new();
        for name in ["[vdso]", "[vvar]"] {
            let Some(range) = mapping_named(name) else { continue };
            rig.assert_stays(range, StayReason::Unsupported);
        }
        match secret_file(2) {
            Err(error) => common::loudly(&format!("there is no secret memory here: {error}")),
            Ok(file) => {
                let mapping = Mapping::new(2, Backing::File(file.as_fd(), 0), RW);
                fill(&mapping);
                rig.assert_stays(mapping.range(), StayReason::Unsupported);
                assert_filled(&mapping);
            }
        }
    });
}

#[test]
fn what_the_kernel_may_drop_stays() {
    /// `MAP_DROPPABLE` (Linux 6.11), in place of `MAP_PRIVATE`.
    const DROPPABLE: u32 = 8;
    in_own_process(|| {
        let rig = Rig::new();
        let range = place(8);
        let (at, bytes) = (range.address() as usize, range.len() * PAGE_SIZE);
        let at = std::ptr::without_provenance_mut(at);
        let flags = MapFlags::from_bits_retain(DROPPABLE) | MapFlags::FIXED;
        // SAFETY: in the part of the address space that is for tests, where nothing is mapped.
        match unsafe { rustix::mm::mmap_anonymous(at, bytes, RW, flags) } {
            Err(error) => common::loudly(&format!("there is no droppable memory here: {error}")),
            Ok(_) => {
                trap::store(range.address(), 1).expect("it is mapped");
                rig.assert_stays(range, StayReason::Unsupported);
            }
        }
    });
}

#[test]
fn what_is_guarded_stays_a_guard() {
    in_own_process(|| {
        let rig = Rig::new();
        let mapping = Mapping::anonymous(512);
        fill(&mapping);
        let guarded = mapping.part(100, 3);
        match advise(guarded, GUARD_INSTALL) {
            Err(Errno::INVAL) => {
                return common::loudly("there are no guards here: nothing was tested");
            }
            result => result.expect("anonymous memory can be guarded"),
        }
        let report = rig.migrate(mapping.range());
        assert_eq!(report.moved, 509, "{report:?}");
        for page in guarded.iter() {
            assert_eq!(report.reason(page), Some(StayReason::Denied), "{report:?}");
            assert!(trap::load(page.address()).is_err(), "{page} is guarded");
            assert!(trap::store(page.address(), 1).is_err(), "{page} is guarded");
        }
        let others = (0..512).filter(|index| !(100..103).contains(index));
        others.for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
    });
}

/// What serving a fault may need: the arena of the Rust allocator, static data, and the stack of a
/// thread that uses what is attached.
#[test]
fn what_a_server_may_need_stays() {
    static STATIC: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    in_own_process(|| {
        let rig = Rig::new();
        let (on_stack, on_heap) = (5_u64, Box::new(6_u64));
        for address in [&raw const on_stack as u64, &raw const *on_heap as u64] {
            rig.assert_stays(Page::containing(address).into(), StayReason::Reserved);
        }
        let page = Page::containing(STATIC.as_ptr() as u64);
        let reason = rig.migrate(page.into()).reason(page);
        assert!(
            matches!(reason, Some(StayReason::FileBacked | StayReason::Reserved)),
            "{reason:?}"
        );
    });
}

#[test]
fn what_was_not_named_stays_where_only_some_memory_may_move() {
    in_own_process(|| {
        let mapping = Mapping::anonymous(16);
        fill(&mapping);
        let process = attach_with(Options::new().manage(mapping.part(4, 4)));
        let memory = DevicePagemap::register(process.host_memory(64));
        let rig = Rig { process, memory };
        let report = rig.migrate(mapping.range());
        assert_eq!(report.moved, 4, "{report:?}");
        for page in mapping.part(0, 4).iter().chain(mapping.part(8, 8).iter()) {
            assert_eq!(report.reason(page), Some(StayReason::Reserved), "{report:?}");
        }
        rig.process.manage(mapping.part(8, 8));
        rig.assert_moves(mapping.part(8, 8));
        assert_filled(&mapping);
    });
}

#[test]
fn where_nothing_is_mapped_there_is_nothing_to_move() {
    in_own_process(|| {
        let rig = Rig::new();
        let whole = place(16);
        rig.assert_stays(whole, StayReason::Hole);
        // Holes around and between.
        let first = Mapping::at(part(whole, 2, 4), Backing::Anonymous, RW);
        let second = Mapping::at(part(whole, 8, 4), Backing::Anonymous, RW);
        let report = rig.migrate(whole);
        assert_eq!(report.moved, 8, "{report:?}");
        for page in whole.iter() {
            let mapped = first.range().contains(page) || second.range().contains(page);
            let expected = (!mapped).then_some(StayReason::Hole);
            assert_eq!(report.reason(page), expected, "{page}: {report:?}");
        }
        assert_eq!(rig.residency(whole.first()), Residency::Hole);
    });
}
