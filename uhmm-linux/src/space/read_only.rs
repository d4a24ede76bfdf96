//! Pages of mappings that may only be read.
//!
//! The kernel moves pages between mappings that may both be stored to (`UFFDIO_MOVE`), and to let
//! the program's be, for a moment, would let the program store. So these take two steps. First
//! mremap(2) puts them [aside](crate::sys::aside), as they are and in one step against the CPUs, and
//! leaves their mapping, which is registered, without them. From there, where stores are allowed,
//! they move to staging like any others, and those that do not, since a device has them pinned, go
//! back the way they came.
//!
//! Meanwhile they are in transit, so whoever touches them waits. A child that is born meanwhile lacks
//! them, like all that is in transit, and those that went back it is given.
//!
//! mremap does not refuse, as `UFFDIO_MOVE` does, while an event is unread. If somebody had put another
//! mapping in the place of this one, it would be pages of that which go, and whoever uses them would
//! find zeroes. So this is done where changes are announced, and only while none of them is being
//! made there ([`Turns`](super::turns::Turns)). What is not announced
//! ([`Exception`](crate::announce::Exception)) puts no other mapping anywhere.
//!
//! The kernel tells of both calls, by events that the leader reads. They change nothing that stands in
//! the state, and are passed over there.

use mmu_notifier::{Event, EventKind, Owner};
use rustix::io::Errno;
use smallvec::SmallVec;
use uhmm::{Order, Page, PageRange, StayReason};

use super::isolation::{Contents, ProcessIsolation};
use super::pool::{PoolBlock, aligned_blocks};
use super::state::{CHUNK, OfOurMaking, State, Token, numbers};
use super::take::{Fate, Run, TRIES, is_whole, movable, report_out};
use super::{Space, count, fatal, serve};
use crate::mutant::mutant;
use crate::sys::advise;
use crate::sys::aside::Aside;
use crate::sys::maps::Vma;
use crate::sys::userfaultfd::Modes;

/// A block that is in transit, and put aside.
struct Block {
    token: Token,
    first: Page,
    order: Order,
    /// Where it goes, if there is room.
    staged: Option<PoolBlock>,
    runs: SmallVec<[Run; 1]>,
    /// Whether it is where it was.
    undisturbed: bool,
}

impl Block {
    fn pages(&self) -> PageRange {
        self.first.block(self.order)
    }

    /// Returns what of it stays, and why.
    fn stayed(&self) -> impl Iterator<Item = (PageRange, StayReason)> {
        self.runs.iter().filter_map(|run| match run.fate {
            Fate::Stayed(reason) => Some((run.pages, reason)),
            _ => None,
        })
    }
}

impl Space {
    /// Takes what stayed since it may only be read, where changes are announced.
    pub(super) fn take_read_only(&self, isolation: &mut ProcessIsolation, to: Owner) {
        // The leader would wait for itself to read an event.
        if self.coverage().is_none() || serve::is_leading() {
            return;
        }
        let found = isolation.withdraw(StayReason::ReadOnly);
        for pages in found.iter().flat_map(|pages| pages.blocks(CHUNK)) {
            let event = Event::new(EventKind::Migrate, pages.va_range());
            let announced = self.notifiers.invalidate_range_start(event);
            match self.turns.keep(pages) {
                Some(_kept) => self.take_kept(isolation, pages, to),
                None => isolation.stay(pages, StayReason::Busy),
            }
            drop(announced);
        }
        if !found.is_empty() {
            isolation.sort();
        }
    }

    /// Takes what can be taken of `pages`, of one chunk, which nobody changes.
    fn take_kept(&self, isolation: &mut ProcessIsolation, pages: PageRange, to: Owner) {
        let mut next = Some(pages);
        while let Some(rest) = next {
            let Ok(Some(vma)) = self.kernel.vma(rest.first()) else {
                isolation.stay(rest, StayReason::Changed);
                return;
            };
            let Some(part) =
                vma.range.intersection(rest).filter(|_| vma.range.contains(rest.first()))
            else {
                isolation.stay(rest, StayReason::Changed);
                return;
            };
            let after = part.last().checked_add(1);
            next = after.and_then(|first| PageRange::from_bounds(first, rest.last()));
            match self.may_be_put_aside(&vma) {
                Ok(()) => self.take_part(isolation, part, vma.range, to),
                Err(reason) => isolation.stay(part, reason),
            }
        }
    }

    fn may_be_put_aside(&self, vma: &Vma) -> Result<(), StayReason> {
        match movable(vma) {
            Err(StayReason::ReadOnly) if vma.executable || !vma.readable => {
                Err(StayReason::ReadOnly)
            }
            // mremap would unlock the mapping.
            Err(StayReason::ReadOnly) if advise::is_locked(vma.range) => Err(StayReason::Locked),
            Err(StayReason::ReadOnly) => Ok(()),
            Err(reason) => Err(reason),
            // It may be stored to by now.
            Ok(()) => Err(StayReason::Changed),
        }
    }

    fn take_part(
        &self,
        isolation: &mut ProcessIsolation,
        part: PageRange,
        mapping: PageRange,
        to: Owner,
    ) {
        let aside = match Aside::new() {
            Ok(aside) if self.kernel.allows("aside") => aside,
            _ => return isolation.stay(part, StayReason::OutOfSystemMemory),
        };
        let mut gaps = SmallVec::<[PageRange; 2]>::new();
        {
            let mut state = self.lock();
            if state.forking > 0 || state.over || state.poisoned.overlaps(&numbers(part)) {
                return isolation.stay(part, StayReason::Busy);
            }
            let allowed =
                self.allowed(&mut state, part, &mut |pages, why| isolation.stay(pages, why));
            for part in allowed {
                let registered = self.register_missing(&mut state, part, mapping);
                // What is noted as registered may have been replaced, and nothing said so.
                let again = || self.kernel.register(part, Modes::MISSING);
                let registered =
                    registered.and_then(|()| again().map_err(|_| StayReason::Unsupported));
                match registered {
                    Ok(()) => {
                        report_out(&state, isolation, part, to);
                        gaps.extend(state.gaps(part));
                    }
                    Err(reason) => isolation.stay(part, reason),
                }
            }
        }
        gaps.into_iter().for_each(|gap| self.take_gap(isolation, &aside, gap));
    }

    /// Takes `gap`, of which nothing is out.
    fn take_gap(&self, isolation: &mut ProcessIsolation, aside: &Aside, gap: PageRange) {
        let Some(mut blocks) = self.put_aside(isolation, aside, gap) else { return };
        let mut state = self.lock();
        self.move_from_aside(&mut state, aside, gap, &mut blocks);
        let stayed: SmallVec<[PageRange; 2]> =
            blocks.iter().flat_map(Block::stayed).map(|(pages, _)| pages).collect();
        drop(state);
        self.put_back(aside, &stayed);
        let mut state = self.lock();
        let state = &mut *state;
        let supplied =
            if mutant!("what_went_back_is_kept_from_children") { &[] } else { &stayed[..] };
        for &pages in supplied {
            // A child that was born before this lacks it, and others have it.
            state.children.iter_mut().for_each(|child| child.supply(Some(pages), pages));
        }
        for block in blocks {
            for (pages, reason) in block.stayed() {
                isolation.stay(pages, reason);
            }
            let pages = block.pages();
            match (block.staged, &block.runs[..]) {
                (Some(staged), [Run { fate: Fate::Moved, .. }]) if block.undisturbed => {
                    isolation.enter(
                        block.token,
                        block.first,
                        block.order,
                        Contents::Staged(staged),
                    );
                }
                (Some(staged), runs) => {
                    self.take_runs(state, isolation, block.token, pages, staged, runs);
                }
                (None, _) => forget(state, block.token),
            }
        }
        stayed.into_iter().for_each(|pages| self.wake(pages));
    }

    /// Enters `gap` as in transit, and puts it aside; nothing if that cannot be done, and then it
    /// stays.
    fn put_aside(
        &self,
        isolation: &mut ProcessIsolation,
        aside: &Aside,
        gap: PageRange,
    ) -> Option<Vec<Block>> {
        let to = aside.place_of(gap).first();
        let expected = OfOurMaking::Remap { from: gap, to };
        let blocks = {
            let mut state = self.lock();
            // A chunk of which nothing is out may have been given up since it was registered. From the next
            // line on something is.
            let registered = self.is_registered_missing(&state, gap);
            if !registered || state.gaps(gap)[..] != [gap] || state.forking > 0 || state.over {
                isolation.stay(gap, StayReason::Busy);
                return None;
            }
            state.of_our_making.push(expected);
            let entered = aligned_blocks(gap).map(|(first, order)| {
                let token = isolation.enter_transit(&mut state, first, order);
                let (staged, runs) = (self.allocate_staging(order), SmallVec::new());
                Block { token, first, order, staged, runs, undisturbed: true }
            });
            entered.collect::<Vec<Block>>()
        };
        let Err(error) = aside.take(gap) else { return Some(blocks) };
        let mut state = self.lock();
        state.of_our_making.retain(|other| *other != expected);
        for block in &blocks {
            let never_left = std::iter::once(numbers(block.pages())).collect();
            state.children.iter_mut().for_each(|child| child.has(&never_left));
            forget(&mut state, block.token);
        }
        self.wake(gap);
        let reason = match error {
            Errno::NOMEM => StayReason::OutOfSystemMemory,
            _ => StayReason::Unsupported,
        };
        isolation.stay(gap, reason);
        None
    }

    /// Moves what is aside to staging, as far as it moves.
    fn move_from_aside(
        &self,
        state: &mut State,
        aside: &Aside,
        gap: PageRange,
        blocks: &mut [Block],
    ) {
        // It was registered where it was, and is where it is now, where nobody is to wait for it.
        let ours = self.kernel.uffd().unregister(aside.place_of(gap));
        if let Err(error) = ours.and_then(|()| aside.allow_stores(gap, true)) {
            tracing::debug!(target: "uhmm", %gap, %error, "pages go back that may only be read");
            let stay = |block: &mut Block| {
                let fate = Fate::Stayed(StayReason::OutOfSystemMemory);
                block.runs.push(Run { pages: block.pages(), fate });
            };
            return blocks.iter_mut().for_each(stay);
        }
        for block in blocks {
            self.move_block(state, aside, block);
        }
    }

    fn move_block(&self, state: &mut State, aside: &Aside, block: &mut Block) {
        let pages = block.pages();
        let Some(staged) = &block.staged else {
            let fate = Fate::Stayed(StayReason::OutOfSystemMemory);
            return block.runs.push(Run { pages, fate });
        };
        let (mut next, mut tries, mut own) = (Some(pages.first()), 0, None);
        while let Some(rest) = next.and_then(|page| PageRange::from_bounds(page, pages.last())) {
            let (page, from) = (PageRange::from(rest.first()), aside.place_of(rest));
            let offset = rest.first().number() - pages.first().number();
            let target = staged.first().checked_add(offset).expect("within the block");
            let progress = self.kernel.move_out(from, target);
            let (done, fate) = match progress.result {
                _ if progress.pages > 0 => {
                    let count = |first| PageRange::from_pages(first, progress.pages);
                    self.staging.fill(count(target).expect("some were moved"));
                    (count(rest.first()).expect("some were moved"), Fate::Moved)
                }
                Ok(()) => break,
                Err(Errno::AGAIN) if tries < TRIES => {
                    tries += 1;
                    self.drain(state);
                    std::thread::yield_now();
                    continue;
                }
                Err(Errno::NOENT) => {
                    let absent = self.absent(from).pages();
                    let absent = PageRange::from_pages(rest.first(), absent);
                    (absent.expect("the first is"), Fate::Zero)
                }
                // Shared with a child: it is made the program's own. It is not registered here, so this
                // waits for nobody.
                Err(Errno::BUSY) if own != Some(rest.first()) => {
                    own = Some(rest.first());
                    let one = PageRange::from(from.first());
                    match advise::populate_write(one) {
                        Ok(()) => continue,
                        Err(_) => (page, Fate::Stayed(StayReason::OutOfSystemMemory)),
                    }
                }
                Err(Errno::BUSY) => (page, Fate::Stayed(StayReason::Pinned)),
                Err(Errno::NOMEM) => (page, Fate::Stayed(StayReason::OutOfSystemMemory)),
                Err(_) => (page, Fate::Stayed(self.explain_failure(from.first()))),
            };
            next = done.last().checked_add(1);
            block.runs.push(Run { pages: done, fate });
        }
        block.undisturbed = is_whole(state, block.token, pages);
    }

    /// Puts what did not move back where it was.
    fn put_back(&self, aside: &Aside, stayed: &[PageRange]) {
        for &pages in stayed {
            self.lock().of_our_making.push(OfOurMaking::Unmap(pages));
            let mut tries = 0;
            while let Err(error) =
                aside.allow_stores(pages, false).and_then(|()| aside.give_back(pages))
            {
                // There is no other way for what is pinned, and nothing else that is true to say to
                // whoever waits for it.
                if tries == TRIES {
                    fatal("pages that may only be read cannot go back", error);
                }
                tries += 1;
                std::thread::yield_now();
            }
            let mut state = self.lock();
            let state = &mut *state;
            state.of_our_making.retain(|other| *other != OfOurMaking::Unmap(pages));
            // What came is not registered.
            state.registered.remove(numbers(pages));
            self.note_released(state, numbers(pages));
            count(&self.counters.given_back, pages.pages());
        }
    }
}

/// Forgets what is in transit by the name `token`, which is where it was.
fn forget(state: &mut State, token: Token) {
    for (first, ..) in state.of_token(token) {
        drop(state.remove(first));
    }
}
