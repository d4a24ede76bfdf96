//! Which frames of the GPU's memory are free.
//!
//! Free blocks are kept by size, aligned to their size. A block that is too large is halved until
//! it fits; a block that comes back is joined with its other half whenever that is free too. So a
//! block may come back in pieces of any order, and is whole again when the last is back.

use std::collections::BTreeSet;

use uhmm::Order;

/// How many orders there are.
const ORDERS: usize = Order::MAX.get() as usize + 1;

/// The free blocks.
pub(crate) struct Buddy {
    /// By order, the first frames.
    free: [BTreeSet<u64>; ORDERS],
    /// Frames there are.
    capacity: u64,
    /// Frames that are free.
    available: u64,
}

/// A block was freed that was not given out: a part of it is free or beyond the end, or it is not
/// aligned to its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotHeld;

impl Buddy {
    /// Makes an allocator of `capacity` frames, all of them free.
    pub(crate) fn new(capacity: u64) -> Buddy {
        let mut buddy =
            Buddy { free: std::array::from_fn(|_| BTreeSet::new()), capacity, available: capacity };
        let mut first = 0;
        while first < capacity {
            let aligned = if first == 0 { ORDERS as u32 } else { first.trailing_zeros() };
            let fitting = (capacity - first).ilog2();
            let order = aligned.min(fitting).min(ORDERS as u32 - 1);
            buddy.free[order as usize].insert(first);
            first += 1 << order;
        }
        buddy
    }

    /// Takes a block, the one at the smallest frame number of the smallest size that will do.
    pub(crate) fn allocate(&mut self, order: Order) -> Option<u64> {
        let wanted = usize::from(order.get());
        let found = (wanted..ORDERS).find(|&order| !self.free[order].is_empty())?;
        let first = self.free[found].pop_first()?;
        for half in (wanted..found).rev() {
            self.free[half].insert(first + (1 << half));
        }
        self.available -= order.pages();
        Some(first)
    }

    /// Tells whether a block may come back.
    pub(crate) fn check_held(&self, first: u64, order: Order) -> Result<(), NotHeld> {
        let within = first.checked_add(order.pages()).is_some_and(|end| end <= self.capacity);
        if !within || !first.is_multiple_of(order.pages()) || self.any_free(first, order) {
            return Err(NotHeld);
        }
        Ok(())
    }

    /// Takes a block back.
    pub(crate) fn free(&mut self, first: u64, order: Order) -> Result<(), NotHeld> {
        self.check_held(first, order)?;
        self.available += order.pages();
        let (mut first, mut order) = (first, usize::from(order.get()));
        while order + 1 < ORDERS && self.free[order].remove(&(first ^ (1 << order))) {
            first &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(first);
        Ok(())
    }

    /// Returns how many frames are free.
    pub(crate) fn available(&self) -> u64 {
        self.available
    }

    /// Returns the largest block that is free.
    pub(crate) fn largest(&self) -> Option<Order> {
        let largest = (0..ORDERS).rev().find(|&order| !self.free[order].is_empty())?;
        Order::new(largest as u8)
    }

    /// Tells whether a frame of the block is free.
    fn any_free(&self, first: u64, order: Order) -> bool {
        let last = first + order.pages() - 1;
        (0..ORDERS).any(|size| {
            let begins_in_or_before = self.free[size].range(..=last).next_back();
            begins_in_or_before.is_some_and(|&free| free + (1 << size) > first)
        })
    }

    /// Checks that free blocks are aligned, apart from each other and joined, and counted.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut blocks: Vec<(u64, usize)> = Vec::new();
        for (order, free) in self.free.iter().enumerate() {
            blocks.extend(free.iter().map(|&first| (first, order)));
        }
        blocks.sort_unstable();
        for &(first, order) in &blocks {
            if first % (1 << order) != 0 {
                return Err(format!("the free block {first} of order {order} is not aligned"));
            }
            if order + 1 < ORDERS && self.free[order].contains(&(first ^ (1 << order))) {
                return Err(format!("the free block {first} of order {order} was not joined"));
            }
        }
        for pair in blocks.windows(2) {
            if pair[0].0 + (1 << pair[0].1) > pair[1].0 {
                return Err(format!("the free blocks {pair:?} overlap"));
            }
        }
        let counted: u64 = blocks.iter().map(|&(_, order)| 1 << order).sum();
        if counted != self.available {
            return Err(format!("{counted} frames are free, and {} are counted", self.available));
        }
        Ok(())
    }
}
