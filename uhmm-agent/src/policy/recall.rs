//! What comes home, and what has been needed lately.

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uhmm::policy::{CpuFault, HomePlan, Location, MigrateCause, Moved, Policy};
use uhmm::{Order, Page, PageRange};

use super::room::{Room, Taken};
use super::streams::{Streams, part_at};
use crate::ledger::{Counter, Slot};

/// The unit of second chances: 16 pages.
const BLOCK: Order = Order::new(4).expect("4 is an order");

/// How many blocks are remembered that came home: 64 GiB of them.
const MOST_NEEDED: usize = 1 << 20;

/// How many pages come home at a time at most, where the program goes from page to page.
const LONGEST: u64 = 128;

thread_local! {
    /// When the fault began that this thread serves, without the time that it waited for room.
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };

    /// Whether this thread has taken room for a page that it is yet to ask about.
    static GRANTED: Cell<bool> = const { Cell::new(false) };

    /// How much room this thread has taken for pages that have not come.
    static UNUSED: Cell<u64> = const { Cell::new(0) };
}

/// Follows what comes home. See the [module](self).
#[derive(Debug)]
pub(crate) struct Recall {
    slot: Arc<Slot>,
    room: Arc<Room>,
    needed: Mutex<HashSet<u64>>,
    streams: Mutex<Streams>,
}

impl Recall {
    /// Makes it for the process of `slot`.
    pub(crate) fn new(slot: Arc<Slot>, room: Arc<Room>) -> Recall {
        let streams = Mutex::new(Streams::new(LONGEST));
        Recall { slot, room, needed: Mutex::default(), streams }
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

impl Recall {
    /// Takes room for a page, and waits for it.
    fn wait_for_room(&self) {
        let began = Instant::now();
        let taken = self.room.take();
        if taken != Taken::AtOnce {
            self.slot.add(Counter::Throttled, 1);
            self.slot.waited(began.elapsed());
        }
        if taken == Taken::Over {
            self.slot.add(Counter::WentOver, 1);
        }
    }

    /// Notes that pages have left, and tells whether somebody waits for the word that there is room.
    pub(crate) fn left(&self, pages: u64) -> bool {
        self.room.add(pages)
    }
}

impl Policy for Recall {
    fn name(&self) -> &'static str {
        "recall"
    }

    /// Where there is room nobody waits. It is taken now, for the fault that this thread asks about
    /// next.
    fn is_prompt(&self) -> bool {
        GRANTED.set(GRANTED.get() || self.room.take_some(1) == 1);
        GRANTED.get()
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        self.room.give_back(UNUSED.take());
        if !GRANTED.take() {
            self.wait_for_room();
        }
        BEGAN.set(Some(Instant::now()));
        let range = lock(&self.streams).follow(fault.page);
        let more = self.room.take_some(range.pages() - 1);
        UNUSED.set(1 + more);
        let range = part_at(fault.page, range, 1 + more);
        // Not all of a huge page for a touch of one: who wants the rest gets it as any stream does.
        plan.range = range;
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
        UNUSED.set(UNUSED.get().saturating_sub(moved.pages.pages()));
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
    use uhmm::{Owner, SpaceId};

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
            announced: false,
            attach_at: None,
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
    fn who_is_told_that_there_is_room_does_not_wait_for_it() {
        let recall = recall();
        recall.room.set(0, Some(1), 0);
        assert!(recall.is_prompt());
        assert!(recall.is_prompt(), "asked twice, it is taken once");
        let came = page(100);
        let (space, owner, now) = (SpaceId::new(), Owner::new(), Duration::ZERO);
        let fault = CpuFault { space, owner, page: came, order: Order::PAGE, now };
        let mut plan = HomePlan { range: came.into(), nap: Duration::ZERO };
        recall.cpu_fault(&fault, &mut plan);
        assert_eq!((plan.range, recall.room.taken()), (came.into(), 1));
        let totals = recall.slot.ledger().totals();
        assert_eq!(totals.numbers.counter(Counter::Throttled), 0);
        assert!(!recall.is_prompt(), "there is no room for another");
    }

    #[test]
    fn a_touch_brings_a_page_and_not_the_huge_page_that_it_was_in() {
        let recall = recall();
        let mut came = Vec::new();
        for number in [5000, 5001, 5003, 700] {
            let page = page(number);
            let (space, owner) = (SpaceId::new(), Owner::new());
            let fault = CpuFault { space, owner, page, order: Order::HUGE, now: Duration::ZERO };
            let mut plan = HomePlan { range: page.block(Order::HUGE), nap: Duration::ZERO };
            recall.cpu_fault(&fault, &mut plan);
            came.push((plan.range.first().number(), plan.range.pages()));
        }
        assert_eq!(came, [(5000, 1), (5001, 2), (5003, 4), (700, 1)]);
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
