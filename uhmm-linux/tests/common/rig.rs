//! A process that has attached to itself, and a device that mirrors a part of it.

use std::sync::Arc;

use uhmm::policy::Policies;
use uhmm::{
    Access, Clock, CopyJob, DeviceFrame, DeviceMemory, DevicePagemap, FaultError, Frame, Injector,
    Mirror, Order, OutOfDeviceMemory, Page, PageEntry, PageRange, PagemapOptions, RangeFault,
    Residency, SystemMemory,
};
use uhmm_linux::{HostMemory, Options, Process};

use super::device::{Defect, Host, TestDevice};

/// A device with memory of its own, and its steps `allocate`, `copy` and `clear` on demand.
pub(crate) struct Gpu {
    pub(crate) device: Arc<TestDevice>,
    pub(crate) pagemap: Arc<DevicePagemap>,
    pub(crate) injector: Injector,
}

/// A mirror of a range by a device with `Gpu`'s memory.
pub(crate) type TestMirror = Mirror<TestDevice>;

/// Attaches this process, with the default options.
#[track_caller]
pub(crate) fn attach() -> Process {
    attach_with(Options::new())
}

/// Attaches this process.
#[track_caller]
pub(crate) fn attach_with(options: Options) -> Process {
    Process::attach(options).unwrap_or_else(|error| panic!("the process cannot attach: {error}"))
}

impl Gpu {
    /// Makes a device with so many pages of memory, and with no policies.
    pub(crate) fn new(pages: u64) -> Gpu {
        Gpu::named("gpu", pages)
    }

    /// Makes one that reports call by this name.
    pub(crate) fn named(name: &str, pages: u64) -> Gpu {
        let injector = Injector::new();
        Gpu::of(name, TestDevice::new(pages, injector.clone(), Defect::None), injector)
    }

    /// Makes one whose memory is the process's own, so that nothing is copied.
    pub(crate) fn in_place(name: &str, pages: u64, process: &Process) -> Gpu {
        let host = InPlace { host: process.host_memory(pages), memory: process.backend().memory() };
        let injector = Injector::new();
        Gpu::of(name, TestDevice::in_place(Arc::new(host), injector.clone()), injector)
    }

    fn of(name: &str, device: Arc<TestDevice>, injector: Injector) -> Gpu {
        // A clock that stands still: blocks are evicted in the order of their places.
        let options = PagemapOptions::new()
            .name(name.to_owned())
            .policies(Policies::none())
            .clock(Clock::manual());
        let pagemap = DevicePagemap::register_with(device.clone(), options);
        Gpu { device, pagemap, injector }
    }

    /// Makes the device mirror a range.
    #[track_caller]
    pub(crate) fn mirror(&self, process: &Process, range: PageRange) -> TestMirror {
        let mirror = process.mirror_with(&self.device, range, &self.pagemap);
        mirror.unwrap_or_else(|error| panic!("{range} cannot be mirrored: {error}"))
    }
}

/// Memory of the process's own, as a device of the process reaches it.
struct InPlace {
    host: Arc<HostMemory>,
    memory: Arc<dyn SystemMemory>,
}

impl Host for InPlace {
    fn read(&self, frame: DeviceFrame, offset: usize, bytes: &mut [u8]) {
        self.memory.read(Frame(frame.0), offset, bytes);
    }

    fn write(&self, frame: DeviceFrame, offset: usize, bytes: &[u8]) {
        self.memory.write(Frame(frame.0), offset, bytes);
    }
}

impl DeviceMemory for InPlace {
    fn capacity(&self) -> u64 {
        self.host.capacity()
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        self.host.allocate(order)
    }

    fn adopt(&self, memory: &dyn SystemMemory, from: Frame, order: Order) -> Option<DeviceFrame> {
        self.host.adopt(memory, from, order)
    }

    fn in_place(&self, memory: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        self.host.in_place(memory, frame)
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        self.host.free(frame, order);
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        self.host.copy(memory, jobs);
    }
}

/// Makes an access of the device, with as many faults as it takes, and returns what was there.
pub(crate) fn access(
    mirror: &TestMirror,
    page: Page,
    offset: usize,
    access: Access,
    update: &mut dyn FnMut(u64) -> u64,
) -> Result<u64, FaultError> {
    let request = match access {
        Access::None | Access::Read => RangeFault::read(page.into()),
        Access::Write => RangeFault::write(page.into()),
        Access::Atomic => RangeFault::atomic(page.into()),
    };
    loop {
        let done = mirror
            .inspect(|table| mirror.device().access(table, page, offset, access, update))
            .map_err(FaultError::from)?;
        match done {
            Some(old) => return Ok(old),
            None => mirror.range_fault(&request).map(drop)?,
        }
    }
}

/// Loads the first word of a page, as the device.
pub(crate) fn device_load(mirror: &TestMirror, page: Page) -> Result<u64, FaultError> {
    access(mirror, page, 0, Access::Read, &mut |old| old)
}

/// Stores to the first word of a page, as the device.
pub(crate) fn device_store(mirror: &TestMirror, page: Page, value: u64) -> Result<(), FaultError> {
    access(mirror, page, 0, Access::Write, &mut |_| value).map(drop)
}

/// Adds to the first word of a page in one step, as the device, and returns what was there.
pub(crate) fn device_add(mirror: &TestMirror, page: Page, value: u64) -> Result<u64, FaultError> {
    access(mirror, page, 0, Access::Atomic, &mut |old| old.wrapping_add(value))
}

/// Returns what the process says of a page, faulting nothing.
pub(crate) fn entry(process: &Process, page: Page) -> PageEntry {
    process.snapshot(page.into())[0]
}

/// Tells whether a page is in system memory, present in the page table.
pub(crate) fn is_home(process: &Process, page: Page) -> bool {
    matches!(entry(process, page).residency, Residency::System(_))
}

/// Tells whether a page is in the memory of any device.
pub(crate) fn is_out(process: &Process, page: Page) -> bool {
    matches!(entry(process, page).residency, Residency::Device(_))
}
