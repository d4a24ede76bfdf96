//! What a process tells of its mappings and page table, beside what a range fault is for.

mod common;

use std::os::fd::AsFd as _;

use common::children::{End, How, WAYS, child, end_of};
use common::in_own_process;
use common::memory::{
    Backing, Mapping, NONE, R, RW, advise, disk_file, lines, memory_file, protect, unmap,
};
use common::rig::{Gpu, attach};
use uhmm::{Access, Frame, Order, PAGE_SIZE, Page, PageRange, RangeFault, Residency};
use uhmm_linux::{MappingKind, PageFlags, Process};

fn flags(process: &Process, range: PageRange) -> Vec<PageFlags> {
    let mut flags = Vec::new();
    process.page_flags(range, &mut flags);
    flags
}

#[test]
fn mappings_are_told_with_their_rights_kinds_and_names() {
    in_own_process(|| {
        let process = attach();
        let kind_of = |memory: &Mapping| {
            let mapping = process.mapping(memory.page(1)).expect("it is mapped");
            assert!(mapping.range.covers(memory.range()));
            assert_eq!(mapping.page_order, Order::PAGE);
            (mapping.kind, mapping.rights, mapping.shared)
        };
        let memory = Mapping::anonymous(4);
        assert_eq!(kind_of(&memory), (MappingKind::Anonymous, Access::Write, false));
        assert_eq!(process.mapping_name(memory.page(0)), b"");
        protect(memory.range(), R).expect("mprotect");
        assert_eq!(kind_of(&memory), (MappingKind::Anonymous, Access::Read, false));
        let (on_disk, in_memory) = (disk_file(4), memory_file(4));
        let private = Mapping::new(4, Backing::PrivateFile(on_disk.as_fd(), 0), RW);
        assert_eq!(kind_of(&private), (MappingKind::File, Access::Write, false));
        let shared = Mapping::new(4, Backing::File(in_memory.as_fd(), 0), NONE);
        assert_eq!(kind_of(&shared), (MappingKind::Shmem, Access::None, true));
        assert_eq!(process.mapping_name(shared.page(0)), b"/memfd:uhmm-test (deleted)");
        // The next above.
        let below = Page::new(shared.range().first().number() - 1).expect("a page");
        let next = process.mapping(below).expect("there is one above");
        assert_eq!(next.range.first(), shared.range().first());
        assert_eq!(process.mapping_name(below), b"");
        let vdso = lines().into_iter().find(|line| line.name == "[vdso]").expect("there is one");
        let vdso = process.mapping(Page::containing(vdso.range.start)).expect("it is mapped");
        assert_eq!(vdso.kind, MappingKind::Special);
    });
}

#[test]
fn flags_are_those_of_each_page() {
    in_own_process(|| {
        let process = attach();
        let memory = Mapping::anonymous(4);
        assert_eq!(memory.peek(1), 0);
        memory.poke(2, 1);
        let own = PageFlags::PRESENT | PageFlags::EXCLUSIVE;
        let seen = flags(&process, memory.range());
        assert_eq!([seen[0], seen[2], seen[3]], [PageFlags::empty(), own, PageFlags::empty()]);
        assert!(seen[1].contains(PageFlags::PRESENT | PageFlags::ZERO));
        let huge = Mapping::new(512, Backing::Huge, RW);
        huge.poke(0, 1);
        assert_eq!(flags(&process, huge.range()), [own | PageFlags::HUGE; 512]);
        let on_disk = disk_file(2);
        let private = Mapping::new(2, Backing::PrivateFile(on_disk.as_fd(), 0), RW);
        assert_eq!(private.peek(0), 0);
        private.poke(1, 1);
        let seen = flags(&process, private.range());
        assert!(seen[0].contains(PageFlags::PRESENT | PageFlags::FILE));
        assert_eq!(seen[1], own);
        unmap(memory.part(3, 1));
        assert_eq!(flags(&process, memory.part(3, 1)), [PageFlags::empty()]);
        // Two have it, and then one again.
        let (reader, writer) = std::io::pipe().expect("pipe");
        let pid = child(How::Hooked, || {
            drop(writer.try_clone());
            std::io::Read::read(&mut &reader, &mut [0; 1]).is_ok()
        });
        assert_eq!(flags(&process, memory.part(2, 1)), [PageFlags::PRESENT]);
        std::io::Write::write_all(&mut &writer, b"x").expect("the child reads it");
        assert_eq!(end_of(pid), End::Well);
        assert_eq!(flags(&process, memory.part(2, 1)), [own]);
    });
}

#[test]
fn what_is_away_is_told_and_not_watched() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::in_place("gpu", 1024, &process);
        let memory = Mapping::new(512, Backing::Huge, RW);
        memory.fill(|index| index);
        let away = |range| {
            let mut away = Vec::new();
            process.away(range, &mut away);
            away
        };
        assert_eq!(away(memory.range()), []);
        assert_eq!(process.migrate(memory.range(), &gpu.pagemap).run().moved, 512);
        let part = memory.part(8, 16);
        let found = away(part);
        let [(pages, Residency::Device(at), order)] = found[..] else { panic!("{found:?}") };
        assert_eq!((pages, at.owner, order), (part, gpu.pagemap.owner(), Order::HUGE));
        let whole = away(memory.range());
        let [(_, Residency::Device(first), _)] = whole[..] else { panic!("{whole:?}") };
        assert_eq!(at.frame.0, first.frame.0 + 8);
        assert_eq!(flags(&process, part), [PageFlags::empty(); 16]);
        assert_eq!(memory.peek(0), 0);
        assert_eq!(away(memory.range()), []);
    });
}

#[test]
fn forks_are_counted_however_they_are_made() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let memory = Mapping::anonymous(8);
        memory.fill(|index| index);
        for how in WAYS {
            // So that the kernel tells of it.
            process.migrate(memory.range(), &gpu.pagemap).run();
            let before = process.forks();
            assert_eq!(before, process.forks());
            let pid = child(how, || !process.is_here());
            assert!(process.forks() > before, "{how:?}");
            assert_eq!(end_of(pid), End::Well);
            assert!(process.is_here());
        }
    });
}

#[test]
fn devices_know_of_what_was_done_before() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let memory = Mapping::anonymous(8);
        let mirror = gpu.mirror(&process, memory.range());
        for round in 0..200 {
            memory.fill(|index| index + round);
            mirror.range_fault(&RangeFault::read(memory.range())).expect("it is mapped");
            let invalidations = || mirror.statistics().delivered;
            let before = invalidations();
            advise(memory.range(), libc::MADV_DONTNEED).expect("madvise");
            process.catch_up();
            assert!(invalidations() > before, "in round {round}");
        }
    });
}

#[test]
fn accesses_say_how_far_they_came() {
    in_own_process(|| {
        let process = attach();
        let memory = Mapping::anonymous(4);
        memory.fill(|index| index + 1);
        unmap(memory.part(2, 1));
        let system = process.backend().memory();
        let frame = Frame(memory.range().first().number());
        let mut bytes = vec![9; 4 * PAGE_SIZE];
        assert_eq!(system.try_read(frame, 0, &mut bytes), 2 * PAGE_SIZE);
        assert_eq!((bytes[0], bytes[PAGE_SIZE]), (1, 2));
        assert_eq!(system.try_write(frame, 0, &[5; 4 * PAGE_SIZE]), 2 * PAGE_SIZE);
        assert_eq!(memory.peek(1), u64::from_ne_bytes([5; 8]));
        // As if nothing were known: zeroes in the place of what is gone.
        system.read(frame, 0, &mut bytes);
        assert_eq!((bytes[0], bytes[2 * PAGE_SIZE]), (5, 0));
        protect(memory.part(0, 1), R).expect("mprotect");
        assert_eq!(system.try_write(frame, 0, &[6; PAGE_SIZE]), 0);
    });
}
