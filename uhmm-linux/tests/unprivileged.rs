//! What an ordinary user gets, and what is refused, with the reason.

mod common;
mod kernel;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use common::memory::{Backing, Mapping, RW, memory_file, unmap};
use common::rig::{
    Gpu, attach, attach_with, device_add, device_load, device_store, is_home, is_out,
};
use common::trap::{self, Trap};
use common::{Faults, OwnProcess, eventually, exit_now, fork, is_own_process};
use kernel::filter::{Threads, Verdict, forbid};
use rustix::io::Errno;
use uhmm::policy::Policies;
use uhmm::{
    Clock, DevicePagemap, FaultError, PAGE_SIZE, PagemapOptions, RangeFault, Residency, StayReason,
};
use uhmm_linux::probe::{Feature, Status};
use uhmm_linux::{AttachError, NoMigration, Options, Process};

/// Somebody who has nothing and may nothing.
const NOBODY: u32 = 65534;

/// `vm.unprivileged_userfaultfd`, which all processes of the machine share. Where a test needs a
/// certain value, it is set by the process that judges the test, so that it is restored whatever
/// becomes of the one that is judged.
struct Setting {
    before: String,
    /// Locked: one test at a time needs a value.
    _lock: File,
}

impl Setting {
    const FILE: &str = "/proc/sys/vm/unprivileged_userfaultfd";

    /// Sets it, in the process that judges. `None` in the one that is judged, and where it cannot
    /// be set, which [`is`](Setting::is) tells.
    fn set(value: &str) -> Option<Setting> {
        if is_own_process() {
            return None;
        }
        let path = std::env::temp_dir().join("uhmm-test-unprivileged-userfaultfd.lock");
        let lock = File::create(path).expect("the folder for temporary files can be written to");
        // SAFETY: takes a descriptor, and accesses no memory.
        let locked = unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) };
        assert_eq!(locked, 0, "flock: {}", std::io::Error::last_os_error());
        let before = std::fs::read_to_string(Setting::FILE).ok()?;
        std::fs::write(Setting::FILE, value).ok()?;
        Some(Setting { before, _lock: lock })
    }

    /// Tells whether it has this value.
    fn is(value: &str) -> bool {
        std::fs::read_to_string(Setting::FILE).is_ok_and(|now| now.trim() == value)
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        std::fs::write(Setting::FILE, &self.before).expect("it could be written to before");
    }
}

/// Runs the body, a closure of the test itself, as nobody, where the setting is `value`.
#[track_caller]
fn as_nobody<F: FnOnce()>(value: &str, body: F) {
    // SAFETY: asks who this is.
    let is_root = unsafe { libc::geteuid() } == 0;
    let setting = Setting::set(value);
    if is_own_process() {
        assert!(is_root && Setting::is(value), "it was so in the process that judges this one");
        become_nobody();
    } else if !is_root || setting.is_none() {
        return common::loudly("only root can become nobody: nothing was tested");
    }
    OwnProcess::new().needs(Faults::UserModeOnly).run(body);
}

fn become_nobody() {
    let no_groups = std::ptr::null();
    // SAFETY: takes an array of no groups.
    let outcome = unsafe { libc::setgroups(0, no_groups) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: changes who this process is, and no memory.
    let outcome = unsafe { libc::setresgid(NOBODY, NOBODY, NOBODY) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: as above.
    let outcome = unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    // As a program is that was started by nobody.
    // SAFETY: takes numbers, and accesses no memory.
    let outcome = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}

fn host(process: &Process) -> Arc<DevicePagemap> {
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    DevicePagemap::register_with(process.host_memory(64), options)
}

fn refused(errno: Errno) -> Status {
    Status::NotPermitted { errno }
}

#[test]
fn nobody_is_told_what_there_is_not_and_why() {
    as_nobody("0", || {
        let probe = uhmm_linux::probe();
        println!("{probe}");
        // Only the full one goes by a permission that somebody without rights does not have.
        assert_eq!(probe.status(Feature::Userfaultfd), refused(Errno::PERM));
        assert_eq!(probe.status(Feature::EventFork), refused(Errno::PERM));
        for feature in [
            Feature::UserModeFaults,
            Feature::EventRemap,
            Feature::EventRemove,
            Feature::EventUnmap,
            Feature::PagemapScan,
            Feature::ProcessVm,
            Feature::Populate,
        ] {
            assert!(probe.has(feature), "{feature}: {}", probe.status(feature));
        }
        assert_eq!(probe.migration(), Err(NoMigration::UserModeOnly));
        let remarks = probe.remarks();
        let remedy = remarks.iter().find(|remark| remark.subject.contains("of all faults"));
        let remedy = &remedy.expect("it is missing").remedy;
        assert!(remedy.contains("sysctl vm.unprivileged_userfaultfd=1"), "{remedy}");
        assert!(probe.to_string().contains("vm.unprivileged_userfaultfd"));
    });
}

#[test]
fn nobody_has_mirrors_faults_and_snapshots() {
    as_nobody("0", || {
        let before = common::leaks::holdings();
        let process = attach();
        let gpu = Gpu::new(16);
        let mapping = Mapping::anonymous(8);
        let mirror = gpu.mirror(&process, mapping.range());
        assert_eq!(process.snapshot(mapping.page(0).into())[0].residency, Residency::Empty);
        for (index, page) in (0..).zip(mapping.range().iter()) {
            assert_eq!(device_store(&mirror, page, 100 + index), Ok(()));
            assert_eq!(mapping.peek(index), 100 + index);
            mapping.poke(index, 200 + index);
            assert_eq!(device_load(&mirror, page), Ok(200 + index));
        }
        assert!(mapping.range().iter().all(|page| is_home(&process, page)));
        // Memory of files is told of as well.
        let file = memory_file(2);
        let shared = Mapping::new(2, Backing::File(file.as_fd(), 0), RW);
        let of_file = gpu.mirror(&process, shared.range());
        assert_eq!(device_store(&of_file, shared.page(1), 5), Ok(()));
        assert_eq!(shared.peek(1), 5);

        // What is unmapped is seen.
        unmap(mapping.part(4, 4));
        let there =
            |index: u64| mirror.inspect(|table| table.entries.contains_key(&mapping.page(index)));
        assert!(eventually(|| there(5) == Ok(false)), "the device has heard of it");
        assert_eq!(device_load(&mirror, mapping.page(0)), Ok(200));
        let gone = mirror.range_fault(&RangeFault::read(mapping.page(5).into())).map(drop);
        assert_eq!(gone, Err(FaultError::Hole { page: mapping.page(5) }));
        drop((mirror, of_file, process, gpu, file));
        // A thread that has been waited for is there for a moment longer.
        let left = || common::leaks::holdings().difference(&before);
        assert!(eventually(|| left().is_empty()), "{}", left());
    });
}

#[test]
fn nobody_is_refused_what_would_make_system_calls_fail() {
    as_nobody("0", || {
        let (process, gpu) = (attach(), Gpu::new(16));
        assert_eq!(process.migration(), Err(NoMigration::UserModeOnly));
        assert_eq!(process.probe().migration(), Err(NoMigration::UserModeOnly));
        let why = NoMigration::UserModeOnly.to_string();
        assert!(why.contains("vm.unprivileged_userfaultfd=1"), "{why}");
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| 1 + index);
        for memory in [&host(&process), &gpu.pagemap] {
            let report = process.migrate(mapping.range(), memory).run();
            assert_eq!(report.moved, 0, "{report:?}");
            for page in mapping.range().iter() {
                assert_eq!(report.reason(page), Some(StayReason::Unsupported), "{report:?}");
            }
        }
        let mirror = gpu.mirror(&process, mapping.range());
        let expected =
            FaultError::NotExclusive { page: mapping.page(3), reason: StayReason::Unsupported };
        assert_eq!(device_add(&mirror, mapping.page(3), 1), Err(expected));
        assert_eq!(mirror.exclusive(mapping.page(3).into()).map(drop), Err(expected));
        // A system call on what the device uses is what it always was.
        assert_eq!(device_load(&mirror, mapping.page(2)), Ok(3));
        assert_eq!(read_into(mapping.word(2), 77), Ok(()));
        assert_eq!(device_load(&mirror, mapping.page(2)), Ok(77));
    });
}

/// Reads a word from a file into memory, by a system call.
fn read_into(address: u64, word: u64) -> Result<(), Errno> {
    let file = memory_file(1);
    rustix::io::pwrite(&file, &word.to_ne_bytes(), 0)?;
    let to = std::ptr::without_provenance_mut(address as usize);
    // SAFETY: within memory of the test, where no Rust object is; or the kernel says that it
    // cannot.
    match unsafe { libc::pread(file.as_raw_fd(), to, 8, 0) } {
        8 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).expect("it has failed")),
    }
}

#[test]
fn without_the_event_of_forks_nothing_moves_unless_the_program_promises() {
    as_nobody("1", || {
        let probe = uhmm_linux::probe();
        assert_eq!(probe.status(Feature::Userfaultfd), Status::Found);
        assert_eq!(probe.status(Feature::EventFork), refused(Errno::PERM));
        assert_eq!(probe.migration(), Err(NoMigration::ForksUnseen));
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| 1 + index);
        {
            let process = attach();
            assert_eq!(process.migration(), Err(NoMigration::ForksUnseen));
            let report = process.migrate(mapping.range(), &host(&process)).run();
            assert_eq!(report.reason(mapping.page(0)), Some(StayReason::Unsupported));
        }
        let process = attach_with(Options::new().only_hooked_forks(true));
        assert_eq!(process.migration(), Ok(()));
        let gpu = Gpu::new(16);
        for memory in [&host(&process), &gpu.pagemap] {
            let report = process.migrate(mapping.range(), memory).run();
            assert_eq!(report.moved, 8, "{report:?}");
            assert!(is_out(&process, mapping.page(2)));
            // Whoever touches it waits, in system calls too.
            assert_eq!(read_into(mapping.word(2), 3), Ok(()));
            (0..8).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
        }
    });
}

/// Runs `body` in a child, and returns what it ended with.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    let Some(pid) = fork() else {
        common::alarm(Duration::from_secs(20));
        exit_now(body())
    };
    let mut status = 0;
    // SAFETY: `status` is room for the status of the child, which is reaped once.
    let reaped = unsafe { libc::waitpid(pid as i32, &mut status, 0) };
    assert_eq!(reaped, pid as i32);
    assert!(libc::WIFEXITED(status), "the child ended with status {status:#x}");
    libc::WEXITSTATUS(status)
}

#[test]
fn a_child_that_nobody_tells_of_has_everything_that_could_come_home() {
    as_nobody("1", || {
        let options = Options::new().only_hooked_forks(true);
        let process = attach_with(options.patience(Duration::from_millis(300)));
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(16);
        mapping.fill(|index| 1 + index);
        let send = || assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().moved, 16);
        send();
        let seen = in_child(|| {
            let whole = (0..16).all(|index| trap::load(mapping.word(index)) == Ok(1 + index));
            i32::from(!whole)
        });
        assert_eq!(seen, 0, "the child has what its parent had");
        // What the device does not give the child does not take for zeroes.
        send();
        gpu.injector.fail_always("copy");
        let seen = in_child(|| {
            let refused =
                (0..16).all(|index| trap::load(mapping.word(index)) == Err(Trap::Unmapped));
            i32::from(!refused)
        });
        assert_eq!(seen, 0, "the child has no such pages");
        gpu.injector.clear();
        (0..16).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
        // And that was for this child alone.
        send();
        let seen = in_child(|| {
            let whole = (0..16).all(|index| trap::load(mapping.word(index)) == Ok(1 + index));
            i32::from(!whole)
        });
        assert_eq!(seen, 0, "the next child has what its parent had");
    });
}

/// What the program itself keeps from its children stays so.
#[test]
fn what_children_do_not_inherit_they_never_inherit() {
    as_nobody("1", || {
        let options = Options::new().only_hooked_forks(true);
        let process = attach_with(options.patience(Duration::from_millis(300)));
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(16);
        mapping.fill(|index| 1 + index);
        let own = mapping.part(4, 8);
        common::memory::advise(own, libc::MADV_DONTFORK).expect("it is anonymous");
        assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().moved, 16);
        gpu.injector.fail_always("copy");
        assert_eq!(in_child(|| 0), 0);
        gpu.injector.clear();
        (0..16).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
        let seen = in_child(|| {
            let as_it_was = (0..16).all(|index| {
                let kept = (4..12).contains(&index);
                let expected = if kept { Err(Trap::Unmapped) } else { Ok(1 + index) };
                trap::load(mapping.word(index)) == expected
            });
            i32::from(!as_it_was)
        });
        assert_eq!(seen, 0);
    });
}

#[test]
fn where_there_is_no_userfaultfd_at_all_a_process_cannot_attach() {
    as_nobody("0", || {
        forbid(&[libc::SYS_userfaultfd], Verdict::Errno(Errno::PERM), Threads::This);
        let probe = uhmm_linux::probe();
        assert_eq!(probe.status(Feature::UserModeFaults), refused(Errno::PERM));
        assert_eq!(probe.seccomp_filters, 1);
        let error = Process::attach(Options::new()).expect_err("there is no userfaultfd");
        assert_eq!(error, AttachError::Userfaultfd { errno: Errno::PERM });
    });
}

/// An administrator can give somebody the device instead of the system call.
#[test]
fn where_the_system_call_is_forbidden_the_device_does() {
    OwnProcess::new().needs(Faults::All).run(|| {
        if File::open("/dev/userfaultfd").is_err() {
            return common::loudly("/dev/userfaultfd cannot be opened: nothing was tested");
        }
        forbid(&[libc::SYS_userfaultfd], Verdict::Errno(Errno::PERM), Threads::All);
        let process = attach();
        assert_eq!(process.migration(), Ok(()));
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| 1 + index);
        assert_eq!(process.migrate(mapping.range(), &host(&process)).run().moved, 8);
        (0..8).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
        assert_eq!(read_into(mapping.word(2), PAGE_SIZE as u64), Ok(()));
    });
}
