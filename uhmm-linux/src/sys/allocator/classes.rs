//! The sizes that small objects are rounded up to.

use core::alloc::Layout;

use super::runs::SPAN_BYTES;

/// What every object is aligned to, in bytes, and what the smallest one takes.
const GRAIN: usize = 16;

/// The size up to which sizes are multiples of [`GRAIN`]; from there on each doubling has four.
const LINEAR_LIMIT: usize = 128;

/// How many sizes there are between a power of two and the next.
const STEPS: usize = 4;

/// The largest small object, in bytes: two fit a span.
pub(super) const LARGEST: usize = SPAN_BYTES / 2;

/// How many classes there are.
pub(super) const CLASSES: usize =
    LINEAR_LIMIT / GRAIN + STEPS * (LARGEST / LINEAR_LIMIT).ilog2() as usize;

/// The most objects that a span has.
pub(super) const MOST_OBJECTS: usize = SPAN_BYTES / GRAIN;

/// A class of small objects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Class {
    /// The bytes of an object, a multiple of [`GRAIN`].
    pub(super) size: u32,
    /// How many objects fit a span.
    pub(super) objects: u32,
    /// 2^32 divided by `size`, rounded up: multiplying by it is quicker than dividing.
    reciprocal: u32,
}

/// All classes, from small to large.
pub(super) static ALL: [Class; CLASSES] = {
    let mut all = [Class { size: 0, objects: 0, reciprocal: 0 }; CLASSES];
    let mut index = 0;
    while index < CLASSES {
        let linear = LINEAR_LIMIT / GRAIN;
        let size = if index < linear {
            (index + 1) * GRAIN
        } else {
            let (doubling, step) = ((index - linear) / STEPS, (index - linear) % STEPS);
            (LINEAR_LIMIT << doubling) / STEPS * (STEPS + 1 + step)
        };
        all[index] = Class {
            size: size as u32,
            objects: (SPAN_BYTES / size) as u32,
            reciprocal: (1_u64 << 32).div_ceil(size as u64) as u32,
        };
        index += 1;
    }
    assert!(all[CLASSES - 1].size as usize == LARGEST);
    all
};

impl Class {
    /// Returns which object holds the byte at `offset` in a span.
    ///
    /// The reciprocal is too large by less than one part in 2^32 / `size`, and `offset` is less
    /// than 2^16, so the product is too large by less than 2^16 objects / 2^32, and the quotient
    /// exact.
    #[inline]
    pub(super) const fn object_at(self, offset: u32) -> u32 {
        ((offset as u64 * self.reciprocal as u64) >> 32) as u32
    }

    /// Returns how many words of 64 bits have a bit for each object.
    #[inline]
    pub(super) const fn words(self) -> usize {
        self.objects.div_ceil(u64::BITS) as usize
    }

    /// Returns the bits of word `word` that stand for objects.
    #[inline]
    pub(super) const fn mask(self, word: usize) -> u64 {
        let before = word as u32 * u64::BITS;
        match self.objects.saturating_sub(before) {
            0 => 0,
            objects if objects >= u64::BITS => u64::MAX,
            objects => (1 << objects) - 1,
        }
    }
}

/// Returns the class whose objects can be of this layout; `None` where it is not small.
#[inline]
pub(super) fn class_for(layout: Layout) -> Option<usize> {
    if layout.align() <= GRAIN {
        return (layout.size() <= LARGEST).then(|| class_of(layout.size()));
    }
    // Objects stand at the multiples of their size, so they are as aligned as their size is even. A
    // multiple of the alignment that is no class lies where the classes are a smaller power of two
    // apart than a quarter of it, and the next class is a multiple of that, and so of the
    // alignment.
    let size = layout.size().max(1).checked_next_multiple_of(layout.align())?;
    (size <= LARGEST).then(|| class_of(size))
}

/// Returns the first class whose objects have `size` bytes, which is at most [`LARGEST`].
#[inline]
const fn class_of(size: usize) -> usize {
    if size <= LINEAR_LIMIT {
        return size.saturating_sub(1) / GRAIN;
    }
    let last = size - 1;
    let doubling = last.ilog2() - LINEAR_LIMIT.ilog2();
    let step = (last >> (last.ilog2() - STEPS.ilog2())) - STEPS;
    LINEAR_LIMIT / GRAIN + doubling as usize * STEPS + step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_the_smallest_class_that_it_fits() {
        for size in 0..=LARGEST {
            let class = class_of(size);
            assert!(ALL[class].size as usize >= size);
            assert!(class == 0 || (ALL[class - 1].size as usize) < size, "{size} in class {class}");
        }
    }

    #[test]
    fn objects_of_a_class_are_as_aligned_as_the_layout_asks() {
        for shift in 0..=20 {
            let align = 1_usize << shift;
            for size in (0..3000).chain([4095, 4096, 4097, 20_000, LARGEST, LARGEST + 1]) {
                let layout = Layout::from_size_align(size, align).expect("a layout");
                match class_for(layout) {
                    Some(class) => {
                        let class = ALL[class];
                        assert!(class.size as usize >= size);
                        assert!(align <= GRAIN || (class.size as usize).is_multiple_of(align));
                        assert!((class.size as usize).is_multiple_of(GRAIN));
                    }
                    None => assert!(size.next_multiple_of(align).max(align) > LARGEST),
                }
            }
        }
    }

    #[test]
    fn every_byte_of_a_span_belongs_to_the_object_that_division_says() {
        for class in ALL {
            for offset in 0..SPAN_BYTES as u32 {
                assert_eq!(class.object_at(offset), offset / class.size);
            }
            let bits: u32 = (0..class.words()).map(|word| class.mask(word).count_ones()).sum();
            assert_eq!(bits, class.objects);
            assert_eq!(class.mask(class.words()), 0);
        }
    }
}
