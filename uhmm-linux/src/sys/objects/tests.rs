//! Tests.

use std::cell::Cell;
use std::sync::atomic::AtomicU64;

use uhmm::Page;

use super::*;

/// A variable that begins as something, and one that begins as zeroes.
static WITH_VALUE: AtomicU64 = AtomicU64::new(7);
static ZERO: [AtomicU64; 4096] = [const { AtomicU64::new(0) }; 4096];
static CONSTANT: [u64; 4] = [1, 2, 3, 4];

thread_local! {
    static OWN: [Cell<u64>; 512] = const { [const { Cell::new(5) }; 512] };
}

/// Tells whether the ranges have each byte of a value.
fn hold<T: ?Sized>(ranges: &[PageRange], value: &T) -> bool {
    let address = std::ptr::from_ref(value).addr() as u64;
    let held = covering(address, size_of_val(value) as u64).expect("it has a size");
    ranges.iter().any(|range| range.covers(held))
}

#[test]
fn the_segments_hold_code_and_variables_and_no_heap_or_stack() {
    let segments = segments();
    assert!(hold(&segments, &WITH_VALUE));
    assert!(hold(&segments, &ZERO));
    assert!(hold(&segments, &CONSTANT));
    for code in [hold::<u64> as *const (), libc::malloc as *const ()] {
        let page = Page::containing(code.addr() as u64);
        assert!(segments.iter().any(|range| range.contains(page)), "code at {code:p}");
    }
    let local = 3_u64;
    assert!(!hold(&segments, &local));
    assert!(!hold(&segments, &*Box::new([0_u8; 1 << 20])));
}

#[test]
fn segments_are_in_order_and_apart() {
    let segments = segments();
    for pair in segments.windows(2) {
        assert!(pair[0].last().checked_add(1).expect("not the last page") < pair[1].first());
    }
}

#[test]
fn each_thread_has_variables_of_its_own() {
    let of_one = std::thread::spawn(|| {
        let own = thread_local_segments();
        OWN.with(|variables| assert!(hold(&own, variables)));
        own
    });
    let of_one = of_one.join().expect("it holds");
    OWN.with(|variables| {
        assert!(hold(&thread_local_segments(), variables));
        assert!(!hold(&of_one, variables));
    });
}

#[test]
fn ranges_that_touch_are_joined() {
    let range = |first, pages| {
        PageRange::from_pages(Page::new(first).expect("a page"), pages).expect("a range")
    };
    let merged = merge(vec![range(9, 1), range(1, 3), range(4, 2), range(2, 1), range(7, 1)]);
    assert_eq!(merged, [range(1, 5), range(7, 1), range(9, 1)]);
    let top = PageRange::from(Page::MAX);
    assert_eq!(merge(vec![top, top]), [top]);
}
