//! How a process attaches.

use std::time::Duration;

use uhmm::{Injector, PageRange};

/// How [`Process::attach`](crate::Process::attach) attaches. The defaults are right for most.
///
/// ```
/// use uhmm_linux::Options;
///
/// let options = Options::new().staging_bytes(1 << 30).servers(3);
/// # let _ = options;
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) staging_bytes: usize,
    pub(crate) servers: usize,
    pub(crate) patience: Duration,
    pub(crate) max_registrations: usize,
    pub(crate) managed: Option<Vec<PageRange>>,
    pub(crate) only_hooked_forks: bool,
    pub(crate) own_descriptors: bool,
    pub(crate) announced: bool,
    pub(crate) injector: Option<Injector>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            staging_bytes: 256 << 30,
            servers: 4,
            patience: Duration::from_secs(5),
            max_registrations: 8192,
            managed: None,
            only_hooked_forks: false,
            own_descriptors: false,
            announced: false,
            injector: None,
        }
    }
}

impl Options {
    /// Makes the default options.
    pub fn new() -> Options {
        Options::default()
    }

    /// Sets how much address space is reserved, in bytes, for pages that are between the program and
    /// a device, and for those in [host memory](crate::Process::host_memory). It takes no memory by
    /// itself. The default is 256 GiB; where the process may not reserve so much, it is halved
    /// until it may.
    #[must_use]
    pub fn staging_bytes(mut self, bytes: usize) -> Options {
        self.staging_bytes = bytes;
        self
    }

    /// Sets how many threads serve faults: at least 2. The default is 4.
    #[must_use]
    pub fn servers(mut self, servers: usize) -> Options {
        self.servers = servers;
        self
    }

    /// Sets how long a page may fail to come home before the access to it fails. The default is 5
    /// seconds.
    ///
    /// A load or store that fails raises `SIGBUS` in its thread, with the address, the code
    /// `SI_QUEUE`, and in `si_errno` the reason: `EIO` where the device does not give the page,
    /// `ENOMEM` where there is no memory for it. A system call that fails says `EFAULT`. The page stays where it is, and a later
    /// access tries again; after a system call, or where `SIGBUS` is blocked, only once it has come
    /// home after all, which is tried for as long.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Options {
        self.patience = patience;
        self
    }

    /// Limits how many separate ranges are registered with the kernel, each of which is up to two
    /// mappings more for the process (`vm.max_map_count`). Beyond it pages stay, as
    /// [busy](uhmm::StayReason::Busy). The default is 8192.
    #[must_use]
    pub fn max_registrations(mut self, ranges: usize) -> Options {
        self.max_registrations = ranges;
        self
    }

    /// Lets `range` move to devices, and nothing else that was not named likewise.
    ///
    /// Without this, all private anonymous memory of the program may move if
    /// [`Allocator`](crate::Allocator) is its global allocator, and nothing if it is not: then what
    /// serving a fault needs could lie anywhere in the heap. By naming a range the caller promises
    /// that nothing of this project is in it: no mirror, device, migration or what those refer to,
    /// and no stack of a thread that uses them. A range in which something is does not lead to wrong
    /// contents, but threads may wait for themselves.
    #[must_use]
    pub fn manage(mut self, range: PageRange) -> Options {
        self.managed.get_or_insert_default().push(range);
        self
    }

    /// Promises, if `yes`, that this program makes children that have memory of their own by the C
    /// library's `fork` alone, and not by the system calls `fork` and `clone`. What shares the memory
    /// of its parent until it executes another program is no such child: `vfork`, `posix_spawn`,
    /// `system`, [`std::process::Command`].
    ///
    /// It matters only where this user is not told of forks
    /// ([`NoMigration::ForksUnseen`](crate::NoMigration::ForksUnseen)): without the promise nothing
    /// moves there. With it everything comes home before each fork, and what cannot within 5 seconds
    /// the child does not have: touching it there raises `SIGSEGV`. Where the promise is broken,
    /// children read zeroes in the place of what was away.
    #[must_use]
    pub fn only_hooked_forks(mut self, yes: bool) -> Options {
        self.only_hooked_forks = yes;
        self
    }

    /// Gives the calling thread, and those that serve, descriptors of their own, if `yes`: the program
    /// does not see them, and cannot close them.
    ///
    /// The thread that attaches then has none of the program's descriptors any more. Its standard
    /// input, output and error are `/dev/null`. So it is a thread made for this, and what uses the
    /// attached process (devices, mirrors, migrations) runs on it, and on threads that it makes from
    /// then on, and nowhere else. Forks of any thread are seen to.
    #[must_use]
    pub fn own_descriptors(mut self, yes: bool) -> Options {
        self.own_descriptors = yes;
        self
    }

    /// Has every change that the program makes to its mappings announced before it is made, and ended
    /// after ([`Coherence::Announced`](uhmm::Coherence::Announced)), if `yes`: when `munmap` returns,
    /// no device uses what was there. Without it changes are observed. See
    /// [`Process::coverage`](crate::Process::coverage) for what this covers.
    ///
    /// Attaching fails where it cannot be ([`NoAnnouncement`](crate::NoAnnouncement)). It installs a
    /// seccomp filter for all threads of the process, for its children and the programs that they
    /// execute, which stays for good: each call that changes mappings takes several times as long, in
    /// children of this process too. While this process is stopped (`SIGSTOP`), so are its
    /// children at such calls. A second process, `uhmm-keeper`, lets their calls pass when this one
    /// has ended.
    ///
    /// A thread that holds a mirror's lock, or that a device waits for in order to stop, must make no
    /// such call: it would wait for itself.
    #[must_use]
    pub fn announced(mut self, yes: bool) -> Options {
        self.announced = yes;
        self
    }

    /// Makes steps fail on demand, for tests: `register`, `unregister`, `move`, `copy`, `zeropage`,
    /// `wake`, `populate`, `interrupt` (a signal while a page is faulted in), `scan`, `staging`,
    /// `buffer`, `nothing`.
    #[must_use]
    pub fn injector(mut self, injector: Injector) -> Options {
        self.injector = Some(injector);
        self
    }
}
