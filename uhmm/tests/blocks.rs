//! Blocks of device memory: cut into pieces, and freed piece by piece in any order.
#![cfg(not(any(loom, shuttle)))]

mod plain;

use std::sync::{Arc, Mutex};

use plain::{Counted, Places, Plain};
use uhmm::policy::{Candidate, Policies, Policy, Verdict};
use uhmm::{
    AddressSpace, DeviceBlock, DeviceFrame, DevicePagemap, Order, PageRange, PagemapOptions,
};

/// Notes what an eviction may choose.
#[derive(Debug, Default)]
struct Candidates(Mutex<Vec<(DeviceFrame, Order)>>);

impl Policy for Candidates {
    fn name(&self) -> &'static str {
        "candidates"
    }

    fn victim(&self, candidate: &Candidate, _: &mut Verdict) {
        let block = (candidate.location.frame, candidate.order);
        self.0.lock().expect("no panic").push(block);
    }
}

/// An address space with one page of some order, which is on a device.
struct Rig {
    _space: AddressSpace,
    places: Arc<Places>,
    memory: Arc<Counted>,
    pagemap: Arc<DevicePagemap>,
    candidates: Arc<Candidates>,
}

impl Rig {
    fn new(order: u8) -> (Rig, DeviceBlock) {
        let order = Order::new(order).expect("an order");
        let plain = Plain::new(1, order);
        let places = plain.places().clone();
        let memory = Counted::new(false);
        let candidates = Arc::new(Candidates::default());
        let policies = Policies::none().and_shared(candidates.clone());
        let options = PagemapOptions::new().policies(policies);
        let pagemap = DevicePagemap::register_with(memory.clone(), options);
        let space = AddressSpace::new(Arc::new(plain));
        let range = PageRange::new(0, order.bytes() as u64).expect("a range");
        assert_eq!(space.migrate(range, &pagemap).run().moved, order.pages());
        let block = places.take(0);
        (Rig { _space: space, places, memory, pagemap, candidates }, block)
    }

    /// Returns the blocks that an eviction of everything would take, as the accounts have them.
    fn victims(&self) -> Vec<DeviceFrame> {
        assert_eq!(self.pagemap.evict(u64::MAX), 0, "nobody finds a page");
        let mut victims: Vec<_> = self.places.asked().iter().map(|at| at.frame).collect();
        victims.sort_unstable();
        victims
    }

    /// Checks that the accounts are those of `blocks`, of a whole of `pages`.
    fn check(&self, blocks: &[DeviceBlock], pages: u64) {
        let used: u64 = blocks.iter().map(|block| block.order().pages()).sum();
        assert_eq!((self.pagemap.used(), self.memory.freed()), (used, pages - used));
        let frames: Vec<_> = blocks.iter().map(|block| block.location().frame).collect();
        assert_eq!(self.victims(), frames);
        let mut known = std::mem::take(&mut *self.candidates.0.lock().expect("no panic"));
        known.sort_unstable();
        let blocks = blocks.iter().map(|block| (block.location().frame, block.order()));
        // Where there is no choice, no policy is asked.
        assert!(frames.len() < 2 || known.into_iter().eq(blocks));
    }
}

#[test]
fn halves_are_halves_in_ascending_order() {
    let (rig, block) = Rig::new(3);
    let at = block.location();
    let [low, high] = block.halve();
    for (half, first) in [(&low, 0), (&high, 4)] {
        assert_eq!((half.order().get(), half.location().frame), (2, DeviceFrame(first)));
        assert_eq!((half.location().owner, half.pagemap().owner()), (at.owner, at.owner));
    }
    rig.check(&[low, high], 8);
}

/// Halves of halves, down to single pages, and each of the orders in which four pieces can go.
#[test]
fn pieces_are_freed_in_any_order_and_the_accounts_stay_exact() {
    for order in 0..24 {
        let (rig, block) = Rig::new(3);
        let [low, high] = block.halve();
        let [first, second] = low.halve();
        let [third, fourth] = high.halve();
        let mut pieces = vec![first, second, third, fourth];
        let mut choices = order;
        for left in (1..=4).rev() {
            rig.check(&pieces, 8);
            drop(pieces.remove(choices % left));
            choices /= left;
        }
        rig.check(&[], 8);
    }
}

#[test]
fn one_half_is_split_and_the_other_stays_whole() {
    for first_goes_first in [true, false] {
        let (rig, block) = Rig::new(2);
        let [low, high] = block.halve();
        let singles = low.split();
        assert!(singles.iter().all(|single| single.order() == Order::PAGE));
        let mut all = singles;
        all.push(high);
        rig.check(&all, 4);
        let gone = if first_goes_first { all.remove(0) } else { all.pop().expect("three pieces") };
        drop(gone);
        rig.check(&all, 4);
        drop(all);
        rig.check(&[], 4);
    }
}

#[test]
fn a_large_page_is_split_into_all_its_pages() {
    let (rig, block) = Rig::new(9);
    let mut singles = block.split();
    let frames: Vec<_> = singles.iter().map(|single| single.location().frame.0).collect();
    assert_eq!(frames, (0..512).collect::<Vec<_>>());
    rig.check(&singles, 512);
    singles.retain(|single| single.location().frame.0 % 3 == 1);
    rig.check(&singles, 512);
}

/// A block that holds no page yet, or none any more, is not one that eviction may choose; neither
/// are its pieces.
#[test]
fn what_eviction_does_not_know_it_does_not_know_in_pieces() {
    let (rig, block) = Rig::new(1);
    let space = AddressSpace::new(Arc::new(Plain::new(1, Order::PAGE)));
    let range = PageRange::new(0, Order::PAGE.bytes() as u64).expect("a range");
    // It is copied, and not committed.
    let migration = space.migrate(range, &rig.pagemap).copy();
    assert_eq!(rig.victims(), [block.location().frame]);
    drop(migration);
    let [low, high] = block.halve();
    assert_eq!(rig.victims(), [DeviceFrame(0), DeviceFrame(1)]);
    drop((high, low));
    assert_eq!(rig.victims(), []);
}

#[test]
#[should_panic(expected = "a single page has no halves")]
fn a_single_page_has_no_halves() {
    let (_rig, block) = Rig::new(0);
    let _halves = block.halve();
}
