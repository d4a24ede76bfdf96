//! Small objects: spans full of objects of one size, with a bit for each that is free.
//!
//! Whoever clears an object's bit has the object, and gives it back by setting the bit. The bits
//! are all that decides; everything else only says where to look, may be out of date at any time,
//! and is checked where it matters. The rules:
//!
//! 1. Bits are set only while the span has the class that they were made for, and a span changes
//!    its class only in the hands of who has all of its objects. So an object, once taken, tells
//!    its class for certain: who took one in a span that is no longer of the class that was wanted
//!    gives it back.
//! 2. A span is `listed` while it is on the list of a class, or on its way there or from there. Who
//!    sets the flag puts the span on the list, and who takes the span off clears the flag, then
//!    looks whether something is free. Who frees an object sets its bit, then looks at the flag.
//!    These four are in one order (SeqCst), so one of the two sees the other, and no free object is
//!    forgotten.
//! 3. A span need not be listed while it is the current one of a shard, whose threads look into it
//!    first. Who frees an object of a span and then finds it current leaves it at that; who makes
//!    another span current then looks whether something is free in the one before, and lists it.
//!    Again these are in one order. A span can be current in several shards, and listed too; it is
//!    only less good, because their threads then write to the same words.
//! 4. Only who has taken a span off a list, and has not yet cleared its flag, may take all of its
//!    objects and return it. So a span that is listed keeps its class, and nobody writes its `next`
//!    but who put it on the list. It may still be current where it was: rule 1 takes care of that.
//!
//! A thread that stops anywhere keeps only what it has in its hands from the others, an object, a
//! span, or the list that it is going through, and they take another span. That is more than speed:
//! a thread may fault on its own stack in the middle of anything here, and who serves that fault
//! allocates.

use super::atomics::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use super::classes::{ALL, CLASSES, Class, MOST_OBJECTS};

/// The bits of a word.
const BITS: u32 = u64::BITS;

/// What is known of a span; zeroes for one that belongs to nobody.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Span {
    /// What it is used for, see [`Use`].
    class: AtomicU32,
    /// The word of `free` in which an object was last freed or found free.
    hint: AtomicU32,
    /// The span after this one on a list, 0 for none.
    next: AtomicU32,
    /// Whether it is on a list, or about to be, see the module.
    listed: AtomicBool,
    /// A bit for each object that is free.
    free: [AtomicU64; MOST_OBJECTS / BITS as usize],
}

/// What a span is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Nothing, or it is in a run but not at its head.
    None,
    /// The first of a run.
    Run,
    /// Objects of this class.
    Class(usize),
}

/// What freeing an object has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freed {
    /// Nothing special.
    Object,
    /// For a moment no object of the same word was in use. Perhaps none of the span is.
    LastOfWord,
    /// It was free already.
    Twice,
}

/// What is known of the spans of a class; zeroes to begin with.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct ClassSpans {
    /// Spans with free objects: the number of the first, 0 for none, in the low half, and in the
    /// high half how often it has changed.
    partial: AtomicU64,
    /// How many spans have this class.
    spans: AtomicU32,
    /// How often a span was found with no object in use since that was last looked into.
    unused: AtomicU32,
}

#[cfg(test)]
#[allow(dead_code, reason = "for tests/allocator_protocol.rs, which includes this file")]
impl ClassSpans {
    /// Makes what is known of a class without spans.
    #[allow(dead_code, reason = "an arena's begin as zeroes")]
    pub(super) fn new() -> ClassSpans {
        let (partial, spans) = (AtomicU64::new(0), AtomicU32::new(0));
        ClassSpans { partial, spans, unused: AtomicU32::new(0) }
    }
}

impl Span {
    /// Makes a span that belongs to nobody.
    #[cfg(test)]
    #[allow(dead_code, reason = "for tests/allocator_protocol.rs, which includes this file")]
    pub(super) fn new() -> Span {
        let [class, hint, next] = [const { AtomicU32::new(0) }; 3];
        let free = [const { AtomicU64::new(0) }; MOST_OBJECTS / BITS as usize];
        Span { class, hint, next, listed: AtomicBool::new(false), free }
    }

    /// Returns the bits of a word.
    #[cfg(test)]
    #[allow(dead_code, reason = "not every test needs it")]
    pub(super) fn free_in(&self, word: usize) -> u64 {
        self.free[word].load(Ordering::SeqCst)
    }

    /// Returns what the span is used for.
    #[inline]
    pub(super) fn usage(&self) -> Use {
        match self.class.load(Ordering::SeqCst) {
            0 => Use::None,
            u32::MAX => Use::Run,
            class => Use::Class(class as usize - 1),
        }
    }

    /// Says what the span, which is the caller's, is used for. One made for a class has no free
    /// object yet.
    pub(super) fn set_usage(&self, usage: Use) {
        let class = match usage {
            Use::None => 0,
            Use::Run => u32::MAX,
            Use::Class(class) => class as u32 + 1,
        };
        self.class.store(class, Ordering::SeqCst);
    }

    /// Makes all objects free but the first, which is the caller's. The span is the caller's.
    pub(super) fn fill(&self, class: Class) {
        for (word, free) in self.free.iter().enumerate().take(class.words()) {
            let own = u64::from(word == 0);
            // Release: pairs with `take`: who takes an object finds the class.
            free.store(class.mask(word) & !own, Ordering::Release);
        }
    }

    /// Takes an object: the first that is free after the last that was found so. Returns its
    /// number, or `None` where none was free at some moment.
    #[inline]
    pub(super) fn take(&self, class: Class) -> Option<u32> {
        let words = class.words();
        // Relaxed: where to look first.
        let hint = self.hint.load(Ordering::Relaxed) as usize;
        let hint = if hint < words { hint } else { 0 };
        if let Some(object) = self.take_in(hint) {
            return Some(object);
        }
        let others = (hint + 1..words).chain(0..hint);
        for word in others {
            if let Some(object) = self.take_in(word) {
                self.hint.store(word as u32, Ordering::Relaxed);
                return Some(object);
            }
        }
        None
    }

    /// Takes the first free object of a word.
    #[inline]
    fn take_in(&self, word: usize) -> Option<u32> {
        let free = self.free.get(word)?;
        let mut bits = free.load(Ordering::Relaxed);
        while bits != 0 {
            // Acquire: pairs with `give_back`: what the one before did to the object is over.
            match free.compare_exchange_weak(
                bits,
                bits & (bits - 1),
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(word as u32 * BITS + bits.trailing_zeros()),
                Err(now) => bits = now,
            }
        }
        None
    }

    /// Tells whether the span is on a list, or about to be.
    #[inline]
    pub(super) fn is_listed(&self) -> bool {
        // SeqCst: rule 2 of the module.
        self.listed.load(Ordering::SeqCst)
    }

    /// Gives an object back. The caller looks whether the span is listed afterwards.
    #[inline]
    pub(super) fn give_back(&self, class: Class, object: u32) -> Freed {
        let (word, bit) = ((object / BITS) as usize, 1 << (object % BITS));
        // SeqCst: rule 2 of the module; as a release it pairs with `take`.
        let before = self.free[word].fetch_or(bit, Ordering::SeqCst);
        // Relaxed: where to look first. The span may have another use by now: see `take`.
        self.hint.store(word as u32, Ordering::Relaxed);
        if before & bit != 0 {
            Freed::Twice
        } else if before | bit == class.mask(word) {
            Freed::LastOfWord
        } else {
            Freed::Object
        }
    }

    /// Tells whether an object was free at some moment.
    pub(super) fn has_free(&self) -> bool {
        let Use::Class(class) = self.usage() else { return false };
        // SeqCst: rules 2 and 3 of the module.
        (0..ALL[class].words()).any(|word| self.free[word].load(Ordering::SeqCst) != 0)
    }

    /// Tells whether each object was free at some moment, not necessarily the same one.
    pub(super) fn is_unused(&self, class: Class) -> bool {
        (0..class.words()).all(|word| {
            // Relaxed: who returns the span finds out.
            self.free[word].load(Ordering::Relaxed) == class.mask(word)
        })
    }

    /// Takes every object, if none is in use. Then the span is the caller's.
    ///
    /// The span is listed by the caller (rule 4 of the module).
    pub(super) fn take_all(&self, class: Class) -> bool {
        for word in 0..class.words() {
            let mask = class.mask(word);
            // Acquire: pairs with `give_back`, as in `take`.
            let taken =
                self.free[word].compare_exchange(mask, 0, Ordering::Acquire, Ordering::Relaxed);
            if taken.is_err() {
                for earlier in 0..word {
                    self.free[earlier].fetch_or(class.mask(earlier), Ordering::SeqCst);
                }
                return false;
            }
        }
        true
    }
}

/// All spans, by number. Number 0 is none of theirs.
///
/// # Invariants
///
/// 1. At `table` there is room for a [`Span`] of each number of the arena. Those of the spans that
///    were ever made for a class are accessible, began as zeroes, and are only accessed by shared
///    references, for `'a`.
/// 2. Numbers that come in from outside, and so those on lists, are of such spans.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spans<'a> {
    table: *const Span,
    classes: &'a [ClassSpans; CLASSES],
}

impl<'a> Spans<'a> {
    /// Makes the spans of an arena.
    ///
    /// # Safety
    ///
    /// `table` is as invariant 1 says, and numbers passed to the methods are as invariant 2 says.
    pub(super) unsafe fn new(table: *const Span, classes: &'a [ClassSpans; CLASSES]) -> Spans<'a> {
        Spans { table, classes }
    }

    /// Returns what is known of a span.
    #[inline]
    pub(super) fn span(self, number: u32) -> &'a Span {
        let span = self.table.wrapping_add(number as usize);
        // SAFETY: by invariants 1 and 2 it is there, valid and only shared.
        unsafe { &*span }
    }

    /// Makes a span, which is the caller's, one of `class`. The first object is the caller's.
    pub(super) fn begin(self, number: u32, class: usize) {
        // Relaxed: a number that nothing else hangs on.
        self.classes[class].spans.fetch_add(1, Ordering::Relaxed);
        self.span(number).set_usage(Use::Class(class));
        self.span(number).fill(ALL[class]);
    }

    /// Notes that a span of a class was seen unused. Tells whether that were `at_least` as many
    /// since the last time that it did, and at least a quarter of all.
    pub(super) fn saw_unused(self, class: usize, at_least: u32) -> bool {
        let spans = &self.classes[class];
        // Relaxed, all three: they only say when to look.
        let unused = spans.unused.fetch_add(1, Ordering::Relaxed) + 1;
        if unused < at_least.max(spans.spans.load(Ordering::Relaxed) / 4) {
            return false;
        }
        spans.unused.store(0, Ordering::Relaxed);
        true
    }

    /// Puts a span on the list of its class, unless it is on a list or is of no class.
    pub(super) fn list(self, number: u32) {
        let span = self.span(number);
        while span.has_free() && !span.listed.swap(true, Ordering::SeqCst) {
            if let Use::Class(class) = span.usage() {
                // It keeps its class, because the flag is ours (rule 4).
                self.push(class, number);
                return;
            }
            span.listed.store(false, Ordering::SeqCst);
            // It was returned. Has it been made for a class since? Then who has freed an object of
            // it may have seen our flag.
        }
    }

    /// Takes a span with free objects off the list of a class. They may be gone by now.
    pub(super) fn unlist(self, class: usize) -> Option<u32> {
        let number = self.pop(class)?;
        let span = self.span(number);
        debug_assert_eq!(span.usage(), Use::Class(class), "rule 4");
        span.listed.store(false, Ordering::SeqCst);
        // The caller looks for free objects by relaxed loads; the fence is what puts them into the
        // order of rule 2.
        fence(Ordering::SeqCst);
        Some(number)
    }

    /// Takes the spans of `class` of which no object is in use off its list, except one, and passes
    /// each to `returned`: it is the caller's, and of no class.
    pub(super) fn return_unused(self, class: usize, mut returned: impl FnMut(u32)) {
        let mut kept = false;
        let mut next = self.pop_all(class);
        while next != 0 {
            let number = next;
            let span = self.span(number);
            debug_assert_eq!(span.usage(), Use::Class(class), "rule 4");
            // Relaxed: `pop_all` has acquired what was pushed.
            next = span.next.load(Ordering::Relaxed);
            let unused = span.is_unused(ALL[class]);
            if unused && core::mem::replace(&mut kept, true) && span.take_all(ALL[class]) {
                span.set_usage(Use::None);
                span.listed.store(false, Ordering::SeqCst);
                self.classes[class].spans.fetch_sub(1, Ordering::Relaxed);
                returned(number);
            } else {
                self.push(class, number);
            }
        }
    }

    /// Checks that the flags and the lists agree. Nobody may be using the spans.
    #[cfg(test)]
    pub(super) fn check(self, numbers: std::ops::Range<u32>) {
        let mut listed = std::collections::BTreeSet::new();
        let of_class = |class| {
            let is_of = |&number: &u32| self.span(number).usage() == Use::Class(class);
            numbers.clone().filter(is_of).count()
        };
        for (index, class) in self.classes.iter().enumerate() {
            assert_eq!(class.spans.load(Ordering::SeqCst) as usize, of_class(index));
            let mut next = class.partial.load(Ordering::SeqCst) as u32;
            while next != 0 {
                assert!(numbers.contains(&next), "{next} is no span");
                assert!(listed.insert(next), "span {next} is on two lists");
                next = self.span(next).next.load(Ordering::SeqCst);
            }
        }
        for number in numbers {
            assert_eq!(self.span(number).is_listed(), listed.contains(&number), "span {number}");
            let span = self.span(number);
            let words = match span.usage() {
                Use::Class(class) => ALL[class].words(),
                Use::None | Use::Run => 0,
            };
            let stray = span.free[words..].iter().any(|free| free.load(Ordering::SeqCst) != 0);
            assert!(!stray, "span {number} has objects that are not of its class");
        }
    }

    /// Puts a span, whose flag is the caller's, on the list of a class.
    fn push(self, class: usize, number: u32) {
        let partial = &self.classes[class].partial;
        let mut head = partial.load(Ordering::Relaxed);
        loop {
            // Relaxed: published by the exchange below.
            self.span(number).next.store(head as u32, Ordering::Relaxed);
            let new = next_change(head) | u64::from(number);
            // Release: pairs with `pop` and `pop_all`, which read `next`.
            match partial.compare_exchange_weak(head, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes the first span off the list of a class; its flag is the caller's now.
    fn pop(self, class: usize) -> Option<u32> {
        let partial = &self.classes[class].partial;
        // Acquire, here and below: pairs with `push`.
        let mut head = partial.load(Ordering::Acquire);
        loop {
            if head as u32 == 0 {
                return None;
            }
            // Relaxed: if another has taken it meanwhile, the number is wrong, and so is `head`: it
            // comes back only after 2^32 changes.
            let next = self.span(head as u32).next.load(Ordering::Relaxed);
            let new = next_change(head) | u64::from(next);
            match partial.compare_exchange_weak(head, new, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(head as u32),
                Err(now) => head = now,
            }
        }
    }

    /// Takes the whole list of a class: the number of the first; the flags are the caller's now.
    fn pop_all(self, class: usize) -> u32 {
        let partial = &self.classes[class].partial;
        let mut head = partial.load(Ordering::Relaxed);
        loop {
            let new = next_change(head);
            // Acquire: pairs with `push`.
            match partial.compare_exchange_weak(head, new, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return head as u32,
                Err(now) => head = now,
            }
        }
    }
}

/// Returns the count of changes after that of `head`, with no span.
const fn next_change(head: u64) -> u64 {
    ((head >> 32).wrapping_add(1)) << 32
}
