//! Faults of devices: how a page becomes one that can be used.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mmu_notifier::{Event, EventKind, Owner, thread_number};
use rustix::io::Errno;
use uhmm::{Access, DevicePagemap, FaultError, Order, Page, PageRange};

use super::Space;
use super::home::Put;
use super::snapshot::{TRIES, Watched};
use super::state::{IsolationId, Place, State};
use crate::sys::maps::Kind;

/// How long a sleeper here goes without a look whether it was woken for nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What is to be done about the first page of a range that is out.
enum Next {
    Sleep(IsolationId, Page),
    Home(Arc<DevicePagemap>, Page, Order),
    Revoke(Page),
    Unpark(Page),
}

impl Space {
    /// Does what [`Backend::fault`](uhmm::Backend::fault) says.
    pub(super) fn fault_in(
        &self,
        range: PageRange,
        access: Access,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        if !self.is_here() {
            return Err(FaultError::Released);
        }
        if mmu_notifier::in_callback() {
            return Err(FaultError::SelfWait { page: range.first() });
        }
        self.reserve_this_thread();
        let (permitted, refused) = self.permitted(range, access);
        if let Some(permitted) = permitted {
            self.fetch(permitted, keep, deadline)?;
            self.populate(permitted, access, deadline)?;
        }
        match refused {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Returns the pages from the first on whose mappings allow `access`, and what is wrong with the
    /// one after.
    fn permitted(
        &self,
        range: PageRange,
        access: Access,
    ) -> (Option<PageRange>, Option<FaultError>) {
        let mut next = Some(range.first());
        let mut tries = 0;
        let before = |page: Page| {
            let last = page.number().checked_sub(1).and_then(Page::new);
            last.and_then(|last| PageRange::from_bounds(range.first(), last))
        };
        while let Some(page) = next.filter(|&page| page <= range.last()) {
            let vma = match self.kernel.vma(page) {
                Ok(Some(vma)) if vma.range.contains(page) => vma,
                Ok(_) => return (before(page), Some(FaultError::Hole { page })),
                Err(_) => return (before(page), Some(FaultError::OutOfMemory { page })),
            };
            let rest = PageRange::from_bounds(page, range.last()).expect("checked just now");
            let piece = vma.range.intersection(rest).expect("it holds the page");
            // Before anything is faulted in: somebody else may handle the faults there, and never
            // answer. Nobody would hear of changes then, so it is of no use to a device anyway.
            let allowed = match self.device_rights(&vma) {
                allowed if allowed < access => allowed,
                allowed => match self.watch_around(piece, &vma) {
                    Watched::Before | Watched::Now => allowed,
                    Watched::Changed if tries < TRIES => {
                        tries += 1;
                        continue;
                    }
                    Watched::Changed | Watched::Never => Access::None,
                },
            };
            if allowed < access {
                let denied = FaultError::Denied { page, wanted: access, allowed };
                return (before(page), Some(denied));
            }
            next = vma.range.last().checked_add(1);
        }
        (Some(range), None)
    }

    /// Brings home what is out in `range`, but for what is on the device of `keep`, or held by it.
    fn fetch(
        &self,
        range: PageRange,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        if self.lock().over {
            return Err(FaultError::Released);
        }
        self.fetch_home(range, keep, deadline)
    }

    /// Does what [`fetch`](Space::fetch) does, also at the end of the space.
    pub(super) fn fetch_home(
        &self,
        range: PageRange,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        loop {
            let state = self.lock();
            let Some(next) = self.next_out(&state, range, keep) else { return Ok(()) };
            if let Next::Sleep(isolation, page) = next {
                drop(self.sleep_for(state, isolation, page, deadline)?);
                continue;
            }
            drop(state);
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(FaultError::TimedOut { page: range.first() });
            }
            match next {
                Next::Sleep(..) => {}
                Next::Home(pagemap, page, order) => pagemap.bring_home(self, page, order)?,
                Next::Revoke(page) => drop(self.revoke(page)),
                Next::Unpark(page) => {
                    let put = self.release_block(&mut self.lock(), page);
                    self.settle_unless_leading();
                    if put.parked > 0 {
                        return Err(FaultError::OutOfMemory { page });
                    }
                }
            }
        }
    }

    /// Sleeps until an isolation is over.
    fn sleep_for<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
        isolation: IsolationId,
        page: Page,
        deadline: Option<Instant>,
    ) -> Result<MutexGuard<'s, State>, FaultError> {
        let thread = thread_number();
        if state.waits_for(isolation, thread) {
            return Err(FaultError::SelfWait { page });
        }
        state.waiting.insert(thread, isolation);
        let mut result = Ok(());
        while state.isolations.contains_key(&isolation) {
            let wait = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if wait.is_some_and(|wait| wait.is_zero()) {
                result = Err(FaultError::TimedOut { page });
                break;
            }
            let wait = wait.map_or(LOOK_AGAIN, |wait| wait.min(LOOK_AGAIN));
            let woken = self.arrivals.wait_timeout(state, wait);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting.remove(&thread);
        result.map(|()| state)
    }

    /// Has the kernel fault in what of `range` is not out.
    fn populate(
        &self,
        range: PageRange,
        access: Access,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        let thread = thread_number();
        let gaps = {
            let mut state = self.lock();
            // While the kernel waits on behalf of a thread, others must know for what.
            if state.isolations.values().any(|isolation| isolation.thread == thread) {
                state.populating.insert(thread, range);
            }
            state.gaps(range)
        };
        let result = gaps.into_iter().try_for_each(|gap| self.populate_run(gap, access, deadline));
        self.lock().populating.remove(&thread);
        result
    }

    fn populate_run(
        &self,
        run: PageRange,
        access: Access,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        if run.pages() > 1 && self.populate_until(run, access, deadline).is_ok() {
            return Ok(());
        }
        // Which page it was the kernel does not say.
        run.iter().try_for_each(|page| self.populate_page(page, access, deadline))
    }

    /// Has the kernel fault one page in. What it refuses may be there when it is looked for, since it
    /// was another mapping just then: so it is asked again before an error is believed.
    fn populate_page(
        &self,
        page: Page,
        access: Access,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        let mut tries = 0;
        loop {
            let error = match self.populate_until(page.into(), access, deadline) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN | Errno::INTR) => return Err(FaultError::TimedOut { page }),
                Err(error) => error,
            };
            tries += 1;
            match self.explain(page, access, error) {
                hole @ FaultError::Hole { .. } => return Err(hole),
                error if tries == TRIES => return Err(error),
                _ => {}
            }
        }
    }

    /// Has the kernel fault `pages` in, as often as it is interrupted by signals, until `deadline`.
    fn populate_until(
        &self,
        pages: PageRange,
        access: Access,
        deadline: Option<Instant>,
    ) -> Result<(), Errno> {
        loop {
            match self.kernel.populate(pages, access >= Access::Write) {
                Err(Errno::AGAIN | Errno::INTR)
                    if deadline.is_none_or(|deadline| deadline > Instant::now()) => {}
                result => return result,
            }
        }
    }

    /// Says why the kernel would not fault a page in.
    fn explain(&self, page: Page, access: Access, error: Errno) -> FaultError {
        let denied = |allowed| FaultError::Denied { page, wanted: access, allowed };
        let vma = match self.kernel.vma(page) {
            Ok(Some(vma)) if vma.range.contains(page) => vma,
            _ => return FaultError::Hole { page },
        };
        match error {
            Errno::INVAL => match vma.rights() {
                allowed if allowed < access => denied(allowed),
                // The mapping is of a kind that nobody but the CPUs may use.
                _ => denied(Access::None),
            },
            // None of the pages that were set aside is left.
            Errno::FAULT if vma.kind == Kind::Hugetlb => FaultError::OutOfMemory { page },
            // Beyond the end of a file, or a guard.
            Errno::FAULT if !vma.is_anonymous() => FaultError::EndOfFile { page },
            Errno::FAULT => denied(Access::None),
            _ => FaultError::OutOfMemory { page },
        }
    }

    /// Takes a page back from the device that holds it. The announcement has no owner, so that
    /// device hears of it as well.
    pub(super) fn revoke(&self, page: Page) -> Put {
        let range = PageRange::from(page);
        let announced =
            self.notifiers.invalidate_range_start(Event::new(EventKind::Clear, range.va_range()));
        let put = {
            let mut state = self.lock();
            match state.at(page) {
                Some((first, extent)) if matches!(extent.place, Place::Held { .. }) => {
                    self.release_block(&mut state, first)
                }
                _ => Put::default(),
            }
        };
        drop(announced);
        self.settle_unless_leading();
        put
    }

    fn next_out(&self, state: &State, range: PageRange, keep: Option<Owner>) -> Option<Next> {
        state.overlapping(range).find_map(|(first, extent)| {
            let page = first.max(range.first());
            match &extent.place {
                Place::Transit { isolation, .. } => Some(Next::Sleep(*isolation, page)),
                Place::Device(block) if keep == Some(block.location().owner) => None,
                Place::Device(block) => {
                    Some(Next::Home(Arc::clone(block.pagemap()), page, self.mapped_order(extent)))
                }
                Place::Held { owner, .. } if keep == Some(*owner) => None,
                Place::Held { .. } => Some(Next::Revoke(page)),
                Place::Parked(_) => Some(Next::Unpark(first)),
            }
        })
    }
}
