//! The devices: one with memory of its own, and one whose memory is the process's.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use uhmm::policy::{FaultAround, Policies};
use uhmm::{
    Access, Device, DevicePagemap, Event, FaultError, Frame, Injector, Mirror, MirrorHandle,
    PAGE_SIZE, Page, PageEntry, PageRange, PagemapOptions, RangeFault, Residency, StayReason,
    SystemMemory, WouldBlock,
};
use uhmm_devices::gpu::{Context, FaultReason, FaultService, KernelFault, SoftGpu, SoftGpuOptions};
use uhmm_linux::Process;

use super::journal;

/// How long a device goes on trying what may pass.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device, as those use it who make it work.
pub(crate) trait Gpu: Send + Sync {
    fn name(&self) -> &'static str;
    fn pagemap(&self) -> &Arc<DevicePagemap>;
    /// Returns a way to make accesses; `None` while the device mirrors nothing.
    fn context(&self) -> Option<Box<dyn Accesses>>;
    /// Ends the mirror, whoever is using it, and begins another.
    fn mirror_again(&self, process: &Process);
    /// Holds pages exclusively while `f` runs. `false` if they could not be had.
    fn hold(&self, range: PageRange, f: &mut dyn FnMut()) -> bool;
    /// Makes a step fail once.
    fn fail(&self, step: &'static str, after: u64);
    /// Says which rule was seen broken, if one was.
    fn check(&self) -> Result<(), String>;
    /// Stops using the process.
    fn stop(&self);
}

/// Accesses of a device to words of the process. One that fails has no effect.
pub(crate) trait Accesses: Send {
    fn load(&self, address: u64) -> Result<u64, Refused>;
    fn store(&self, address: u64, value: u64) -> Result<(), Refused>;
    fn add(&self, address: u64, value: u64) -> Result<u64, Refused>;
}

/// Why an access was not made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The mirror has ended.
    Gone,
    /// Nothing that allows the access is mapped there.
    NotMapped,
    /// There was no memory, or another failure on demand.
    Failed,
    /// What should pass did not, for too long.
    Stuck(String),
}

fn policies() -> Policies {
    Policies::none().and(FaultAround::new())
}

/// The device with memory of its own.
pub(crate) struct Own {
    gpu: Arc<SoftGpu>,
    service: RwLock<Option<FaultService>>,
    mirror: RwLock<Option<Mirror<SoftGpu>>>,
}

impl Own {
    pub(crate) fn start(process: &Process, pages: u64, limit: u64) -> Own {
        let pagemap = PagemapOptions::new().name("own").limit(limit).policies(policies());
        let options = SoftGpuOptions::new().memory_pages(pages).pagemap(pagemap).patience(PATIENCE);
        let gpu = SoftGpu::new(options.max_retries(4096));
        let service = gpu.start_service().expect("a thread can be had");
        let own = Own { gpu, service: RwLock::new(Some(service)), mirror: RwLock::default() };
        own.mirror_again(process);
        own
    }

    fn handle(&self) -> Option<MirrorHandle<SoftGpu>> {
        let mirror = self.mirror.read().unwrap_or_else(PoisonError::into_inner);
        Some(MirrorHandle::clone(mirror.as_ref()?))
    }
}

impl Gpu for Own {
    fn name(&self) -> &'static str {
        "the device with memory of its own"
    }

    fn pagemap(&self) -> &Arc<DevicePagemap> {
        self.gpu.pagemap().expect("it has memory")
    }

    fn context(&self) -> Option<Box<dyn Accesses>> {
        let mirror = self.mirror.read().unwrap_or_else(PoisonError::into_inner);
        let context = self.gpu.context(mirror.as_ref()?).ok()?;
        Some(Box::new(context))
    }

    fn mirror_again(&self, process: &Process) {
        let mut mirror = self.mirror.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = mirror.take() {
            old.unregister();
        }
        let new = self.gpu.mirror(process, journal::everything());
        *mirror = Some(new.expect("the process is alive"));
    }

    fn hold(&self, range: PageRange, f: &mut dyn FnMut()) -> bool {
        // Not under the lock: `f` may ask for a context, and somebody wait to end the mirror.
        let Some(mirror) = self.handle() else { return false };
        let Ok(held) = mirror.exclusive(range) else { return false };
        f();
        drop(held);
        true
    }

    fn fail(&self, step: &'static str, after: u64) {
        self.gpu.injector().fail(step, after);
    }

    fn check(&self) -> Result<(), String> {
        let mirror = self.mirror.read().unwrap_or_else(PoisonError::into_inner);
        self.gpu.check(mirror.as_deref())
    }

    fn stop(&self) {
        drop(self.mirror.write().unwrap_or_else(PoisonError::into_inner).take());
        drop(self.service.write().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Accesses for Context {
    fn load(&self, address: u64) -> Result<u64, Refused> {
        self.run(|view| view.load(address)).map_err(Refused::from)
    }

    fn store(&self, address: u64, value: u64) -> Result<(), Refused> {
        self.run(|view| view.store(address, value)).map_err(Refused::from)
    }

    fn add(&self, address: u64, value: u64) -> Result<u64, Refused> {
        self.run(|view| view.fetch_add_u64(address, value)).map_err(Refused::from)
    }
}

impl From<KernelFault> for Refused {
    fn from(fault: KernelFault) -> Refused {
        match fault.reason {
            FaultReason::Gone => Refused::Gone,
            FaultReason::Address | FaultReason::Permission => Refused::NotMapped,
            FaultReason::OutOfMemory => Refused::Failed,
            _ => Refused::Stuck(fault.to_string()),
        }
    }
}

/// The device whose memory is the process's.
pub(crate) struct InPlace {
    device: Arc<InPlaceDevice>,
    pagemap: Arc<DevicePagemap>,
    injector: Injector,
    mirror: RwLock<Option<Mirror<InPlaceDevice>>>,
}

/// What it is to the address space: tables, and nothing that goes on by itself.
#[derive(Debug)]
pub(crate) struct InPlaceDevice;

pub(crate) struct Table {
    entries: BTreeMap<Page, PageEntry>,
    memory: Arc<dyn SystemMemory>,
}

impl InPlace {
    pub(crate) fn start(process: &Process, limit: u64) -> InPlace {
        let options = PagemapOptions::new().name("in place").limit(limit).policies(policies());
        let pagemap = DevicePagemap::register_with(process.host_memory(limit), options);
        let device = Arc::new(InPlaceDevice);
        let mirror = RwLock::default();
        let gpu = InPlace { device, pagemap, injector: Injector::new(), mirror };
        gpu.mirror_again(process);
        gpu
    }

    fn handle(&self) -> Option<MirrorHandle<InPlaceDevice>> {
        let mirror = self.mirror.read().unwrap_or_else(PoisonError::into_inner);
        Some(MirrorHandle::clone(mirror.as_ref()?))
    }
}

impl Gpu for InPlace {
    fn name(&self) -> &'static str {
        "the device in place"
    }

    fn pagemap(&self) -> &Arc<DevicePagemap> {
        &self.pagemap
    }

    fn context(&self) -> Option<Box<dyn Accesses>> {
        Some(Box::new(self.handle()?))
    }

    fn mirror_again(&self, process: &Process) {
        let mut mirror = self.mirror.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = mirror.take() {
            old.unregister();
        }
        let new = process.mirror_with(&self.device, journal::everything(), &self.pagemap);
        *mirror = Some(new.expect("the process is alive"));
    }

    fn hold(&self, range: PageRange, f: &mut dyn FnMut()) -> bool {
        // Not under the lock: `f` may ask for a context, and somebody wait to end the mirror.
        let Some(mirror) = self.handle() else { return false };
        let Ok(held) = mirror.exclusive(range) else { return false };
        f();
        drop(held);
        true
    }

    fn fail(&self, step: &'static str, after: u64) {
        self.injector.fail(step, after);
    }

    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    fn stop(&self) {
        drop(self.mirror.write().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Device for InPlaceDevice {
    type PageTable = Table;
    type Fence = ();

    fn page_table(&self, _: PageRange, memory: &Arc<dyn SystemMemory>) -> Table {
        Table { entries: BTreeMap::new(), memory: Arc::clone(memory) }
    }

    fn map(&self, table: &mut Table, range: PageRange, entries: &[PageEntry]) {
        for (page, entry) in range.iter().zip(entries) {
            match entry.access {
                Access::None => table.entries.remove(&page),
                _ => table.entries.insert(page, *entry),
            };
        }
    }

    fn invalidate(&self, table: &mut Table, event: &Event) {
        let gone = PageRange::covering(event.range());
        table.entries.retain(|&page, _| !gone.contains(page));
    }

    fn try_invalidate(&self, table: &mut Table, event: &Event) -> Result<(), WouldBlock> {
        self.invalidate(table, event);
        Ok(())
    }
}

impl Table {
    /// Makes an access if there is a translation for it.
    fn access(
        &self,
        address: u64,
        access: Access,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Option<u64> {
        let entry = self.entries.get(&Page::containing(address))?;
        if entry.access < access {
            return None;
        }
        let frame = match entry.residency {
            Residency::System(frame) | Residency::Exclusive { frame, .. } => frame,
            // Its memory is the process's: frames of both have the same numbers.
            Residency::Device(at) => Frame(at.frame.0),
            residency => panic!("a translation of a page that is {residency:?}"),
        };
        let offset = address as usize % PAGE_SIZE;
        if access == Access::Atomic {
            return Some(self.memory.fetch_update(frame, offset, update));
        }
        let mut bytes = [0; 8];
        if access == Access::Read {
            self.memory.read(frame, offset, &mut bytes);
        } else {
            self.memory.write(frame, offset, &update(0).to_ne_bytes());
        }
        Some(u64::from_ne_bytes(bytes))
    }
}

/// Makes an access, with as many faults as it takes.
fn access(
    handle: &MirrorHandle<InPlaceDevice>,
    address: u64,
    access: Access,
    update: &mut dyn FnMut(u64) -> u64,
) -> Result<u64, Refused> {
    let page = Page::containing(address);
    let began = Instant::now();
    loop {
        let done = handle.inspect(|table| table.access(address, access, update));
        if let Some(old) = done.map_err(|_| Refused::Gone)? {
            return Ok(old);
        }
        // Half of the pages it works on where they are.
        let faulted = if page.number().is_multiple_of(2) {
            handle.handle_fault(page, access).map(drop)
        } else {
            handle.range_fault(&request(page, access)).map(drop)
        };
        match faulted {
            Ok(()) => {}
            Err(error) => judge(error, began)?,
        }
    }
}

fn request(page: Page, access: Access) -> RangeFault<'static> {
    match access {
        Access::None | Access::Read => RangeFault::read(page.into()),
        Access::Write => RangeFault::write(page.into()),
        Access::Atomic => RangeFault::atomic(page.into()),
    }
}

/// Says what an access ends with that cannot be served, if it does not try again.
fn judge(error: FaultError, began: Instant) -> Result<(), Refused> {
    match error {
        FaultError::Released => Err(Refused::Gone),
        FaultError::Hole { .. } | FaultError::Denied { .. } | FaultError::OutOfRange { .. } => {
            Err(Refused::NotMapped)
        }
        FaultError::OutOfMemory { .. } => Err(Refused::Failed),
        FaultError::NotExclusive {
            reason: StayReason::Locked | StayReason::OutOfSystemMemory,
            ..
        } => Err(Refused::Failed),
        _ if began.elapsed() > PATIENCE => Err(Refused::Stuck(error.to_string())),
        _ => {
            std::thread::yield_now();
            Ok(())
        }
    }
}

impl Accesses for MirrorHandle<InPlaceDevice> {
    fn load(&self, address: u64) -> Result<u64, Refused> {
        access(self, address, Access::Read, &mut |old| old)
    }

    fn store(&self, address: u64, value: u64) -> Result<(), Refused> {
        access(self, address, Access::Write, &mut |_| value).map(drop)
    }

    fn add(&self, address: u64, value: u64) -> Result<u64, Refused> {
        access(self, address, Access::Atomic, &mut |old| old.wrapping_add(value))
    }
}
