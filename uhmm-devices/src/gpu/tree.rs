//! The radix tree of page tables: six levels of nine bits, with leaves of 4 KiB and 2 MiB.
//!
//! # Nodes, and when they may be used again
//!
//! A context remembers more than translations: its walk cache remembers which node holds the 4 KiB
//! entries of a region, so that the next walk begins there. So a node that leaves the tree is not
//! free yet. It is empty, so a walk that still begins there finds nothing and begins again at the
//! root; and it is *retired*: only after every context of these tables has dropped its walk cache
//! may it be given to another region (regression 61). A node goes through these states:
//!
//! | state | in the tree | may be in a walk cache | left by |
//! | --- | --- | --- | --- |
//! | linked | yes | yes | becoming empty, or a 2 MiB leaf in its place |
//! | deposited | no, kept by a 2 MiB leaf | yes, of the same region | the leaf's split, or removal |
//! | retired | no | yes | the end of the flush that follows |
//! | free | no | no | being linked or deposited |
//!
//! Each 2 MiB leaf keeps a node of its own deposited, so that splitting it, which an invalidation
//! does, allocates nothing.

use uhmm::{Access, DeviceFrame, Frame, Order, Page, PageRange};

use super::memory::Stamp;

/// The bits of a page's number that a level of the tree decides.
const LEVEL_BITS: u32 = 9;

/// The entries of a node.
const SLOTS: usize = 1 << LEVEL_BITS;

/// The level of the root: six levels of nine bits hold every 52-bit page number.
const ROOT_LEVEL: u32 = 5;

/// The level whose entries are 2 MiB each.
const HUGE_LEVEL: u32 = 1;

/// Where a translation leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To system memory.
    System(Frame),
    /// To the GPU's own memory. The stamp tells this use of the frame from later ones.
    Local(DeviceFrame, Stamp),
}

/// A leaf: the first page of its block leads to `target`, the others follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) target: Target,
    pub(crate) access: Access,
}

/// What a walk found.
pub(crate) struct Walked {
    pub(crate) leaf: Leaf,
    pub(crate) order: Order,
    /// The node that holds the 4 KiB entries, if the walk came to one.
    pub(crate) node: Option<NodeIndex>,
}

/// How many nodes there are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeCounts {
    /// In the tree.
    pub linked: usize,
    /// Kept by 2 MiB leaves for their split.
    pub deposited: usize,
    /// Out of the tree, and still to be flushed from walk caches.
    pub retired: usize,
    /// Ready to be used.
    pub free: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeIndex(u32);

/// A list of nodes, through their `next`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Chain {
    ends: Option<(NodeIndex, NodeIndex)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NodeState {
    Linked,
    Deposited,
    Retired,
    Free,
}

#[derive(Clone, Copy)]
enum Slot {
    Empty,
    Table(NodeIndex),
    Page(Leaf),
    Huge { leaf: Leaf, deposit: NodeIndex },
}

struct Node {
    state: NodeState,
    level: u32,
    /// The first page of the region.
    base: u64,
    /// How many slots are not empty.
    live: usize,
    next: Option<NodeIndex>,
    slots: Box<[Slot]>,
}

/// The tree of one mirror.
pub(super) struct Tree {
    nodes: Vec<Node>,
    free: Chain,
    /// Retired, and not in the hands of a fence.
    pub(super) retired: Chain,
    root: NodeIndex,
}

impl Chain {
    pub(crate) fn is_empty(&self) -> bool {
        self.ends.is_none()
    }
}

impl Target {
    /// Returns where the page leads that is `pages` further in the same block.
    pub(crate) fn plus(self, pages: u64) -> Target {
        match self {
            Target::System(frame) => Target::System(Frame(frame.0 + pages)),
            Target::Local(frame, stamp) => Target::Local(DeviceFrame(frame.0 + pages), stamp),
        }
    }
}

impl Leaf {
    /// Returns the leaf of the page that is `pages` further in the same block.
    pub(crate) fn plus(self, pages: u64) -> Leaf {
        Leaf { target: self.target.plus(pages), ..self }
    }

    /// Returns the leaf of the page that is `pages` before in the same block.
    pub(crate) fn minus(self, pages: u64) -> Leaf {
        let target = match self.target {
            Target::System(frame) => Target::System(Frame(frame.0 - pages)),
            Target::Local(frame, stamp) => Target::Local(DeviceFrame(frame.0 - pages), stamp),
        };
        Leaf { target, ..self }
    }

    /// Tells whether two leaves differ in nothing but the allocation.
    pub(crate) fn leads_beside(self, other: Leaf) -> bool {
        let same_frame = match (self.target, other.target) {
            (Target::Local(one, _), Target::Local(two, _)) => one == two,
            (one, two) => one == two,
        };
        same_frame && self.access == other.access
    }
}

/// Returns the position of `page` in a node of `level`.
fn slot_of(page: u64, level: u32) -> usize {
    (page >> (LEVEL_BITS * level)) as usize & (SLOTS - 1)
}

/// Returns the pages of one entry of a node of `level`.
fn span_of(level: u32) -> u64 {
    1 << (LEVEL_BITS * level)
}

impl Tree {
    pub(super) fn new() -> Tree {
        let root = Node::new(ROOT_LEVEL, 0);
        Tree {
            nodes: vec![root],
            free: Chain::default(),
            retired: Chain::default(),
            root: NodeIndex(0),
        }
    }

    fn node(&self, index: NodeIndex) -> &Node {
        &self.nodes[index.0 as usize]
    }

    fn node_mut(&mut self, index: NodeIndex) -> &mut Node {
        &mut self.nodes[index.0 as usize]
    }

    pub(super) fn walk(&self, page: Page) -> Option<Walked> {
        let number = page.number();
        let mut index = self.root;
        for level in (0..=ROOT_LEVEL).rev() {
            match self.node(index).slots[slot_of(number, level)] {
                Slot::Empty => return None,
                Slot::Table(child) => index = child,
                Slot::Page(leaf) => {
                    return Some(Walked { leaf, order: Order::PAGE, node: Some(index) });
                }
                Slot::Huge { leaf, .. } => {
                    let leaf = leaf.plus(number % span_of(HUGE_LEVEL));
                    return Some(Walked { leaf, order: Order::HUGE, node: None });
                }
            }
        }
        unreachable!("the lowest level holds no tables")
    }

    /// Looks `page` up in a node that a walk cache has for it; `Err` with what the node is for now,
    /// if that is something else.
    pub(super) fn walk_from(&self, index: NodeIndex, page: Page) -> Result<Option<Leaf>, u64> {
        let node = self.node(index);
        let base = page.align_down(Order::HUGE).number();
        if node.level != 0 || node.base != base || node.state == NodeState::Free {
            return Err(node.base << uhmm::PAGE_SHIFT);
        }
        match node.slots[slot_of(page.number(), 0)] {
            Slot::Page(leaf) => Ok(Some(leaf)),
            _ => Ok(None),
        }
    }

    /// Returns the node of `level` above `page`, made if need be. A 2 MiB leaf in the way is split.
    fn descend(&mut self, page: Page, level: u32) -> NodeIndex {
        let number = page.number();
        let mut index = self.root;
        for above in (level + 1..=ROOT_LEVEL).rev() {
            let slot = slot_of(number, above);
            index = match self.node(index).slots[slot] {
                Slot::Table(child) => child,
                Slot::Empty => {
                    let base = number & !(span_of(above) - 1);
                    let child = self.allocate(above - 1, base, NodeState::Linked);
                    self.set(index, slot, Slot::Table(child));
                    child
                }
                Slot::Huge { leaf, deposit } => self.split(index, slot, leaf, deposit),
                Slot::Page(_) => unreachable!("4 KiB leaves are in the lowest level"),
            };
        }
        index
    }

    pub(super) fn enter_page(&mut self, page: Page, leaf: Leaf) {
        let node = self.descend(page, 0);
        self.set(node, slot_of(page.number(), 0), Slot::Page(leaf));
    }

    pub(super) fn enter_huge(&mut self, first: Page, leaf: Leaf) {
        let node = self.descend(first, HUGE_LEVEL);
        let slot = slot_of(first.number(), HUGE_LEVEL);
        let deposit = match self.node(node).slots[slot] {
            Slot::Empty => self.allocate(0, first.number(), NodeState::Deposited),
            Slot::Huge { deposit, .. } => deposit,
            // A walk cache that has the node for this region will find it empty until it is put
            // back in its place, so it needs no flush.
            Slot::Table(child) => {
                let child_node = self.node_mut(child);
                child_node.clear();
                child_node.state = NodeState::Deposited;
                child
            }
            Slot::Page(_) => unreachable!("4 KiB leaves are in the lowest level"),
        };
        self.set(node, slot, Slot::Huge { leaf, deposit });
    }

    /// Puts 512 leaves in the place of one.
    fn split(
        &mut self,
        parent: NodeIndex,
        slot: usize,
        leaf: Leaf,
        deposit: NodeIndex,
    ) -> NodeIndex {
        let node = self.node_mut(deposit);
        for (page, slot) in (0..).zip(node.slots.iter_mut()) {
            *slot = Slot::Page(leaf.plus(page));
        }
        node.live = SLOTS;
        node.state = NodeState::Linked;
        self.set(parent, slot, Slot::Table(deposit));
        deposit
    }

    /// Removes the leaves of `range`, and says whether there were any.
    pub(super) fn remove(&mut self, range: PageRange) -> bool {
        self.remove_below(self.root, range.first().number(), range.last().number())
    }

    fn remove_below(&mut self, index: NodeIndex, first: u64, last: u64) -> bool {
        let (level, base) = (self.node(index).level, self.node(index).base);
        let span = span_of(level);
        let mut changed = false;
        for slot in
            slot_of(first.max(base), level)..=slot_of(last.min(base + (span * 512 - 1)), level)
        {
            let (from, to) = (base + slot as u64 * span, base + (slot as u64 + 1) * span - 1);
            changed |= match self.node(index).slots[slot] {
                Slot::Empty => false,
                Slot::Page(_) => {
                    self.set(index, slot, Slot::Empty);
                    true
                }
                Slot::Huge { deposit, .. } if first <= from && to <= last => {
                    self.set(index, slot, Slot::Empty);
                    self.retire(deposit);
                    true
                }
                Slot::Huge { leaf, deposit } => {
                    let child = self.split(index, slot, leaf, deposit);
                    self.remove_below(child, first, last)
                }
                Slot::Table(child) => {
                    let changed = self.remove_below(child, first, last);
                    if self.node(child).live == 0 {
                        self.set(index, slot, Slot::Empty);
                        self.retire(child);
                    }
                    changed
                }
            };
        }
        changed
    }

    fn set(&mut self, index: NodeIndex, slot: usize, new: Slot) {
        let node = self.node_mut(index);
        let old = std::mem::replace(&mut node.slots[slot], new);
        node.live += usize::from(!matches!(new, Slot::Empty));
        node.live -= usize::from(!matches!(old, Slot::Empty));
    }

    fn allocate(&mut self, level: u32, base: u64, state: NodeState) -> NodeIndex {
        let Some(index) = self.pop_free() else {
            let index = u32::try_from(self.nodes.len()).expect("2^32 table nodes are never needed");
            self.nodes.push(Node { state, ..Node::new(level, base) });
            return NodeIndex(index);
        };
        let node = self.node_mut(index);
        debug_assert_eq!(node.live, 0, "a node is freed empty");
        (node.level, node.base, node.state) = (level, base, state);
        index
    }

    fn pop_free(&mut self) -> Option<NodeIndex> {
        let (head, tail) = self.free.ends?;
        let next = self.node_mut(head).next.take();
        self.free.ends = next.map(|next| (next, tail));
        Some(head)
    }

    fn retire(&mut self, index: NodeIndex) {
        let node = self.node_mut(index);
        node.clear();
        node.state = NodeState::Retired;
        let alone = Chain { ends: Some((index, index)) };
        self.retired = self.append(self.retired, alone);
    }

    pub(super) fn free(&mut self, chain: Chain) {
        let mut next = chain.ends.map(|(head, _)| head);
        while let Some(index) = next {
            let node = self.node_mut(index);
            node.state = NodeState::Free;
            next = node.next;
        }
        self.free = self.append(self.free, chain);
    }

    fn append(&mut self, front: Chain, back: Chain) -> Chain {
        let (Some((head, middle)), Some((next, tail))) = (front.ends, back.ends) else {
            return Chain { ends: front.ends.or(back.ends) };
        };
        self.node_mut(middle).next = Some(next);
        Chain { ends: Some((head, tail)) }
    }

    pub(super) fn count(&self) -> NodeCounts {
        let mut counts = NodeCounts::default();
        for node in &self.nodes {
            *match node.state {
                NodeState::Linked => &mut counts.linked,
                NodeState::Deposited => &mut counts.deposited,
                NodeState::Retired => &mut counts.retired,
                NodeState::Free => &mut counts.free,
            } += 1;
        }
        counts
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let mut reached = NodeCounts::default();
        self.check_below(self.root, &mut reached)?;
        let counts = self.count();
        if (reached.linked, reached.deposited) != (counts.linked, counts.deposited) {
            return Err(format!("the tree reaches {reached:?} of {counts:?} nodes"));
        }
        for node in &self.nodes {
            let used = node.state == NodeState::Linked;
            if !used && node.live != 0 {
                return Err(format!("a node that is {:?} has {} entries", node.state, node.live));
            }
        }
        Ok(())
    }

    fn check_below(&self, index: NodeIndex, reached: &mut NodeCounts) -> Result<(), String> {
        let node = self.node(index);
        reached.linked += 1;
        let live = node.slots.iter().filter(|slot| !matches!(slot, Slot::Empty)).count();
        if node.state != NodeState::Linked || node.live != live {
            return Err(format!("{:?} node of {} entries counts {live}", node.state, node.live));
        }
        if live == 0 && index != self.root {
            return Err(format!("the node of level {} at {:#x} is empty", node.level, node.base));
        }
        for (slot, entry) in node.slots.iter().enumerate() {
            let base = node.base + slot as u64 * span_of(node.level);
            match *entry {
                Slot::Table(child) => {
                    let below = self.node(child);
                    if (below.level + 1, below.base) != (node.level, base) {
                        return Err(format!("a node of {:#x} hangs at {base:#x}", below.base));
                    }
                    self.check_below(child, reached)?;
                }
                Slot::Huge { deposit, .. } => {
                    let kept = self.node(deposit);
                    reached.deposited += 1;
                    if kept.state != NodeState::Deposited || kept.base != base {
                        return Err(format!("the leaf at {base:#x} keeps a {:?} node", kept.state));
                    }
                }
                Slot::Page(_) | Slot::Empty => {}
            }
        }
        Ok(())
    }
}

impl Node {
    fn new(level: u32, base: u64) -> Node {
        let slots = vec![Slot::Empty; SLOTS].into_boxed_slice();
        Node { state: NodeState::Linked, level, base, live: 0, next: None, slots }
    }

    fn clear(&mut self) {
        if self.live != 0 {
            self.slots.fill(Slot::Empty);
            self.live = 0;
        }
    }
}
