//! The least that a backend and a device's memory can be: pages without contents, none of which is
//! ever unmapped. What is left of the time that something takes on it is the layer's own.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use mmu_notifier::Subscriptions;
use uhmm::backend::{
    CannotSplit, Committed, IsolatedPage, Isolation, OutOfSystemMemory, Placement, ReverseMap,
    Select, Source,
};
use uhmm::{
    Access, Backend, Coherence, CopyJob, Death, DeviceBlock, DeviceFrame, DeviceLocation,
    DeviceMemory, FaultError, Frame, Order, OutOfDeviceMemory, Owner, Page, PageEntry, PageRange,
    SpaceId, Stayed, SystemMemory,
};

/// An address space of pages of one order, from page 0 on, whose frames have the pages' numbers.
pub(crate) struct Plain {
    id: SpaceId,
    notifiers: Arc<Subscriptions>,
    places: Arc<Places>,
}

/// Where the pages are: the block of each that is on a device.
pub(crate) struct Places {
    order: Order,
    memory: Arc<Nothing>,
    blocks: Mutex<Vec<Option<DeviceBlock>>>,
    /// What its reverse map was asked for.
    asked: Mutex<Vec<DeviceLocation>>,
}

/// System memory that nobody reads or writes.
struct Nothing;

/// Pages of a [`Plain`], with the blocks that were taken out of it.
struct Taken {
    places: Arc<Places>,
    pages: Vec<IsolatedPage>,
    blocks: Vec<Option<DeviceBlock>>,
}

/// A device's memory without contents.
pub(crate) struct Counted {
    in_place: bool,
    next: AtomicU64,
    free: AtomicU64,
}

impl Plain {
    /// Makes an address space of `count` pages of `order`, all in system memory.
    pub(crate) fn new(count: usize, order: Order) -> Plain {
        let blocks = Mutex::new((0..count).map(|_| None).collect());
        let asked = Mutex::default();
        let places = Arc::new(Places { order, memory: Arc::new(Nothing), blocks, asked });
        Plain { id: SpaceId::new(), notifiers: Subscriptions::new(), places }
    }

    pub(crate) fn places(&self) -> &Arc<Places> {
        &self.places
    }
}

impl Places {
    fn blocks(&self) -> MutexGuard<'_, Vec<Option<DeviceBlock>>> {
        self.blocks.lock().expect("no panic")
    }

    /// Takes the block that a page is in, which is lost by that.
    pub(crate) fn take(&self, index: usize) -> DeviceBlock {
        self.blocks()[index].take().expect("the page is on a device")
    }

    /// Returns what was to be evicted since the last call.
    pub(crate) fn asked(&self) -> Vec<DeviceLocation> {
        std::mem::take(&mut *self.asked.lock().expect("no panic"))
    }

    fn index(&self, page: Page) -> usize {
        (page.number() >> self.order.get()) as usize
    }

    fn take_all(self: &Arc<Places>, range: PageRange, select: Select) -> Taken {
        let (first, last) = (self.index(range.first()), self.index(range.last()));
        let mut places = self.blocks();
        let (mut pages, mut blocks) = (Vec::new(), Vec::new());
        for index in first..=last.min(places.len() - 1) {
            let owner = places[index].as_ref().map(|block| block.location().owner);
            let selected = match select {
                Select::System { .. } => owner.is_none(),
                Select::Device(of) => owner == Some(of),
                Select::Foreign(of) => owner.is_some_and(|owner| owner != of),
            };
            if !selected {
                continue;
            }
            let number = (index as u64) << self.order.get();
            let page = Page::new(number).expect("a small number");
            let block = places[index].take();
            let source = match &block {
                Some(block) => Source::Device(block.location()),
                None => Source::System(Frame(number)),
            };
            pages.push(IsolatedPage { page, order: self.order, source });
            blocks.push(block);
        }
        Taken { places: Arc::clone(self), pages, blocks }
    }
}

impl Backend for Plain {
    fn id(&self) -> SpaceId {
        self.id
    }

    fn notifiers(&self) -> &Arc<Subscriptions> {
        &self.notifiers
    }

    fn coherence(&self) -> Coherence {
        Coherence::Announced
    }

    fn memory(&self) -> Arc<dyn SystemMemory> {
        self.places.memory.clone()
    }

    fn snapshot(&self, _: PageRange, _: &mut Vec<PageEntry>) {
        unreachable!("no device faults on these pages")
    }

    fn fault(
        &self,
        _: PageRange,
        _: Access,
        _: Option<Owner>,
        _: Option<Instant>,
    ) -> Result<(), FaultError> {
        unreachable!("no device faults on these pages")
    }

    fn isolate(&self, range: PageRange, select: Select) -> Box<dyn Isolation> {
        Box::new(self.places.take_all(range, select))
    }

    fn exclusive(&self, _: PageRange, _: Owner, _: Option<Instant>) -> Result<(), FaultError> {
        unreachable!("no device holds these pages")
    }

    fn end_exclusive(&self, _: PageRange, _: Owner) {}

    fn exit(&self, _: Death) {
        let blocks = std::mem::take(&mut *self.places.blocks());
        drop(blocks);
    }
}

impl Isolation for Taken {
    fn memory(&self) -> Arc<dyn SystemMemory> {
        self.places.memory.clone()
    }

    fn reverse_map(&self) -> Arc<dyn ReverseMap> {
        self.places.clone()
    }

    fn pages(&self) -> &[IsolatedPage] {
        &self.pages
    }

    fn block(&self, index: usize) -> Option<&DeviceBlock> {
        self.blocks[index].as_ref()
    }

    fn stayed(&self) -> &[Stayed] {
        &[]
    }

    fn split(&mut self, _: usize) -> Result<(), CannotSplit> {
        Err(CannotSplit)
    }

    fn allocate_home(&mut self, index: usize) -> Result<Frame, OutOfSystemMemory> {
        Ok(Frame(self.pages[index].page.number()))
    }

    fn commit(mut self: Box<Self>, placements: Vec<Placement>) -> Vec<Committed> {
        for (block, placement) in self.blocks.iter_mut().zip(placements) {
            match placement {
                Placement::Back => {}
                Placement::Device(to) => *block = Some(to),
                Placement::Home => *block = None,
            }
        }
        vec![Committed::Placed; self.pages.len()]
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut blocks = self.places.blocks();
        for (page, block) in self.pages.iter().zip(&mut self.blocks) {
            blocks[self.places.index(page.page)] = block.take();
        }
    }
}

impl std::fmt::Debug for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Taken").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl ReverseMap for Places {
    /// Finds nothing, and remembers what was asked for.
    fn isolate(&self, locations: &[DeviceLocation]) -> Box<dyn Isolation> {
        self.asked.lock().expect("no panic").extend(locations);
        Box::new(Taken {
            places: Arc::new(Places {
                order: self.order,
                memory: self.memory.clone(),
                blocks: Mutex::default(),
                asked: Mutex::default(),
            }),
            pages: Vec::new(),
            blocks: Vec::new(),
        })
    }
}

impl SystemMemory for Nothing {
    fn read(&self, _: Frame, _: usize, _: &mut [u8]) {}

    fn write(&self, _: Frame, _: usize, _: &[u8]) {}

    fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
        0
    }
}

impl Counted {
    /// Makes memory of which there is always enough; `in_place` if it is that of the pages.
    pub(crate) fn new(in_place: bool) -> Arc<Counted> {
        Arc::new(Counted { in_place, next: AtomicU64::new(0), free: AtomicU64::new(0) })
    }

    /// Returns how many pages were given back.
    pub(crate) fn freed(&self) -> u64 {
        self.free.load(Relaxed)
    }
}

impl DeviceMemory for Counted {
    fn capacity(&self) -> u64 {
        1 << 40
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        // Relaxed: a number of its own is all that each caller needs. Blocks are of one order.
        Ok(DeviceFrame(self.next.fetch_add(order.pages(), Relaxed)))
    }

    fn adopt(&self, _: &dyn SystemMemory, from: Frame, _: Order) -> Option<DeviceFrame> {
        self.in_place.then_some(DeviceFrame(from.0))
    }

    fn in_place(&self, _: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        self.in_place.then_some(Frame(frame.0))
    }

    fn free(&self, _: DeviceFrame, order: Order) {
        self.free.fetch_add(order.pages(), Relaxed);
    }

    fn copy(&self, _: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        jobs.iter_mut().for_each(CopyJob::complete);
    }
}
