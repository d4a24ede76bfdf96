//! The machine: what all its processes share.

use std::fmt;
use std::sync::Arc;

use super::fault::Space;
use super::file::File;
use super::host_memory::HostMemory;
use super::process::Process;
use super::state::{Shared, SpaceState};
use crate::injector::Injector;

/// A simulated machine. Its copies are one machine.
///
/// It lives until the last handle on it, on one of its processes and on one of its files is gone.
#[derive(Clone)]
pub struct Machine {
    pub(super) shared: Arc<Shared>,
}

/// What a machine is to be like.
#[derive(Clone, Debug, Default)]
pub struct MachineOptions {
    system_pages: Option<u64>,
    injector: Injector,
    count_violations: bool,
}

impl MachineOptions {
    /// Makes the default options: memory without limit, no failure, and a panic at a violation.
    pub fn new() -> MachineOptions {
        MachineOptions::default()
    }

    /// Limits system memory to `pages` pages.
    #[must_use]
    pub fn system_pages(self, pages: u64) -> MachineOptions {
        MachineOptions { system_pages: Some(pages), ..self }
    }

    /// Chooses who says which steps fail: `"frame"`, the allocation of a block of system memory,
    /// and `"split"`, the splitting of a large page where its failure is legal.
    #[must_use]
    pub fn injector(self, injector: Injector) -> MachineOptions {
        MachineOptions { injector, ..self }
    }

    /// Makes violations be listed by [`Machine::violations`] and go on, rather than panic: reads
    /// give `0xdb`, writes do nothing.
    #[must_use]
    pub fn count_violations(self) -> MachineOptions {
        MachineOptions { count_violations: true, ..self }
    }
}

impl Machine {
    /// Makes a machine with the default options.
    #[expect(clippy::new_without_default, reason = "no two machines are alike")]
    pub fn new() -> Machine {
        Machine::with(MachineOptions::new())
    }

    /// Makes a machine.
    pub fn with(options: MachineOptions) -> Machine {
        let MachineOptions { system_pages, injector, count_violations } = options;
        Machine { shared: Shared::new(system_pages, injector, count_violations) }
    }

    /// Makes a process with nothing mapped.
    pub fn spawn(&self) -> Process {
        let space = Space::new(Arc::clone(&self.shared));
        self.shared.lock().spaces.insert(space.id, SpaceState::of(&space));
        Process::new(space)
    }

    /// Makes a file of `pages` pages of zeroes.
    pub fn file(&self, pages: u64) -> File {
        File::new(&self.shared, pages)
    }

    /// Makes memory for a device out of up to `pages` pages of system memory.
    pub fn host_memory(&self, pages: u64) -> Arc<HostMemory> {
        Arc::new(HostMemory::new(&self.shared, pages))
    }

    /// Returns who says which steps fail.
    pub fn injector(&self) -> &Injector {
        &self.shared.injector
    }

    /// Returns how many frames are allocated. The shared frame of zeroes does not count.
    pub fn frames(&self) -> u64 {
        self.shared.ram.used()
    }

    /// Merges pages of private memory that have equal contents, in all processes. Returns how many
    /// pages are no more. Pages that are large, pinned, held, in transit or not in system memory
    /// are left alone.
    ///
    /// Announces [`EventKind::Clear`](crate::EventKind::Clear) wherever such a page is mapped.
    #[doc(alias = "KSM")]
    pub fn merge(&self) -> u64 {
        self.shared.merge()
    }

    /// Checks what must hold at every moment (invariant *Whole*): each object is led to by just the
    /// entries in its reverse map, each frame has one owner and is not leaked, no store goes
    /// through to a page that is shared privately, what is in transit is hidden, and device blocks
    /// are where they are said to be, also those that are system memory.
    ///
    /// # Errors
    ///
    /// A sentence that says what does not hold.
    pub fn check(&self) -> Result<(), String> {
        self.shared.lock().check(&*self.shared.copy_engines)
    }

    /// Lists the misuses of memory that were detected so far.
    pub fn violations(&self) -> Vec<String> {
        self.shared.ram.violations()
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("frames", &self.frames()).finish_non_exhaustive()
    }
}
