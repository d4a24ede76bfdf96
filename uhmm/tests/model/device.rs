//! A device for tests that run on one thread: a map for a page table, a list for memory, or the
//! machine's own memory. It can be given a defect, to see that it is found.

use std::collections::BTreeMap;
use std::sync::Arc;

use uhmm::primitive::{Mutex, lock};
use uhmm::sim::HostMemory;
use uhmm::{
    Access, CopyJob, CopyKind, Device, DeviceFrame, DeviceMemory, Event, Frame, Injector, Order,
    OutOfDeviceMemory, PAGE_SIZE, Page, PageEntry, PageRange, Residency, SystemMemory, WouldBlock,
};

type Bytes = [u8; PAGE_SIZE];

/// What is wrong with a device, on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Defect {
    /// Nothing.
    #[default]
    None,
    /// It says that it copied in what it did not.
    LosesCopiesIn,
    /// It says that it copied out what it did not.
    LosesCopiesOut,
    /// It says that it cleared what it did not.
    LosesClears,
    /// It goes on using what it was told to stop using.
    KeepsTranslations,
    /// It never gives its memory back to the allocator, so a block is given out again that is in use.
    GivesOutTwice,
    /// It stores although it was given a page to load from.
    StoresAnyway,
}

/// Memory of the machine's own, and how a device reaches it.
pub(crate) trait Host: DeviceMemory {
    fn read(&self, frame: DeviceFrame, offset: usize, bytes: &mut [u8]);
    fn write(&self, frame: DeviceFrame, offset: usize, bytes: &[u8]);
}

/// A device with a little memory. Its steps are `allocate`, `copy` and `clear`, and `adopt` where
/// its memory is the machine's.
pub(crate) struct TestDevice {
    memory: Mutex<Vec<Option<Box<Bytes>>>>,
    /// What it has instead of memory of its own.
    host: Option<Arc<dyn Host>>,
    injector: Injector,
    defect: Defect,
}

/// The translations of one mirror. An access is made under the mirror's lock, so that when an
/// invalidation has returned there is nothing left to wait for.
pub(crate) struct Table {
    pub(crate) entries: BTreeMap<Page, PageEntry>,
    system: Arc<dyn SystemMemory>,
}

impl TestDevice {
    pub(crate) fn new(pages: u64, injector: Injector, defect: Defect) -> Arc<TestDevice> {
        let memory = (0..pages).map(|_| None).collect();
        Arc::new(TestDevice { memory: Mutex::new(memory), host: None, injector, defect })
    }

    /// Makes a device whose memory is the machine's.
    pub(crate) fn in_place(host: Arc<dyn Host>, injector: Injector) -> Arc<TestDevice> {
        let (memory, host, defect) = (Mutex::default(), Some(host), Defect::None);
        Arc::new(TestDevice { memory, host, injector, defect })
    }

    /// Makes an access through the table: returns what was there, or `None` for a fault. A load has
    /// no `update`.
    pub(crate) fn access(
        &self,
        table: &Table,
        page: Page,
        offset: usize,
        access: Access,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Option<u64> {
        let entry = table.entries.get(&page)?;
        let enough = match self.defect {
            Defect::StoresAnyway => access.min(Access::Read),
            _ => access,
        };
        if entry.access < enough {
            return None;
        }
        Some(match entry.residency {
            Residency::System(frame) | Residency::Exclusive { frame, .. } => match access {
                Access::Atomic => table.system.fetch_update(frame, offset, update),
                _ => system_word(&*table.system, frame, offset, access, update),
            },
            Residency::Device(at) => self.own_word(at.frame, offset, access, update),
            residency => panic!("a translation of a page that is {residency:?}"),
        })
    }

    /// Returns the word there, without being the device.
    pub(crate) fn peek(&self, frame: DeviceFrame, offset: usize) -> u64 {
        self.own_word(frame, offset, Access::Read, &mut |old| old)
    }

    fn own_word(
        &self,
        frame: DeviceFrame,
        offset: usize,
        access: Access,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> u64 {
        let mut old = 0;
        self.with(frame, |page| {
            let bytes = &mut page[offset..offset + 8];
            old = u64::from_le_bytes((&*bytes).try_into().expect("a word has eight bytes"));
            if access >= Access::Write {
                bytes.copy_from_slice(&update(old).to_le_bytes());
            }
        });
        old
    }

    fn with(&self, frame: DeviceFrame, f: impl FnOnce(&mut Bytes)) {
        if let Some(host) = &self.host {
            let mut page = [0; PAGE_SIZE];
            host.read(frame, 0, &mut page);
            f(&mut page);
            return host.write(frame, 0, &page);
        }
        let mut memory = lock(&self.memory);
        let page = memory.get_mut(frame.0 as usize).and_then(Option::as_mut);
        f(page.unwrap_or_else(|| panic!("{frame:?} is used, and not allocated")))
    }

    fn do_job(&self, memory: &dyn SystemMemory, kind: CopyKind) {
        let mut bytes = [0; PAGE_SIZE];
        match (kind, self.defect) {
            (CopyKind::In { .. }, Defect::LosesCopiesIn)
            | (CopyKind::Out { .. }, Defect::LosesCopiesOut)
            | (CopyKind::Clear { .. }, Defect::LosesClears) => {}
            (CopyKind::In { from, to }, _) => {
                memory.read(from, 0, &mut bytes);
                self.with(to, |page| *page = bytes);
            }
            (CopyKind::Out { from, to }, _) => {
                self.with(from, |page| bytes = *page);
                memory.write(to, 0, &bytes);
            }
            (CopyKind::Clear { to }, _) => self.with(to, |page| *page = bytes),
        }
    }
}

/// Returns what is copied of page `index` of a block.
fn page_of(kind: CopyKind, index: u64) -> CopyKind {
    let system = |Frame(first)| Frame(first + index);
    let device = |DeviceFrame(first)| DeviceFrame(first + index);
    match kind {
        CopyKind::In { from, to } => CopyKind::In { from: system(from), to: device(to) },
        CopyKind::Out { from, to } => CopyKind::Out { from: device(from), to: system(to) },
        CopyKind::Clear { to } => CopyKind::Clear { to: device(to) },
    }
}

fn system_word(
    memory: &dyn SystemMemory,
    frame: Frame,
    offset: usize,
    access: Access,
    update: &mut dyn FnMut(u64) -> u64,
) -> u64 {
    let mut bytes = [0; 8];
    memory.read(frame, offset, &mut bytes);
    let old = u64::from_le_bytes(bytes);
    if access == Access::Write {
        memory.write(frame, offset, &update(old).to_le_bytes());
    }
    old
}

impl Host for HostMemory {
    fn read(&self, frame: DeviceFrame, offset: usize, bytes: &mut [u8]) {
        HostMemory::read(self, frame, offset, bytes);
    }

    fn write(&self, frame: DeviceFrame, offset: usize, bytes: &[u8]) {
        HostMemory::write(self, frame, offset, bytes);
    }
}

impl Device for TestDevice {
    type PageTable = Table;
    type Fence = ();

    fn page_table(&self, _: PageRange, memory: &Arc<dyn SystemMemory>) -> Table {
        Table { entries: BTreeMap::new(), system: Arc::clone(memory) }
    }

    fn map(&self, table: &mut Table, range: PageRange, entries: &[PageEntry]) {
        for (page, entry) in range.iter().zip(entries) {
            assert!(range.covers(page.block(entry.order)), "a block that reaches out of its range");
            match entry.access {
                Access::None => table.entries.remove(&page),
                _ => table.entries.insert(page, *entry),
            };
        }
    }

    fn invalidate(&self, table: &mut Table, event: &Event) {
        if self.defect != Defect::KeepsTranslations {
            let gone = PageRange::covering(event.range());
            table.entries.retain(|&page, _| !gone.contains(page));
        }
    }

    fn try_invalidate(&self, table: &mut Table, event: &Event) -> Result<(), WouldBlock> {
        self.invalidate(table, event);
        Ok(())
    }
}

impl DeviceMemory for TestDevice {
    fn capacity(&self) -> u64 {
        match &self.host {
            Some(host) => host.capacity(),
            None => lock(&self.memory).len() as u64,
        }
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        if self.injector.fails("allocate") {
            return Err(OutOfDeviceMemory { order });
        }
        if let Some(host) = &self.host {
            return host.allocate(order);
        }
        let mut memory = lock(&self.memory);
        let pages = order.pages() as usize;
        let mut blocks = memory.chunks_exact_mut(pages).enumerate();
        let free = |block: &[Option<Box<Bytes>>]| block.iter().all(Option::is_none);
        let found = match self.defect {
            Defect::GivesOutTwice => blocks.next(),
            _ => blocks.find(|(_, block)| free(block)),
        };
        let (index, block) = found.ok_or(OutOfDeviceMemory { order })?;
        // Not zeroes: who forgets to clear a page is to be found out.
        block.fill_with(|| Some(Box::new([0xee; PAGE_SIZE])));
        Ok(DeviceFrame((index * pages) as u64))
    }

    fn adopt(&self, memory: &dyn SystemMemory, from: Frame, order: Order) -> Option<DeviceFrame> {
        let host = self.host.as_ref()?;
        if self.injector.fails("adopt") { None } else { host.adopt(memory, from, order) }
    }

    fn in_place(&self, memory: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        self.host.as_ref()?.in_place(memory, frame)
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        if let Some(host) = &self.host {
            return host.free(frame, order);
        }
        let mut memory = lock(&self.memory);
        for page in &mut memory[frame.0 as usize..][..order.pages() as usize] {
            let freed = page.take().is_some();
            assert!(freed || self.defect == Defect::GivesOutTwice, "{frame:?} is freed twice");
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        for job in jobs {
            let step = if let CopyKind::Clear { .. } = job.kind() { "clear" } else { "copy" };
            if !self.injector.fails(step) {
                (0..job.order().pages()).for_each(|index| {
                    self.do_job(memory, page_of(job.kind(), index));
                });
                job.complete();
            }
        }
    }
}
