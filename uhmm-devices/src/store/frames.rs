//! Which frames of a store are in use, and what is known of each.
//!
//! Frames come in chunks of 512, the largest block that is given out. A chunk has a bit for each
//! frame that is free, and an entry for each frame, which is the store's. A chunk is *backed* while
//! it has entries and whatever the store keeps for all of it, such as an extent of a file: it is
//! when the first of its frames is given out, and may be until long after the last came back. A
//! backed chunk with no frame in use is *idle*.
//!
//! Chunks with free frames are on lists, by the largest block that is free in them, so that a block
//! is cut from the smallest that will do. The lists are links between chunks: to give a frame back
//! allocates nothing and cannot fail, as [`DeviceMemory::free`](uhmm::DeviceMemory::free) demands.
//!
//! # Concurrency
//!
//! Chunks are dealt out to shards, each behind a lock that is held for some tens of instructions,
//! or for one call of `f` in [`FrameSpace::with`] and [`FrameSpace::free`]. Nothing that takes long
//! is done under it: a chunk that is to be backed, or not to be backed any more, is taken off all
//! lists with no frame free, so it is in the hands of one thread, which lets go of the lock
//! meanwhile.

use uhmm::primitive::atomic::{AtomicUsize, Ordering};
use uhmm::primitive::{Mutex, lock};
use uhmm::{DeviceFrame, Order};

/// How many frames a chunk has.
pub(super) const CHUNK: usize = Order::HUGE.pages() as usize;

/// The words that a chunk's bits are in.
const WORDS: usize = CHUNK / 64;

/// The list of chunks that are not backed; those before it are by order.
const UNBACKED: u8 = Order::HUGE.get() + 1;

/// How many lists there are.
const LISTS: usize = UNBACKED as usize + 1;

/// On no list, for a chunk; no chunk, for a link.
const OFF: u8 = u8::MAX;
const NONE: u32 = u32::MAX;

/// Frames, with an entry for each. See the [module](self).
pub(super) struct FrameSpace<E> {
    shards: Box<[Mutex<Shard<E>>]>,
    /// How many chunks a shard may have.
    chunks: u32,
    /// The shard that the next block is looked for in first.
    turn: AtomicUsize,
}

struct Shard<E> {
    chunks: Vec<Chunk<E>>,
    heads: [u32; LISTS],
    /// How many chunks are idle.
    idle: u32,
}

struct Chunk<E> {
    /// A bit for each frame that is free.
    free: [u64; WORDS],
    /// The list it is on, or [`OFF`].
    list: u8,
    previous: u32,
    next: u32,
    /// Where it is backed.
    entries: Option<Box<[E]>>,
}

/// A chunk of a space, by its number: its first frame divided by [`CHUNK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkNumber(u64);

impl ChunkNumber {
    /// Returns its first frame.
    pub(super) fn first(self) -> DeviceFrame {
        DeviceFrame(self.0 * CHUNK as u64)
    }
}

impl<E: Copy + Default> FrameSpace<E> {
    /// Makes a space of at least `pages` frames, all of them free and none backed, in so many
    /// shards.
    pub(super) fn new(pages: u64, shards: usize) -> FrameSpace<E> {
        let chunks = pages.div_ceil((CHUNK * shards) as u64);
        let chunks = u32::try_from(chunks).unwrap_or(NONE).min(NONE - 1);
        let shard = |_| Mutex::new(Shard { chunks: Vec::new(), heads: [NONE; LISTS], idle: 0 });
        let shards = (0..shards).map(shard).collect();
        FrameSpace { shards, chunks, turn: AtomicUsize::new(0) }
    }

    /// Returns how many frames there are.
    pub(super) fn capacity(&self) -> u64 {
        u64::from(self.chunks) * (self.shards.len() * CHUNK) as u64
    }

    /// Takes a block of frames, whose entries are the default ones. `back` is called, with no lock
    /// held, for a chunk that is to be backed for it; if that fails, there is no block.
    pub(super) fn allocate(
        &self,
        order: Order,
        mut back: impl FnMut(ChunkNumber) -> bool,
    ) -> Option<DeviceFrame> {
        if order > Order::HUGE {
            return None;
        }
        // Relaxed: it only spreads the load.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        for index in (0..self.shards.len()).map(|step| (turn + step) % self.shards.len()) {
            let unbacked = {
                let mut shard = lock(&self.shards[index]);
                match shard.take(order) {
                    Some((chunk, bit)) => return Some(self.frame(index, chunk, bit)),
                    None => shard.take_unbacked(self.chunks),
                }
            };
            let Some(chunk) = unbacked else { continue };
            let entries = entries().filter(|_| back(self.number(index, chunk)));
            let mut shard = lock(&self.shards[index]);
            let Some(entries) = entries else {
                shard.link(chunk, UNBACKED);
                return None;
            };
            shard.chunks[chunk as usize].entries = Some(entries);
            shard.give(chunk, 0, Order::HUGE);
            // Others may have taken some of what came back meanwhile, but none of this chunk.
            let bit = shard.take_from(chunk, order);
            return bit.map(|bit| self.frame(index, chunk, bit));
        }
        None
    }

    /// Takes a block back, which may be a piece of what was given out, after a call of `f` for the
    /// entry of each frame. Says whether a chunk has become idle by it.
    ///
    /// # Panics
    ///
    /// If a part of it is not in use: two would own the same frame next.
    pub(super) fn free(&self, frame: DeviceFrame, order: Order, f: impl FnMut(&mut E)) -> bool {
        let (index, chunk, bit) = self.place(frame);
        let mut shard = lock(&self.shards[index]);
        assert!(
            shard.holds(chunk, bit, order),
            "{order:?} at {frame:?} was freed, and is not held"
        );
        shard.entries(chunk, bit, order.pages() as usize).iter_mut().for_each(f);
        let idle = shard.idle;
        shard.give(chunk, bit, order);
        shard.idle > idle
    }

    /// Calls `f` with the entries of `pages` frames from `frame` on, which must be of one chunk.
    pub(super) fn with<R>(
        &self,
        frame: DeviceFrame,
        pages: usize,
        f: impl FnOnce(&mut [E]) -> R,
    ) -> R {
        let (index, chunk, bit) = self.place(frame);
        f(lock(&self.shards[index]).entries(chunk, bit, pages))
    }

    /// Calls `f` with the entry of a frame, if there is one: the frame may be free.
    pub(super) fn with_backed<R>(
        &self,
        frame: DeviceFrame,
        f: impl FnOnce(&mut E) -> R,
    ) -> Option<R> {
        let (index, chunk, bit) = self.place(frame);
        let mut shard = lock(&self.shards[index]);
        let entries = shard.chunks.get_mut(chunk as usize)?.entries.as_mut()?;
        Some(f(&mut entries[bit]))
    }

    /// Takes a chunk that is idle, unless no more than `keep` of its shard are. It belongs to the
    /// caller, who gives it to [`retire`](FrameSpace::retire) or [`restore`](FrameSpace::restore).
    pub(super) fn take_idle(&self, keep: u32) -> Option<ChunkNumber> {
        self.shards.iter().enumerate().find_map(|(index, shard)| {
            let mut shard = lock(shard);
            if shard.idle <= keep {
                return None;
            }
            let chunk = shard.heads[usize::from(Order::HUGE.get())];
            shard.take_from(chunk, Order::HUGE)?;
            Some(self.number(index, chunk))
        })
    }

    /// Says that the store keeps nothing for the chunk any more.
    pub(super) fn retire(&self, chunk: ChunkNumber) {
        let (index, chunk, _) = self.place(chunk.first());
        let mut shard = lock(&self.shards[index]);
        let entries = shard.chunks[chunk as usize].entries.take();
        shard.link(chunk, UNBACKED);
        drop(shard);
        drop(entries);
    }

    /// Says that the chunk is idle as before.
    pub(super) fn restore(&self, chunk: ChunkNumber) {
        let (index, chunk, _) = self.place(chunk.first());
        lock(&self.shards[index]).give(chunk, 0, Order::HUGE);
    }

    /// Returns the bytes that the tables take.
    pub(super) fn table_bytes(&self) -> u64 {
        let bytes = |shard: &Mutex<Shard<E>>| {
            let shard = lock(shard);
            let backed = shard.chunks.iter().filter(|chunk| chunk.entries.is_some()).count();
            shard.chunks.capacity() * size_of::<Chunk<E>>() + backed * CHUNK * size_of::<E>()
        };
        self.shards.iter().map(bytes).sum::<usize>() as u64
    }

    /// Calls `f` with each frame that is in use and its entry, shard by shard. To be called while
    /// no chunk is in the hands of anybody.
    pub(super) fn for_each(&self, mut f: impl FnMut(DeviceFrame, &E)) {
        for (index, shard) in self.shards.iter().enumerate() {
            let shard = lock(shard);
            for (chunk, number) in shard.chunks.iter().zip(0..) {
                let entries = chunk.entries.iter().flatten().enumerate();
                for (bit, entry) in entries {
                    if chunk.free[bit / 64] & (1 << (bit % 64)) == 0 {
                        f(self.frame(index, number, bit), entry);
                    }
                }
            }
        }
    }

    /// Checks that each chunk is on the list that it should be on. To be called while nothing is
    /// allocated or freed.
    pub(super) fn check(&self) -> Result<(), String> {
        self.shards.iter().try_for_each(|shard| lock(shard).check())
    }

    fn number(&self, shard: usize, chunk: u32) -> ChunkNumber {
        ChunkNumber(u64::from(chunk) * self.shards.len() as u64 + shard as u64)
    }

    fn frame(&self, shard: usize, chunk: u32, bit: usize) -> DeviceFrame {
        DeviceFrame(self.number(shard, chunk).first().0 + bit as u64)
    }

    /// Returns the shard, the chunk and the bit of a frame.
    fn place(&self, frame: DeviceFrame) -> (usize, u32, usize) {
        let (number, shards) = (frame.0 / CHUNK as u64, self.shards.len() as u64);
        let chunk = u32::try_from(number / shards).expect("it was given out from here");
        ((number % shards) as usize, chunk, (frame.0 % CHUNK as u64) as usize)
    }
}

impl<E> Shard<E> {
    /// Takes a block from a chunk that is backed.
    fn take(&mut self, order: Order) -> Option<(u32, usize)> {
        let lists = usize::from(order.get())..usize::from(UNBACKED);
        let chunk = self.heads[lists].iter().copied().find(|&head| head != NONE)?;
        let bit = self.take_from(chunk, order)?;
        Some((chunk, bit))
    }

    /// Takes the first block of `order` from `chunk`.
    fn take_from(&mut self, chunk: u32, order: Order) -> Option<usize> {
        let free = &mut self.chunks[chunk as usize].free;
        let bit = first_free(free, order)?;
        self.idle -= u32::from(*free == [u64::MAX; WORDS]);
        for_each_word(bit, order, |word, mask| free[word] &= !mask);
        self.list_anew(chunk);
        Some(bit)
    }

    /// Takes a block back.
    fn give(&mut self, chunk: u32, bit: usize, order: Order) {
        let free = &mut self.chunks[chunk as usize].free;
        for_each_word(bit, order, |word, mask| free[word] |= mask);
        self.idle += u32::from(*free == [u64::MAX; WORDS]);
        self.list_anew(chunk);
    }

    /// Takes a chunk that is not backed, or makes one, if there may be more than there are. It is
    /// on no list, and no frame of it is free.
    fn take_unbacked(&mut self, most: u32) -> Option<u32> {
        let head = self.heads[usize::from(UNBACKED)];
        if head != NONE {
            self.unlink(head);
            return Some(head);
        }
        let chunk = u32::try_from(self.chunks.len()).ok().filter(|&chunk| chunk < most)?;
        self.chunks.try_reserve(1).ok()?;
        let free = [0; WORDS];
        self.chunks.push(Chunk { free, list: OFF, previous: NONE, next: NONE, entries: None });
        Some(chunk)
    }

    /// Tells whether all of a block is in use.
    fn holds(&self, chunk: u32, bit: usize, order: Order) -> bool {
        let Some(chunk) = self.chunks.get(chunk as usize) else { return false };
        let within = order <= Order::HUGE && bit.is_multiple_of(order.pages() as usize);
        let mut used = within && chunk.entries.is_some();
        if used {
            for_each_word(bit, order, |word, mask| used &= chunk.free[word] & mask == 0);
        }
        used
    }

    fn entries(&mut self, chunk: u32, bit: usize, pages: usize) -> &mut [E] {
        let chunk = self.chunks.get_mut(chunk as usize).expect("the frame was given out");
        let entries = chunk.entries.as_mut().expect("the frame is in use");
        &mut entries[bit..bit + pages]
    }

    /// Puts a chunk on the list that it belongs on.
    fn list_anew(&mut self, chunk: u32) {
        let list = largest_free(&self.chunks[chunk as usize].free);
        if list != self.chunks[chunk as usize].list {
            self.unlink(chunk);
            if list != OFF {
                self.link(chunk, list);
            }
        }
    }

    fn link(&mut self, chunk: u32, list: u8) {
        let head = std::mem::replace(&mut self.heads[usize::from(list)], chunk);
        if head != NONE {
            self.chunks[head as usize].previous = chunk;
        }
        let chunk = &mut self.chunks[chunk as usize];
        (chunk.list, chunk.previous, chunk.next) = (list, NONE, head);
    }

    fn unlink(&mut self, chunk: u32) {
        let chunk = &mut self.chunks[chunk as usize];
        let (list, previous, next) = (chunk.list, chunk.previous, chunk.next);
        chunk.list = OFF;
        if list == OFF {
            return;
        }
        match previous {
            NONE => self.heads[usize::from(list)] = next,
            previous => self.chunks[previous as usize].next = next,
        }
        if next != NONE {
            self.chunks[next as usize].previous = previous;
        }
    }

    fn check(&self) -> Result<(), String> {
        let idle = |chunk: &&Chunk<E>| chunk.free == [u64::MAX; WORDS];
        let idle = self.chunks.iter().filter(idle).count();
        if idle != self.idle as usize {
            return Err(format!("{idle} chunks are idle, and {} are counted", self.idle));
        }
        let mut listed = 0;
        for list in 0..LISTS as u8 {
            let mut at = self.heads[usize::from(list)];
            while at != NONE {
                listed += 1;
                let chunk = &self.chunks[at as usize];
                let right = match &chunk.entries {
                    Some(_) => largest_free(&chunk.free),
                    None => UNBACKED,
                };
                if chunk.list != list || right != list || listed > self.chunks.len() {
                    return Err(format!("chunk {at} is on list {list}, and belongs on {right}"));
                }
                at = chunk.next;
            }
        }
        let full = self.chunks.iter().filter(|chunk| chunk.list == OFF).count();
        if listed + full != self.chunks.len() {
            return Err(format!("{listed} chunks are on lists, and {full} are full"));
        }
        Ok(())
    }
}

/// Makes entries for a chunk, if there is memory for them.
fn entries<E: Copy + Default>() -> Option<Box<[E]>> {
    let mut entries = Vec::new();
    entries.try_reserve_exact(CHUNK).ok()?;
    entries.resize(CHUNK, E::default());
    Some(entries.into_boxed_slice())
}

/// The first bits of the aligned blocks of two bits, of four, and so on.
const FIRST: [u64; 6] = [
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    0x0000_0000_0000_0001,
];

/// Given the first bits of the aligned blocks of `2^order` bits that are set, returns those of the
/// blocks of twice the size.
fn joined(word: u64, order: u8) -> u64 {
    word & (word >> (1 << order)) & FIRST[usize::from(order)]
}

/// Returns the first of the first `2^order` bits that are set and aligned.
fn first_free(free: &[u64; WORDS], order: Order) -> Option<usize> {
    if order.pages() < 64 {
        let blocks = |&word: &u64| (0..order.get()).fold(word, joined);
        let found = free.iter().position(|word| blocks(word) != 0)?;
        return Some(found * 64 + blocks(&free[found]).trailing_zeros() as usize);
    }
    let words = order.pages() as usize / 64;
    let found = free.chunks_exact(words).position(|words| words.iter().all(|&w| w == u64::MAX))?;
    Some(found * words * 64)
}

/// Returns the order of the largest block that is free, or [`OFF`].
fn largest_free(free: &[u64; WORDS]) -> u8 {
    let mut blocks = *free;
    let mut largest = OFF;
    for order in 0..=6 {
        if blocks.iter().all(|&word| word == 0) {
            return largest;
        }
        largest = order;
        if order < 6 {
            blocks.iter_mut().for_each(|word| *word = joined(*word, order));
        }
    }
    // Now a word is 1 if all of its bits were set.
    let full =
        |words: usize| blocks.chunks_exact(words).any(|words| words.iter().all(|&word| word == 1));
    (6..).zip([1, 2, 4, 8]).take_while(|&(_, words)| full(words)).last().map_or(largest, |(o, _)| o)
}

/// Calls `f` with each word that the block is in, and its bits there.
fn for_each_word(bit: usize, order: Order, mut f: impl FnMut(usize, u64)) {
    let pages = order.pages() as usize;
    if pages < 64 {
        f(bit / 64, ((1 << pages) - 1) << (bit % 64));
    } else {
        (bit / 64..(bit + pages) / 64).for_each(|word| f(word, u64::MAX));
    }
}
