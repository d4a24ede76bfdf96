//! What a context has cached of its page tables: translations, and where walks may begin.
//!
//! Nothing here notices a change of the tables. A cached translation is used until it is replaced by
//! another or flushed, which is what makes forgetting a flush a bug that shows.

use uhmm::primitive::Mutex;
use uhmm::{Order, Page, PageRange};

use super::tree::{Leaf, NodeIndex};

/// How many places an entry may be in.
const WAYS: usize = 4;

/// How many regions a walk cache knows.
const REGIONS: usize = 4;

/// A context, as those see it who flush it.
///
/// The lock is held from the look-up of a translation to the end of the access through it, so to
/// have had the lock once is to know that no access from before is under way.
pub(crate) struct TlbCell {
    pub(crate) id: u64,
    pub(crate) tlb: Mutex<Tlb>,
}

/// The translations of a context, of 4 KiB and of 2 MiB, and its walk cache.
pub(crate) struct Tlb {
    pages: Sets,
    huge: Sets,
    pub(crate) walks: WalkCache,
}

/// The nodes that held the 4 KiB entries of regions that were walked lately.
#[derive(Default)]
pub(crate) struct WalkCache([Option<(u64, NodeIndex)>; REGIONS]);

/// Translations of one size, in sets of [`WAYS`] places each.
struct Sets {
    order: Order,
    places: Vec<Option<(Page, Leaf)>>,
    /// Per set, the place that is given up next.
    next: Vec<usize>,
}

impl TlbCell {
    pub(crate) fn new(id: u64, entries: usize) -> TlbCell {
        TlbCell { id, tlb: Mutex::new(Tlb::new(entries)) }
    }
}

impl Tlb {
    /// Makes an empty one, of about `entries` translations of 4 KiB and a quarter of that of 2 MiB.
    pub(crate) fn new(entries: usize) -> Tlb {
        Tlb {
            pages: Sets::new(Order::PAGE, entries),
            huge: Sets::new(Order::HUGE, entries / 4),
            walks: WalkCache::default(),
        }
    }

    /// Returns what is cached for `page`.
    pub(crate) fn get(&self, page: Page) -> Option<Leaf> {
        self.pages.get(page).or_else(|| self.huge.get(page))
    }

    /// Caches what a walk found for `page`, which may be a large leaf around it.
    pub(crate) fn insert(&mut self, page: Page, leaf: Leaf, order: Order) {
        // Of one page there is to be one entry: else an older one might be found first. Those of a
        // large leaf's other pages may stay, since they lead to the same places: a change of that
        // would have flushed them.
        self.remove(page);
        match order {
            Order::HUGE => self.huge.insert(page, leaf),
            _ => self.pages.insert(page, leaf),
        }
    }

    /// Drops what is cached for `page`.
    pub(crate) fn remove(&mut self, page: Page) {
        self.pages.flush(page.into());
        self.huge.flush(page.into());
    }

    /// Drops every translation that reaches into `range`, and the walk cache as a whole.
    pub(crate) fn flush(&mut self, range: PageRange) {
        self.pages.flush(range);
        self.huge.flush(range);
        self.walks = WalkCache::default();
    }

    /// Lists what is cached, by the first page of each translation.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Page, Leaf)> {
        self.pages.places.iter().chain(&self.huge.places).copied().flatten()
    }
}

impl Sets {
    fn new(order: Order, entries: usize) -> Sets {
        let sets = (entries / WAYS).next_power_of_two();
        Sets { order, places: vec![None; sets * WAYS], next: vec![0; sets] }
    }

    fn set_of(&self, page: Page) -> usize {
        (page.number() >> self.order.get()) as usize & (self.next.len() - 1)
    }

    fn get(&self, page: Page) -> Option<Leaf> {
        let first = page.align_down(self.order);
        let set = self.set_of(page) * WAYS;
        let found = self.places[set..set + WAYS].iter().flatten().find(|(at, _)| *at == first);
        found.map(|(_, leaf)| leaf.plus(page.number() - first.number()))
    }

    /// `leaf` is that of `page`.
    fn insert(&mut self, page: Page, leaf: Leaf) {
        let first = page.align_down(self.order);
        let leaf = leaf.minus(page.number() - first.number());
        let set = self.set_of(page);
        let way = self.next[set];
        self.next[set] = (way + 1) % WAYS;
        self.places[set * WAYS + way] = Some((first, leaf));
    }

    fn flush(&mut self, range: PageRange) {
        let order = self.order;
        let gone = |place: &Option<(Page, Leaf)>| {
            place.is_some_and(|(first, _)| first.block(order).overlaps(range))
        };
        if range.pages() == 1 {
            let set = self.set_of(range.first()) * WAYS;
            let places = self.places[set..set + WAYS].iter_mut();
            places.filter(|place| gone(place)).for_each(|place| *place = None);
            return;
        }
        self.places.iter_mut().filter(|place| gone(place)).for_each(|place| *place = None);
    }
}

impl WalkCache {
    fn region(page: Page) -> u64 {
        page.number() >> Order::HUGE.get()
    }

    fn place(&mut self, page: Page) -> &mut Option<(u64, NodeIndex)> {
        &mut self.0[Self::region(page) as usize % REGIONS]
    }

    pub(crate) fn get(&mut self, page: Page) -> Option<NodeIndex> {
        let region = Self::region(page);
        self.place(page).filter(|&(at, _)| at == region).map(|(_, node)| node)
    }

    pub(crate) fn insert(&mut self, page: Page, node: NodeIndex) {
        *self.place(page) = Some((Self::region(page), node));
    }

    pub(crate) fn remove(&mut self, page: Page) {
        *self.place(page) = None;
    }
}
