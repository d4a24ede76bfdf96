//! The GPU's page tables, and who walks them.
//!
//! One [`Tables`] is what the hardware walks for one mirror. Its driver writes it through a
//! [`PageTable`](super::PageTable), under the mirror's lock, and execution contexts read it.
//!
//! What becomes of the nodes of its [`Tree`] is told there; here is who may use them.

use std::fmt;
use std::sync::Arc;

use uhmm::primitive::atomic::{AtomicBool, Ordering};
use uhmm::primitive::{Mutex, MutexGuard, lock};
use uhmm::{Access, Order, Page, PageRange, SystemMemory};

use super::tlb::{TlbCell, WalkCache};
use super::tree::{Chain, Leaf, NodeCounts, Target, Tree, Walked};
use super::violations::Violations;

/// What the page tables hold for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Where the page is.
    pub target: Target,
    /// What may be done there.
    pub access: Access,
    /// The size of the leaf it was found in: [`Order::PAGE`] or [`Order::HUGE`].
    pub order: Order,
}

/// What the hardware knows of one mirror.
pub(crate) struct Tables {
    id: u64,
    range: PageRange,
    system: Arc<dyn SystemMemory>,
    state: Mutex<State>,
    /// No fault is served any more. Written and read under the lock of the fault buffer, so that
    /// none is entered after those that wait were told.
    gone: AtomicBool,
    violations: Arc<Violations>,
}

/// Correlated, so one lock: a context that is not in the list yet walks a tree in which everything
/// that was invalidated before it came is missing.
pub(crate) struct State {
    tree: Tree,
    /// Copied on write, so that an invalidation takes it without allocating.
    contexts: Arc<Vec<Arc<TlbCell>>>,
}

impl Tables {
    pub(crate) fn new(
        range: PageRange,
        system: Arc<dyn SystemMemory>,
        violations: Arc<Violations>,
    ) -> Tables {
        // Relaxed: each caller just takes a different number.
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let state = State { tree: Tree::new(), contexts: Arc::default() };
        Tables {
            id,
            range,
            system,
            state: Mutex::new(state),
            gone: AtomicBool::new(false),
            violations,
        }
    }

    /// Returns a number that no other tables have.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn range(&self) -> PageRange {
        self.range
    }

    pub(crate) fn system(&self) -> &Arc<dyn SystemMemory> {
        &self.system
    }

    /// Tells whether the mirror has ended. Under the fault buffer's lock.
    pub(crate) fn is_gone(&self) -> bool {
        // Relaxed: ordered by the fault buffer's lock.
        self.gone.load(Ordering::Relaxed)
    }

    /// Notes that the mirror has ended. Under the fault buffer's lock.
    pub(crate) fn set_gone(&self) {
        // Relaxed: ordered by the fault buffer's lock.
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Enters and removes leaves for `range`: `leaf(page)` says what each page is to get. A pair of
    /// a leaf and [`Order::HUGE`], for the first page of a block, is for the whole block.
    ///
    /// Nothing is flushed here. So an entry may add to what there is and must not contradict it:
    /// another target, no access where there was some, or reading where there was more, are left to
    /// an invalidation, which somebody forgot then. An atomic access may become one to write, which
    /// is what a fault finds that is served beside the one that took the page.
    pub(crate) fn enter(
        &self,
        range: PageRange,
        mut leaf: impl FnMut(Page) -> Option<(Leaf, Order)>,
    ) {
        let mut state = lock(&self.state);
        let mut next = Some(range.first());
        while let Some(page) = next.filter(|&page| range.contains(page)) {
            let pages = match leaf(page) {
                Some((leaf, Order::HUGE)) => {
                    self.judge_block(&state.tree, page, leaf);
                    state.tree.enter_huge(page, leaf);
                    Order::HUGE.pages()
                }
                Some((leaf, _)) => {
                    self.contradicts(&state.tree, page, Some(leaf));
                    state.tree.enter_page(page, leaf);
                    1
                }
                None => {
                    self.contradicts(&state.tree, page, None);
                    state.tree.remove(page.into());
                    1
                }
            };
            next = page.checked_add(pages);
        }
    }

    /// Reports an entry for a large page that contradicts what is there.
    fn judge_block(&self, tree: &Tree, first: Page, leaf: Leaf) {
        // One page tells for all where a large leaf is there already.
        let large = tree.walk(first).is_some_and(|walked| walked.order == Order::HUGE);
        let pages = if large { first.into() } else { first.block(Order::HUGE) };
        // One report is enough.
        let _wrong = pages
            .iter()
            .zip(0..)
            .any(|(page, index)| self.contradicts(tree, page, Some(leaf.plus(index))));
    }

    /// Reports an entry that contradicts what is there for `page`, and says whether it does.
    fn contradicts(&self, tree: &Tree, page: Page, new: Option<Leaf>) -> bool {
        let Some(Walked { leaf: old, .. }) = tree.walk(page) else { return false };
        let agrees = new.is_some_and(|new| {
            new.target == old.target && new.access >= old.access.min(Access::Write)
        });
        if !agrees && !self.violations.observed {
            self.violations.report(format!(
                "{page} was entered as {new:?} over {old:?}, which nobody invalidated"
            ));
        }
        !agrees
    }

    /// Takes everything of `range` out of the tree. What comes out is for a flush: whether there was
    /// anything, the contexts to be flushed, and the nodes to free when they are.
    pub(crate) fn remove(&self, range: PageRange) -> (bool, Arc<Vec<Arc<TlbCell>>>, Chain) {
        let mut state = lock(&self.state);
        self.remove_in(&mut state, range)
    }

    /// Takes the lock of the tree if nobody has it.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        try_lock(&self.state)
    }

    /// Does what [`remove`](Tables::remove) does, under the lock that the caller has.
    pub(crate) fn remove_in(
        &self,
        state: &mut State,
        range: PageRange,
    ) -> (bool, Arc<Vec<Arc<TlbCell>>>, Chain) {
        let changed = state.tree.remove(range);
        let retired = std::mem::take(&mut state.tree.retired);
        (changed, Arc::clone(&state.contexts), retired)
    }

    /// Makes retired nodes usable: each context has dropped its walk cache since they were retired.
    pub(crate) fn free(&self, retired: Chain) {
        if !retired.is_empty() {
            lock(&self.state).tree.free(retired);
        }
    }

    /// Walks to `page`, from the node that `cache` has for it or from the root.
    pub(crate) fn walk(&self, page: Page, cache: &mut WalkCache) -> Option<Walked> {
        let state = lock(&self.state);
        if let Some(node) = cache.get(page) {
            match state.tree.walk_from(node, page) {
                Ok(Some(leaf)) => {
                    return Some(Walked { leaf, order: Order::PAGE, node: Some(node) });
                }
                Ok(None) => {}
                Err(base) => self.violations.report(format!(
                    "the walk for {page} began in a table node that is now in use for the pages \
                     from {base:#x}: it was used again before the walk caches were flushed"
                )),
            }
            cache.remove(page);
        }
        let walked = state.tree.walk(page)?;
        if let Some(node) = walked.node {
            cache.insert(page, node);
        }
        Some(walked)
    }

    /// Looks `page` up as a context would that has nothing cached.
    pub(crate) fn translation(&self, page: Page) -> Option<Translation> {
        let state = lock(&self.state);
        let Walked { leaf, order, .. } = state.tree.walk(page)?;
        Some(Translation { target: leaf.target, access: leaf.access, order })
    }

    /// Counts the nodes by walking the tree.
    pub(crate) fn nodes(&self) -> NodeCounts {
        lock(&self.state).tree.count()
    }

    pub(crate) fn add_context(&self, cell: Arc<TlbCell>) {
        let mut state = lock(&self.state);
        Arc::make_mut(&mut state.contexts).push(cell);
    }

    pub(crate) fn remove_context(&self, cell: &Arc<TlbCell>) {
        let mut state = lock(&self.state);
        Arc::make_mut(&mut state.contexts).retain(|other| !Arc::ptr_eq(other, cell));
    }

    /// Returns the contexts that may use these tables.
    pub(crate) fn contexts(&self) -> Arc<Vec<Arc<TlbCell>>> {
        Arc::clone(&lock(&self.state).contexts)
    }

    /// Checks that the tree is whole, and that no context uses a translation that is not in it.
    pub(crate) fn check(&self) -> Result<(), String> {
        lock(&self.state).tree.check()?;
        for cell in self.contexts().iter() {
            let tlb = lock(&cell.tlb);
            for (page, cached) in tlb.entries() {
                let now = self.translation(page).map(|now| (now.target, now.access));
                let stale = match now {
                    Some((target, access)) => target != cached.target || access < cached.access,
                    None => true,
                };
                if stale {
                    let context = cell.id;
                    return Err(format!(
                        "context {context} has {page} cached as {cached:?}, and the table says \
                         {now:?}"
                    ));
                }
            }
        }
        Ok(())
    }
}

impl State {
    pub(crate) fn cells(&self) -> &Arc<Vec<Arc<TlbCell>>> {
        &self.contexts
    }

    pub(crate) fn free(&mut self, retired: Chain) {
        self.tree.free(retired);
    }
}

/// Locks `mutex` if nobody has it.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(std::sync::TryLockError::Poisoned(poison)) => Some(poison.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => None,
    }
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").field("id", &self.id).field("range", &self.range).finish()
    }
}
