//! What is said of what was found: names, costs and remedies.

use std::fmt;

use super::{Feature, Finding, HugePages, Overcommit, Probe, Remark, Status};

impl Probe {
    /// Returns what could be better, what it costs, and what to do about it; what costs most first.
    pub fn remarks(&self) -> Vec<Remark> {
        let missing = self.findings.iter().filter(|finding| finding.status != Status::Found);
        // Whose faults are told of outside the kernel alone does not matter where all are.
        let matters = |finding: &&Finding| {
            finding.feature != Feature::UserModeFaults || !self.has(Feature::Userfaultfd)
        };
        let mut remarks: Vec<Remark> = missing
            .filter(matters)
            .map(|finding| {
                let Description { name, costs, .. } = describe(finding.feature);
                Remark::new(name, costs, finding.remedy())
            })
            .collect();
        self.remark_on_circumstances(&mut remarks);
        remarks
    }

    fn remark_on_circumstances(&self, remarks: &mut Vec<Remark>) {
        let mut remark = |holds: bool, subject: &str, costs: &str, remedy: &str| {
            if holds {
                remarks.push(Remark::new(subject, costs, remedy));
            }
        };
        remark(
            self.locks_future_mappings,
            "mlockall(MCL_FUTURE)",
            "all memory that is mapped from now on is locked, and locked memory stays",
            "munlockall(2)",
        );
        remark(
            self.seccomp_filters > 0,
            "seccomp filters",
            "what serves faults passes them too: if they forbid it to read, poll or call ioctl(2), \
             madvise(2) or process_vm_readv(2), the process cannot attach, or ends when it is \
             needed",
            "allow these calls, and futex(2), munmap(2), mmap(2) and mprotect(2), in the filter",
        );
        remark(
            self.userfaultfds > 0,
            "another userfaultfd",
            "pages of ranges that are registered with it stay, and devices cannot use them",
            "unregister what is to be used by devices",
        );
        remark(
            self.huge_pages == HugePages::Never,
            "huge pages",
            "there are none, so all memory moves in pieces of 4 KiB, which takes longer in place: \
             50 us for 2 MiB where a huge page takes 1.5 us",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        );
        remark(
            self.max_map_count.is_some_and(|count| count < MAPPINGS),
            "vm.max_map_count",
            "it is low: each range that is registered with the kernel may take two mappings more",
            "sysctl vm.max_map_count=65530, or lower Options::max_registrations",
        );
        remark(
            self.address_space_limit.is_some(),
            "RLIMIT_AS",
            "less address space may be reserved, and so fewer pages may be away at a time",
            "ulimit -v unlimited, or lower Options::staging_bytes",
        );
        remark(
            self.overcommit == Overcommit::Never,
            "vm.overcommit_memory=2",
            "address space that has been used once counts as memory in use until the process \
             detaches",
            "sysctl vm.overcommit_memory=0",
        );
    }
}

/// How many mappings a process may have where nobody has changed it.
pub(super) const MAPPINGS: u64 = 65530;

impl Remark {
    fn new(subject: &str, costs: &str, remedy: &str) -> Remark {
        let [subject, costs, remedy] = [subject, costs, remedy].map(str::to_owned);
        Remark { subject, costs, remedy }
    }
}

/// What there is to say of a feature.
struct Description {
    name: &'static str,
    /// The version that brought it.
    since: &'static str,
    /// What is lost without it.
    costs: &'static str,
    /// What to do where the kernel has it and does not give it.
    permission: &'static str,
}

fn describe(feature: Feature) -> Description {
    let sandbox = "allow it in the seccomp profile of the container";
    let proc = "mount /proc, with hidepid=0, and let the process be dumpable";
    let of = |name, since, costs, permission| Description { name, since, costs, permission };
    match feature {
        Feature::Userfaultfd => of(
            "userfaultfd(2) of all faults",
            "4.11",
            "pages cannot move to devices, nor be held exclusively: a system call on a page that \
             is away would fail",
            "sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE, or access to \
             /dev/userfaultfd",
        ),
        Feature::UserModeFaults => {
            of("userfaultfd(2) of user-mode faults", "5.11", "a process cannot attach", sandbox)
        }
        Feature::EventFork => of(
            "userfaultfd: event of fork",
            "4.11",
            "pages cannot move to devices unless the program promises to fork by the C library \
             only",
            "CAP_SYS_PTRACE in the first user namespace, or Options::only_hooked_forks",
        ),
        Feature::EventRemap => {
            of("userfaultfd: event of mremap", "4.11", "pages cannot move to devices", sandbox)
        }
        Feature::EventRemove => {
            of("userfaultfd: event of madvise", "4.11", "pages cannot move to devices", sandbox)
        }
        Feature::EventUnmap => {
            of("userfaultfd: event of munmap", "4.11", "pages cannot move to devices", sandbox)
        }
        Feature::ThreadId => of(
            "userfaultfd: thread of a fault",
            "4.14",
            "a page that cannot come home is poisoned until it does, also for who could be told by \
             a signal",
            sandbox,
        ),
        Feature::Poison => of(
            "userfaultfd: poison",
            "6.6",
            "a system call on a page that cannot come home waits for it",
            sandbox,
        ),
        Feature::WpAsync => of(
            "userfaultfd: asynchronous write protection",
            "6.7",
            "devices cannot use pages of files, since nobody tells when they go",
            sandbox,
        ),
        Feature::Move => of("userfaultfd: move", "6.8", "pages cannot move to devices", sandbox),
        Feature::PagemapScan => of("PAGEMAP_SCAN", "6.7", "a process cannot attach", proc),
        Feature::PagemapGuards => of(
            "PAGEMAP_SCAN of guards",
            "6.15",
            "a guard that is put up where a page is away may be taken down by its coming home",
            proc,
        ),
        Feature::ProcmapQuery => of(
            "PROCMAP_QUERY",
            "6.11",
            "a look at a mapping reads the text of all: slow in a process that has many",
            proc,
        ),
        Feature::ProcessVm => of(
            "process_vm_readv(2)",
            "3.2",
            "devices that are software read zeroes, and their stores are lost",
            sandbox,
        ),
        Feature::Populate => {
            of("MADV_POPULATE_READ", "5.14", "devices cannot fault pages in", sandbox)
        }
        Feature::ThreadPidfd => of(
            "pidfd of a thread",
            "6.9",
            "if a seccomp filter ends a thread that serves faults, nobody notices, and who touches \
             a page that is away waits for ever",
            sandbox,
        ),
        Feature::SeccompNotify => of(
            "seccomp user notification",
            "5.0",
            "no supervisor can announce changes of mappings before they are made: they are \
             observed",
            sandbox,
        ),
        Feature::SeccompWaitKillable => of(
            "seccomp notification with WAIT_KILLABLE_RECV",
            "5.19",
            "no supervisor can announce changes of mappings before they are made: they are \
             observed",
            sandbox,
        ),
    }
}

impl Finding {
    /// Returns what to do to have it; nothing where it was found.
    pub fn remedy(&self) -> &'static str {
        match self.status {
            Status::Found => "",
            Status::NotPermitted { .. } => describe(self.feature).permission,
            Status::Missing => match self.feature {
                Feature::Userfaultfd | Feature::UserModeFaults => {
                    "a kernel with CONFIG_USERFAULTFD"
                }
                Feature::SeccompNotify | Feature::SeccompWaitKillable => {
                    "a kernel with CONFIG_SECCOMP_FILTER, of Linux 5.19 or later"
                }
                _ => "a later kernel",
            },
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(describe(*self).name)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Found => f.write_str("found"),
            Status::Missing => f.write_str("missing"),
            Status::NotPermitted { errno } => write!(f, "not permitted ({errno})"),
        }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Remark { subject, costs, remedy } = self;
        write!(f, "{subject}: {costs}.\n    To change that: {remedy}.")
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Linux {}", self.kernel)?;
        for Finding { feature, status } in &self.findings {
            let Description { name, since, .. } = describe(*feature);
            writeln!(f, "  {name:<46} since {since:<5} {status}")?;
        }
        let limit = |limit: Option<u64>| match limit {
            Some(bytes) => format!("{bytes} bytes"),
            None => "unlimited".to_owned(),
        };
        let count = self.max_map_count.map_or("unknown".to_owned(), |count| count.to_string());
        let facts = [
            ("huge pages", format!("{:?}", self.huge_pages).to_lowercase()),
            ("mappings at most", count),
            ("memory that may be locked", limit(self.locked_memory_limit)),
            ("address space", limit(self.address_space_limit)),
            ("overcommit", format!("{:?}", self.overcommit).to_lowercase()),
            ("seccomp filters", self.seccomp_filters.to_string()),
            ("userfaultfds open", self.userfaultfds.to_string()),
            ("future mappings are locked", yes_or_no(self.locks_future_mappings).to_owned()),
            ("userfaultfd offers", self.userfaultfd_features().join(" ")),
        ];
        for (what, value) in facts {
            writeln!(f, "  {what:<46} {value}")?;
        }
        match self.migration() {
            Ok(()) => writeln!(f, "Pages can move to devices.")?,
            Err(why) => writeln!(f, "Pages cannot move to devices: {why}.")?,
        }
        self.remarks().iter().try_for_each(|remark| writeln!(f, "{remark}"))
    }
}

fn yes_or_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}
