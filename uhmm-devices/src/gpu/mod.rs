//! A GPU in software: page tables, TLBs, memory, a copy engine and replayable faults.
//!
//! It is a [`Device`] like one in hardware would be, and does on purpose what those make difficult:
//! translations are cached and used until they are flushed, walks begin at remembered table nodes,
//! faults go through a bounded buffer and are served later by somebody else, allocations and copies
//! fail. What must never happen is noticed and [reported](SoftGpu::violations).
//!
//! # Locks
//!
//! | lock | taken while holding | held for |
//! | --- | --- | --- |
//! | the mirror's | whatever the layer above holds | a `map` or an `invalidate`: none of these waits for a context |
//! | a context's TLB | nothing; or the mirror's and the tables', but then only where it is free | one access of at most a page, with its walk |
//! | the tables' | the mirror's, or a context's TLB | a walk, or entering or removing a range |
//! | the fault buffer's | the mirror's | a few instructions |
//! | the allocator's | whatever a backend holds | a block that is given out or comes back |
//! | a frame's | a context's TLB, the tables', the allocator's, or whatever a backend holds | one access of at most a page |
//! | the injector's | the mirror's, a context's TLB, or whatever a backend holds | a few instructions |
//! | that of the list of violations | any | adding one |
//!
//! A violation is also reported to `tracing` where it is found, so a subscriber may run under any of
//! these: it must use neither the GPU nor the address space.
//!
//! While a context has its TLB locked it calls [`SystemMemory`] and nothing else of the layers
//! above. A context that waits for a fault holds nothing. So an invalidation that waits for a TLB
//! waits for one access to memory, and no access waits for an invalidation.

mod buddy;
mod compare;
mod context;
mod fault;
mod fault_buffer;
mod flush;
pub mod kernels;
mod memory;
mod service;
mod tables;
mod tlb;
mod tree;
mod view;
mod violations;

#[cfg(all(test, not(shuttle)))]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mmu_notifier::SubscribeError;
use uhmm::primitive::atomic::{AtomicU64, Ordering};
use uhmm::{
    Access, AddressSpace, Clock, Device, DevicePagemap, Event, EventKind, Injector, Mirror,
    MirrorHandle, Order, Page, PageEntry, PageRange, PagemapOptions, Released, Residency,
    SystemMemory, WouldBlock,
};

pub use compare::{CompareError, Comparison, Difference, compare};
pub use context::{Context, RunningKernel};
pub use fault::{FaultReason, KernelFault};
pub use fault_buffer::FaultStatistics;
pub use flush::Flush;
pub use memory::{FREED, FRESH, LocalMemory, Stamp};
pub use service::{FaultService, ServiceError, Serviced};
pub use tables::Translation;
pub use tree::{NodeCounts, Target};
pub use view::{DeviceMemoryView, Word};

use fault_buffer::FaultBuffer;
use flush::Promptness;
use tables::Tables;
use tree::Leaf;
use violations::{Alarm, Violations};

/// A GPU in software. See the [module](self).
pub struct SoftGpu {
    options: SoftGpuOptions,
    memory: Arc<LocalMemory>,
    pagemap: Option<Arc<DevicePagemap>>,
    faults: FaultBuffer,
    contexts: AtomicU64,
    clock: Clock,
    violations: Arc<Violations>,
}

/// How a [`SoftGpu`] is made. The defaults are a small GPU that works.
#[derive(Clone)]
pub struct SoftGpuOptions {
    memory_pages: u64,
    pagemap: PagemapOptions,
    injector: Injector,
    tlb_entries: usize,
    fault_buffer: usize,
    batch: usize,
    replay: ReplayPolicy,
    max_retries: u32,
    max_replays: u32,
    patience: Duration,
    break_flush: bool,
    checksums: bool,
    observed: bool,
    alarm: Option<Alarm>,
}

/// When sleeping contexts are woken to try again (feature F62).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReplayPolicy {
    /// After each block of 2 MiB that was served: soonest, and most often.
    Block,
    /// After each batch.
    Batch,
    /// After each batch, and what is in the buffer by then is dropped: much of it is served already,
    /// and what is not will be reported again.
    #[default]
    BatchFlush,
    /// When the buffer is empty.
    Once,
}

/// What the driver holds of the page tables of one mirror.
pub struct PageTable {
    tables: Arc<Tables>,
}

impl SoftGpuOptions {
    /// Makes the default options: 16 MiB of memory, and nothing fails.
    pub fn new() -> SoftGpuOptions {
        SoftGpuOptions::default()
    }

    /// Sets how much memory the GPU has. With none it has no [`pagemap`](SoftGpu::pagemap), and works
    /// on system memory alone.
    #[must_use]
    pub fn memory_pages(mut self, pages: u64) -> SoftGpuOptions {
        self.memory_pages = pages;
        self
    }

    /// Sets how the memory is registered: its limit, policies, clock and name.
    #[must_use]
    pub fn pagemap(mut self, options: PagemapOptions) -> SoftGpuOptions {
        self.pagemap = options;
        self
    }

    /// Sets what makes steps fail. The steps are listed in the documentation of the crate.
    #[must_use]
    pub fn injector(mut self, injector: Injector) -> SoftGpuOptions {
        self.injector = injector;
        self
    }

    /// Sets about how many translations a context caches. They are kept in sets of four.
    #[must_use]
    pub fn tlb_entries(mut self, entries: usize) -> SoftGpuOptions {
        self.tlb_entries = entries;
        self
    }

    /// Sets how many faults the fault buffer holds. At least one.
    #[must_use]
    pub fn fault_buffer(mut self, faults: usize) -> SoftGpuOptions {
        self.fault_buffer = faults.max(1);
        self
    }

    /// Sets how many faults are served together. At least one.
    #[must_use]
    pub fn batch(mut self, faults: usize) -> SoftGpuOptions {
        self.batch = faults.max(1);
        self
    }

    /// Sets when contexts try again.
    #[must_use]
    pub fn replay(mut self, policy: ReplayPolicy) -> SoftGpuOptions {
        self.replay = policy;
        self
    }

    /// Sets how often serving one access may fail in a way that may pass, before the access fails.
    /// Between its tries the context waits, by the clock of the GPU's memory if it has any: ten
    /// microseconds at first, and twice as long each time up to ten milliseconds.
    #[must_use]
    pub fn max_retries(mut self, retries: u32) -> SoftGpuOptions {
        self.max_retries = retries;
        self
    }

    /// Sets how often one access may be replayed, for whatever reason, before it fails.
    #[must_use]
    pub fn max_replays(mut self, replays: u32) -> SoftGpuOptions {
        self.max_replays = replays;
        self
    }

    /// Sets how long one access may wait for its faults to be served, before it fails.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> SoftGpuOptions {
        self.patience = patience;
        self
    }

    /// Makes the memory keep a checksum of each page that the copy engine has filled. A page that is
    /// copied out and is not what was copied in, though no kernel has written to it, is a
    /// [violation](SoftGpu::violations). The default keeps none.
    #[must_use]
    pub fn checksums(mut self, checksums: bool) -> SoftGpuOptions {
        self.checksums = checksums;
        self
    }

    /// Says that the GPU is for address spaces whose changes are only
    /// [observed](uhmm::Coherence::Observed): an entry that contradicts what nobody has invalidated yet
    /// is no violation there.
    #[must_use]
    pub fn observed(mut self) -> SoftGpuOptions {
        self.observed = true;
        self
    }

    /// Sets what is called with each [violation](SoftGpu::violations), where it is found. It runs
    /// under any of the GPU's locks, and uses neither the GPU nor the address space.
    #[must_use]
    pub fn alarm(mut self, alarm: impl Fn(&str) + Send + Sync + 'static) -> SoftGpuOptions {
        self.alarm = Some(Arc::new(alarm));
        self
    }

    /// Makes the GPU one that never flushes its TLBs and walk caches, and says that it did: the
    /// defect that tests must find.
    #[must_use]
    pub fn break_flush(mut self) -> SoftGpuOptions {
        self.break_flush = true;
        self
    }
}

impl Default for SoftGpuOptions {
    fn default() -> SoftGpuOptions {
        SoftGpuOptions {
            memory_pages: 4096,
            pagemap: PagemapOptions::new(),
            injector: Injector::new(),
            tlb_entries: 64,
            fault_buffer: 1024,
            batch: 256,
            replay: ReplayPolicy::default(),
            max_retries: 64,
            max_replays: 1_000_000,
            patience: Duration::from_secs(60),
            break_flush: false,
            checksums: false,
            observed: false,
            alarm: None,
        }
    }
}

impl fmt::Debug for SoftGpuOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftGpuOptions")
            .field("memory_pages", &self.memory_pages)
            .field("pagemap", &self.pagemap)
            .field("injector", &self.injector)
            .field("tlb_entries", &self.tlb_entries)
            .field("fault_buffer", &self.fault_buffer)
            .field("batch", &self.batch)
            .field("replay", &self.replay)
            .field("max_retries", &self.max_retries)
            .field("max_replays", &self.max_replays)
            .field("patience", &self.patience)
            .field("break_flush", &self.break_flush)
            .field("checksums", &self.checksums)
            .field("observed", &self.observed)
            .field("alarm", &self.alarm.is_some())
            .finish()
    }
}

impl SoftGpu {
    /// Makes a GPU and registers its memory.
    pub fn new(options: SoftGpuOptions) -> Arc<SoftGpu> {
        let violations = Arc::new(Violations::new(options.alarm.clone(), options.observed));
        let (pages, injector) = (options.memory_pages, options.injector.clone());
        let memory = LocalMemory::new(pages, injector, Arc::clone(&violations));
        let memory = Arc::new(if options.checksums { memory.with_checksums() } else { memory });
        let pagemap = (pages > 0)
            .then(|| DevicePagemap::register_with(memory.clone(), options.pagemap.clone()));
        let clock = pagemap.as_ref().map_or_else(Clock::system, |own| own.clock().clone());
        Arc::new(SoftGpu {
            faults: FaultBuffer::new(options.fault_buffer),
            options,
            memory,
            pagemap,
            contexts: AtomicU64::new(0),
            clock,
            violations,
        })
    }

    /// Makes the GPU mirror `range`, with its own memory if it has any. Nothing is translated yet:
    /// kernels fault what they touch.
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::mirror`].
    pub fn mirror(
        self: &Arc<Self>,
        space: &AddressSpace,
        range: PageRange,
    ) -> Result<Mirror<SoftGpu>, SubscribeError> {
        match &self.pagemap {
            Some(pagemap) => space.mirror_with(self, range, pagemap),
            None => space.mirror(self, range),
        }
    }

    /// Makes a context for kernels in the address space of `mirror`.
    ///
    /// # Errors
    ///
    /// [`Released`]: the mirror has ended.
    ///
    /// # Panics
    ///
    /// If the mirror is another device's.
    pub fn context(self: &Arc<Self>, mirror: &MirrorHandle<SoftGpu>) -> Result<Context, Released> {
        Context::new(self, mirror)
    }

    /// Returns the GPU's own memory.
    pub fn memory(&self) -> &Arc<LocalMemory> {
        &self.memory
    }

    /// Returns its memory as a place for pages, if it has any.
    pub fn pagemap(&self) -> Option<&Arc<DevicePagemap>> {
        self.pagemap.as_ref()
    }

    /// Returns what makes its steps fail.
    pub fn injector(&self) -> &Injector {
        &self.options.injector
    }

    /// Takes faults again after a [`FaultService`] was stopped, to be served by
    /// [`service_once`](SoftGpu::service_once). While a service is being stopped it does nothing.
    pub fn accept_faults(&self) {
        self.faults.reopen();
    }

    /// Tells whether an access may begin to fault, or would be refused with
    /// [`FaultReason::Stopped`].
    pub fn accepts_faults(&self) -> bool {
        self.faults.is_open()
    }

    /// Returns how many faults are in the buffer.
    pub fn pending_faults(&self) -> usize {
        self.faults.len()
    }

    /// Returns how many contexts sleep until a fault of theirs has been seen to, or until the buffer
    /// has room for it. A fault that was fetched and not replayed yet counts here, and not among the
    /// pending ones.
    pub fn stalled_contexts(&self) -> usize {
        self.faults.sleepers()
    }

    /// Returns what the fault buffer has seen so far.
    pub fn fault_statistics(&self) -> FaultStatistics {
        self.faults.statistics()
    }

    /// Returns the rules that were seen broken: accesses to device memory that is free or was given
    /// to somebody else, that was copied out or not filled yet, walks through table nodes that are in
    /// use for something else, entries that contradict each other or what nobody invalidated, blocks
    /// of memory that are given back by whom does not hold them, panics of the fault service. Empty,
    /// or there is a bug.
    pub fn violations(&self) -> Vec<String> {
        self.violations.list()
    }

    /// Checks the memory's accounts, and the page tables of `mirrors`, against which no context may
    /// have anything cached that is not in them. To be called while nothing moves and nothing is
    /// invalidated; kernels may run that do not fault.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, or the first [violation](SoftGpu::violations).
    pub fn check<'a>(
        &self,
        mirrors: impl IntoIterator<Item = &'a MirrorHandle<SoftGpu>>,
    ) -> Result<(), String> {
        if let Some(violation) = self.violations().into_iter().next() {
            return Err(violation);
        }
        self.memory.check()?;
        for mirror in mirrors {
            if let Ok(tables) = mirror.inspect(|table| Arc::clone(table.tables())) {
                tables.check()?;
            }
        }
        Ok(())
    }

    pub(crate) fn options(&self) -> &SoftGpuOptions {
        &self.options
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(crate) fn faults(&self) -> &FaultBuffer {
        &self.faults
    }

    pub(crate) fn local_memory(&self) -> &LocalMemory {
        &self.memory
    }

    pub(crate) fn next_context(&self) -> u64 {
        // Relaxed: each caller just takes a different number.
        self.contexts.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn violation(&self, violation: String) {
        self.violations.report(violation);
    }

    fn promptness(&self) -> Promptness {
        if self.options.break_flush {
            Promptness::Never
        } else if self.injector().fails("late-flush") {
            Promptness::Late
        } else {
            Promptness::Prompt
        }
    }

    /// Turns the entry of `page` into a leaf, and says how large a one.
    fn leaf(&self, range: PageRange, entries: &[PageEntry], page: Page) -> Option<(Leaf, Order)> {
        let index = range.index_of(page)?;
        let leaf = self.leaf_of(page, &entries[index])?;
        let block = page.block(Order::HUGE);
        if entries[index].order < Order::HUGE || block.first() != page || !range.covers(block) {
            return Some((leaf, Order::PAGE));
        }
        let mut order = Order::HUGE;
        for (other, number) in block.iter().zip(0..).skip(1) {
            let expected = leaf.plus(number);
            let found = self.leaf_of(other, &entries[index + number as usize]);
            if found == Some(expected) {
                continue;
            }
            // Pieces that were allocated apart may still lie side by side.
            order = Order::PAGE;
            if !found.is_some_and(|found| found.leads_beside(expected)) {
                let entry = &entries[index];
                self.violation(format!(
                    "{page} is said to be of a large page by {entry:?}, and {other} is {found:?}"
                ));
                break;
            }
        }
        Some((leaf, order))
    }

    fn leaf_of(&self, page: Page, entry: &PageEntry) -> Option<Leaf> {
        if entry.access == Access::None {
            return None;
        }
        let target = match entry.residency {
            Residency::System(frame) | Residency::Exclusive { frame, .. } => Target::System(frame),
            Residency::Device(at)
                if self.pagemap.as_ref().is_some_and(|own| own.owner() == at.owner) =>
            {
                let Some(stamp) = self.memory.enter(at.frame) else {
                    self.violation(format!("{page} is said to be in {at:?}, which is free"));
                    return None;
                };
                Target::Local(at.frame, stamp)
            }
            residency => {
                self.violation(format!("{page} is to be mapped, and is {residency:?}"));
                return None;
            }
        };
        Some(Leaf { target, access: entry.access })
    }
}

impl Device for SoftGpu {
    type PageTable = PageTable;
    type Fence = Flush;

    fn page_table(&self, range: PageRange, memory: &Arc<dyn SystemMemory>) -> PageTable {
        let violations = Arc::clone(&self.violations);
        PageTable { tables: Arc::new(Tables::new(range, Arc::clone(memory), violations)) }
    }

    fn map(&self, table: &mut PageTable, range: PageRange, entries: &[PageEntry]) {
        table.tables.enter(range, |page| self.leaf(range, entries, page));
    }

    fn invalidate(&self, table: &mut PageTable, event: &Event) -> Flush {
        let range = PageRange::covering(event.range());
        if event.kind() == EventKind::Release && range.covers(table.tables.range()) {
            // First nobody comes in any more, then nobody is left inside (acceptance D11).
            self.faults.end_tables(&table.tables);
        }
        Flush::begin(&table.tables, range, self.promptness())
    }

    fn try_invalidate(&self, table: &mut PageTable, event: &Event) -> Result<Flush, WouldBlock> {
        if event.kind() == EventKind::Release {
            return Err(WouldBlock);
        }
        let range = PageRange::covering(event.range());
        Flush::try_begin(&table.tables, range, self.promptness())
    }
}

impl PageTable {
    /// Returns the pages that are mirrored.
    pub fn range(&self) -> PageRange {
        self.tables.range()
    }

    /// Returns what the tables hold for `page`.
    pub fn translation(&self, page: Page) -> Option<Translation> {
        self.tables.translation(page)
    }

    /// Counts the nodes of the tables.
    pub fn nodes(&self) -> NodeCounts {
        self.tables.nodes()
    }

    pub(crate) fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }
}

impl fmt::Debug for SoftGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftGpu")
            .field("memory", &self.memory)
            .field("pagemap", &self.pagemap)
            .field("faults", &self.fault_statistics())
            .field("violations", &self.violations)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable")
            .field("range", &self.range())
            .field("nodes", &self.nodes())
            .finish()
    }
}
