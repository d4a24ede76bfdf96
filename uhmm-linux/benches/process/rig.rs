//! This process, attached, with memory that may leave it.

use std::sync::Arc;

use uhmm::policy::Policies;
use uhmm::{DevicePagemap, Mirror, PageRange, PagemapOptions};
use uhmm_linux::{Options, Process};

use super::bare::Memory;
use super::device::Trivial;

/// An attached process, and the memory of two devices: one that has pages where they are, and one
/// that copies them.
pub(crate) struct Rig {
    pub(crate) process: Process,
    pub(crate) in_place: Arc<DevicePagemap>,
    pub(crate) copying: Arc<DevicePagemap>,
}

impl Rig {
    /// Attaches. Devices have room for so many pages.
    pub(crate) fn new(pages: usize) -> Rig {
        Rig::with_policies(pages, &Policies::none())
    }

    /// Attaches, for devices with these policies.
    pub(crate) fn with_policies(pages: usize, policies: &Policies) -> Rig {
        // Nothing but what is named moves: that is this benchmark's memory, and not its own state.
        let process = Process::attach(Options::new().manage(NOTHING)).expect("this can attach");
        let options = || PagemapOptions::new().policies(policies.clone());
        let host = process.host_memory(pages as u64);
        let in_place = DevicePagemap::register_with(host, options());
        let copying = DevicePagemap::register_with(Trivial::new(pages.min(8192)), options());
        Rig { process, in_place, copying }
    }

    /// Lets memory leave.
    pub(crate) fn manage(&self, memory: &Memory) {
        self.process.manage(memory.range());
    }

    /// Has a device mirror memory.
    pub(crate) fn mirror(&self, memory: &Memory) -> Mirror<Trivial> {
        self.manage(memory);
        self.process.mirror(&Trivial::new(0), memory.range()).expect("it lives")
    }

    /// Moves each page of a range away by itself, so that each comes home by itself.
    pub(crate) fn send_each(&self, range: PageRange, to: &Arc<DevicePagemap>) {
        for page in range.iter() {
            let report = self.process.migrate(page.into(), to).run();
            assert_eq!(report.moved, 1, "{report:?}");
        }
    }

    /// Moves a range away.
    pub(crate) fn send(&self, range: PageRange, to: &Arc<DevicePagemap>) {
        let report = self.process.migrate(range, to).run();
        assert_eq!(report.moved, range.pages(), "{report:?}");
    }

    /// Moves a range home.
    pub(crate) fn fetch(&self, range: PageRange) {
        let report = self.process.migrate_home(range);
        assert_eq!(report.moved, range.pages(), "{report:?}");
    }
}

/// A page where nothing can be mapped.
const NOTHING: PageRange = match PageRange::new(0, uhmm::PAGE_SIZE as u64) {
    Ok(range) => range,
    Err(_) => unreachable!(),
};
