//! Programs that use userfaultfd, seccomp, mlockall or protection keys themselves: they go on to
//! work as they did, and what cannot be done beside them says so, or ends at once.

mod common;
mod kernel;

use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::memory::{Backing, Mapping, RW, disk_file, lock, memory_file};
use common::rig::{Gpu, attach, attach_with, device_load, device_store, is_home, is_out};
use common::{OwnProcess, ends_within, eventually, in_own_process, trap};
use kernel::faults::{FILLING, Handler};
use kernel::filter::{Threads, Verdict, forbid};
use kernel::ring::Ring;
use rustix::io::Errno;
use uhmm::policy::Policies;
use uhmm::{
    Access, Clock, DevicePagemap, FaultError, Injector, PAGE_SIZE, PagemapOptions, RangeFault,
    StayReason,
};
use uhmm_linux::{Options, Process};

fn host(process: &Process) -> Arc<DevicePagemap> {
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    DevicePagemap::register_with(process.host_memory(4096), options)
}

fn fill(mapping: &Mapping) {
    mapping.fill(|index| 1 + index);
}

#[track_caller]
fn assert_filled(mapping: &Mapping) {
    (0..mapping.range().pages()).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
}

// userfaultfd.

/// The page at `index`, as the program's own handler fills it in.
#[track_caller]
fn assert_filled_by_handler(mapping: &Mapping, index: u64) {
    assert_eq!(mapping.peek(index), mapping.word(index), "page {index}");
    assert_eq!(trap::load(mapping.word(index) + 8), Ok(FILLING), "page {index}");
}

#[test]
fn what_the_program_handles_itself_stays_and_it_goes_on_to_handle_it() {
    in_own_process(|| {
        let mapping = Mapping::anonymous(48);
        (0..16).chain(32..48).for_each(|index| mapping.poke(index, 1 + index));
        let own = mapping.part(16, 16);
        let handler = Handler::new();
        handler.register(own).expect("it is anonymous");
        assert_filled_by_handler(&mapping, 20);

        let process = attach();
        assert_eq!(process.probe().userfaultfds, 1);
        let memory = host(&process);
        for round in 0..4 {
            let report = process.migrate(mapping.range(), &memory).run();
            assert_eq!(report.moved, 32, "{report:?}");
            for page in own.iter() {
                assert_eq!(report.reason(page), Some(StayReason::Handled), "{report:?}");
            }
            // Some that were never touched, while the neighbours are away.
            assert_filled_by_handler(&mapping, 21 + round);
            assert_eq!(handler.answered(), 2 + round, "its own faults, and no others");
            (0..16).chain(32..48).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
        }
        // When it has no use for them any more they are memory like any other.
        drop(handler);
        assert!(eventually(|| process.migrate(mapping.range(), &memory).run().is_complete()));
        assert_filled_by_handler(&mapping, 20);
    });
}

#[test]
fn a_device_gets_an_error_where_the_program_handles_faults_itself() {
    in_own_process(|| {
        let mapping = Mapping::anonymous(8);
        let own = mapping.part(2, 4);
        // One that never answers: who waits for it waits for ever.
        let mut handler = Handler::deaf();
        handler.register(own).expect("it is anonymous");
        let (process, gpu) = (attach(), Gpu::new(16));
        let mirror = gpu.mirror(&process, mapping.range());
        for page in own.iter() {
            let requests = [
                (RangeFault::read(page.into()), Access::Read),
                (RangeFault::write(page.into()), Access::Write),
            ];
            for (request, wanted) in requests {
                let refused = mirror.range_fault(&request).map(drop);
                let allowed = Access::None;
                assert_eq!(refused, Err(FaultError::Denied { page, wanted, allowed }));
            }
            let held = mirror.exclusive(page.into()).map(drop);
            assert!(matches!(held, Err(FaultError::Denied { .. })), "{held:?}");
        }
        assert_eq!(handler.answered(), 0);
        assert_eq!(device_store(&mirror, mapping.page(0), 5), Ok(()));
        assert_eq!(device_load(&mirror, mapping.page(7)), Ok(0));
        // The same once the pages are there: nobody would tell when they go.
        handler.answer();
        assert_filled_by_handler(&mapping, 3);
        let refused = device_load(&mirror, mapping.page(3));
        assert!(matches!(refused, Err(FaultError::Denied { .. })), "{refused:?}");
    });
}

/// The kernel lets one userfaultfd have a range. Where devices use memory, or it has moved, the
/// program comes second; it can have the range when they have let go.
#[test]
fn the_program_is_told_where_a_device_came_first() {
    in_own_process(|| {
        let process = attach();
        let memory = host(&process);
        let mapping = Mapping::anonymous(8);
        fill(&mapping);
        assert_eq!(process.migrate(mapping.range(), &memory).run().moved, 8);
        let handler = Handler::new();
        assert_eq!(handler.register(mapping.range()), Err(Errno::BUSY));
        assert_filled(&mapping);
        // What is home is let go of before long.
        assert!(eventually(|| handler.register(mapping.range()).is_ok()));
        let report = process.migrate(mapping.range(), &memory).run();
        assert_eq!(report.reason(mapping.page(0)), Some(StayReason::Handled));
        assert_filled(&mapping);
    });
}

// mlockall.

/// Returns how much memory this process uses, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.expect("the kernel counts it") * 1024
}

fn lock_all(flags: i32) {
    // SAFETY: changes where memory is, and none of its contents.
    let result = unsafe { libc::mlockall(flags) };
    assert_eq!(result, 0, "mlockall: {}", std::io::Error::last_os_error());
}

fn unlock_all() {
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlockall() }, 0);
}

/// What a program that locks its memory pays for being attached, at most, in bytes: what is
/// reserved is not filled.
const BEARABLE: u64 = 256 << 20;

#[track_caller]
fn assert_all_locked(process: &Process, mapping: &Mapping, memory: &Arc<DevicePagemap>) {
    let report = process.migrate(mapping.range(), memory).run();
    assert_eq!(report.moved, 0, "{report:?}");
    for page in mapping.range().iter() {
        assert_eq!(report.reason(page), Some(StayReason::Locked), "{report:?}");
    }
}

#[test]
fn a_program_that_has_locked_all_its_memory_can_attach() {
    in_own_process(|| {
        lock_all(libc::MCL_CURRENT | libc::MCL_FUTURE);
        let before = resident();
        let process = attach();
        assert!(process.probe().locks_future_mappings);
        assert!(resident() < before + BEARABLE, "{} bytes from {before}", resident());
        let (memory, gpu) = (host(&process), Gpu::new(16));
        let mapping = Mapping::anonymous(16);
        fill(&mapping);
        assert_all_locked(&process, &mapping, &memory);
        assert_filled(&mapping);
        let mirror = gpu.mirror(&process, mapping.range());
        assert_eq!(device_store(&mirror, mapping.page(3), 9), Ok(()));
        assert_eq!(mapping.peek(3), 9);
        drop(mirror);
        unlock_all();
        assert_eq!(process.migrate(mapping.range(), &memory).run().moved, 16);
        assert_eq!((mapping.peek(3), mapping.peek(4)), (9, 5));
        assert!(resident() < before + BEARABLE, "{} bytes from {before}", resident());
    });
}

#[test]
fn a_program_can_lock_all_its_memory_while_pages_are_away() {
    in_own_process(|| {
        let process = attach();
        let (memory, gpu) = (host(&process), Gpu::new(1024));
        let mappings = [Mapping::anonymous(600), Mapping::anonymous(300)];
        mappings.iter().for_each(fill);
        assert_eq!(process.migrate(mappings[0].range(), &memory).run().moved, 600);
        assert_eq!(process.migrate(mappings[1].range(), &gpu.pagemap).run().moved, 300);
        let before = resident();
        lock_all(libc::MCL_CURRENT | libc::MCL_FUTURE);
        // A stack is filled to its end as well, so what is locked is not of our making alone.
        println!("{} bytes in use, from {before}", resident());
        assert!(resident() < before + BEARABLE, "{} bytes from {before}", resident());
        for mapping in &mappings {
            assert!(mapping.range().iter().all(|page| is_home(&process, page)), "it was filled");
            assert_filled(mapping);
            assert_all_locked(&process, mapping, &memory);
        }
        let later = Mapping::anonymous(16);
        fill(&later);
        assert_all_locked(&process, &later, &memory);
        unlock_all();
        for mapping in mappings.iter().chain([&later]) {
            let gone = eventually(|| process.migrate(mapping.range(), &memory).run().is_complete());
            assert!(gone, "{:?}", process.migrate(mapping.range(), &memory).run());
            assert!(is_out(&process, mapping.page(7)));
            assert_filled(mapping);
            assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().stayed, []);
            assert_filled(mapping);
        }
    });
}

/// `mlockall(MCL_CURRENT)` alone: what is mapped later is not locked, and can move.
#[test]
fn what_was_mapped_after_all_memory_was_locked_moves() {
    in_own_process(|| what_was_mapped_later_moves(attach()));
}

/// The same where the kernel has no memory that is never locked (before Linux 6.11).
#[test]
fn what_was_mapped_after_all_memory_was_locked_moves_on_older_kernels() {
    in_own_process(|| {
        let injector = Injector::new();
        injector.fail_always("nothing");
        let process = attach_with(Options::new().injector(injector.clone()));
        assert_eq!(injector.asked("nothing"), 1);
        what_was_mapped_later_moves(process);
    });
}

fn what_was_mapped_later_moves(process: Process) {
    let memory = host(&process);
    let mapping = Mapping::anonymous(64);
    fill(&mapping);
    assert_eq!(process.migrate(mapping.range(), &memory).run().moved, 64);
    lock_all(libc::MCL_CURRENT);
    assert_filled(&mapping);
    assert_all_locked(&process, &mapping, &memory);
    let later = Mapping::anonymous(64);
    fill(&later);
    let gone = eventually(|| process.migrate(later.range(), &memory).run().is_complete());
    assert!(gone, "{:?}", process.migrate(later.range(), &memory).run());
    assert_filled(&later);
    assert_all_locked(&process, &mapping, &memory);
    assert_filled(&mapping);
}

#[test]
fn a_part_that_is_locked_comes_home_and_the_rest_stays_away() {
    in_own_process(|| {
        let process = attach();
        let memory = host(&process);
        let mapping = Mapping::anonymous(64);
        fill(&mapping);
        assert_eq!(process.migrate(mapping.range(), &memory).run().moved, 64);
        lock(mapping.part(20, 10)).expect("root may");
        for (index, page) in (0..).zip(mapping.range().iter()) {
            assert_eq!(is_home(&process, page), (20..30).contains(&index), "page {index}");
        }
        assert_filled(&mapping);
    });
}

// io_uring.

/// What the kernel does on behalf of io_uring passes no seccomp filter and no library function, and
/// is told of all the same.
#[test]
fn what_io_uring_discards_does_not_come_back() {
    in_own_process(|| {
        let Some(mut ring) = Ring::new() else {
            return common::loudly("there is no io_uring here: nothing was tested");
        };
        let process = attach();
        let memory = host(&process);
        let mapping = Mapping::anonymous(32);
        fill(&mapping);
        assert_eq!(process.migrate(mapping.range(), &memory).run().moved, 32);
        assert_eq!(ring.madvise(mapping.part(8, 8), libc::MADV_DONTNEED), 0);
        for index in 0..32 {
            let expected = if (8..16).contains(&index) { 0 } else { 1 + index };
            assert_eq!(mapping.peek(index), expected, "page {index}");
        }
    });
}

/// A buffer that is registered while its pages are away is pinned where they came home to.
#[test]
fn what_io_uring_pins_comes_home_and_stays() {
    in_own_process(|| {
        let Some(mut ring) = Ring::new() else {
            return common::loudly("there is no io_uring here: nothing was tested");
        };
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(32);
        fill(&mapping);
        assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().moved, 32);
        ring.register(mapping.range()).expect("it can be pinned");
        let report = process.migrate(mapping.range(), &gpu.pagemap).run();
        for page in mapping.range().iter() {
            assert_eq!(report.reason(page), Some(StayReason::Pinned), "{report:?}");
        }
        for (index, file) in [(3_u64, memory_file(1)), (9, disk_file(1))] {
            rustix::io::pwrite(&file, &(70 + index).to_ne_bytes(), 0).expect("it is a file");
            assert_eq!(ring.read_fixed(&file, mapping.word(index), 8), 8);
            assert_eq!(mapping.peek(index), 70 + index);
        }
        // A device uses it where it is.
        let mirror = gpu.mirror(&process, mapping.range());
        assert_eq!(device_store(&mirror, mapping.page(5), 55), Ok(()));
        let file = memory_file(1);
        assert_eq!(ring.write(&file, mapping.word(5), 8), 8);
        let mut word = [0; 8];
        assert_eq!(rustix::io::pread(&file, &mut word, 0), Ok(8));
        assert_eq!(u64::from_ne_bytes(word), 55);
    });
}

// Protection keys.

#[test]
fn what_has_a_protection_key_stays() {
    in_own_process(|| {
        // SAFETY: takes numbers, and accesses no memory.
        let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) };
        if key < 0 {
            return common::loudly("the processor has no protection keys: nothing was tested");
        }
        let process = attach();
        let memory = host(&process);
        let mapping = Mapping::anonymous(16);
        fill(&mapping);
        assert_eq!(process.migrate(mapping.range(), &memory).run().moved, 16);
        let own = mapping.part(4, 4);
        let (at, bytes) = (own.address(), own.len() * PAGE_SIZE);
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: within a mapping of the test.
        let result = unsafe { libc::syscall(libc::SYS_pkey_mprotect, at, bytes, rights, key) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        assert_filled(&mapping);
        let report = process.migrate(mapping.range(), &memory).run();
        assert_eq!(report.moved, 12, "{report:?}");
        for page in own.iter() {
            assert_eq!(report.reason(page), Some(StayReason::Unsupported), "{report:?}");
        }
        assert_filled(&mapping);
    });
}

// seccomp.

/// What a victim is to forbid, by names that fit into an environment.
const CALLS: &[(&str, &[i64])] = &[
    ("ioctl", &[libc::SYS_ioctl]),
    ("read", &[libc::SYS_read]),
    ("poll", &[libc::SYS_ppoll, libc::SYS_poll]),
    ("madvise", &[libc::SYS_madvise]),
    ("process_vm", &[libc::SYS_process_vm_readv, libc::SYS_process_vm_writev]),
    ("mmap", &[libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect]),
    ("futex", &[libc::SYS_futex]),
    ("write", &[libc::SYS_write]),
];

const VERDICTS: &[(&str, Verdict)] = &[
    ("EPERM", Verdict::Errno(Errno::PERM)),
    ("ENOSYS", Verdict::Errno(Errno::NOSYS)),
    ("process", Verdict::KillProcess),
];

const CALL: &str = "UHMM_TEST_CALL";
const VERDICT: &str = "UHMM_TEST_VERDICT";

/// Closes every descriptor but the first three, as daemons do.
const CLOSE_ALL: &str = "close_range";

/// How a victim ends that has read something else than what was there.
const WRONG: i32 = 3;

/// Does something to itself while pages are away, and touches them.
#[test]
#[ignore = "the test of filters starts it"]
fn victim() {
    let Ok(call) = std::env::var(CALL) else { return };
    common::die_with_parent(Duration::from_secs(60));
    let process = attach_with(Options::new().patience(Duration::from_millis(500)));
    let gpu = Gpu::new(64);
    let mappings = [Mapping::anonymous(32), Mapping::anonymous(32)];
    mappings.iter().for_each(fill);
    assert_eq!(process.migrate(mappings[0].range(), &host(&process)).run().moved, 32);
    assert_eq!(process.migrate(mappings[1].range(), &gpu.pagemap).run().moved, 32);
    if call == CLOSE_ALL {
        // SAFETY: descriptors that are used after this are found closed, which is what is tested.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
        assert_eq!(closed, 0, "{}", std::io::Error::last_os_error());
    } else {
        let calls = CALLS.iter().find(|(name, _)| *name == call).expect("a call").1;
        let verdict = std::env::var(VERDICT).expect("one for each call");
        let verdict = VERDICTS.iter().find(|(name, _)| *name == verdict).expect("a verdict").1;
        forbid(calls, verdict, Threads::All);
    }
    for mapping in &mappings {
        for index in 0..32 {
            // An access that is refused is a signal, which is no wrong answer.
            if trap::load(mapping.word(index)).is_ok_and(|word| word != 1 + index) {
                common::exit_now(WRONG);
            }
        }
    }
    common::exit_now(0);
}

/// Starts a victim, and sees that it ends by itself and reads nothing that is wrong.
#[track_caller]
fn assert_clear_end(call: &str, verdict: &str) {
    let mut victim = Command::new(std::env::current_exe().expect("a program has a file"))
        .args(["victim", "--exact", "--include-ignored", "--nocapture"])
        .env(CALL, call)
        .env(VERDICT, verdict)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the program can be started again");
    let ended = ends_within(victim.id(), Duration::from_secs(30));
    if !ended {
        println!("{}", common::stacks::of_process(victim.id()));
        victim.kill().expect("it is ours");
    }
    let status = victim.wait().expect("it is ours");
    println!("{call}, {verdict}: {status}, by itself: {ended}");
    assert!(ended, "{call} ({verdict}): it waited for ever");
    assert_ne!(status.code(), Some(WRONG), "{call} ({verdict}): it read wrong words");
}

/// A filter that takes away what serves faults is no reason to read zeroes, nor to wait for ever:
/// the process is served, or refused by a signal, or it ends.
#[test]
fn a_filter_that_the_program_installs_is_a_clear_end_or_none() {
    OwnProcess::new().deadline(Duration::from_secs(300)).run(|| {
        for (call, _) in CALLS {
            VERDICTS.iter().for_each(|(verdict, _)| assert_clear_end(call, verdict));
        }
    });
}

/// A userfaultfd that is closed lets everybody who waits read zeroes. So nobody can close the last
/// descriptor of it.
#[test]
fn a_program_that_closes_descriptors_that_are_not_its_own_reads_no_zeroes() {
    in_own_process(|| (0..20).for_each(|_| assert_clear_end(CLOSE_ALL, "")));
}

/// What is shared with other processes is seen by nobody here, which `docs/limitations.md` says;
/// but it is the same memory.
#[test]
fn a_file_that_another_process_writes_to_is_what_a_device_reads() {
    in_own_process(|| {
        let file = memory_file(2);
        let other = kernel::other::Other::new();
        let process = attach();
        let gpu = Gpu::new(16);
        let mapping = Mapping::new(2, Backing::File(file.as_fd(), 0), RW);
        let mirror = gpu.mirror(&process, mapping.range());
        assert_eq!(device_load(&mirror, mapping.page(1)), Ok(0));
        other.write(kernel::other::By::ProcessVm, mapping.word(1), 5).expect("it may");
        assert_eq!(device_load(&mirror, mapping.page(1)), Ok(5));
    });
}
