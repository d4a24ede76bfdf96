//! A small device for tests, and a process for it to mirror.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use uhmm::primitive::{Mutex, lock};
use uhmm::sim::{HostMemory, Machine, Mapping, Process};
use uhmm::{
    Access, Clock, CopyJob, CopyKind, Device, DeviceFrame, DeviceMemory, DevicePagemap, Event,
    FaultError, Frame, Injector, Mirror, MirrorHandle, Order, OutOfDeviceMemory, PAGE_SIZE, Page,
    PageEntry, PageRange, PagemapOptions, Residency, SystemMemory, policy::Policies,
};

/// Where the process's memory begins: at the edge of a huge page.
pub(crate) const BASE: u64 = 0x4000_0000;

/// Returns `pages` pages from page `first` of the process's memory.
pub(crate) fn range(first: u64, pages: u64) -> PageRange {
    PageRange::from_pages(page(first), pages).expect("a test's range is a range")
}

/// Returns page `index` of the process's memory.
pub(crate) fn page(index: u64) -> Page {
    Page::containing(BASE).checked_add(index).expect("a test's page is a page")
}

/// Returns the address of the first word of a page.
pub(crate) fn word(index: u64) -> u64 {
    page(index).address()
}

/// A device with a flat page table and a little memory. It makes each access under the lock of its
/// table, so an invalidation has nothing left to wait for.
pub(crate) struct Gpu {
    memory: Memory,
    /// Steps: `allocate`, `copy`, `clear`; `adopt` where its memory is the machine's.
    pub(crate) injector: Injector,
    /// What was done to it, in order.
    pub(crate) log: Mutex<Vec<String>>,
}

type Bytes = [u8; PAGE_SIZE];

enum Memory {
    Own(Mutex<Vec<Option<Box<Bytes>>>>),
    /// The machine's, a part of which is the device's.
    Host(Arc<HostMemory>),
}

thread_local! {
    static IN_PLACE: Cell<bool> = const { Cell::new(false) };
}

/// Runs a test in which the devices of all rigs have their memory in that of the machine.
pub(crate) fn in_place(test: impl FnOnce()) {
    IN_PLACE.set(true);
    test();
    IN_PLACE.set(false);
}

/// Tells whether the test is run so.
pub(crate) fn is_in_place() -> bool {
    IN_PLACE.get()
}

pub(crate) struct Table {
    entries: Mutex<BTreeMap<Page, PageEntry>>,
    system: Arc<dyn SystemMemory>,
}

impl Gpu {
    pub(crate) fn new(pages: usize) -> Arc<Gpu> {
        Gpu::with(Memory::Own(Mutex::new(vec![None; pages])))
    }

    /// Makes a device whose memory is a part of the machine's.
    pub(crate) fn in_place(machine: &Machine, pages: usize) -> Arc<Gpu> {
        Gpu::with(Memory::Host(machine.host_memory(pages as u64)))
    }

    /// Makes a device with memory of its own, or in place where the test is run so.
    pub(crate) fn on(machine: &Machine, pages: usize) -> Arc<Gpu> {
        if is_in_place() { Gpu::in_place(machine, pages) } else { Gpu::new(pages) }
    }

    fn with(memory: Memory) -> Arc<Gpu> {
        Arc::new(Gpu { memory, injector: Injector::new(), log: Mutex::new(Vec::new()) })
    }

    /// Reads, changes and writes back the word at `address`, if the table allows it now.
    pub(crate) fn update(
        &self,
        table: &Table,
        address: u64,
        access: Access,
        mut update: impl FnMut(u64) -> u64,
    ) -> Option<u64> {
        let entries = lock(&table.entries);
        let entry = entries.get(&Page::containing(address))?;
        if entry.access < access {
            return None;
        }
        let offset = address as usize % PAGE_SIZE;
        match entry.residency {
            Residency::System(frame) | Residency::Exclusive { frame, .. } => {
                Some(self.update_system(table, frame, offset, access, &mut update))
            }
            Residency::Device(at) => {
                let mut old = 0;
                self.with_page(at.frame, 0, |page| {
                    let bytes = &mut page[offset..offset + 8];
                    old = u64::from_le_bytes((&*bytes).try_into().expect("a word"));
                    if access >= Access::Write {
                        bytes.copy_from_slice(&update(old).to_le_bytes());
                    }
                });
                Some(old)
            }
            residency => panic!("a translation of a page that is {residency:?}"),
        }
    }

    fn update_system(
        &self,
        table: &Table,
        frame: Frame,
        offset: usize,
        access: Access,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> u64 {
        if access == Access::Atomic {
            return table.system.fetch_update(frame, offset, update);
        }
        let mut bytes = [0; 8];
        table.system.read(frame, offset, &mut bytes);
        let old = u64::from_le_bytes(bytes);
        if access == Access::Write {
            table.system.write(frame, offset, &update(old).to_le_bytes());
        }
        old
    }
}

impl Table {
    pub(crate) fn entry(&self, page: Page) -> Option<PageEntry> {
        lock(&self.entries).get(&page).copied()
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.entries).len()
    }
}

impl Device for Gpu {
    type PageTable = Arc<Table>;
    type Fence = ();

    fn page_table(&self, _: PageRange, memory: &Arc<dyn SystemMemory>) -> Arc<Table> {
        Arc::new(Table { entries: Mutex::new(BTreeMap::new()), system: Arc::clone(memory) })
    }

    fn map(&self, table: &mut Arc<Table>, range: PageRange, entries: &[PageEntry]) {
        let mut held = lock(&table.entries);
        for (page, entry) in range.iter().zip(entries) {
            assert!(range.covers(page.block(entry.order)), "an order that reaches out");
            match entry.access {
                Access::None => held.remove(&page),
                _ => held.insert(page, *entry),
            };
        }
    }

    fn invalidate(&self, table: &mut Arc<Table>, event: &Event) {
        let gone = PageRange::covering(event.range());
        lock(&table.entries).retain(|&page, _| !gone.contains(page));
        lock(&self.log).push(format!("{:?}", event.kind()));
    }

    fn release(&self, table: Arc<Table>) {
        assert_eq!(table.len(), 0, "released with translations");
        lock(&self.log).push("released".to_owned());
    }
}

impl DeviceMemory for Gpu {
    fn capacity(&self) -> u64 {
        match &self.memory {
            Memory::Own(pages) => lock(pages).len() as u64,
            Memory::Host(host) => host.capacity(),
        }
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        if self.injector.fails("allocate") {
            return Err(OutOfDeviceMemory { order });
        }
        let mut memory = match &self.memory {
            Memory::Own(pages) => lock(pages),
            Memory::Host(host) => return host.allocate(order),
        };
        let pages = order.pages() as usize;
        let blocks = memory.chunks_exact_mut(pages);
        for (index, block) in blocks.enumerate() {
            if block.iter().all(Option::is_none) {
                // Not zeroes: who forgets to clear a page is to be found out.
                block.fill(Some(Box::new([0xee; PAGE_SIZE])));
                return Ok(DeviceFrame((index * pages) as u64));
            }
        }
        Err(OutOfDeviceMemory { order })
    }

    fn adopt(&self, memory: &dyn SystemMemory, from: Frame, order: Order) -> Option<DeviceFrame> {
        match &self.memory {
            Memory::Host(host) if !self.injector.fails("adopt") => host.adopt(memory, from, order),
            _ => None,
        }
    }

    fn in_place(&self, memory: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        match &self.memory {
            Memory::Own(_) => None,
            Memory::Host(host) => host.in_place(memory, frame),
        }
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        let mut memory = match &self.memory {
            Memory::Own(pages) => lock(pages),
            Memory::Host(host) => return host.free(frame, order),
        };
        for page in &mut memory[frame.0 as usize..][..order.pages() as usize] {
            assert!(page.take().is_some(), "{frame:?} is freed twice");
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        for job in jobs {
            let step = if let CopyKind::Clear { .. } = job.kind() { "clear" } else { "copy" };
            if self.injector.fails(step) {
                continue;
            }
            for index in 0..job.order().pages() {
                self.copy_page(memory, job.kind(), index);
            }
            job.complete();
        }
    }
}

impl Gpu {
    fn copy_page(&self, system: &dyn SystemMemory, kind: CopyKind, index: u64) {
        let mut bytes = [0; PAGE_SIZE];
        match kind {
            CopyKind::In { from, to } => {
                system.read(Frame(from.0 + index), 0, &mut bytes);
                self.with_page(to, index, |page| *page = bytes);
            }
            CopyKind::Out { from, to } => {
                self.with_page(from, index, |page| bytes = *page);
                system.write(Frame(to.0 + index), 0, &bytes);
            }
            CopyKind::Clear { to } => self.with_page(to, index, |page| *page = bytes),
        }
    }

    fn with_page(&self, DeviceFrame(first): DeviceFrame, index: u64, f: impl FnOnce(&mut Bytes)) {
        match &self.memory {
            Memory::Own(pages) => {
                let page = &mut lock(pages)[(first + index) as usize];
                f(page.as_mut().expect("only allocated memory is used"));
            }
            Memory::Host(host) => {
                let (frame, mut page) = (DeviceFrame(first + index), [0; PAGE_SIZE]);
                host.read(frame, 0, &mut page);
                f(&mut page);
                host.write(frame, 0, &page);
            }
        }
    }
}

/// A process with memory, and a device that mirrors it.
pub(crate) struct Rig {
    pub(crate) machine: Machine,
    pub(crate) process: Process,
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) pagemap: Arc<DevicePagemap>,
    pub(crate) mirror: Mirror<Gpu>,
}

impl Rig {
    /// Maps `pages` pages of anonymous memory, for a device with `device_pages` of its own and no
    /// policies.
    pub(crate) fn new(pages: u64, device_pages: usize) -> Rig {
        Rig::with(pages, device_pages, PagemapOptions::new().policies(Policies::none()))
    }

    pub(crate) fn with(pages: u64, device_pages: usize, options: PagemapOptions) -> Rig {
        let machine = Machine::new();
        let process = machine.spawn();
        process.map(range(0, pages), Mapping::anonymous(Access::Write)).expect("memory is mapped");
        let gpu = Gpu::on(&machine, device_pages);
        let pagemap = DevicePagemap::register_with(gpu.clone(), options.clock(Clock::manual()));
        let mirror = mirror(&process, &gpu, &pagemap);
        Rig { machine, process, gpu, pagemap, mirror }
    }

    /// Stores `first + i` in the first word of page `i`, for every page.
    pub(crate) fn fill(&self, pages: u64, first: u64) {
        for index in 0..pages {
            self.process.store_u64(word(index), first + index).expect("memory is there");
        }
    }

    pub(crate) fn residency(&self, index: u64) -> Residency {
        self.process.address_space().snapshot(page(index).into())[0].residency
    }

    pub(crate) fn on_device(&self, index: u64) -> bool {
        matches!(self.residency(index), Residency::Device(at) if at.owner == self.pagemap.owner())
    }

    /// Loads a word on the device, as it would: through its page table, faulting until it can.
    pub(crate) fn device_load(&self, address: u64) -> Result<u64, FaultError> {
        access(&self.mirror, address, Access::Read, |old| old)
    }

    pub(crate) fn device_store(&self, address: u64, value: u64) -> Result<u64, FaultError> {
        access(&self.mirror, address, Access::Write, |_| value)
    }

    pub(crate) fn device_add(&self, address: u64, value: u64) -> Result<u64, FaultError> {
        access(&self.mirror, address, Access::Atomic, |old| old.wrapping_add(value))
    }

    /// Ends the process, and checks that nothing of it is left anywhere.
    pub(crate) fn finish(self) {
        let Rig { machine, process, pagemap, mirror, .. } = self;
        machine.check().expect("the machine is whole");
        drop(mirror);
        process.exit();
        machine.check().expect("the machine is whole after the exit");
        assert_eq!(machine.frames(), 0, "system memory leaks");
        assert_eq!(pagemap.used(), 0, "device memory leaks");
        assert_eq!(machine.violations(), Vec::<String>::new());
    }
}

pub(crate) fn mirror(
    process: &Process,
    gpu: &Arc<Gpu>,
    pagemap: &Arc<DevicePagemap>,
) -> Mirror<Gpu> {
    let all = range(0, 1 << 20);
    process.address_space().mirror_with(gpu, all, pagemap).expect("the process lives")
}

/// Makes an access on the device, serving its faults.
pub(crate) fn access(
    mirror: &MirrorHandle<Gpu>,
    address: u64,
    access: Access,
    mut update: impl FnMut(u64) -> u64,
) -> Result<u64, FaultError> {
    loop {
        let table = mirror.inspect(Arc::clone)?;
        match mirror.device().update(&table, address, access, &mut update) {
            Some(old) => return Ok(old),
            None => _ = mirror.handle_fault(Page::containing(address), access)?,
        }
    }
}
