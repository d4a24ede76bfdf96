//! Small objects, taken and given back: which span to look into, and when to return one.
//!
//! The rules that this follows are those of [`spans`](super::spans).

use super::atomics::{AtomicU32, Ordering};
use super::classes::{ALL, CLASSES};
use super::spans::{Freed, Spans, Use};
use super::{UNUSED_SPANS, corrupted};

/// The current spans of the threads of a shard, one of each class, 0 for none.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Shard {
    current: [AtomicU32; CLASSES],
}

/// The small objects, as the threads of a shard see them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Objects<'a> {
    pub(super) spans: Spans<'a>,
    pub(super) shard: &'a Shard,
}

/// An object: the number of its span, and its own in there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Object {
    pub(super) span: u32,
    pub(super) index: u32,
}

impl Objects<'_> {
    /// Takes an object of a class. Where no span is known to have a free one, `fresh` gets a span,
    /// which is nobody's; `None` where that has none.
    #[inline]
    pub(super) fn take(self, class: usize, fresh: impl FnOnce() -> Option<u32>) -> Option<Object> {
        // Acquire: pairs with `make_current`, so that the span's data is accessible.
        let current = self.shard.current[class].load(Ordering::Acquire);
        self.take_in(current, class).or_else(|| self.take_elsewhere(class, fresh))
    }

    /// Gives an object back, which is one of `class`. Passes each span that nobody needs any more
    /// to `returned`: it is nobody's.
    #[inline]
    pub(super) fn give_back(self, object: Object, class: usize, returned: impl FnMut(u32)) {
        let span = self.spans.span(object.span);
        let freed = span.give_back(ALL[class], object.index);
        // SeqCst: rule 3.
        let current = self.shard.current[class].load(Ordering::SeqCst);
        if current != object.span && !span.is_listed() {
            self.spans.list(object.span);
        }
        match freed {
            Freed::Object => {}
            Freed::Twice => corrupted("freed memory twice\n"),
            Freed::LastOfWord => {
                // What a thread allocates from it will go on to allocate from.
                if current != object.span && span.is_unused(ALL[class]) {
                    self.return_unused(class, returned);
                }
            }
        }
    }

    /// Takes an object of a class, where the current span has none.
    #[cold]
    #[inline(never)]
    fn take_elsewhere(self, class: usize, fresh: impl FnOnce() -> Option<u32>) -> Option<Object> {
        while let Some(span) = self.spans.unlist(class) {
            self.make_current(span, class);
            if let Some(object) = self.take_in(span, class) {
                return Some(object);
            }
        }
        let span = fresh()?;
        self.spans.begin(span, class);
        self.make_current(span, class);
        Some(Object { span, index: 0 })
    }

    /// Takes an object of a class in a span, which may be none.
    #[inline]
    fn take_in(self, span: u32, class: usize) -> Option<Object> {
        if span == 0 {
            return None;
        }
        let index = self.spans.span(span).take(ALL[class])?;
        match self.spans.span(span).usage() {
            Use::Class(actual) if actual == class => Some(Object { span, index }),
            Use::Class(actual) => {
                // It has changed hands since we last heard of it (rule 1).
                self.spans.span(span).give_back(ALL[actual], index);
                self.spans.list(span);
                None
            }
            Use::None | Use::Run => corrupted("a span without a class has free objects\n"),
        }
    }

    /// Makes a span the current one, and sees to it that what is free in the one before is found.
    fn make_current(self, span: u32, class: usize) {
        // SeqCst: rule 3; as a release it pairs with `take`.
        let before = self.shard.current[class].swap(span, Ordering::SeqCst);
        if before != 0 && before != span {
            self.spans.list(before);
        }
    }

    /// Returns the unused spans of a class if there are many; called for each that is seen.
    #[cold]
    fn return_unused(self, class: usize, returned: impl FnMut(u32)) {
        if self.spans.saw_unused(class, UNUSED_SPANS) {
            self.spans.return_unused(class, returned);
        }
    }
}

#[cfg(test)]
#[allow(dead_code, reason = "for tests/allocator_protocol.rs, which includes this file")]
impl Shard {
    /// Makes a shard without current spans.
    #[allow(dead_code, reason = "an arena's begin as zeroes")]
    pub(super) fn new() -> Shard {
        Shard { current: [const { AtomicU32::new(0) }; CLASSES] }
    }

    /// Tells whether a span is the current one of a class.
    pub(super) fn has_current(&self, span: u32, class: usize) -> bool {
        self.current[class].load(Ordering::SeqCst) == span
    }
}
