//! What there is of the kernel's features, what each that is missing costs, and how to have it.
//!
//! [`probe`] finds out, and changes nothing; a process that attaches does so as well, and keeps the
//! answer ([`Process::probe`](crate::Process::probe)). Each feature is tried as it is used, since
//! neither the version of a kernel nor the capabilities of a process tell what a container lets
//! through.
//!
//! ```
//! let probe = uhmm_linux::probe();
//! println!("{probe}");
//! for remark in probe.remarks() {
//!     println!("{}: {}", remark.subject, remark.remedy);
//! }
//! ```

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::sys::maps::Maps;
use crate::sys::pagemap::{Categories, Pagemap};
use crate::sys::pidfd::Pidfd;
use crate::sys::process_vm;

mod words;
use crate::sys::userfaultfd::{Faults, Features, Userfaultfd};

/// Something of the kernel's that this crate uses, where it is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// userfaultfd(2) that is told of all faults, those of system calls too (Linux 4.11).
    Userfaultfd,
    /// userfaultfd(2) that is told of faults outside the kernel, which any user may have (5.11).
    UserModeFaults,
    /// The event of a fork (4.11).
    EventFork,
    /// The event of mremap(2) (4.11).
    EventRemap,
    /// The event of madvise(2) that drops memory (4.11).
    EventRemove,
    /// The event of munmap(2) and of what maps over something (4.11).
    EventUnmap,
    /// Faults that say which thread waits (4.14).
    ThreadId,
    /// Pages that fail when they are touched (6.6).
    Poison,
    /// Files that can be registered for events (6.7).
    WpAsync,
    /// Pages that leave the page table without being copied (6.8).
    Move,
    /// The scan of page tables (6.7).
    PagemapScan,
    /// A scan that tells guard pages apart (6.15).
    PagemapGuards,
    /// Mappings one at a time (6.11).
    ProcmapQuery,
    /// process_vm_readv(2) and process_vm_writev(2) on oneself (3.2).
    ProcessVm,
    /// `MADV_POPULATE_READ` and `MADV_POPULATE_WRITE` (5.14).
    Populate,
    /// Threads whose end can be waited for (6.9).
    ThreadPidfd,
    /// System calls that are shown to a supervisor (5.0).
    SeccompNotify,
    /// The same without being disturbed by signals (5.19).
    SeccompWaitKillable,
}

/// Whether a feature is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Status {
    /// It is.
    Found,
    /// The kernel does not have it: it is too old, or was built without.
    Missing,
    /// The kernel does not give it to this process.
    NotPermitted {
        /// What it says.
        errno: Errno,
    },
}

/// A feature, and whether it is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// Which.
    pub feature: Feature,
    /// Whether.
    pub status: Status,
}

/// Where the kernel makes huge pages of private memory by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HugePages {
    /// Wherever they fit.
    Always,
    /// Where the program asks for them (`MADV_HUGEPAGE`).
    Madvise,
    /// Nowhere.
    Never,
    /// It cannot be found out, or the kernel has none.
    Unknown,
}

/// How the kernel accounts for memory that is mapped and not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Overcommit {
    /// It refuses what is obviously too much (`vm.overcommit_memory=0`).
    Heuristic,
    /// It refuses nothing (1).
    Always,
    /// It promises no more than there is (2).
    Never,
    /// It cannot be found out.
    Unknown,
}

/// Something that could be better, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Remark {
    /// What it is about.
    pub subject: String,
    /// What it costs.
    pub costs: String,
    /// What to do about it: a command, a setting or a switch of this crate.
    pub remedy: String,
}

/// Why pages of a process cannot move to devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum NoMigration {
    /// Only the faults outside the kernel are told of.
    #[error(
        "a system call on a page that is away would fail (EFAULT), since this user is told of \
         faults outside the kernel alone: `sysctl vm.unprivileged_userfaultfd=1`, \
         CAP_SYS_PTRACE, or access to /dev/userfaultfd"
    )]
    UserModeOnly,
    /// Forks are not told of.
    #[error(
        "a child that is made by a raw `clone` while pages are away would find zeroes, since this \
         user is not told of forks: CAP_SYS_PTRACE, or `Options::only_hooked_forks(true)` where \
         there are no such children"
    )]
    ForksUnseen,
    /// Changes of mappings are not told of.
    #[error("the kernel does not tell of changes of mappings: Linux 4.11 or later")]
    NoEvents,
    /// Pages cannot be taken out of the page table without a moment in which they are gone.
    #[error("the kernel cannot take pages out of a page table (UFFDIO_MOVE): Linux 6.8 or later")]
    NoMove,
}

/// What was found. See the [module](self).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Probe {
    /// The version of the kernel, as it calls it.
    pub kernel: String,
    /// Each feature, and whether it is to be had.
    pub findings: Vec<Finding>,
    /// Where the kernel makes huge pages by itself.
    pub huge_pages: HugePages,
    /// How many mappings a process may have (`vm.max_map_count`), if it can be found out.
    pub max_map_count: Option<u64>,
    /// How many bytes may be locked in memory (`RLIMIT_MEMLOCK`); `None` if there is no limit.
    pub locked_memory_limit: Option<u64>,
    /// How many bytes of address space there may be (`RLIMIT_AS`); `None` if there is no limit.
    pub address_space_limit: Option<u64>,
    /// How memory that is not used is accounted for.
    pub overcommit: Overcommit,
    /// How many seccomp filters each system call of the calling thread passes, where the kernel
    /// counts them (5.9); else 1 if there are any.
    pub seccomp_filters: u64,
    /// How many userfaultfds are open in this process, that of an attached
    /// [`Process`](crate::Process) among them.
    pub userfaultfds: usize,
    /// Whether what is mapped from now on is locked in memory (`mlockall(MCL_FUTURE)`).
    pub locks_future_mappings: bool,
    /// What the userfaultfd of the more telling sort can do.
    pub(crate) offered: Features,
}

/// What can be done with what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Whose faults a userfaultfd is told of.
    pub(crate) faults: Faults,
    /// What it is asked for.
    pub(crate) features: Features,
    /// Whether pages can move.
    pub(crate) migration: Result<(), NoMigration>,
}

/// Finds out what there is, and changes nothing: it opens descriptors and closes them, reads files
/// of `/proc` and `/sys`, and maps a page that it unmaps. It takes well under a millisecond.
pub fn probe() -> Probe {
    let everybody = Userfaultfd::offered(Faults::All);
    let user_mode = Userfaultfd::offered(Faults::UserModeOnly);
    let (faults, offered) = match (everybody, user_mode) {
        (Ok(offered), _) => (Faults::All, offered),
        (Err(_), user_mode) => (Faults::UserModeOnly, user_mode.unwrap_or(Features::empty())),
    };
    let mut findings = vec![
        Finding::of(Feature::Userfaultfd, everybody),
        Finding::of(Feature::UserModeFaults, user_mode),
        Finding::of(Feature::EventFork, forks_told_of(faults, offered)),
    ];
    findings.extend(BITS.iter().map(|&(feature, bit)| {
        let found = if offered.contains(bit) { Ok(()) } else { Err(Errno::NOSYS) };
        Finding::of(feature, found)
    }));
    findings.extend(other_findings());
    // The threads that serve are made by the one that attaches, and get its filters.
    let status = read("/proc/thread-self/status");
    Probe {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        findings,
        huge_pages: huge_pages(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
        max_map_count: read("/proc/sys/vm/max_map_count").trim().parse().ok(),
        locked_memory_limit: getrlimit(Resource::Memlock).current,
        address_space_limit: getrlimit(Resource::As).current,
        overcommit: overcommit(&read("/proc/sys/vm/overcommit_memory")),
        seccomp_filters: seccomp_filters(&status),
        userfaultfds: userfaultfds(),
        locks_future_mappings: crate::sys::probe::locks_future_mappings(),
        offered,
    }
}

/// The features that are bits of a userfaultfd, and need nothing else.
const BITS: [(Feature, Features); 7] = [
    (Feature::EventRemap, Features::EVENT_REMAP),
    (Feature::EventRemove, Features::EVENT_REMOVE),
    (Feature::EventUnmap, Features::EVENT_UNMAP),
    (Feature::ThreadId, Features::THREAD_ID),
    (Feature::Poison, Features::POISON),
    (Feature::WpAsync, Features::WP_ASYNC),
    (Feature::Move, Features::MOVE),
];

/// Finds out whether a userfaultfd may be told of forks, which takes a privilege.
fn forks_told_of(faults: Faults, offered: Features) -> Result<(), Errno> {
    if !offered.contains(Features::EVENT_FORK) {
        return Err(Errno::NOSYS);
    }
    Userfaultfd::open(faults, Features::EVENT_FORK).map(drop)
}

fn other_findings() -> [Finding; 8] {
    let pagemap = Pagemap::open();
    let guards = match &pagemap {
        Ok(pagemap) if pagemap.known().contains(Categories::GUARD) => Ok(()),
        Ok(_) => Err(Errno::NOSYS),
        Err(errno) => Err(*errno),
    };
    let maps = match Maps::open() {
        Ok(maps) if maps.is_quick() => Ok(()),
        Ok(_) => Err(Errno::NOSYS),
        Err(errno) => Err(errno),
    };
    let word = 0_u64;
    let process_vm = process_vm::read((&raw const word).expose_provenance() as u64, &mut [0; 8]);
    let notification = crate::sys::probe::seccomp_notification;
    [
        Finding::of(Feature::PagemapScan, pagemap),
        Finding::of(Feature::PagemapGuards, guards),
        Finding::of(Feature::ProcmapQuery, maps),
        Finding::of(Feature::ProcessVm, process_vm),
        Finding::of(Feature::Populate, crate::sys::probe::populate()),
        Finding::of(Feature::ThreadPidfd, Pidfd::open_thread(crate::sys::thread::gettid())),
        Finding::of(Feature::SeccompNotify, notification(false)),
        Finding::of(Feature::SeccompWaitKillable, notification(true)),
    ]
}

impl Finding {
    fn of<T>(feature: Feature, found: Result<T, Errno>) -> Finding {
        let status = match found {
            Ok(_) => Status::Found,
            // What a kernel says to a system call, an ioctl and a flag that it does not know.
            Err(Errno::NOSYS | Errno::NOTTY | Errno::INVAL) => Status::Missing,
            Err(errno) => Status::NotPermitted { errno },
        };
        Finding { feature, status }
    }
}

impl Probe {
    /// Tells whether a feature is to be had.
    pub fn has(&self, feature: Feature) -> bool {
        self.status(feature) == Status::Found
    }

    /// Tells whether, or why not, a feature is to be had.
    pub fn status(&self, feature: Feature) -> Status {
        let finding = self.findings.iter().find(|finding| finding.feature == feature);
        finding.map_or(Status::Missing, |finding| finding.status)
    }

    /// Returns the kernel's names of what a userfaultfd of this process can be asked for, used here
    /// or not; `EVENT_FORK` also where this process may not ask for it.
    pub fn userfaultfd_features(&self) -> Vec<&'static str> {
        self.offered.iter_names().map(|(name, _)| name).collect()
    }

    /// Tells whether pages of an attached process could move to devices, with the default
    /// [`Options`](crate::Options).
    ///
    /// # Errors
    ///
    /// Why they could not.
    pub fn migration(&self) -> Result<(), NoMigration> {
        self.plan(false).migration
    }

    /// Decides what to ask for. `only_hooked_forks` is what the program promises.
    pub(crate) fn plan(&self, only_hooked_forks: bool) -> Plan {
        let changes = Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
        let forks = match self.has(Feature::EventFork) {
            true => Features::EVENT_FORK,
            false => Features::empty(),
        };
        let others = Features::MOVE | Features::POISON | Features::WP_ASYNC | Features::THREAD_ID;
        let features = (changes | forks | others) & self.offered;
        let faults = match self.has(Feature::Userfaultfd) {
            true => Faults::All,
            false => Faults::UserModeOnly,
        };
        let migration = if faults == Faults::UserModeOnly {
            Err(NoMigration::UserModeOnly)
        } else if !self.offered.contains(changes) {
            Err(NoMigration::NoEvents)
        } else if !self.offered.contains(Features::MOVE) {
            Err(NoMigration::NoMove)
        } else if forks.is_empty() && !only_hooked_forks {
            Err(NoMigration::ForksUnseen)
        } else {
            Ok(())
        };
        Plan { faults, features, migration }
    }
}

/// Reads a small file; nothing if it cannot be.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Reads the setting that stands in brackets.
fn huge_pages(text: &str) -> HugePages {
    let chosen = text.split('[').nth(1).and_then(|rest| rest.split(']').next());
    match chosen {
        Some("always") => HugePages::Always,
        Some("madvise") => HugePages::Madvise,
        Some("never") => HugePages::Never,
        _ => HugePages::Unknown,
    }
}

fn overcommit(text: &str) -> Overcommit {
    match text.trim() {
        "0" => Overcommit::Heuristic,
        "1" => Overcommit::Always,
        "2" => Overcommit::Never,
        _ => Overcommit::Unknown,
    }
}

fn seccomp_filters(status: &str) -> u64 {
    let field = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    };
    // The mode is 2 where there are filters.
    let any = u64::from(field("Seccomp:").is_some_and(|mode| mode > 0));
    field("Seccomp_filters:").unwrap_or(any)
}

fn userfaultfds() -> usize {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return 0 };
    let targets = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets.filter(|target| target.as_os_str() == "anon_inode:[userfaultfd]").count()
}

#[cfg(test)]
mod tests;
