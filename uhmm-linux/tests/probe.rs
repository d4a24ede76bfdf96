//! What is found out about the kernel and this process.

mod common;
mod kernel;

use std::os::fd::AsRawFd as _;
use std::time::Instant;

use common::leaks::holdings;
use common::memory::lines;
use common::rig::attach;
use common::{Faults, OwnProcess, in_own_process};
use kernel::filter::{Threads, Verdict, forbid};
use rustix::io::Errno;
use uhmm_linux::probe::{Feature, HugePages, Overcommit, Status};
use uhmm_linux::{NoMigration, probe};

/// Tests that need no userfaultfd of any kind.
fn anywhere(body: impl FnOnce()) {
    OwnProcess::new().needs(Faults::None).run(body);
}

#[test]
fn it_changes_nothing() {
    anywhere(|| {
        let first = probe();
        let (before, mappings) = (holdings(), lines());
        let second = probe();
        assert_eq!(first, second);
        assert_eq!(holdings().difference(&before), "");
        // But for what allocators do.
        let foreign = |line: &&common::memory::Line| !line.name.is_empty();
        let named = |lines: &[common::memory::Line]| lines.iter().filter(foreign).count();
        assert_eq!(named(&lines()), named(&mappings));
    });
}

#[test]
fn it_is_quick() {
    anywhere(|| {
        let mut times: Vec<_> = (0..50)
            .map(|_| {
                let began = Instant::now();
                let _ = probe();
                began.elapsed()
            })
            .collect();
        times.sort();
        println!("{:?} in half of the cases, {:?} at most", times[25], times[49]);
        assert!(times[25].as_millis() < 20, "{:?}", times[25]);
    });
}

#[test]
fn each_feature_is_there_once_and_what_is_missing_is_remarked_on() {
    anywhere(|| {
        let probe = probe();
        println!("{probe}");
        for (index, finding) in probe.findings.iter().enumerate() {
            let others = probe.findings[index + 1..].iter();
            let again = { others }.find(|other| other.feature == finding.feature);
            assert_eq!(again, None, "{}", finding.feature);
            assert_eq!(probe.status(finding.feature), finding.status);
            assert_eq!(finding.remedy().is_empty(), finding.status == Status::Found);
        }
        let text = probe.to_string();
        let missing = probe.findings.iter().filter(|finding| finding.status != Status::Found);
        for finding in missing.filter(|finding| finding.feature != Feature::UserModeFaults) {
            let name = finding.feature.to_string();
            let remark = probe.remarks().into_iter().find(|remark| remark.subject == name);
            let remark = remark.unwrap_or_else(|| panic!("no remark on {name}"));
            assert!(!remark.costs.is_empty() && !remark.remedy.is_empty(), "{remark:?}");
            assert!(text.contains(&remark.remedy), "{text}");
        }
    });
}

#[test]
fn it_agrees_with_what_the_machine_says() {
    anywhere(|| {
        let probe = probe();
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(probe.kernel, read("/proc/sys/kernel/osrelease").trim());
        let count = read("/proc/sys/vm/max_map_count").trim().parse().ok();
        assert_eq!(probe.max_map_count, count);
        let huge_pages = match &read("/sys/kernel/mm/transparent_hugepage/enabled") {
            text if text.contains("[always]") => HugePages::Always,
            text if text.contains("[madvise]") => HugePages::Madvise,
            text if text.contains("[never]") => HugePages::Never,
            _ => HugePages::Unknown,
        };
        assert_eq!(probe.huge_pages, huge_pages);
        let overcommit = match read("/proc/sys/vm/overcommit_memory").trim() {
            "0" => Overcommit::Heuristic,
            "1" => Overcommit::Always,
            "2" => Overcommit::Never,
            _ => Overcommit::Unknown,
        };
        assert_eq!(probe.overcommit, overcommit);
        for (resource, bytes) in [(libc::RLIMIT_AS, 1 << 40), (libc::RLIMIT_MEMLOCK, 1 << 16)] {
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            // SAFETY: takes a limit, and accesses no other memory.
            assert_eq!(unsafe { libc::setrlimit(resource, &limit) }, 0);
        }
        let probe = uhmm_linux::probe();
        assert_eq!(probe.address_space_limit, Some(1 << 40));
        assert_eq!(probe.locked_memory_limit, Some(1 << 16));
        assert!(probe.remarks().iter().any(|remark| remark.subject == "RLIMIT_AS"));
    });
}

#[test]
fn what_the_program_does_itself_is_found() {
    in_own_process(|| {
        let probe = probe();
        assert_eq!((probe.userfaultfds, probe.seccomp_filters), (0, 0));
        assert!(!probe.locks_future_mappings);
        let own = kernel::faults::open();
        assert_eq!(uhmm_linux::probe().userfaultfds, 1);
        forbid(&[libc::SYS_swapon], Verdict::Errno(Errno::PERM), Threads::This);
        assert_eq!(uhmm_linux::probe().seccomp_filters, 1);
        // SAFETY: changes where memory is, and none of its contents.
        assert_eq!(unsafe { libc::mlockall(libc::MCL_FUTURE) }, 0);
        let probe = uhmm_linux::probe();
        assert!(probe.locks_future_mappings);
        let subjects: Vec<_> = probe.remarks().into_iter().map(|remark| remark.subject).collect();
        for subject in ["mlockall(MCL_FUTURE)", "seccomp filters", "another userfaultfd"] {
            assert!(subjects.iter().any(|found| found == subject), "{subject}: {subjects:?}");
        }
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlockall() }, 0);
        assert!(own.as_raw_fd() >= 0);
    });
}

#[test]
fn an_attached_process_keeps_what_it_found() {
    in_own_process(|| {
        let found = probe();
        let process = attach();
        assert_eq!(process.probe(), &found);
        assert_eq!(process.migration(), found.migration());
        assert_eq!(process.migration(), Ok(()), "the tests of migration run here");
        assert_eq!(probe().userfaultfds, open());
        assert!(open() > 0);
    });
}

/// Returns how many userfaultfds are open, as `/proc` tells it.
fn open() -> usize {
    let fds = holdings().descriptors;
    fds.iter().filter(|name| name.contains("[userfaultfd]")).count()
}

#[test]
fn the_reasons_name_what_would_have_to_be_different() {
    let reasons = [
        (NoMigration::UserModeOnly, "vm.unprivileged_userfaultfd"),
        (NoMigration::ForksUnseen, "Options::only_hooked_forks"),
        (NoMigration::NoEvents, "Linux 4.11"),
        (NoMigration::NoMove, "Linux 6.8"),
    ];
    for (reason, remedy) in reasons {
        assert!(reason.to_string().contains(remedy), "{reason}");
    }
}
