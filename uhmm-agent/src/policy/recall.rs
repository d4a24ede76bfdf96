//! What comes home, and what has been needed lately.

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uhmm::policy::{CpuFault, HomePlan, Location, MigrateCause, Moved, Policy};
use uhmm::{Order, Page, PageRange};

use super::room::Room;
use crate::ledger::{Counter, Slot};

/// The unit of second chances: 16 pages.
const BLOCK: Order = Order::new(4).expect("4 is an order");

/// How many blocks are remembered that came home: 64 GiB of them.
const MOST_NEEDED: usize = 1 << 20;

/// How many streams are followed at a time.
const STREAMS: usize = 16;

/// How much comes home for a touch that is part of no stream, and at most for one that is, in pages.
const ALONE: u64 = 1;
const LONGEST: u64 = 128;

thread_local! {
    /// When the fault began that this thread serves.
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Follows what comes home. See the [module](self).
#[derive(Debug)]
pub(crate) struct Recall {
    slot: Arc<Slot>,
    room: Arc<Room>,
    needed: Mutex<HashSet<u64>>,
    streams: Mutex<Streams>,
}

/// Touches one after the other, upwards or downwards.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The page after the last that came home, and the one before the first.
    above: u64,
    below: u64,
    /// How much came home.
    pages: u64,
    /// When it was last followed.
    used: u64,
}

#[derive(Debug, Default)]
struct Streams {
    streams: [Stream; STREAMS],
    faults: u64,
}

impl Streams {
    /// Returns what is to come home for a touch of `page`.
    fn follow(&mut self, page: Page) -> PageRange {
        self.faults += 1;
        let number = page.number();
        let near = |edge: u64| number.abs_diff(edge) <= 1;
        let known = self
            .streams
            .iter()
            .position(|stream| stream.pages > 0 && (near(stream.above) || near(stream.below)));
        let (place, first, pages) = match known {
            Some(place) => {
                let stream = self.streams[place];
                let pages = (stream.pages * 2).min(LONGEST);
                let first = match near(stream.above) {
                    true => number,
                    false => number.saturating_sub(pages - 1),
                };
                (place, first, pages)
            }
            None => {
                let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
                let place = oldest.map_or(0, |(place, _)| place);
                (place, number / ALONE * ALONE, ALONE)
            }
        };
        let range = Page::new(first).and_then(|first| PageRange::from_pages(first, pages).ok());
        let range = range.unwrap_or_else(|| page.into());
        self.streams[place] = Stream {
            above: range.last().number() + 1,
            below: range.first().number().saturating_sub(1),
            pages,
            used: self.faults,
        };
        range
    }
}

impl Recall {
    /// Makes it for the process of `slot`.
    pub(crate) fn new(slot: Arc<Slot>, room: Arc<Room>) -> Recall {
        Recall { slot, room, needed: Mutex::default(), streams: Mutex::default() }
    }

    /// Returns the first of `pages`, at most `most`, and whether they are to leave: not if they have
    /// been needed since this was last asked.
    pub(crate) fn judge(&self, pages: PageRange, most: u64) -> (PageRange, bool) {
        let mut needed = lock(&self.needed);
        let block = |page: Page| page.number() >> BLOCK.get();
        let first = pages.first();
        let within = |page: Page| page.number() - first.number();
        if needed.remove(&block(first)) {
            let last = first.block(BLOCK).last().min(pages.last());
            self.slot.add(Counter::SecondChances, within(last) + 1);
            return (PageRange::from_bounds(first, last).expect("ascending"), false);
        }
        let mut last = first;
        loop {
            let end = last.block(BLOCK).last().min(pages.last());
            last = end;
            let next = end.checked_add(1).filter(|&next| next <= pages.last());
            match next {
                Some(next) if within(end) + 1 < most && !needed.contains(&block(next)) => {
                    last = next
                }
                _ => break,
            }
        }
        (PageRange::from_bounds(first, last).expect("ascending"), true)
    }
}

impl Policy for Recall {
    fn name(&self) -> &'static str {
        "recall"
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        BEGAN.set(Some(Instant::now()));
        if self.room.wait() {
            self.slot.add(Counter::Throttled, 1);
        }
        let range = lock(&self.streams).follow(fault.page);
        let first = range.first().min(plan.range.first());
        let last = range.last().max(plan.range.last());
        plan.range = PageRange::from_bounds(first, last).unwrap_or(plan.range);
        plan.nap = Duration::ZERO;
    }

    fn moved(&self, moved: &Moved) {
        if moved.to == Location::Device {
            return;
        }
        self.slot.add(Counter::PagesHome, moved.pages.pages());
        if moved.cause != MigrateCause::CpuFault {
            return;
        }
        self.slot.add(Counter::PagesTouched, moved.pages.pages());
        if let Some(began) = BEGAN.take() {
            self.slot.fault_served(began.elapsed());
        }
        let mut needed = lock(&self.needed);
        let blocks = moved.pages.first().number() >> BLOCK.get()
            ..=moved.pages.last().number() >> BLOCK.get();
        if needed.len() >= MOST_NEEDED {
            // Much of it is unmapped by now. Nothing has a second chance for once.
            needed.clear();
        }
        needed.extend(blocks);
    }
}

/// Locks; nothing under these locks panics half way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use uhmm::Owner;

    use super::*;
    use crate::ledger::{Config, Ledger};

    fn page(number: u64) -> Page {
        Page::new(number).expect("a page")
    }

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::from_pages(page(first), count).expect("pages")
    }

    fn recall() -> Recall {
        let config = Config {
            budget: 1 << 20,
            device: "lz4".into(),
            policy: "clock".to_owned(),
            verify: false,
        };
        let ledger = Ledger::create(&config).expect("there is memory");
        let slot = ledger.claim(std::process::id(), "test".as_ref()).expect("there is a slot");
        Recall::new(Arc::new(slot), Arc::new(Room::new()))
    }

    fn came_home(recall: &Recall, pages: PageRange) {
        recall.moved(&Moved {
            space: None,
            pages,
            owner: Owner::new(),
            to: Location::System,
            cause: MigrateCause::CpuFault,
            now: Duration::ZERO,
        });
    }

    #[test]
    fn touches_here_and_there_bring_one_page_each() {
        let mut streams = Streams::default();
        for number in [1000, 5000, 300, 7777] {
            assert_eq!(streams.follow(page(number)), pages(number, 1));
        }
    }

    #[test]
    fn who_goes_upwards_gets_twice_as_much_each_time() {
        let mut streams = Streams::default();
        let mut next = 4096;
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 128] {
            let range = streams.follow(page(next));
            assert_eq!(range, pages(next, expected));
            // Another thread touches elsewhere meanwhile.
            streams.follow(page(next * 100));
            next += expected;
        }
    }

    #[test]
    fn who_goes_downwards_gets_what_is_below() {
        let mut streams = Streams::default();
        assert_eq!(streams.follow(page(900)), pages(900, 1));
        assert_eq!(streams.follow(page(899)), pages(898, 2));
        assert_eq!(streams.follow(page(897)), pages(894, 4));
        // At the bottom of the address space too.
        assert_eq!(streams.follow(page(1)), pages(1, 1));
        assert!(streams.follow(page(0)).contains(page(0)));
    }

    #[test]
    fn what_came_home_has_a_second_chance_and_no_third() {
        let recall = recall();
        came_home(&recall, pages(32, 1));
        assert_eq!(recall.judge(pages(32, 40), 64), (pages(32, 16), false));
        assert_eq!(recall.judge(pages(32, 40), 64), (pages(32, 40), true));
    }

    #[test]
    fn what_leaves_ends_before_what_stays_and_is_no_more_than_was_asked_for() {
        let recall = recall();
        came_home(&recall, pages(64, 16));
        assert_eq!(recall.judge(pages(10, 200), 64), (pages(10, 54), true));
        assert_eq!(recall.judge(pages(64, 200), 64), (pages(64, 16), false));
        // Whole blocks of 16, since it is those that have chances.
        assert_eq!(recall.judge(pages(80, 200), 20), (pages(80, 32), true));
        assert_eq!(recall.judge(pages(5, 2), 64), (pages(5, 2), true));
    }
}
