//! What a device gets of each kind of mapping of a live process: pages or an error, and never a
//! signal.

mod common;

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};

use common::memory::{
    Backing, Mapping, NONE, R, RW, TERRITORY, W, advise, disk_file, lines, memory_file, place,
    protect, punch, secret_file, truncate, unmap,
};
use common::rig::{Gpu, TestMirror, attach, device_load, device_store};
use common::{in_own_process, trap};
use rustix::io::Errno;
use uhmm::{
    Access, FaultError, Frame, Order, PAGE_SIZE, Page, PageEntry, PageRange, RangeFault, Residency,
};
use uhmm_devices::gpu::{SoftGpu, SoftGpuOptions};
use uhmm_linux::Process;

/// `MADV_GUARD_INSTALL` (Linux 6.13).
const GUARD_INSTALL: i32 = 102;

/// Runs `body` on a device, and sees that this process got no signal meanwhile.
#[track_caller]
fn silently(body: impl FnOnce(&Process, &Gpu)) {
    trap::install();
    let before = trap::signals();
    let (process, gpu) = (attach(), Gpu::new(16));
    body(&process, &gpu);
    assert_eq!(trap::signals(), before, "a fault of a device raised a signal");
}

/// Faults a range for reading, or as well for writing.
fn fault(
    mirror: &TestMirror,
    range: PageRange,
    access: Access,
) -> Result<Vec<PageEntry>, FaultError> {
    let request = match access {
        Access::Read => RangeFault::read(range),
        _ => RangeFault::write(range),
    };
    mirror.range_fault(&request).map(|done| done.entries)
}

/// Sees that entries are of pages in system memory that allow `access`.
#[track_caller]
fn assert_home(entries: &[PageEntry], range: PageRange, access: Access, allowed: Access) {
    assert_eq!(entries.len(), range.len());
    for (page, entry) in range.iter().zip(entries) {
        let expected = Residency::System(Frame(page.number()));
        assert_eq!(entry.residency, expected, "{page}: {entry:?}");
        assert!(entry.access >= access, "{page}: {entry:?}");
        assert_eq!(entry.allowed, allowed, "{page}: {entry:?}");
    }
}

#[track_caller]
fn assert_huge(entries: &[PageEntry]) {
    let other = entries.iter().position(|entry| entry.order != Order::HUGE);
    assert_eq!(other.map(|index| entries[index]), None, "page {other:?} is of no huge page");
}

fn residency(process: &Process, page: Page) -> Residency {
    process.snapshot(page.into())[0].residency
}

/// Sees that loads and stores of the device and of the CPUs are of the same page.
#[track_caller]
fn assert_shared(mirror: &TestMirror, mapping: &Mapping, index: u64) {
    let page = mapping.page(index);
    mapping.poke(index, 0x1111);
    assert_eq!(device_load(mirror, page), Ok(0x1111));
    assert_eq!(device_store(mirror, page, 0x2222), Ok(()));
    assert_eq!(mapping.peek(index), 0x2222);
    mapping.poke(index, 0x3333);
    assert_eq!(device_load(mirror, page), Ok(0x3333));
}

/// Returns what a fault says of four pages of which the third cannot be had, and that page. Sees that
/// the others are had, and those before it also when all four are asked for.
#[track_caller]
fn bad_third(
    process: &Process,
    gpu: &Gpu,
    mapping: &Mapping,
    access: Access,
) -> (FaultError, Page) {
    let mirror = gpu.mirror(process, mapping.range());
    let error = fault(&mirror, mapping.range(), access).expect_err("the third page is bad");
    let entered = mirror.inspect(|table| table.entries.len()).expect("the process lives");
    assert_eq!(entered, 0, "a batch is all or nothing");
    // A device's request may have been refused by a look alone; this one never is.
    let backend = process.backend().fault(mapping.range(), access, None, None);
    assert_eq!(backend, Err(error));
    for page in mapping.part(0, 2).iter() {
        let before = residency(process, page);
        assert_eq!(before, Residency::System(Frame(page.number())), "{page} stands before");
    }
    for index in [0, 1, 3] {
        assert_eq!(fault(&mirror, mapping.page(index).into(), access).map(drop), Ok(()));
    }
    (error, mapping.page(2))
}

fn denied(page: Page, wanted: Access, allowed: Access) -> FaultError {
    FaultError::Denied { page, wanted, allowed }
}

#[test]
fn anonymous_pages_are_had_and_shared_with_the_cpus() {
    in_own_process(|| {
        silently(|process, gpu| {
            let mapping = Mapping::anonymous(8);
            let mirror = gpu.mirror(process, mapping.range());
            assert_eq!(residency(process, mapping.page(0)), Residency::Empty);
            let entries =
                fault(&mirror, mapping.part(0, 4), Access::Read).expect("they are mapped");
            assert_home(&entries, mapping.part(0, 4), Access::Read, Access::Write);
            let entries = fault(&mirror, mapping.range(), Access::Write).expect("they are mapped");
            assert_home(&entries, mapping.range(), Access::Write, Access::Write);
            (0..8).for_each(|index| assert_shared(&mirror, &mapping, index));
        });
    });
}

#[test]
fn memory_is_read_and_written_across_pages_and_at_any_offset() {
    in_own_process(|| {
        silently(|process, gpu| {
            let mapping = Mapping::anonymous(3);
            let mirror = gpu.mirror(process, mapping.range());
            fault(&mirror, mapping.range(), Access::Write).expect("they are mapped");
            let memory = process.backend().memory();
            let first = Frame(mapping.range().first().number());
            let written: Vec<u8> =
                (0..2 * PAGE_SIZE + 3).map(|index| (index % 251) as u8).collect();
            memory.write(first, 5, &written);
            let mut read = vec![0; written.len()];
            memory.read(first, 5, &mut read);
            assert_eq!(read, written);
            let word = |index: u64| trap::load(mapping.word(0) + 8 * index).expect("it is mapped");
            let expected =
                |at: usize| u64::from_ne_bytes(written[at - 5..][..8].try_into().expect("8"));
            assert_eq!(word(1), expected(8));
            assert_eq!(word(512), expected(PAGE_SIZE), "the first word of the second page");
        });
    });
}

#[test]
fn huge_pages_are_had_whole() {
    in_own_process(|| {
        silently(|process, gpu| {
            let pages = Order::HUGE.pages();
            let mapping = Mapping::new(2 * pages, Backing::Huge, RW);
            let mirror = gpu.mirror(process, mapping.range());
            mapping.poke(3, 7);
            let huge = mapping.part(0, pages);
            let entries = fault(&mirror, huge, Access::Write).expect("they are mapped");
            assert_home(&entries, huge, Access::Write, Access::Write);
            // The kernel gives none where there is no such piece of memory.
            if huge_bytes(&mapping) > 0 {
                assert_huge(&entries);
            } else {
                common::loudly("no huge page was to be had: their order was not looked at");
            }
            assert_eq!(device_load(&mirror, mapping.page(3)), Ok(7));
            assert_shared(&mirror, &mapping, pages - 1);
            // One that the device touches first, in the middle.
            assert_shared(&mirror, &mapping, pages + 100);
        });
    });
}

/// Returns how much of a mapping is in huge pages.
fn huge_bytes(mapping: &Mapping) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("proc is mounted");
    let start = format!("{:x}-", mapping.range().address());
    let ours = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let line = ours.take(30).find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.expect("smaps has a line for it") * 1024
}

/// Reserves large pages, and gives them back.
struct Reserved {
    before: String,
}

impl Reserved {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    fn new(pages: u64) -> Option<Reserved> {
        let before = std::fs::read_to_string(Reserved::FILE).ok()?;
        let wanted = before.trim().parse::<u64>().ok()? + pages;
        std::fs::write(Reserved::FILE, wanted.to_string()).ok()?;
        let reserved = Reserved { before };
        let now = std::fs::read_to_string(Reserved::FILE).ok()?;
        (now.trim().parse::<u64>().ok()? >= wanted).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        std::fs::write(Reserved::FILE, &self.before).expect("it could be written to before");
    }
}

#[test]
fn reserved_huge_pages_are_had_whole_while_there_are_any() {
    in_own_process(|| {
        let pages = Order::HUGE.pages();
        let Some(reserved) = Reserved::new(1) else {
            return common::loudly("no huge pages can be reserved here: nothing was tested");
        };
        silently(|process, gpu| {
            let mapping = Mapping::new(pages, Backing::Hugetlb, RW);
            let mirror = gpu.mirror(process, mapping.range());
            let entries = fault(&mirror, mapping.range(), Access::Write).expect("one is reserved");
            assert_home(&entries, mapping.range(), Access::Write, Access::Write);
            assert_huge(&entries);
            assert_shared(&mirror, &mapping, 0);
            assert_shared(&mirror, &mapping, pages - 1);
            drop(mirror);
            drop(mapping);

            // What nobody reserved, and nobody has.
            drop(reserved);
            let mapping = Mapping::new(pages, Backing::HugetlbUnreserved, RW);
            let mirror = gpu.mirror(process, mapping.range());
            let free = std::fs::read_to_string(Reserved::FILE).expect("it could be read before");
            if free.trim() == "0" {
                let error = fault(&mirror, mapping.part(1, 1), Access::Read).expect_err("no page");
                assert_eq!(error, FaultError::OutOfMemory { page: mapping.page(1) });
            }
        });
    });
}

#[test]
fn shared_memory_is_had_and_shared_with_other_mappings_of_it() {
    in_own_process(|| {
        silently(|process, gpu| {
            let anonymous = Mapping::new(4, Backing::Shared, RW);
            let mirror = gpu.mirror(process, anonymous.range());
            let entries = fault(&mirror, anonymous.range(), Access::Write).expect("it is mapped");
            assert_home(&entries, anonymous.range(), Access::Write, Access::Write);
            assert_shared(&mirror, &anonymous, 3);

            let file = memory_file(2);
            let mapping = Mapping::new(2, Backing::File(file.as_fd(), 0), RW);
            let alias = Mapping::new(2, Backing::File(file.as_fd(), 0), RW);
            let mirror = gpu.mirror(process, mapping.range());
            assert_shared(&mirror, &mapping, 1);
            assert_eq!(alias.peek(1), 0x3333);
            alias.poke(0, 4);
            assert_eq!(device_load(&mirror, mapping.page(0)), Ok(4));
            assert_eq!(device_store(&mirror, mapping.page(0), 5), Ok(()));
            assert_eq!(alias.peek(0), 5);
        });
    });
}

#[test]
fn a_shared_file_is_written_to_and_a_private_one_is_not() {
    in_own_process(|| {
        silently(|process, gpu| {
            for file in [disk_file(4), memory_file(4)] {
                let word = |page: u64| {
                    let mut bytes = [0; 8];
                    let read = rustix::io::pread(&file, &mut bytes, page * PAGE_SIZE as u64);
                    assert_eq!(read, Ok(8));
                    u64::from_ne_bytes(bytes)
                };
                let shared = Mapping::new(4, Backing::File(file.as_fd(), 0), RW);
                let mirror = gpu.mirror(process, shared.range());
                let entries = fault(&mirror, shared.range(), Access::Write).expect("it is mapped");
                assert_home(&entries, shared.range(), Access::Write, Access::Write);
                assert_shared(&mirror, &shared, 1);
                assert_eq!(word(1), 0x3333);

                let private = Mapping::new(3, Backing::PrivateFile(file.as_fd(), 1), RW);
                let mirror = gpu.mirror(process, private.range());
                assert_eq!(device_load(&mirror, private.page(0)), Ok(0x3333));
                assert_eq!(device_store(&mirror, private.page(0), 9), Ok(()));
                assert_eq!((private.peek(0), word(1)), (9, 0x3333), "the copy, and the file");
                assert_shared(&mirror, &private, 2);
                assert_eq!(word(3), 0);
            }
        });
    });
}

#[test]
fn a_file_that_may_only_be_read_can_be_loaded_from() {
    in_own_process(|| {
        silently(|process, gpu| {
            let program = std::fs::File::open("/proc/self/exe").expect("a program has a file");
            let mut head = [0; 8];
            assert_eq!(rustix::io::pread(&program, &mut head, 0), Ok(8));
            let mapping = Mapping::new(2, Backing::PrivateFile(program.as_fd(), 0), R);
            let mirror = gpu.mirror(process, mapping.range());
            let page = mapping.page(0);
            assert_eq!(device_load(&mirror, page), Ok(u64::from_ne_bytes(head)));
            let error = device_store(&mirror, page, 1);
            assert_eq!(error, Err(denied(page, Access::Write, Access::Read)));
        });
    });
}

/// Shared mappings of what was opened for reading cannot be registered, so nobody would tell a device
/// when they go.
#[test]
fn what_nobody_would_tell_of_is_denied() {
    in_own_process(|| {
        silently(|process, gpu| {
            let program = std::fs::File::open("/proc/self/exe").expect("a program has a file");
            let mapping = Mapping::new(2, Backing::File(program.as_fd(), 0), R);
            let _ = mapping.peek(0);
            let mirror = gpu.mirror(process, mapping.range());
            let page = mapping.page(0);
            assert_eq!(device_load(&mirror, page), Err(denied(page, Access::Read, Access::None)));
        });
    });
}

#[test]
fn beyond_the_end_of_a_file_there_is_no_page() {
    in_own_process(|| {
        silently(|process, gpu| {
            for (file, shared) in [
                (disk_file(2), true),
                (disk_file(2), false),
                (memory_file(2), true),
                (memory_file(2), false),
            ] {
                let backing = match shared {
                    true => Backing::File(file.as_fd(), 0),
                    false => Backing::PrivateFile(file.as_fd(), 0),
                };
                let mapping = Mapping::new(4, backing, RW);
                let mirror = gpu.mirror(process, mapping.range());
                for access in [Access::Read, Access::Write] {
                    let error =
                        fault(&mirror, mapping.range(), access).expect_err("two are beyond");
                    assert_eq!(
                        error,
                        FaultError::EndOfFile { page: mapping.page(2) },
                        "{backing:?}"
                    );
                    assert_eq!(
                        residency(process, mapping.page(1)),
                        Residency::System(Frame(mapping.page(1).number())),
                        "the page before was faulted"
                    );
                    let error =
                        fault(&mirror, mapping.part(3, 1), access).expect_err("it is beyond");
                    assert_eq!(error, FaultError::EndOfFile { page: mapping.page(3) });
                }
                assert_shared(&mirror, &mapping, 1);
                truncate(&file, 4);
                assert_shared(&mirror, &mapping, 3);
            }
        });
    });
}

#[test]
fn a_hole_in_a_file_is_zeroes() {
    in_own_process(|| {
        silently(|process, gpu| {
            let file = disk_file(3);
            let mapping = Mapping::new(3, Backing::File(file.as_fd(), 0), RW);
            let mirror = gpu.mirror(process, mapping.range());
            assert_shared(&mirror, &mapping, 1);
            let range = mapping.part(1, 1);
            process.change(range, uhmm::EventKind::Clear, || punch(&file, 1, 1));
            assert_eq!(device_load(&mirror, mapping.page(1)), Ok(0));
        });
    });
}

#[test]
fn stacks_are_had() {
    in_own_process(|| {
        silently(|process, gpu| {
            let on_stack = |name: &str| {
                let local = AtomicU64::new(1);
                let address = (&raw const local).expose_provenance() as u64;
                let page = Page::containing(address);
                let mirror = gpu.mirror(process, page.into());
                let offset = (address - page.address()) as usize;
                let load = common::rig::access(&mirror, page, offset, Access::Read, &mut |old| old);
                assert_eq!(load, Ok(1), "{name}");
                let add = &mut |old: u64| old + 1;
                let store = common::rig::access(&mirror, page, offset, Access::Write, add);
                assert_eq!(store, Ok(1), "{name}");
                // Relaxed: this thread itself had it stored.
                assert_eq!(local.load(Ordering::Relaxed), 2, "{name}");
            };
            on_stack("this thread's");
            std::thread::scope(|scope| _ = scope.spawn(|| on_stack("another thread's")));
        });
    });
}

/// Returns the range of the mapping that has this name.
fn named(name: &str) -> Option<PageRange> {
    let line = lines().into_iter().find(|line| line.name == name)?;
    PageRange::new(line.range.start, line.range.end - line.range.start).ok()
}

#[test]
fn what_is_the_kernels_own_is_denied() {
    in_own_process(|| {
        silently(|process, gpu| {
            for name in ["[vdso]", "[vvar]"] {
                let Some(range) = named(name) else {
                    common::loudly(&format!("there is no {name} here: it was not tested"));
                    continue;
                };
                let mirror = gpu.mirror(process, range);
                for access in [Access::Read, Access::Write] {
                    let error = fault(&mirror, range.first().into(), access);
                    let error = error.expect_err("it is the kernel's");
                    assert_eq!(error, denied(range.first(), access, Access::None), "{name}");
                }
            }
        });
    });
}

#[test]
fn nothing_is_had_in_a_hole() {
    in_own_process(|| {
        silently(|process, gpu| {
            for access in [Access::Read, Access::Write] {
                let mapping = Mapping::anonymous(4);
                unmap(mapping.part(2, 1));
                let (error, page) = bad_third(process, gpu, &mapping, access);
                assert_eq!(error, FaultError::Hole { page });
                assert_eq!(residency(process, page), Residency::Hole);
            }
            let nowhere = place(2);
            let mirror = gpu.mirror(process, nowhere);
            assert_eq!(
                fault(&mirror, nowhere, Access::Read),
                Err(FaultError::Hole { page: nowhere.first() })
            );
            // Where nothing can ever be.
            let null = PageRange::new(0, PAGE_SIZE as u64).expect("a page");
            let mirror = gpu.mirror(process, null);
            assert_eq!(
                device_load(&mirror, null.first()),
                Err(FaultError::Hole { page: null.first() })
            );
        });
    });
}

#[test]
fn what_a_mapping_does_not_allow_is_denied() {
    in_own_process(|| {
        silently(|process, gpu| {
            for backing in [Backing::Anonymous, Backing::Shared] {
                for access in [Access::Read, Access::Write] {
                    let mapping = Mapping::new(4, backing, RW);
                    protect(mapping.part(2, 1), NONE).expect("it is mapped");
                    let (error, page) = bad_third(process, gpu, &mapping, access);
                    assert_eq!(error, denied(page, access, Access::None));
                }
                let mapping = Mapping::new(4, backing, RW);
                protect(mapping.part(2, 1), R).expect("it is mapped");
                let (error, page) = bad_third(process, gpu, &mapping, Access::Write);
                assert_eq!(error, denied(page, Access::Write, Access::Read));
                let mirror = gpu.mirror(process, mapping.range());
                assert_eq!(device_load(&mirror, page), Ok(0), "it can be read");
                // What can only be stored to is of no use to a device: its stores are loads as well.
                let mapping = Mapping::new(4, backing, RW);
                protect(mapping.part(2, 1), W).expect("it is mapped");
                let (error, page) = bad_third(process, gpu, &mapping, Access::Read);
                assert_eq!(error, denied(page, Access::Read, Access::None));
            }
        });
    });
}

#[test]
fn what_was_touched_before_access_was_taken_away_is_denied_all_the_same() {
    in_own_process(|| {
        silently(|process, gpu| {
            let mapping = Mapping::anonymous(3);
            mapping.fill(|index| index + 1);
            let mirror = gpu.mirror(process, mapping.range());
            protect(mapping.part(0, 1), NONE).expect("it is mapped");
            protect(mapping.part(1, 1), R).expect("it is mapped");
            let page = |index| mapping.page(index);
            assert_eq!(
                device_load(&mirror, page(0)),
                Err(denied(page(0), Access::Read, Access::None))
            );
            assert_eq!(device_load(&mirror, page(1)), Ok(2));
            assert_eq!(
                device_store(&mirror, page(1), 9),
                Err(denied(page(1), Access::Write, Access::Read))
            );
            assert_eq!(device_load(&mirror, page(2)), Ok(3));
            protect(mapping.range(), RW).expect("it is mapped");
            assert_eq!((mapping.peek(0), mapping.peek(1)), (1, 2));
        });
    });
}

#[test]
fn a_guard_denies_everything() {
    in_own_process(|| {
        silently(|process, gpu| {
            let mapping = Mapping::anonymous(4);
            match advise(mapping.part(2, 1), GUARD_INSTALL) {
                Ok(()) => {}
                Err(Errno::INVAL) => {
                    return common::loudly("this kernel has no guards: not tested");
                }
                Err(error) => panic!("MADV_GUARD_INSTALL: {error}"),
            }
            for access in [Access::Read, Access::Write] {
                let (error, page) = bad_third(process, gpu, &mapping, access);
                assert_eq!(error, denied(page, access, Access::None));
            }
        });
    });
}

#[test]
fn secret_memory_is_denied() {
    in_own_process(|| {
        silently(|process, gpu| {
            let file = match secret_file(2) {
                Ok(file) => file,
                Err(error) => {
                    return common::loudly(&format!(
                        "there is no secret memory here: {error}: not tested"
                    ));
                }
            };
            let mapping = Mapping::new(2, Backing::File(file.as_fd(), 0), RW);
            mapping.poke(0, 5);
            let mirror = gpu.mirror(process, mapping.range());
            for (index, access) in [(0, Access::Read), (0, Access::Write), (1, Access::Read)] {
                let page = mapping.page(index);
                let error = fault(&mirror, page.into(), access).expect_err("it is secret");
                assert!(
                    matches!(error, FaultError::Denied { page: at, .. } if at == page),
                    "{error:?}"
                );
            }
            assert_eq!(mapping.peek(0), 5);
        });
    });
}

#[test]
fn what_stands_before_the_batch_of_an_error_is_entered() {
    in_own_process(|| {
        silently(|process, gpu| {
            let batch = Order::HUGE.pages();
            let mapping = Mapping::anonymous(2 * batch + 10);
            let hole = mapping.part(2 * batch + 5, 1);
            unmap(hole);
            let mirror = gpu.mirror(process, mapping.range());
            let error = fault(&mirror, mapping.range(), Access::Read).expect_err("there is a hole");
            assert_eq!(error, FaultError::Hole { page: hole.first() });
            let entered = mirror.inspect(|table| table.entries.keys().copied().collect::<Vec<_>>());
            let entered = entered.expect("the process lives");
            let expected: Vec<_> = mapping.part(0, 2 * batch).iter().collect();
            assert!(entered == expected, "{} pages were entered", entered.len());
        });
    });
}

#[test]
fn looking_faults_nothing() {
    in_own_process(|| {
        silently(|process, _| {
            let mapping = Mapping::anonymous(6);
            mapping.poke(1, 1);
            let _ = mapping.peek(2);
            protect(mapping.part(3, 1), R).expect("it is mapped");
            protect(mapping.part(4, 1), NONE).expect("it is mapped");
            unmap(mapping.part(5, 1));
            let entries = process.snapshot(mapping.range());
            let system = |index| Residency::System(Frame(mapping.page(index).number()));
            let seen: Vec<_> =
                entries.iter().map(|entry| (entry.residency, entry.allowed)).collect();
            let expected = [
                (Residency::Empty, Access::Write),
                (system(1), Access::Write),
                (system(2), Access::Write),
                (Residency::Empty, Access::Read),
                (Residency::Empty, Access::None),
                (Residency::Hole, Access::None),
            ];
            assert_eq!(seen, expected);
            assert_eq!(entries[1].access, Access::Write);
            // The page of zeroes that all share is for loads alone.
            assert_eq!(entries[2].access, Access::Read);
            assert_eq!(process.snapshot(mapping.page(0).into())[0].residency, Residency::Empty);
        });
    });
}

#[test]
fn the_whole_territory_can_be_looked_at() {
    in_own_process(|| {
        silently(|process, gpu| {
            // Far apart, so that looking takes long if it is page by page.
            let mapping = Mapping::anonymous(2);
            mapping.poke(1, 1);
            let gib = 1 << 30;
            let start = mapping.range().address();
            assert!(TERRITORY.contains(&(start + gib)));
            let range = PageRange::new(start, gib).expect("a range");
            let entries = process.snapshot(range);
            let mapped = entries.iter().filter(|entry| entry.residency != Residency::Hole).count();
            assert_eq!(mapped, 2);
            drop(gpu.mirror(process, range));
        });
    });
}

/// To hold a page is to move it: what the same device has translated leads to where it was.
#[test]
fn a_device_that_takes_a_page_exclusively_forgets_where_it_was() {
    in_own_process(|| {
        let process = attach();
        let gpu = SoftGpu::new(SoftGpuOptions::new());
        let mapping = Mapping::anonymous(4);
        mapping.poke(1, 7);
        let mirror = gpu.mirror(&process, mapping.range()).expect("the process is alive");
        mirror.range_fault(&RangeFault::write(mapping.range())).expect("it is mapped");
        let held = mirror.exclusive(mapping.page(1).into()).expect("it is the program's own");
        assert_eq!(gpu.check([&*mirror]), Ok(()));
        drop(held);
        assert_eq!(gpu.check([&*mirror]), Ok(()));
        assert_eq!(mapping.peek(1), 7);
    });
}
