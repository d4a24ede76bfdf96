//! A backend around the simulated one, that does on purpose what happens by chance.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Instant;

use mmu_notifier::Subscriptions;
use uhmm::backend::{
    CannotSplit, Committed, IsolatedPage, Isolation, OutOfSystemMemory, Placement, ReverseMap,
    Select,
};
use uhmm::primitive::{Mutex, lock};
use uhmm::{
    Access, AddressSpace, Backend, Coherence, Death, DeviceBlock, FaultError, Frame, Owner,
    PageEntry, PageRange, SpaceId, Stayed, SystemMemory,
};

use crate::common::Rig;

pub(crate) type Look = dyn Fn(&AddressSpace, PageRange, &mut [PageEntry]) + Send + Sync;
pub(crate) type Fault = dyn Fn(&AddressSpace, PageRange) -> Result<(), FaultError> + Send + Sync;

/// What is wrong with the next isolation: of pages on foreign devices, or of any others.
pub(crate) struct Next {
    pub(crate) foreign: bool,
    pub(crate) stayed: Vec<Stayed>,
    pub(crate) committed: Box<dyn FnOnce() + Send>,
}

pub(crate) struct Around {
    inner: AddressSpace,
    look: Box<Look>,
    fault: Box<Fault>,
    pub(crate) faults: AtomicU32,
    pub(crate) next: Mutex<Option<Next>>,
    /// The ranges of mirrors that have ended, and whether one of just this range was subscribed then.
    pub(crate) ended: Mutex<Vec<(PageRange, bool)>>,
}

impl Around {
    /// Makes an address space over the memory of `rig`'s process, in which `look` comes after each
    /// look at the page tables, and `fault` before each fault.
    pub(crate) fn new(
        rig: &Rig,
        look: impl Fn(&AddressSpace, PageRange, &mut [PageEntry]) + Send + Sync + 'static,
        fault: impl Fn(&AddressSpace, PageRange) -> Result<(), FaultError> + Send + Sync + 'static,
    ) -> (AddressSpace, Arc<Around>) {
        let around = Arc::new(Around {
            inner: rig.process.address_space().clone(),
            look: Box::new(look),
            fault: Box::new(fault),
            faults: AtomicU32::new(0),
            next: Mutex::new(None),
            ended: Mutex::new(Vec::new()),
        });
        (AddressSpace::new(around.clone()), around)
    }
}

impl Backend for Around {
    fn id(&self) -> SpaceId {
        self.inner.backend().id()
    }

    fn notifiers(&self) -> &Arc<Subscriptions> {
        self.inner.backend().notifiers()
    }

    fn coherence(&self) -> Coherence {
        self.inner.backend().coherence()
    }

    fn memory(&self) -> Arc<dyn SystemMemory> {
        self.inner.backend().memory()
    }

    fn snapshot(&self, range: PageRange, entries: &mut Vec<PageEntry>) {
        let start = entries.len();
        self.inner.backend().snapshot(range, entries);
        (self.look)(&self.inner, range, &mut entries[start..]);
    }

    fn fault(
        &self,
        range: PageRange,
        access: Access,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        self.faults.fetch_add(1, SeqCst);
        (self.fault)(&self.inner, range)?;
        self.inner.backend().fault(range, access, keep, deadline)
    }

    fn isolate(&self, range: PageRange, select: Select) -> Box<dyn Isolation> {
        let inner = self.inner.backend().isolate(range, select);
        let foreign = matches!(select, Select::Foreign(_));
        match lock(&self.next).take_if(|next| next.foreign == foreign) {
            Some(Next { stayed, committed, .. }) => Box::new(Told { inner, stayed, committed }),
            None => inner,
        }
    }

    fn exclusive(
        &self,
        range: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        self.inner.backend().exclusive(range, owner, deadline)
    }

    fn end_exclusive(&self, range: PageRange, owner: Owner) {
        self.inner.backend().end_exclusive(range, owner);
    }

    fn mirror_ended(&self, range: PageRange) {
        let subscribed = self.notifiers().subscribed(range.va_range());
        lock(&self.ended).push((range, subscribed.contains(&range.va_range())));
    }

    // The simulated address space ends by itself, with its process.
    fn exit(&self, _: Death) {}
}

struct Told {
    inner: Box<dyn Isolation>,
    stayed: Vec<Stayed>,
    committed: Box<dyn FnOnce() + Send>,
}

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

impl Isolation for Told {
    fn memory(&self) -> Arc<dyn SystemMemory> {
        self.inner.memory()
    }

    fn reverse_map(&self) -> Arc<dyn ReverseMap> {
        self.inner.reverse_map()
    }

    fn pages(&self) -> &[IsolatedPage] {
        self.inner.pages()
    }

    fn block(&self, index: usize) -> Option<&DeviceBlock> {
        self.inner.block(index)
    }

    fn stayed(&self) -> &[Stayed] {
        &self.stayed
    }

    fn split(&mut self, index: usize) -> Result<(), CannotSplit> {
        self.inner.split(index)
    }

    fn allocate_home(&mut self, index: usize) -> Result<Frame, OutOfSystemMemory> {
        self.inner.allocate_home(index)
    }

    fn commit(self: Box<Self>, placements: Vec<Placement>) -> Vec<Committed> {
        let Told { inner, committed, .. } = *self;
        let result = inner.commit(placements);
        committed();
        result
    }
}
