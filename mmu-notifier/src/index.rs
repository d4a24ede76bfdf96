//! The interval index: which entries overlap a range of addresses.
//!
//! [`Index`] is a B+-tree of ranges in (start, key) order, each inner node knowing the greatest
//! last address below each of its children. Equal and overlapping ranges are welcome, up to
//! 2^32 - 64 of them.
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
//! An entry is two things: a slot, which holds its range and its value, never moves, and whose
//! number is the key; and an [`Item`] in a leaf of the tree, which holds its range and its key, and
//! which moves as nodes split and merge. No slot knows its leaf: to find it is to go down the tree
//! by start and key, so that an item that moves leaves its slot untouched.
//!
//! Slots and nodes lie in chunks that double in size: chunk `k` holds `64 << k` slots and
//! `11 << k` nodes, so neither ever moves. A chunk's memory is reserved once and touched from the
//! bottom up. The slot of a removed entry is the first to be used again, and so is a node that is
//! no longer needed.
//!
//! Leaves and inner nodes are of one type, six cache lines of up to 15 items. It keeps the starts
//! together, the last addresses together and so on, so that a step down the tree reads two or three
//! lines, which are neighbours and which the processor can fetch at the same time.
//!
//! # Why the nodes suffice
//!
//! Each node but the root has 7 items or more, and each node but the root is an item of another.
//! So `n` entries in `m` nodes are `n + m - 1` items, of which `7 (m - 1)` or more are in nodes
//! other than the root: `6 (m - 1) <= n`, and `m <= 1 + n / 6`. The first `k` chunks hold
//! `64 (2^k - 1)` slots and `11 (2^k - 1)` nodes, which is no less than `1 + 64 (2^k - 1) / 6`,
//! rounded down. An insertion takes nodes and frees none, and a removal frees nodes and takes none,
//! so that no more of them are in use at any time than before or after. Hence where there is a slot
//! for an entry, there are the nodes for it too.
//!
//! # Cost
//!
//! For `n` entries, insertion and removal are O(log n). A query with `k` hits is O(log n + k) where
//! the hits are neighbours in start order, as the entries that start within the range asked for
//! always are. Entries that start below it and reach into it may lie scattered, and a query is
//! never worse than O(log n + k log(n / k)): every node visited is on the path to the end of the
//! range asked for, or has a hit at or below it.
//!
//! What takes time among very many entries is that memory is far away. All but the leaves and the
//! slots is a tenth of the tree and mostly in some cache, so an operation waits for one leaf, and
//! for one slot for each entry that it removes or finds.
//!
//! # Invariants
//!
//! 1. All leaves are at the same depth: `height` counts the levels. It is 0 without a root, which
//!    is before the first insertion.
//! 2. Each node but the root has [`MIN`] to [`CAPACITY`] items. The root has no more either, but
//!    may have as few as two where it is an inner node, and none where it is a leaf.
//! 3. The items of the leaves are in (start, key) order, strictly. They are the entries.
//! 4. The (start, key) of an item of an inner node is above every entry of the items before it, and
//!    not above any entry below it. Its `last` is the greatest of the last addresses below it.
//! 5. Every slot in use either holds an entry or is in the free list. `len` counts the former.
//! 6. Every node in use is either in the tree or in the free list.
//! 7. The first `reserved` chunks have room for all their slots and nodes, and no other chunk has
//!    memory. They are filled in order: what is below `used` and `used_nodes` is there, the rest was
//!    never touched.

use std::collections::TryReserveError;

use crate::va_range::VaRange;

/// How many slots the first chunk holds; each further one holds twice as many as the one before.
const FIRST_CHUNK: u32 = 64;

/// How many nodes the first chunk holds; each further one holds twice as many as the one before.
const FIRST_NODES: u32 = 11;

/// How many numbers of nodes the first chunk has, and the others in proportion. It is a power of
/// two, so that the chunk is the highest bit; what is more than the nodes names no node.
const FIRST_NUMBERS: u32 = 16;

/// How many chunks there can be: with one more, slots would outnumber 32 bits.
const MAX_CHUNKS: usize = 26;

/// The number that names no slot and no node. All chunks together hold fewer than this.
const NIL: u32 = u32::MAX;

/// The greatest number of items of a node.
const CAPACITY: usize = 15;

/// The smallest number of items of a node that is not the root.
const MIN: usize = 7;

/// The greatest number of levels: with one more, there were `2 * 7^12` entries or more.
const MAX_HEIGHT: usize = 12;

const _: () = assert!(2 * (MIN as u64).pow(MAX_HEIGHT as u32) > 1 << 32);
// A full node and one item more are enough for two nodes.
const _: () = assert!(CAPACITY.div_ceil(2) > MIN && CAPACITY / 2 >= MIN);
// A node that is one short and a sibling that can spare none fit in one node, with room left.
const _: () = assert!(2 * MIN - 1 < CAPACITY);

/// A map from ranges to values that finds the entries overlapping a range.
///
/// To drop it is to free its memory, and to drop the values that are left.
pub(crate) struct Index<T> {
    chunks: [Vec<Slot<T>>; MAX_CHUNKS],
    node_chunks: [Vec<Node>; MAX_CHUNKS],
    /// How many chunks have memory.
    reserved: usize,
    /// How many slots have been used at least once.
    used: u32,
    /// The first slot of the free list, or [`NIL`].
    free: u32,
    /// The lowest number of a node that was never used.
    used_nodes: u32,
    /// The first node of the free list, or [`NIL`].
    free_nodes: u32,
    len: u32,
    /// The topmost node, or [`NIL`] before the first insertion.
    root: u32,
    /// How many levels the tree has.
    height: usize,
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
    nodes: Vec<Node>,
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
        let mut nodes = Vec::new();
        nodes
            .try_reserve_exact((FIRST_NODES as usize) << chunk)
            .map_err(GrowthError::OutOfMemory)?;
        Ok(Growth { chunk, slots, nodes })
    }
}

impl<T> Index<T> {
    /// Makes an empty index. It is full, too: it has no memory yet.
    pub(crate) const fn new() -> Index<T> {
        Index {
            chunks: [const { Vec::new() }; MAX_CHUNKS],
            node_chunks: [const { Vec::new() }; MAX_CHUNKS],
            reserved: 0,
            used: 0,
            free: NIL,
            used_nodes: 0,
            free_nodes: NIL,
            len: 0,
            root: NIL,
            height: 0,
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
        self.free == NIL && self.used == first(self.reserved, FIRST_CHUNK)
    }

    /// Returns the number of the chunk that [`Index::grow`] takes next.
    pub(crate) fn next_growth(&self) -> usize {
        self.reserved
    }

    /// Returns the bytes of memory that the index has reserved on the heap.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(crate) fn heap_bytes(&self) -> usize {
        let slots: usize = self.chunks.iter().map(Vec::capacity).sum();
        let nodes: usize = self.node_chunks.iter().map(Vec::capacity).sum();
        slots * size_of::<Slot<T>>() + nodes * size_of::<Node>()
    }

    /// Takes over `growth` if it is the chunk that comes next, even where there is room left. Else,
    /// as when another thread was faster, gives it back, to be dropped where it may be freed.
    #[must_use = "a growth that is not needed is to be dropped outside the lock"]
    pub(crate) fn grow(&mut self, growth: Growth<T>) -> Option<Growth<T>> {
        if growth.chunk != self.reserved {
            return Some(growth);
        }
        self.chunks[growth.chunk] = growth.slots;
        self.node_chunks[growth.chunk] = growth.nodes;
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
        let slot = Slot { start: range.start(), last: range.last(), value: Some(value) };
        let at = if self.free == NIL {
            let at = self.used;
            self.chunks[place(at, FIRST_CHUNK).0].push(slot);
            self.used += 1;
            at
        } else {
            let at = self.free;
            let reused = self.slot_mut(at);
            let next = reused.start as u32;
            *reused = slot;
            self.free = next;
            at
        };
        self.len += 1;
        self.link(Key(at), range);
        Key(at)
    }

    /// Takes the entry out and returns its value.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    pub(crate) fn remove(&mut self, key: Key) -> T {
        let start = self.range(key).start();
        self.unlink(key, start);
        let next = u64::from(self.free);
        self.free = key.0;
        self.len -= 1;
        let slot = self.slot_mut(key.0);
        slot.start = next;
        slot.value.take().expect(NO_ENTRY)
    }

    /// Gives the entry another range, under the same key.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    pub(crate) fn set_range(&mut self, key: Key, range: VaRange) {
        let start = self.range(key).start();
        self.unlink(key, start);
        let slot = self.slot_mut(key.0);
        (slot.start, slot.last) = (range.start(), range.last());
        self.link(key, range);
    }

    /// Returns the range of an entry.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    pub(crate) fn range(&self, key: Key) -> VaRange {
        let slot = self.slot(key.0);
        assert!(slot.value.is_some(), "{NO_ENTRY}");
        slot.range()
    }

    /// Returns the value of an entry.
    ///
    /// # Panics
    ///
    /// Where `key` names no entry.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(crate) fn get(&self, key: Key) -> &T {
        self.slot(key.0).value()
    }

    /// Returns the entry that is lowest in (start, key) order, if there is an entry.
    pub(crate) fn first(&self) -> Option<Key> {
        if self.root == NIL {
            return None;
        }
        let mut node = self.node(self.root);
        for _ in 1..self.height {
            node = self.node(node.children[0]);
        }
        (node.len() > 0).then_some(Key(node.keys[0]))
    }

    /// Calls `found` for each entry that shares an address with `range`, in (start, key) order.
    pub(crate) fn overlapping(&self, range: VaRange, mut found: impl FnMut(Key, VaRange, &T)) {
        if self.root != NIL {
            self.visit(self.root, self.height, range, &mut found);
        }
    }

    /// [`Index::overlapping`], for the node `at`, below which there are `height` levels, its own
    /// included. It calls itself once a level, so [`MAX_HEIGHT`] times at most.
    fn visit(
        &self,
        at: u32,
        height: usize,
        range: VaRange,
        found: &mut impl FnMut(Key, VaRange, &T),
    ) {
        let node = self.node(at);
        let (start, last) = (range.start(), range.last());
        for i in 0..node.len() {
            if node.starts[i] > last {
                return; // and so does everything after it
            }
            if node.lasts[i] < start {
                continue;
            }
            if height > 1 {
                self.visit(node.children[i], height - 1, range, found);
            } else {
                let key = node.keys[i];
                let slot = self.slot(key);
                found(Key(key), slot.range(), slot.value());
            }
        }
    }

    /// Adds the item of an entry to the tree.
    fn link(&mut self, key: Key, range: VaRange) {
        let mut new = Item { start: range.start(), last: range.last(), key: key.0, child: NIL };
        if self.root == NIL {
            self.root = self.take_node(Node::of(&[new]));
            self.height = 1;
            return;
        }

        // Down to the leaf, the new entry being told to all above it.
        let mut path = [(NIL, 0); MAX_HEIGHT];
        let mut level = self.height - 1;
        let mut at = self.root;
        for step in &mut path[..level] {
            let node = self.node_mut(at);
            let i = node.child_of(new.start, new.key);
            if (new.start, new.key) < (node.starts[i], node.keys[i]) {
                (node.starts[i], node.keys[i]) = (new.start, new.key);
            }
            if new.last > node.lasts[i] {
                node.lasts[i] = new.last;
            }
            *step = (at, i);
            at = node.children[i];
        }

        // Up again, for as long as a node splits.
        let mut position = self.node(at).below(new.start, new.key);
        loop {
            let node = self.node_mut(at);
            if node.len() < CAPACITY {
                node.insert(position, new);
                return;
            }
            let right = node.split(position, new);
            let left = node.summary(at);
            new = right.summary(NIL);
            new.child = self.take_node(right);
            if level == 0 {
                self.root = self.take_node(Node::of(&[left, new]));
                self.height += 1;
                return;
            }
            level -= 1;
            let (parent, i) = path[level];
            self.node_mut(parent).lasts[i] = left.last;
            at = parent;
            position = i + 1;
        }
    }

    /// Takes the item of the entry `key`, which starts at `start`, out of the tree.
    fn unlink(&mut self, key: Key, start: u64) {
        let mut path = [(NIL, 0); MAX_HEIGHT];
        let levels = self.height - 1;
        let mut at = self.root;
        for step in &mut path[..levels] {
            let node = self.node(at);
            let i = node.child_of(start, key.0);
            *step = (at, i);
            at = node.children[i];
        }
        let leaf = self.node_mut(at);
        let position = leaf.below(start, key.0);
        let item = leaf.remove(position);
        debug_assert_eq!((item.start, item.key), (start, key.0), "the tree lost an entry");

        // Up again, for as long as something changes.
        for &(parent, i) in path[..levels].iter().rev() {
            let node = self.node(at);
            if node.len() < MIN {
                self.refill(parent, i);
            } else {
                let last = node.greatest_last();
                let known = &mut self.node_mut(parent).lasts[i];
                if *known == last {
                    return;
                }
                *known = last;
            }
            at = parent;
        }
        let root = self.node(at);
        if self.height > 1 && root.len() == 1 {
            self.root = root.children[0];
            self.height -= 1;
            self.free_node(at);
        }
    }

    /// Restores invariant 2 for the child `i` of the node `parent`, which is one item short: with a
    /// sibling, it becomes one node if there is room for an insertion then, and shares the items
    /// else.
    fn refill(&mut self, parent: u32, i: usize) {
        let left = i.saturating_sub(1);
        let [a, b] = [left, left + 1].map(|i| self.node(parent).children[i]);
        let [from_a, from_b] = [a, b].map(|node| self.node(node).len());
        if from_a + from_b < CAPACITY {
            for position in 0..from_b {
                let item = self.node(b).item(position);
                self.node_mut(a).insert(from_a + position, item);
            }
            self.free_node(b);
            self.node_mut(parent).remove(left + 1);
        } else {
            for moved in 0..from_a.abs_diff(from_b) / 2 {
                if from_a < from_b {
                    let item = self.node_mut(b).remove(0);
                    self.node_mut(a).insert(from_a + moved, item);
                } else {
                    let item = self.node_mut(a).remove(from_a - moved - 1);
                    self.node_mut(b).insert(0, item);
                }
            }
            let summary = self.node(b).summary(b);
            self.node_mut(parent).set(left + 1, summary);
        }
        let last = self.node(a).greatest_last();
        self.node_mut(parent).lasts[left] = last;
    }

    /// Puts a node where there is room for it and returns its number.
    fn take_node(&mut self, node: Node) -> u32 {
        if self.free_nodes != NIL {
            let at = self.free_nodes;
            let reused = self.node_mut(at);
            let next = reused.children[0];
            *reused = node;
            self.free_nodes = next;
            return at;
        }
        let at = self.used_nodes;
        let (chunk, offset) = place(at, FIRST_NUMBERS);
        // The memory is there, so this does not allocate: see the head of this file.
        // Also without debug checks: to grow here would be to allocate under the owner's lock.
        assert!(self.node_chunks[chunk].len() < self.node_chunks[chunk].capacity());
        self.node_chunks[chunk].push(node);
        let is_last = offset + 1 == (FIRST_NODES as usize) << chunk;
        self.used_nodes = if is_last { first(chunk + 1, FIRST_NUMBERS) } else { at + 1 };
        at
    }

    fn free_node(&mut self, at: u32) {
        let next = self.free_nodes;
        let node = self.node_mut(at);
        node.len = 0;
        node.children[0] = next;
        self.free_nodes = at;
    }

    fn node(&self, at: u32) -> &Node {
        let (chunk, offset) = place(at, FIRST_NUMBERS);
        &self.node_chunks[chunk][offset]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node {
        let (chunk, offset) = place(at, FIRST_NUMBERS);
        &mut self.node_chunks[chunk][offset]
    }

    fn slot(&self, at: u32) -> &Slot<T> {
        let (chunk, offset) = place(at, FIRST_CHUNK);
        &self.chunks[chunk][offset]
    }

    fn slot_mut(&mut self, at: u32) -> &mut Slot<T> {
        let (chunk, offset) = place(at, FIRST_CHUNK);
        &mut self.chunks[chunk][offset]
    }
}

/// What a key that names no entry is told.
const NO_ENTRY: &str = "the key names no entry: was it removed?";

/// Returns the chunk of a number and its offset in it, `in_first` numbers, a power of two, being in
/// the first chunk.
fn place(number: u32, in_first: u32) -> (usize, usize) {
    // Counted from 64, say, the slots of chunk `k` are those whose highest bit is `64 << k`.
    let counted = number + in_first;
    let highest = counted.ilog2();
    ((highest - in_first.ilog2()) as usize, (counted - (1 << highest)) as usize)
}

/// Returns the first number of a chunk: how many there are in the chunks before it.
fn first(chunk: usize, in_first: u32) -> u32 {
    ((u64::from(in_first) << chunk) - u64::from(in_first)) as u32
}

/// An entry, at the place that its key names, or a place for one: half a cache line, where an
/// `Option<T>` has 16 bytes.
#[repr(align(32))]
struct Slot<T> {
    /// Where the range starts. In a free slot, the next free slot.
    start: u64,
    last: u64,
    /// `None` in a free slot.
    value: Option<T>,
}

impl<T> Slot<T> {
    fn range(&self) -> VaRange {
        VaRange::from_bounds(self.start, self.last).expect("it was a range when it came in")
    }

    fn value(&self) -> &T {
        self.value.as_ref().expect(NO_ENTRY)
    }
}

/// What a leaf knows of an entry, and what an inner node knows of a child.
#[derive(Clone, Copy, Debug)]
struct Item {
    start: u64,
    /// Of a child, the greatest of the last addresses below it.
    last: u64,
    /// The key of the entry; of a child, what is with the `start` the least that may be below it.
    key: u32,
    /// The child; [`NIL`] in a leaf.
    child: u32,
}

/// A node of the tree, or a free one, in which the first of the children is the next free one.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Node {
    starts: [u64; CAPACITY],
    len: u64,
    lasts: [u64; CAPACITY],
    keys: [u32; CAPACITY],
    children: [u32; CAPACITY],
}

impl Node {
    fn of(items: &[Item]) -> Node {
        let mut node = Node {
            starts: [0; CAPACITY],
            len: items.len() as u64,
            lasts: [0; CAPACITY],
            keys: [0; CAPACITY],
            children: [NIL; CAPACITY],
        };
        for (i, item) in items.iter().enumerate() {
            node.set(i, *item);
        }
        node
    }

    fn len(&self) -> usize {
        // Never more, and the compiler need not look.
        (self.len as usize).min(CAPACITY)
    }

    fn item(&self, i: usize) -> Item {
        Item {
            start: self.starts[i],
            last: self.lasts[i],
            key: self.keys[i],
            child: self.children[i],
        }
    }

    fn set(&mut self, i: usize, item: Item) {
        self.starts[i] = item.start;
        self.lasts[i] = item.last;
        self.keys[i] = item.key;
        self.children[i] = item.child;
    }

    /// Returns how many items are below (`start`, `key`).
    fn below(&self, start: u64, key: u32) -> usize {
        let starts = &self.starts[..self.len()];
        let mut i = starts.iter().map(|&other| usize::from(other < start)).sum();
        while i < starts.len() && starts[i] == start && self.keys[i] < key {
            i += 1;
        }
        i
    }

    /// Returns the child below which (`start`, `key`) is, or would be.
    fn child_of(&self, start: u64, key: u32) -> usize {
        let i = self.below(start, key);
        if i < self.len() && (self.starts[i], self.keys[i]) == (start, key) {
            i
        } else {
            i.saturating_sub(1)
        }
    }

    /// Returns the greatest of the last addresses.
    fn greatest_last(&self) -> u64 {
        self.lasts[..self.len()].iter().fold(0, |a, &b| a.max(b))
    }

    /// Returns what is known of this node, whose number is `at`, in the node above it.
    fn summary(&self, at: u32) -> Item {
        Item { start: self.starts[0], last: self.greatest_last(), key: self.keys[0], child: at }
    }

    /// Adds an item before the item `i`. There is room for it.
    fn insert(&mut self, i: usize, item: Item) {
        let len = self.len();
        self.starts.copy_within(i..len, i + 1);
        self.lasts.copy_within(i..len, i + 1);
        self.keys.copy_within(i..len, i + 1);
        self.children.copy_within(i..len, i + 1);
        self.len += 1;
        self.set(i, item);
    }

    /// Takes the item `i` out.
    fn remove(&mut self, i: usize) -> Item {
        let len = self.len();
        let item = self.item(i);
        self.starts.copy_within(i + 1..len, i);
        self.lasts.copy_within(i + 1..len, i);
        self.keys.copy_within(i + 1..len, i);
        self.children.copy_within(i + 1..len, i);
        self.len -= 1;
        item
    }

    /// Adds an item before the item `i` to this node, which is full; returns the upper half.
    fn split(&mut self, i: usize, item: Item) -> Node {
        let half = CAPACITY / 2;
        let keep = if i <= half { half } else { half + 1 };
        let mut right = Node::of(&[]);
        let moved = CAPACITY - keep;
        right.starts[..moved].copy_from_slice(&self.starts[keep..]);
        right.lasts[..moved].copy_from_slice(&self.lasts[keep..]);
        right.keys[..moved].copy_from_slice(&self.keys[keep..]);
        right.children[..moved].copy_from_slice(&self.children[keep..]);
        right.len = moved as u64;
        self.len = keep as u64;
        if i <= half {
            self.insert(i, item);
        } else {
            right.insert(i - keep, item);
        }
        right
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
impl<T> Index<T> {
    /// Panics where an invariant does not hold.
    pub(crate) fn check(&self) {
        let mut entries = Vec::new();
        let mut nodes = 0;
        assert_eq!(self.root == NIL, self.height == 0, "invariant 1: the height without a root");
        if self.root != NIL {
            let least = if self.height > 1 { 2 } else { 0 };
            self.check_node(self.root, self.height, least, &mut entries, &mut nodes);
        }
        let ordered = entries.is_sorted_by(|a, b| (a.0.start(), a.1) < (b.0.start(), b.1));
        assert!(ordered, "invariant 3: {entries:?}");
        assert_eq!(entries.len(), self.len(), "invariant 3: the leaves hold `len` entries");

        let mut free = 0;
        let mut at = self.free;
        while at != NIL {
            free += 1;
            assert!(free <= self.used, "invariant 5: the free list ends");
            let slot = self.slot(at);
            assert!(slot.value.is_none(), "invariant 5: the free slot {at} holds an entry");
            at = slot.start as u32;
        }
        assert_eq!(self.len + free, self.used, "invariant 5: every slot is an entry or free");

        assert!(nodes <= 1 + self.len() / 6, "the nodes outnumber their bound");
        let there: usize = self.node_chunks.iter().map(Vec::len).sum();
        let mut at = self.free_nodes;
        while at != NIL {
            nodes += 1;
            assert!(nodes <= there, "invariant 6: the free list ends");
            assert_eq!(self.node(at).len, 0, "invariant 6: the free node {at} has items");
            at = self.node(at).children[0];
        }
        assert_eq!(nodes, there, "invariant 6: every node is in the tree or free");

        for number in 0..MAX_CHUNKS {
            let (slots, nodes) = (&self.chunks[number], &self.node_chunks[number]);
            let size = (first(number + 1, FIRST_CHUNK) - first(number, FIRST_CHUNK)) as usize;
            let filled = (self.used.saturating_sub(first(number, FIRST_CHUNK)) as usize).min(size);
            assert_eq!(slots.len(), filled, "invariant 7: slots of chunk {number}");
            let node_size = (FIRST_NODES as usize) << number;
            let first_node = first(number, FIRST_NUMBERS);
            let filled = (self.used_nodes.saturating_sub(first_node) as usize).min(node_size);
            assert_eq!(nodes.len(), filled, "invariant 7: nodes of chunk {number}");
            if number < self.reserved {
                let fits = slots.capacity() >= size && nodes.capacity() >= node_size;
                assert!(fits, "invariant 7: chunk {number} is too small");
            } else {
                let memory = slots.capacity() + nodes.capacity();
                assert_eq!(memory, 0, "invariant 7: chunk {number} came too early");
            }
        }
    }

    /// Checks the node `at`, which has `height` levels and `least` items or more, adds its entries
    /// to `entries` in order and its nodes to `nodes`, and returns its greatest last address.
    fn check_node(
        &self,
        at: u32,
        height: usize,
        least: usize,
        entries: &mut Vec<(VaRange, u32)>,
        nodes: &mut usize,
    ) -> u64 {
        *nodes += 1;
        let node = self.node(at);
        assert!((least..=CAPACITY).contains(&(node.len as usize)), "invariant 2: at {at}");
        for item in (0..node.len()).map(|i| node.item(i)) {
            if height == 1 {
                let range = self.range(Key(item.key));
                assert_eq!((item.start, item.last), (range.start(), range.last()), "invariant 3");
                entries.push((range, item.key));
                assert!(entries.len() <= self.len(), "invariant 3: the tree has a cycle");
            } else {
                let above = |entry: &(VaRange, u32)| (entry.0.start(), entry.1);
                let bound = (item.start, item.key);
                assert!(entries.iter().next_back().is_none_or(|e| above(e) < bound), "invariant 4");
                let before = entries.len();
                let last = self.check_node(item.child, height - 1, MIN, entries, nodes);
                assert!(bound <= above(&entries[before]), "invariant 4: above what is below it");
                assert_eq!(item.last, last, "invariant 4: the greatest last address");
            }
        }
        node.greatest_last()
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use std::fmt::Debug;
    use std::sync::Arc;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const _: () = assert!(size_of::<Slot<Arc<dyn Debug>>>() == 32);
    const _: () = assert!(size_of::<Node>() == 6 * 64);

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
            ranges in vec(any_range(), 0..250),
            steps in vec(step(), 1..120),
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
                (7, 127 * (64 * size_of::<Slot<u32>>() + 11 * size_of::<Node>()))
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
        for in_first in [FIRST_CHUNK, FIRST_NUMBERS] {
            assert_eq!(place(0, in_first), (0, 0));
            for chunk in 1..MAX_CHUNKS {
                let first = first(chunk, in_first);
                let size = (in_first as usize) << (chunk - 1);
                assert_eq!(place(first - 1, in_first), (chunk - 1, size - 1));
                assert_eq!(place(first, in_first), (chunk, 0));
            }
        }
        let slots = first(MAX_CHUNKS, FIRST_CHUNK);
        assert_eq!(place(slots - 1, FIRST_CHUNK), (MAX_CHUNKS - 1, (1 << 31) - 1));
        assert!(slots < NIL);
    }

    #[test]
    fn the_chunks_have_nodes_for_all_their_slots() {
        for chunks in 1..=MAX_CHUNKS {
            let slots = u64::from(first(chunks, FIRST_CHUNK));
            let nodes: u64 = (0..chunks).map(|chunk| u64::from(FIRST_NODES) << chunk).sum();
            assert!(nodes > slots / (MIN as u64 - 1), "{chunks} chunks");
        }
    }

    /// Fills the slots to the last one and makes the nodes as empty as they get, again and again.
    #[test]
    fn nodes_suffice_where_slots_do() {
        let mut index = Index::new();
        for chunk in 0..4 {
            assert!(index.grow(Growth::try_new(chunk).ok().unwrap()).is_none());
            let bytes = index.heap_bytes();
            for stride in [1, 2, 3, 5, 7, 8, 9, 11] {
                let mut keys = Vec::new();
                for n in 0_u64.. {
                    if index.is_full() {
                        break;
                    }
                    // In order up or down, or spread.
                    let start = [n, !n, n.wrapping_mul(0x9E37_79B9_7F4A_7C15)][n as usize % 3];
                    let start = if stride % 2 == 0 { n } else { start };
                    keys.push(index.insert(range(start, start), n));
                }
                index.check();
                keys.sort_by_key(|key| index.range(*key).start());
                for (n, key) in keys.into_iter().enumerate() {
                    if n % stride != 0 || stride == 1 {
                        index.remove(key);
                        index.check();
                    }
                }
            }
            while let Some(key) = index.first() {
                index.remove(key);
            }
            index.check();
            assert_eq!(index.heap_bytes(), bytes);
        }
    }

    /// Fills and empties an index several times, at random and in order, against a sorted map.
    #[test]
    fn behaves_like_a_map_at_every_size_and_height() {
        type Map = std::collections::BTreeMap<(u64, u32), (u64, u32)>;
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) % below
        };
        let (mut index, mut map) = (Index::new(), Map::new());
        let mut highest = 0;
        let mut value = 0;
        // How many steps, and how many in a hundred insert and change a range. The others remove.
        // What is changed or removed is for a while the lowest, then the highest, then any.
        let phases = [(9_000, 90, 5), (9_000, 5, 20), (12_000, 70, 10), (9_000, 45, 10)];
        let phases = phases.into_iter().chain([(12_000, 0, 10)]);
        for (phase, (steps, insertions, changes)) in phases.enumerate() {
            for step in 0..steps {
                let start = match random(8) {
                    0 => [0, u64::MAX, u64::MAX - 1, 1][random(4) as usize],
                    1 | 2 => 0x7000 + random(3),
                    3 => step << 12,
                    4 => u64::MAX - (step << 12),
                    _ => random(1 << 24),
                };
                let last = match random(64) {
                    0 => u64::MAX,
                    1..16 => start,
                    _ => start.saturating_add(random(0x4000)),
                };
                let kind = random(100);
                if kind < insertions || map.is_empty() {
                    let key = insert(&mut index, range(start, last), value);
                    assert_eq!(map.insert((start, key.0), (last, value)), None);
                    value += 1;
                } else {
                    let pick = match (phase + step as usize / 1000) % 3 {
                        0 => map.first_key_value(),
                        1 => map.last_key_value(),
                        _ => map.range((random(1 << 24), 0)..).next().or(map.first_key_value()),
                    };
                    let (&(old, key), &(_, value)) = pick.unwrap();
                    map.remove(&(old, key));
                    if kind < insertions + changes {
                        index.set_range(Key(key), range(start, last));
                        map.insert((start, key), (last, value));
                    } else {
                        assert_eq!(index.remove(Key(key)), value);
                    }
                }
                highest = highest.max(index.height);
                assert_eq!(index.len(), map.len());
                let lowest = map.first_key_value().map(|(&(_, key), _)| Key(key));
                assert_eq!(index.first(), lowest);
                if step.is_multiple_of(97) || map.len() < 40 {
                    index.check();
                    for at in [range(start, last), range(start, start)] {
                        let hits = map
                            .iter()
                            .map(|(&(s, key), &(l, value))| (Key(key), range(s, l), value))
                            .filter(|hit| hit.1.overlaps(at))
                            .collect::<Vec<_>>();
                        assert_eq!(found(&index, at), hits);
                    }
                }
            }
        }
        index.check();
        assert!(highest >= 4, "{highest}");
        assert!(map.len() < 40, "{}", map.len());
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
