//! Making contexts forget translations: what an invalidation leaves to be waited for.
//!
//! # Why nothing is used afterwards
//!
//! A context looks a translation up, in its TLB or in the tables, and makes the access through it,
//! with the lock of its TLB held from the first to the last. An invalidation takes the range out of
//! the tables first, and then has each context's lock once. Each access either ended before that, or
//! begins after it. The latter finds nothing in the TLB, since the flush emptied it under that lock,
//! and nothing in the tables. It cannot have filled the TLB from the tables in between and kept that
//! over the flush, since a walk, the filling and the access are under the one lock.
//!
//! The contexts to be flushed are taken in the same step as the range is taken out. One that comes
//! later begins with an empty TLB and walks tables that have the range no more.
//!
//! A context that is not in the middle of an access is flushed when the invalidation begins. Only
//! those that are, are waited for when it is waited for, so several devices stop in parallel. The
//! wait is for one access, which takes no lock that is ever held across an announcement.

use std::fmt;
use std::sync::Arc;

use uhmm::primitive::lock;
use uhmm::{Fence, PageRange, WouldBlock};

use super::tables::{Tables, try_lock};
use super::tlb::TlbCell;
use super::tree::Chain;

/// Contexts that have yet to forget a range. Over when all have.
pub struct Flush {
    tables: Arc<Tables>,
    range: PageRange,
    contexts: Arc<Vec<Arc<TlbCell>>>,
    /// The table nodes that walk caches may still have.
    retired: Chain,
    changed: bool,
    over: bool,
}

/// How a flush is to go wrong or to be late. See [`SoftGpuOptions`](super::SoftGpuOptions).
#[derive(Clone, Copy)]
pub(crate) enum Promptness {
    /// At once, where no access is under way.
    Prompt,
    /// Only when it is waited for.
    Late,
    /// Never, which is a defect.
    Never,
}

impl Flush {
    /// Takes `range` out of the tables and begins to flush it.
    pub(crate) fn begin(tables: &Arc<Tables>, range: PageRange, when: Promptness) -> Flush {
        let (changed, contexts, retired) = tables.remove(range);
        let mut flush =
            Flush { tables: Arc::clone(tables), range, contexts, retired, changed, over: false };
        let over = match when {
            Promptness::Prompt => flush.flush_idle(),
            Promptness::Late => false,
            Promptness::Never => true,
        };
        if over {
            flush.end();
        }
        flush
    }

    /// Takes `range` out of the tables and flushes it, if that takes no waiting.
    pub(crate) fn try_begin(
        tables: &Arc<Tables>,
        range: PageRange,
        when: Promptness,
    ) -> Result<Flush, WouldBlock> {
        let mut state = tables.try_lock().ok_or(WouldBlock)?;
        let cells = Arc::clone(state.cells());
        // All of them or none: a refusal changes nothing.
        let tlbs = cells.iter().map(|cell| try_lock(&cell.tlb)).collect::<Option<Vec<_>>>();
        let mut tlbs = tlbs.ok_or(WouldBlock)?;
        let (changed, contexts, retired) = tables.remove_in(&mut state, range);
        if !matches!(when, Promptness::Never) {
            tlbs.iter_mut().for_each(|tlb| tlb.flush(range));
        }
        drop(tlbs);
        state.free(retired);
        drop(state);
        let tables = Arc::clone(tables);
        Ok(Flush { tables, range, contexts, retired: Chain::default(), changed, over: true })
    }

    /// Flushes the contexts that make no access now, and says whether those are all.
    fn flush_idle(&self) -> bool {
        let mut all = true;
        for cell in self.contexts.iter() {
            match try_lock(&cell.tlb) {
                Some(mut tlb) => tlb.flush(self.range),
                None => all = false,
            }
        }
        all
    }

    fn flush_all(&mut self) {
        for cell in self.contexts.iter() {
            lock(&cell.tlb).flush(self.range);
        }
        self.end();
    }

    fn end(&mut self) {
        self.tables.free(std::mem::take(&mut self.retired));
        self.over = true;
    }
}

impl Fence for Flush {
    fn wait(mut self) {
        if !self.over {
            self.flush_all();
        }
    }

    fn is_over(&self) -> bool {
        self.over
    }

    fn changed(&self) -> bool {
        self.changed
    }
}

impl Drop for Flush {
    /// An announcer that unwinds drops its fences: the device stops all the same.
    fn drop(&mut self) {
        if !self.over {
            self.flush_all();
        }
    }
}

impl fmt::Debug for Flush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flush")
            .field("range", &self.range)
            .field("contexts", &self.contexts.len())
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}
