//! The interval index: which entries overlap a range of addresses.
//!
//! [`Index`] is a balanced tree (AVL) of ranges in (start, key) order, each node knowing the
//! greatest last address below it. Equal and overlapping ranges are welcome, up to 2^32 - 64 of
//! them.
//!
//! # Why nothing here allocates under a lock
//!
//! The owner keeps the index under a lock that an announcement of a change of the address space
//! takes too. The allocator may unmap memory, and that is such a change: to allocate or to free
//! under the lock is to wait for oneself. So insertion, removal and queries do neither. Memory
//! comes in two steps instead: [`Growth::try_new`] allocates outside the lock, [`Index::grow`]
//! takes the memory over under it, and what is not needed goes back to the caller, to be dropped
//! outside. So do the values that are removed. No memory is freed before the index is dropped.
//!
//! # Layout
//!
//! Entries lie in slots of one cache line each, in chunks that double in size: chunk `k` holds
//! `64 << k` slots, so slots never move and a slot number names its chunk by its highest bit. A
//! chunk's memory is reserved once and touched from the bottom up. The slot of a removed entry is
//! the first to be used again.
//!
//! A node holds a summary of each of its two subtrees (root, height, greatest last address), so
//! that whether to go down, and whether to rebalance, is decided without a look at a child: a step
//! down the tree costs one cache miss.
//!
//! # Cost
//!
//! For `n` entries, insertion and removal are O(log n). A query with `k` hits is O(log n + k) where
//! the hits are neighbours in start order, as the entries that start within the range asked for
//! always are. Entries that start below it and reach into it may lie scattered, and a query is
//! never worse than O(log n + k log(n / k)): every node visited is on the path to the end of the
//! range asked for, or has a hit at or below it.
//!
//! # Invariants
//!
//! 1. The nodes of the tree are in (start, key) order, strictly.
//! 2. The heights of the two subtrees of a node differ by one at most.
//! 3. Every [`Subtree`] tells the truth of the nodes it summarises.
//! 4. Every slot in use is either in the tree and holds a value, or in the free list and holds
//!    none. `len` counts the former.
//! 5. The first `reserved` chunks have room for all their slots, and no other chunk has memory.
//!    They are filled in order: slots `0..used` are there, the others were never touched.

use std::collections::TryReserveError;

use crate::va_range::VaRange;

/// How many slots the first chunk holds; each further one holds twice as many as the one before.
const FIRST_CHUNK: u32 = 64;

/// How many chunks there can be: with one more, slots would outnumber 32 bits.
const MAX_CHUNKS: usize = 26;

/// The slot number that names no slot. All chunks together hold fewer slots than this.
const NIL: u32 = u32::MAX;

/// A map from ranges to values that finds the entries overlapping a range.
///
/// To drop it is to free its memory, and to drop the values that are left.
pub(crate) struct Index<T> {
    chunks: [Vec<Slot<T>>; MAX_CHUNKS],
    /// How many chunks have memory.
    reserved: usize,
    /// How many slots have been used at least once.
    used: u32,
    /// The first slot of the free list, or [`NIL`].
    free: u32,
    len: u32,
    tree: Subtree,
}

/// The name of an entry, from its insertion to its removal.
///
/// The slot of a removed entry is used again, and with it the key: who removes an entry forgets its
/// key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(pub(crate) u32);

/// Memory for the next chunk of an index, allocated ahead.
pub(crate) struct Growth<T> {
    chunk: usize,
    slots: Vec<Slot<T>>,
}

/// Why there is no [`Growth`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GrowthError {
    /// The index holds as many entries as it ever can.
    Limit,
    /// The allocator has no memory.
    OutOfMemory(TryReserveError),
}

impl<T> Growth<T> {
    /// Allocates the memory of chunk number `chunk`, which [`Index::next_growth`] tells.
    ///
    /// # Errors
    ///
    /// [`GrowthError::Limit`] where no index has such a chunk, [`GrowthError::OutOfMemory`] where
    /// the allocation fails.
    pub(crate) fn try_new(chunk: usize) -> Result<Growth<T>, GrowthError> {
        if chunk >= MAX_CHUNKS {
            return Err(GrowthError::Limit);
        }
        let mut slots = Vec::new();
        slots
            .try_reserve_exact((FIRST_CHUNK as usize) << chunk)
            .map_err(GrowthError::OutOfMemory)?;
        Ok(Growth { chunk, slots })
    }
}

impl<T> Index<T> {
    /// Makes an empty index. It is full, too: it has no memory yet.
    pub(crate) const fn new() -> Index<T> {
        Index {
            chunks: [const { Vec::new() }; MAX_CHUNKS],
            reserved: 0,
            used: 0,
            free: NIL,
            len: 0,
            tree: Subtree::EMPTY,
        }
    }

    /// Returns the number of entries.
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    /// Tells whether there is no entry.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tells whether [`Index::grow`] must come before the next [`Index::insert`].
    pub(crate) fn is_full(&self) -> bool {
        self.free == NIL && self.used == first_slot(self.reserved)
    }

    /// Returns the number of the chunk that [`Index::grow`] takes next.
    pub(crate) fn next_growth(&self) -> usize {
        self.reserved
    }

    /// Returns the bytes of memory that the index has reserved on the heap.
    #[cfg(test)]
    pub(crate) fn heap_bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.capacity() * size_of::<Slot<T>>()).sum()
    }

    /// Takes over `growth` if it is the chunk that comes next, even where there is room left. Else,
    /// as when another thread was faster, gives it back, to be dropped where it may be freed.
    #[must_use = "a growth that is not needed is to be dropped outside the lock"]
    pub(crate) fn grow(&mut self, growth: Growth<T>) -> Option<Growth<T>> {
        if growth.chunk != self.reserved {
            return Some(growth);
        }
        self.chunks[growth.chunk] = growth.slots;
        self.reserved += 1;
        None
    }

    /// Adds an entry.
    ///
    /// # Panics
    ///
    /// Where the index [is full](Index::is_full).
    pub(crate) fn insert(&mut self, range: VaRange, value: T) -> Key {
        assert!(!self.is_full(), "the index is full: it must grow before an insertion");
        let slot = Slot { range, value: Some(value), below: [Subtree::EMPTY; 2] };
        let at = if self.free == NIL {
            let at = self.used;
            self.chunks[place(at).0].push(slot);
            self.used += 1;
            at
        } else {
            let at = self.free;
            let reused = self.slot_mut(at);
            let next_free = reused.below(Side::Left).root;
            *reused = slot;
            self.free = next_free;
            at
        };
        self.len += 1;
        self.tree = self.link(self.tree, at, range);
        Key(at)
    }

    /// Takes the entry out and returns its value.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    pub(crate) fn remove(&mut self, key: Key) -> T {
        let start = self.range(key).start();
        self.tree = self.unlink(self.tree, key.0, start);
        self.len -= 1;
        let next_free = Subtree { root: self.free, ..Subtree::EMPTY };
        self.free = key.0;
        let slot = self.slot_mut(key.0);
        slot.below = [next_free, Subtree::EMPTY];
        slot.value.take().expect(NO_ENTRY)
    }

    /// Gives the entry another range, under the same key.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    pub(crate) fn set_range(&mut self, key: Key, range: VaRange) {
        let start = self.range(key).start();
        self.tree = self.unlink(self.tree, key.0, start);
        let slot = self.slot_mut(key.0);
        slot.range = range;
        slot.below = [Subtree::EMPTY; 2];
        self.tree = self.link(self.tree, key.0, range);
    }

    /// Returns the range of an entry.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    pub(crate) fn range(&self, key: Key) -> VaRange {
        let slot = self.slot(key.0);
        assert!(slot.value.is_some(), "{NO_ENTRY}");
        slot.range
    }

    /// Returns the value of an entry.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    #[cfg(test)]
    pub(crate) fn get(&self, key: Key) -> &T {
        self.slot(key.0).value()
    }

    /// Returns the entry that is lowest in (start, key) order, if there is an entry.
    pub(crate) fn first(&self) -> Option<Key> {
        let mut first = None;
        let mut at = self.tree.root;
        while at != NIL {
            first = Some(Key(at));
            at = self.slot(at).below(Side::Left).root;
        }
        first
    }

    /// Calls `found` for each entry that shares an address with `range`, in (start, key) order.
    pub(crate) fn overlapping(&self, range: VaRange, mut found: impl FnMut(Key, VaRange, &T)) {
        if self.tree.last >= range.start() {
            self.visit(self.tree.root, range, &mut found);
        }
    }

    /// [`Index::overlapping`], for the subtree of the node `at`.
    fn visit(&self, mut at: u32, range: VaRange, found: &mut impl FnMut(Key, VaRange, &T)) {
        while at != NIL {
            let slot = self.slot(at);
            let left = slot.below(Side::Left);
            if left.last >= range.start() {
                self.visit(left.root, range, found);
            }
            if slot.range.start() > range.last() {
                return; // and so does everything to the right
            }
            if slot.range.last() >= range.start() {
                found(Key(at), slot.range, slot.value());
            }
            let right = slot.below(Side::Right);
            if right.last < range.start() {
                return;
            }
            at = right.root;
        }
    }

    /// Adds the node `new`, which has this range and nothing below, to `tree`; returns what `tree`
    /// has become. It calls itself once a level, so 46 times at most, as do its like below.
    fn link(&mut self, tree: Subtree, new: u32, range: VaRange) -> Subtree {
        if tree.root == NIL {
            return Subtree { last: range.last(), root: new, height: 1 };
        }
        let side = self.side_of(tree.root, new, range.start());
        let below = self.link(self.slot(tree.root).below(side), new, range);
        self.replace(tree, side, below)
    }

    /// Takes the node `old`, which starts at `start`, out of `tree`; returns what `tree` has
    /// become.
    fn unlink(&mut self, tree: Subtree, old: u32, start: u64) -> Subtree {
        if tree.root != old {
            let side = self.side_of(tree.root, old, start);
            let below = self.unlink(self.slot(tree.root).below(side), old, start);
            return self.replace(tree, side, below);
        }
        let [left, right] = self.slot(old).below;
        if left.root == NIL {
            return right;
        }
        if right.root == NIL {
            return left;
        }
        let (first, right) = self.unlink_first(right);
        self.slot_mut(first).below = [left, right];
        self.balance(first)
    }

    /// Takes the lowest node out of `tree`; returns it and what `tree` has become.
    fn unlink_first(&mut self, tree: Subtree) -> (u32, Subtree) {
        let [left, right] = self.slot(tree.root).below;
        if left.root == NIL {
            return (tree.root, right);
        }
        let (first, left) = self.unlink_first(left);
        (first, self.replace(tree, Side::Left, left))
    }

    /// Tells on which side of the node `at` the node `other`, which starts at `start`, belongs.
    fn side_of(&self, at: u32, other: u32, start: u64) -> Side {
        if (start, other) < (self.slot(at).range.start(), at) { Side::Left } else { Side::Right }
    }

    /// Puts `below` on one side below the root of `tree`; returns what `tree` has become. Where it
    /// changes nothing, it writes nothing, here and all the way up.
    fn replace(&mut self, tree: Subtree, side: Side, below: Subtree) -> Subtree {
        let slot = self.slot_mut(tree.root);
        if slot.below(side) == below {
            return tree;
        }
        slot.below[side as usize] = below;
        self.balance(tree.root)
    }

    /// Restores invariant 2 at the node `at`, whose subtrees differ in height by two at most;
    /// returns the subtree that takes its place.
    fn balance(&mut self, at: u32) -> Subtree {
        let slot = self.slot(at);
        let [left, right] = slot.below;
        let (taller, side) = if left.height > right.height + 1 {
            (left, Side::Left)
        } else if right.height > left.height + 1 {
            (right, Side::Right)
        } else {
            return slot.summary(at);
        };
        // Raising `taller` hands its inner subtree over to `at`. Where that is the higher one of
        // the two, it would be too high there as well: raise its root first.
        let child = self.slot(taller.root);
        if child.below(side.opposite()).height > child.below(side).height {
            let raised = self.rotate(taller.root, side.opposite());
            self.slot_mut(at).below[side as usize] = raised;
        }
        self.rotate(at, side)
    }

    /// Raises the child on `side` of the node `at` into its place, `at` becoming its child on the
    /// other side; returns the subtree of the child.
    fn rotate(&mut self, at: u32, side: Side) -> Subtree {
        let child = self.slot(at).below(side).root;
        let inner = self.slot(child).below(side.opposite());
        let lowered = self.slot_mut(at);
        lowered.below[side as usize] = inner;
        let lowered = lowered.summary(at);
        let raised = self.slot_mut(child);
        raised.below[side.opposite() as usize] = lowered;
        raised.summary(child)
    }

    fn slot(&self, at: u32) -> &Slot<T> {
        let (chunk, offset) = place(at);
        &self.chunks[chunk][offset]
    }

    fn slot_mut(&mut self, at: u32) -> &mut Slot<T> {
        let (chunk, offset) = place(at);
        &mut self.chunks[chunk][offset]
    }
}

/// What a key that names no entry is told.
const NO_ENTRY: &str = "the key names no entry: was it removed?";

/// Returns the chunk of a slot and the slot's offset in it.
fn place(slot: u32) -> (usize, usize) {
    // Counted from 64, the slots of chunk `k` are those whose highest bit is `64 << k`.
    let counted = slot + FIRST_CHUNK;
    let highest = counted.ilog2();
    ((highest - FIRST_CHUNK.ilog2()) as usize, (counted - (1 << highest)) as usize)
}

/// Returns the first slot of a chunk: how many slots there are in the chunks before it.
fn first_slot(chunk: usize) -> u32 {
    ((u64::from(FIRST_CHUNK) << chunk) - u64::from(FIRST_CHUNK)) as u32
}

/// A node of the tree, or a free slot: one cache line, where an `Option<T>` has 16 bytes.
#[repr(align(64))]
struct Slot<T> {
    range: VaRange,
    /// `None` in a free slot.
    value: Option<T>,
    /// The subtrees, by [`Side`]. In a free slot, the root of the left one is the next free slot.
    below: [Subtree; 2],
}

impl<T> Slot<T> {
    fn below(&self, side: Side) -> Subtree {
        self.below[side as usize]
    }

    fn value(&self) -> &T {
        self.value.as_ref().expect(NO_ENTRY)
    }

    /// Returns the subtree of this node, whose number is `at`.
    fn summary(&self, at: u32) -> Subtree {
        let [left, right] = self.below;
        Subtree {
            last: self.range.last().max(left.last).max(right.last),
            root: at,
            height: 1 + left.height.max(right.height),
        }
    }
}

/// What a node knows of a subtree below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Subtree {
    /// The greatest last address of the entries in it; 0 where there are none.
    last: u64,
    /// Its topmost node, or [`NIL`].
    root: u32,
    /// How many nodes the longest way down passes.
    height: u8,
}

impl Subtree {
    const EMPTY: Subtree = Subtree { last: 0, root: NIL, height: 0 };
}

/// A side of a node: lower entries are on the left.
#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
}

impl Side {
    fn opposite(self) -> Side {
        match self {
            Side::Left => Side::Right,
            Side::Right => Side::Left,
        }
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
impl<T> Index<T> {
    /// Panics where an invariant does not hold.
    pub(crate) fn check(&self) {
        let mut nodes = Vec::new();
        let tree = self.check_subtree(self.tree.root, &mut nodes);
        assert_eq!(tree, self.tree, "invariant 3: the summary of the whole tree");
        let ordered = nodes.is_sorted_by(|a, b| (a.0.start(), a.1) < (b.0.start(), b.1));
        assert!(ordered, "invariant 1: {nodes:?}");
        assert_eq!(nodes.len(), self.len(), "invariant 4: the tree holds `len` nodes");

        let mut free = 0;
        let mut at = self.free;
        while at != NIL {
            free += 1;
            assert!(free <= self.used, "invariant 4: the free list ends");
            let slot = self.slot(at);
            assert!(slot.value.is_none(), "invariant 4: the free slot {at} holds a value");
            at = slot.below(Side::Left).root;
        }
        assert_eq!(self.len + free, self.used, "invariant 4: every slot is an entry or free");

        for (number, chunk) in self.chunks.iter().enumerate() {
            let size = (first_slot(number + 1) - first_slot(number)) as usize;
            let filled = (self.used.saturating_sub(first_slot(number)) as usize).min(size);
            assert_eq!(chunk.len(), filled, "invariant 5: slots of chunk {number}");
            if number < self.reserved {
                assert!(chunk.capacity() >= size, "invariant 5: chunk {number} is too small");
            } else {
                assert_eq!(chunk.capacity(), 0, "invariant 5: chunk {number} came too early");
            }
        }
    }

    /// Checks the subtree of the node `at`, adds its nodes to `nodes` in order, and returns its
    /// summary.
    fn check_subtree(&self, at: u32, nodes: &mut Vec<(VaRange, u32)>) -> Subtree {
        if at == NIL {
            return Subtree::EMPTY;
        }
        let slot = self.slot(at);
        assert!(slot.value.is_some(), "invariant 4: the node {at} holds no value");
        let [left, right] = slot.below;
        assert_eq!(left, self.check_subtree(left.root, nodes), "invariant 3: left of {at}");
        nodes.push((slot.range, at));
        assert!(nodes.len() <= self.used as usize, "invariant 1: the tree has a cycle");
        assert_eq!(right, self.check_subtree(right.root, nodes), "invariant 3: right of {at}");
        assert!(left.height.abs_diff(right.height) <= 1, "invariant 2: at {at}");
        Subtree {
            last: slot.range.last().max(left.last).max(right.last),
            root: at,
            height: 1 + left.height.max(right.height),
        }
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use std::fmt::Debug;
    use std::sync::Arc;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const _: () = assert!(size_of::<Slot<Arc<dyn Debug>>>() == 64);
    const _: () = assert!(align_of::<Slot<Arc<dyn Debug>>>() == 64);

    fn range(start: u64, last: u64) -> VaRange {
        VaRange::from_bounds(start, last).unwrap()
    }

    /// Inserts, growing first where that is needed.
    fn insert<T>(index: &mut Index<T>, range: VaRange, value: T) -> Key {
        if index.is_full() {
            let growth = Growth::try_new(index.next_growth()).ok().unwrap();
            assert!(index.grow(growth).is_none());
        }
        index.insert(range, value)
    }

    /// What a query finds: keys, ranges and values.
    fn found(index: &Index<u32>, range: VaRange) -> Vec<(Key, VaRange, u32)> {
        let mut found = Vec::new();
        index.overlapping(range, |key, range, &value| found.push((key, range, value)));
        found
    }

    /// An address: a corner of the address space, or one of a few, so that bounds meet, or any.
    fn address() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0),
            Just(u64::MAX),
            Just(u64::MAX - 1),
            (1_u64 << 63) - 2..(1 << 63) + 2,
            0_u64..64,
            0_u64..64,
            any::<u64>(),
        ]
    }

    fn any_range() -> impl Strategy<Value = VaRange> {
        prop_oneof![
            1 => Just(VaRange::ALL),
            4 => address().prop_map(|only| range(only, only)),
            12 => (address(), address()).prop_map(|(a, b)| range(a.min(b), a.max(b))),
            8 => (0_u64..256, 0_u64..4).prop_map(|(start, more)| range(start, start + more)),
        ]
    }

    /// A step of a test; a number picks one of the entries there are.
    #[derive(Clone, Debug)]
    enum Step {
        Insert(VaRange),
        Remove(prop::sample::Index),
        SetRange(prop::sample::Index, VaRange),
        Query(VaRange),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => any_range().prop_map(Step::Insert),
            3 => any::<prop::sample::Index>().prop_map(Step::Remove),
            2 => (any::<prop::sample::Index>(), any_range())
                .prop_map(|(entry, range)| Step::SetRange(entry, range)),
            3 => any_range().prop_map(Step::Query),
        ]
    }

    proptest! {
        /// The index does what a plain list does.
        #[test]
        fn behaves_like_a_list(
            ranges in vec(any_range(), 0..120),
            steps in vec(step(), 1..100),
        ) {
            let mut index = Index::new();
            let mut list: Vec<(Key, VaRange, u32)> = Vec::new();
            let steps = ranges.into_iter().map(Step::Insert).chain(steps);
            for (value, step) in (0..).zip(steps) {
                match step {
                    Step::Insert(range) => {
                        let key = insert(&mut index, range, value);
                        prop_assert!(list.iter().all(|entry| entry.0 != key));
                        list.push((key, range, value));
                    }
                    Step::Remove(entry) if !list.is_empty() => {
                        let (key, _, value) = list.swap_remove(entry.index(list.len()));
                        prop_assert_eq!(index.remove(key), value);
                    }
                    Step::SetRange(entry, range) if !list.is_empty() => {
                        let entry = entry.get_mut(&mut list);
                        entry.1 = range;
                        index.set_range(entry.0, range);
                    }
                    Step::Query(range) => {
                        let mut hits = list.clone();
                        hits.retain(|entry| entry.1.overlaps(range));
                        hits.sort_by_key(|entry| (entry.1.start(), entry.0.0));
                        prop_assert_eq!(found(&index, range), hits);
                    }
                    Step::Remove(_) | Step::SetRange(..) => {}
                }
                index.check();
            }

            prop_assert_eq!(index.len(), list.len());
            prop_assert_eq!(index.is_empty(), list.is_empty());
            let first = list.iter().min_by_key(|entry| (entry.1.start(), entry.0.0));
            prop_assert_eq!(index.first(), first.map(|entry| entry.0));
            for (key, range, value) in list {
                prop_assert_eq!((index.range(key), *index.get(key)), (range, value));
            }
        }
    }

    #[test]
    fn an_empty_index_finds_nothing_and_has_no_memory() {
        let index = Index::new();
        index.check();
        assert!(index.is_empty() && index.is_full());
        assert_eq!(found(&index, VaRange::ALL), []);
        assert_eq!(found(&index, range(0, 0)), []);
        assert_eq!(index.first(), None);
        assert_eq!(index.heap_bytes(), 0);
    }

    #[test]
    fn hits_come_in_order_of_start_and_then_of_key() {
        let mut index = Index::new();
        let high = insert(&mut index, range(9, 9), 0);
        let a = insert(&mut index, range(5, 20), 1);
        let b = insert(&mut index, range(5, 6), 2);
        let c = insert(&mut index, range(5, 20), 3);
        let all = insert(&mut index, VaRange::ALL, 4);
        insert(&mut index, range(21, u64::MAX), 5);
        let keys = |at| found(&index, at).into_iter().map(|hit| hit.0).collect::<Vec<_>>();
        assert_eq!(keys(range(6, 20)), [all, a, b, c, high]);
        assert_eq!(keys(range(7, 8)), [all, a, c]);
        assert_eq!(keys(range(0, 4)), [all]);
        assert_eq!(index.first(), Some(all));
    }

    #[test]
    fn stays_balanced_over_many_chunks_when_filled_and_emptied_in_order() {
        const ENTRIES: u32 = 5_000;
        for descending in [false, true] {
            let mut index = Index::new();
            for n in 0..ENTRIES {
                let start = u64::from(if descending { ENTRIES - n } else { n }) * 0x1000;
                insert(&mut index, range(start, start + 0x1fff), n);
            }
            index.check();
            assert_eq!(index.len(), ENTRIES as usize);
            // 64 + 128 + ... + 4096 slots are the first chunks to hold them.
            assert_eq!(
                (index.next_growth(), index.heap_bytes()),
                (7, 127 * 64 * size_of::<Slot<u32>>())
            );
            assert_eq!(found(&index, range(0x50_0800, 0x50_0800)).len(), 2);
            let mut left = ENTRIES as usize;
            while let Some(key) = index.first() {
                index.remove(key);
                left -= 1;
                if left.is_multiple_of(256) {
                    index.check();
                }
            }
            assert_eq!(left, 0);
        }
    }

    #[test]
    fn a_growth_that_is_not_next_is_given_back() {
        let mut index = Index::<u32>::new();
        assert!(index.grow(Growth::try_new(1).ok().unwrap()).is_some());
        assert!(index.is_full());
        let late = Growth::try_new(index.next_growth()).ok().unwrap();
        assert!(index.grow(Growth::try_new(index.next_growth()).ok().unwrap()).is_none());
        let bytes = index.heap_bytes();
        assert!(index.grow(late).is_some());
        assert_eq!(index.heap_bytes(), bytes);

        for n in 0..64 {
            assert!(!index.is_full());
            index.insert(VaRange::ALL, n);
        }
        assert!(index.is_full());
        index.check();
        assert!(index.grow(Growth::try_new(1).ok().unwrap()).is_none());
        assert!(!index.is_full());
        index.check();
        assert_eq!(index.heap_bytes(), 3 * bytes);
    }

    #[test]
    fn a_growth_ahead_of_need_is_taken() {
        let mut index = Index::new();
        for chunk in 0..3 {
            assert!(index.grow(Growth::try_new(chunk).ok().unwrap()).is_none());
            index.check();
        }
        for n in 0..64 + 128 + 256 {
            index.insert(range(n, n), n);
        }
        index.check();
        assert!(index.is_full());
    }

    #[test]
    fn a_growth_says_why_it_failed() {
        assert!(matches!(Growth::<u32>::try_new(MAX_CHUNKS), Err(GrowthError::Limit)));
        // The greatest chunk, of slots so large that it cannot be.
        type Large = [u8; 1 << (usize::BITS - 31)];
        let growth = Growth::<Large>::try_new(MAX_CHUNKS - 1);
        assert!(matches!(growth, Err(GrowthError::OutOfMemory(_))));
    }

    #[test]
    fn slots_fill_the_chunks_one_after_the_other() {
        assert_eq!(place(0), (0, 0));
        for chunk in 1..MAX_CHUNKS {
            let first = first_slot(chunk);
            let size = (FIRST_CHUNK as usize) << (chunk - 1);
            assert_eq!(place(first - 1), (chunk - 1, size - 1));
            assert_eq!(place(first), (chunk, 0));
        }
        let slots = first_slot(MAX_CHUNKS);
        assert_eq!(place(slots - 1), (MAX_CHUNKS - 1, (1 << 31) - 1));
        assert!(slots < NIL);
    }

    #[test]
    fn the_slot_of_a_removed_entry_is_used_again() {
        let mut index = Index::new();
        let keys: Vec<Key> =
            (0..64).map(|n| insert(&mut index, range(n, n), Arc::new(n))).collect();
        assert!(index.is_full());
        let bytes = index.heap_bytes();
        let value = index.remove(keys[20]);
        // The index keeps nothing of a value that it gave back.
        assert_eq!(Arc::strong_count(&value), 1);
        index.remove(keys[40]);
        assert!(!index.is_full());
        let mut reused = [7, 8].map(|n| index.insert(range(n, n), Arc::new(n)).0);
        reused.sort_unstable();
        assert_eq!(reused, [keys[20].0, keys[40].0]);
        assert!(index.is_full());
        assert_eq!(index.heap_bytes(), bytes);
        index.check();
    }

    #[test]
    #[should_panic(expected = "the index is full")]
    fn an_insertion_without_room_panics() {
        Index::new().insert(VaRange::ALL, 0_u32);
    }

    #[test]
    #[should_panic(expected = "the key names no entry")]
    fn a_second_removal_panics() {
        let mut index = Index::new();
        let key = insert(&mut index, VaRange::ALL, 0_u32);
        index.remove(key);
        index.remove(key);
    }
}
