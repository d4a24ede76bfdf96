//! Objects of many sizes, packed into slabs: where compressed pages are kept.
//!
//! Objects are rounded up to a multiple of 64 bytes, and each such size, a class, has slabs of its
//! own, of 16 to 64 KiB: the size that leaves the least over, among those that allocators round
//! up least. An object goes into the first slab of its class that has room, so that those behind
//! become empty, and a slab that is empty is given back at once. Where many objects were freed and
//! few came, the slabs that are left are nearly empty: then objects are [moved](Slabs::relocate)
//! from the last slab into the first that has room.
//!
//! # Concurrency
//!
//! Each class has its lock, held for the copy of one object or for a few bits. Pages compress to
//! sizes of all classes, so those who store and fetch seldom meet. Slabs are allocated and freed
//! with no lock held, except that a slab whose last object is freed may be freed under the
//! caller's.
//!
//! An object is moved only in the hands of its owner: whoever may read or remove it sees to it that
//! nobody moves it meanwhile. Whom to ask is known by the number that the object was stored with;
//! it is out of date as soon as the lock is let go of, so the owner is asked whether the object is
//! still where it was.

use uhmm::primitive::atomic::{AtomicU64, Ordering};
use uhmm::primitive::{Mutex, lock};

/// What objects are rounded up to, in bytes.
const GRAIN: usize = 64;

/// The sizes that a slab may have, in bytes.
const SLAB_BYTES: [usize; 6] = [16 << 10, 20 << 10, 24 << 10, 28 << 10, 32 << 10, 64 << 10];

/// The words of a slab's bits.
const WORDS: usize = 4;

/// The most objects that a slab has: one for each bit.
const MOST_OBJECTS: usize = WORDS * 64;

/// Objects of up to a largest size. See the [module](self).
pub(super) struct Slabs {
    classes: Box<[Class]>,
    /// A bit for each class that had much room when an object was removed.
    sparse: AtomicU64,
}

struct Class {
    /// The bytes of an object.
    size: usize,
    /// The bytes of a slab.
    slab_bytes: usize,
    slabs: Mutex<ClassSlabs>,
}

#[derive(Default)]
struct ClassSlabs {
    slabs: Vec<Option<Slab>>,
    /// Which slabs there are and have room.
    roomy: Bits,
    /// Which numbers have no slab.
    vacant: Bits,
    /// How many slabs there are.
    count: usize,
    /// How many objects are in them.
    objects: usize,
}

struct Slab {
    bytes: Box<[u8]>,
    /// The number that each object was stored with.
    owners: Box<[u32]>,
    /// A bit for each object that there is room for.
    free: [u64; WORDS],
    /// How many objects there are.
    count: u16,
}

/// A set of small numbers, of which the smallest is found quickly.
#[derive(Default)]
struct Bits {
    words: Vec<u64>,
    /// All words before this one are 0.
    first: usize,
}

/// Where an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    slab: u32,
    class: u8,
    object: u8,
}

/// There is no room for an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRoom;

impl Handle {
    pub(super) fn to_bits(self) -> u64 {
        u64::from(self.slab) | u64::from(self.class) << 32 | u64::from(self.object) << 40
    }

    pub(super) fn from_bits(bits: u64) -> Handle {
        Handle { slab: bits as u32, class: (bits >> 32) as u8, object: (bits >> 40) as u8 }
    }
}

impl Slabs {
    /// Makes classes for objects of up to `largest` bytes, and one for objects of `whole` bytes.
    pub(super) fn new(largest: usize, whole: usize) -> Slabs {
        let sizes = (1..=largest.div_ceil(GRAIN)).map(|grains| grains * GRAIN).chain([whole]);
        Slabs { classes: sizes.map(Class::new).collect(), sparse: AtomicU64::new(0) }
    }

    /// Copies an object of `owner` in. `take` is asked, with no lock held, before a slab of so many
    /// bytes is allocated; what was taken for one that is not to be had is given to `give_back`.
    /// Where there is no slab to be had, room in those of larger objects will do.
    ///
    /// # Errors
    ///
    /// [`NoRoom`]: nothing was taken.
    pub(super) fn insert(
        &self,
        object: &[u8],
        owner: u32,
        take: impl Fn(u64) -> bool,
        give_back: impl Fn(u64),
    ) -> Result<Handle, NoRoom> {
        let smallest = self.classes.partition_point(|class| class.size < object.len());
        let here = |class: usize| {
            let size = self.classes[class].size;
            let (slab, index) = lock(&self.classes[class].slabs).insert(object, owner, size)?;
            Some(Handle { slab, class: class as u8, object: index })
        };
        if let Some(handle) = here(smallest) {
            return Ok(handle);
        }
        let class = self.classes.get(smallest).ok_or(NoRoom)?;
        let bytes = class.slab_bytes as u64;
        if take(bytes) {
            if let Some(slab) = class.grow(object, owner) {
                return Ok(Handle { slab, class: smallest as u8, object: 0 });
            }
            give_back(bytes);
        }
        (smallest + 1..self.classes.len()).find_map(here).ok_or(NoRoom)
    }

    /// Copies an object out, into the beginning of `bytes`, which is no longer than the object was.
    pub(super) fn read(&self, handle: Handle, bytes: &mut [u8]) {
        let class = &self.classes[usize::from(handle.class)];
        let slabs = lock(&class.slabs);
        let slab = slabs.slabs[handle.slab as usize].as_ref().expect("it has the object");
        let at = usize::from(handle.object) * class.size;
        bytes.copy_from_slice(&slab.bytes[at..at + bytes.len()]);
    }

    /// Overwrites a byte in the middle of an object.
    #[cfg(test)]
    pub(super) fn damage(&self, handle: Handle) {
        let class = &self.classes[usize::from(handle.class)];
        let mut slabs = lock(&class.slabs);
        let slab = slabs.slabs[handle.slab as usize].as_mut().expect("it has the object");
        slab.bytes[usize::from(handle.object) * class.size + class.size / 2] ^= 0xff;
    }

    /// Frees an object, and returns the bytes of the slab if that is given back with it.
    pub(super) fn remove(&self, handle: Handle) -> u64 {
        let class = &self.classes[usize::from(handle.class)];
        let mut slabs = lock(&class.slabs);
        let empty = slabs.remove(handle.slab, handle.object);
        let sparse = slabs.are_sparse(class.objects());
        drop(slabs);
        if sparse {
            self.note_sparse(handle.class, true);
        }
        empty.map_or(0, |slab| slab.bytes.len() as u64)
    }

    /// Returns the last object of a class of which much is room, and its owner, who may have it
    /// [moved](Slabs::relocate) if it is still there.
    pub(super) fn last_of_sparse(&self) -> Option<(Handle, u32)> {
        loop {
            // Relaxed: it is a hint. What it is about is looked at under the lock.
            let sparse = self.sparse.load(Ordering::Relaxed);
            if sparse == 0 {
                return None;
            }
            let number = sparse.trailing_zeros() as u8;
            let class = &self.classes[usize::from(number)];
            let slabs = lock(&class.slabs);
            if slabs.are_sparse(class.objects()) {
                let (slab, object, owner) = slabs.last(class.objects())?;
                return Some((Handle { slab, class: number, object }, owner));
            }
            self.note_sparse(number, false);
        }
    }

    /// Moves an object to the first slab that has room, if that is before its own. Returns where it
    /// is now, and the bytes of the slab that was given back with it. To be called by the owner.
    pub(super) fn relocate(&self, handle: Handle) -> Option<(Handle, u64)> {
        let class = &self.classes[usize::from(handle.class)];
        let (to, empty) = lock(&class.slabs).relocate(handle.slab, handle.object, class.size)?;
        let bytes = empty.map_or(0, |slab| slab.bytes.len() as u64);
        Some((Handle { slab: to.0, class: handle.class, object: to.1 }, bytes))
    }

    fn note_sparse(&self, class: u8, sparse: bool) {
        let bit = 1 << class;
        // Relaxed, all: it is a hint.
        if sparse && self.sparse.load(Ordering::Relaxed) & bit == 0 {
            self.sparse.fetch_or(bit, Ordering::Relaxed);
        } else if !sparse {
            self.sparse.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Returns the bytes that the tables of slabs take.
    pub(super) fn table_bytes(&self) -> u64 {
        let bytes = |class: &Class| {
            let slabs = lock(&class.slabs);
            let words = slabs.roomy.words.capacity() + slabs.vacant.words.capacity();
            let owners = slabs.count * class.objects() * size_of::<u32>();
            slabs.slabs.capacity() * size_of::<Option<Slab>>() + words * size_of::<u64>() + owners
        };
        self.classes.iter().map(bytes).sum::<usize>() as u64
    }

    /// Returns how many objects there are, and the bytes of all slabs, after checking that tables
    /// and bits agree. To be called while nothing is stored or freed.
    pub(super) fn check(&self) -> Result<(u64, u64), String> {
        let mut sum = (0, 0);
        for class in &self.classes {
            let slabs = lock(&class.slabs);
            let (mut there, mut objects) = (0, 0);
            for (slab, number) in slabs.slabs.iter().zip(0..) {
                let Some(slab) = slab else {
                    if !slabs.vacant.has(number) || slabs.roomy.has(number) {
                        return Err(format!("slab {number} of {} is gone", class.size));
                    }
                    continue;
                };
                let free: u32 = slab.free.iter().map(|word| word.count_ones()).sum();
                let count = class.objects() - free as usize;
                if count == 0
                    || count != usize::from(slab.count)
                    || slabs.roomy.has(number) != (free > 0)
                    || slabs.vacant.has(number)
                {
                    return Err(format!("slab {number} of {} has {count} objects", class.size));
                }
                (there, objects) = (there + 1, objects + count);
                sum = (sum.0 + count as u64, sum.1 + slab.bytes.len() as u64);
            }
            if (there, objects) != (slabs.count, slabs.objects) {
                return Err(format!("{objects} objects of {} in {there} slabs", class.size));
            }
        }
        Ok(sum)
    }
}

impl Class {
    fn new(size: usize) -> Class {
        let fits = |&&bytes: &&usize| bytes / size <= MOST_OBJECTS;
        // What is left over of each slab, for each byte of it.
        let waste = |&&bytes: &&usize| (bytes % size) * (64 << 10) / bytes;
        let slab_bytes = *SLAB_BYTES.iter().filter(fits).min_by_key(waste).expect("16 KiB fit");
        Class { size, slab_bytes, slabs: Mutex::default() }
    }

    /// Returns how many objects fit a slab.
    fn objects(&self) -> usize {
        self.slab_bytes / self.size
    }

    /// Adds a slab whose first object is `object`, if there is memory for it.
    fn grow(&self, object: &[u8], owner: u32) -> Option<u32> {
        let mut owners = Vec::new();
        owners.try_reserve_exact(self.objects()).ok()?;
        owners.resize(self.objects(), owner);
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(self.slab_bytes).ok()?;
        bytes.extend_from_slice(object);
        bytes.resize(self.slab_bytes, 0);
        let free = |word: usize| match self.objects().saturating_sub(word * 64) {
            64.. => u64::MAX,
            some => (1 << some) - 1,
        };
        let mut free = std::array::from_fn(free);
        free[0] &= !1;
        let (bytes, owners) = (bytes.into_boxed_slice(), owners.into_boxed_slice());
        let slab = Slab { bytes, owners, free, count: 1 };
        lock(&self.slabs).add(slab)
    }
}

impl ClassSlabs {
    /// Adds a slab, if there is memory to know it by.
    fn add(&mut self, slab: Slab) -> Option<u32> {
        let number = match self.vacant.first() {
            Some(number) => number,
            None => {
                let number = u32::try_from(self.slabs.len()).ok()?;
                self.slabs.try_reserve(1).ok()?;
                self.roomy.make_room(number)?;
                self.vacant.make_room(number)?;
                self.slabs.push(None);
                number
            }
        };
        self.vacant.remove(number);
        if slab.free != [0; WORDS] {
            self.roomy.insert(number);
        }
        self.slabs[number as usize] = Some(slab);
        (self.count, self.objects) = (self.count + 1, self.objects + 1);
        Some(number)
    }

    /// Copies an object into the first slab that has room.
    fn insert(&mut self, object: &[u8], owner: u32, size: usize) -> Option<(u32, u8)> {
        let number = self.roomy.first()?;
        let slab = self.slabs[number as usize].as_mut().expect("it has room");
        let word = slab.free.iter().position(|&free| free != 0).expect("it has room");
        let index = word * 64 + slab.free[word].trailing_zeros() as usize;
        slab.free[word] &= slab.free[word] - 1;
        slab.count += 1;
        slab.owners[index] = owner;
        slab.bytes[index * size..][..object.len()].copy_from_slice(object);
        if slab.free == [0; WORDS] {
            self.roomy.remove(number);
        }
        self.objects += 1;
        Some((number, index as u8))
    }

    /// Tells whether more than a quarter of all slabs, and more than one slab, is room.
    fn are_sparse(&self, per_slab: usize) -> bool {
        let most = self.count * per_slab;
        let room = most - self.objects;
        room > per_slab && room > most / 4
    }

    /// Returns the last object of the last slab, and its owner.
    fn last(&self, per_slab: usize) -> Option<(u32, u8, u32)> {
        let number = self.slabs.len().checked_sub(1)?;
        let slab = self.slabs[number].as_ref()?;
        let used = |&object: &usize| slab.free[object / 64] & (1 << (object % 64)) == 0;
        let object = (0..per_slab).rev().find(used)?;
        Some((number as u32, object as u8, slab.owners[object]))
    }

    /// Moves an object to the first slab that has room, if that is before its own. Returns where it
    /// is now, and the slab that it left if nothing else is in it.
    fn relocate(
        &mut self,
        number: u32,
        object: u8,
        size: usize,
    ) -> Option<((u32, u8), Option<Slab>)> {
        if self.roomy.first()? >= number {
            return None;
        }
        let mut place = self.slabs[number as usize].take();
        let slab = place.as_mut().expect("it has the object");
        let (at, owner) = (usize::from(object), slab.owners[usize::from(object)]);
        let to = self.insert(&slab.bytes[at * size..][..size], owner, size);
        self.slabs[number as usize] = place;
        Some((to.expect("there is room"), self.remove(number, object)))
    }

    /// Takes an object out, and the slab if nothing else is in it. Allocates nothing. The last slab
    /// always has objects.
    fn remove(&mut self, number: u32, object: u8) -> Option<Slab> {
        let place = &mut self.slabs[number as usize];
        let slab = place.as_mut().expect("it has the object");
        let (word, bit) = (usize::from(object) / 64, 1 << (object % 64));
        assert!(slab.free[word] & bit == 0, "the object was freed, and is free");
        slab.free[word] |= bit;
        slab.count -= 1;
        self.objects -= 1;
        if slab.count > 0 {
            self.roomy.insert(number);
            return None;
        }
        self.roomy.remove(number);
        self.vacant.insert(number);
        self.count -= 1;
        let empty = place.take();
        while self.slabs.pop_if(|slab| slab.is_none()).is_some() {
            self.vacant.remove(self.slabs.len() as u32);
        }
        empty
    }
}

impl Bits {
    /// Makes room for `number`, so that inserting it allocates nothing.
    fn make_room(&mut self, number: u32) -> Option<()> {
        let words = number as usize / 64 + 1;
        self.words.try_reserve(words.saturating_sub(self.words.len())).ok()?;
        self.words.resize(words.max(self.words.len()), 0);
        Some(())
    }

    fn insert(&mut self, number: u32) {
        let word = number as usize / 64;
        self.words[word] |= 1 << (number % 64);
        self.first = self.first.min(word);
    }

    fn remove(&mut self, number: u32) {
        self.words[number as usize / 64] &= !(1 << (number % 64));
    }

    fn has(&self, number: u32) -> bool {
        self.words.get(number as usize / 64).is_some_and(|word| word & (1 << (number % 64)) != 0)
    }

    /// Returns the smallest.
    fn first(&mut self) -> Option<u32> {
        let found = self.words[self.first..].iter().position(|&word| word != 0);
        // Where there is none, the next time there is no need to look at what was looked at.
        self.first = found.map_or(self.words.len(), |found| self.first + found);
        let word = self.words.get(self.first)?;
        Some((self.first * 64) as u32 + word.trailing_zeros())
    }
}
