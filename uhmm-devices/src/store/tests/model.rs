//! Both stores beside a map from frames to contents.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use uhmm::primitive::lock;
use uhmm::{CopyJob, CopyKind, DeviceFrame, DeviceMemory, Injector, Order, PAGE_SIZE};

use super::super::content::PageBytes;
use super::super::{Compressed, Mismatch, Store, StoreOptions, StoreSpec, Verification};
use super::{Frames, compressible, copy_in, copy_out, noise, order};

/// Opens one store of each kind.
fn stores(limit: Option<u64>, options: &StoreOptions) -> [Store; 2] {
    let path = std::env::temp_dir();
    let specs = [
        StoreSpec::Compressed { limit_bytes: limit },
        StoreSpec::File { path, limit_bytes: limit },
    ];
    specs.map(|spec| spec.open(options.clone()).expect("a store can be made"))
}

/// What is put into a page.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Zero,
    Word(u64),
    /// Compresses to about so many bytes.
    Bytes(u64, usize),
    Noise(u64),
}

impl Fill {
    fn page(self) -> PageBytes {
        match self {
            Fill::Zero => [0; PAGE_SIZE],
            Fill::Word(word) => {
                let bytes = word.to_ne_bytes();
                std::array::from_fn(|at| bytes[at % 8])
            }
            Fill::Bytes(seed, bytes) => compressible(seed, bytes),
            Fill::Noise(seed) => noise(seed),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A block comes, of so many pages in all, that begin with these and go on with the last.
    In(u8, Vec<Fill>),
    Clear(u8),
    Free {
        which: usize,
        order: u8,
    },
    /// The piece of this order that holds some page is fetched.
    Out {
        which: usize,
        order: u8,
    },
    /// The next step of this name fails.
    Fail(&'static str),
    Compact(u64),
}

fn fill() -> impl Strategy<Value = Fill> {
    prop_oneof![
        1 => Just(Fill::Zero),
        1 => any::<u64>().prop_map(Fill::Word),
        4 => (any::<u64>(), 0..=PAGE_SIZE).prop_map(|(seed, bytes)| Fill::Bytes(seed, bytes)),
        1 => any::<u64>().prop_map(Fill::Noise),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let size = || prop_oneof![6 => 0..=3_u8, 1 => 4..=9_u8];
    let fills = || prop::collection::vec(fill(), 1..8);
    let piece = || (any::<usize>(), size());
    let failure = || prop::sample::select(vec!["allocate", "copy", "clear", "reserve", "release"]);
    prop_oneof![
        6 => (size(), fills()).prop_map(|(order, fills)| Step::In(order, fills)),
        1 => size().prop_map(Step::Clear),
        5 => piece().prop_map(|(which, order)| Step::Free { which, order }),
        4 => piece().prop_map(|(which, order)| Step::Out { which, order }),
        1 => failure().prop_map(Step::Fail),
        1 => (0..100_u64).prop_map(Step::Compact),
    ]
}

type Model = BTreeMap<u64, PageBytes>;

/// Returns the block of `size` around some page of the model, if the model has all of it.
fn block(model: &Model, which: usize, size: u8) -> Option<(DeviceFrame, Order)> {
    let frame = *model.keys().nth(which % model.len().max(1))?;
    let pages = order(size).pages();
    let first = frame & !(pages - 1);
    let whole = model.range(first..first + pages).count() as u64 == pages;
    Some(if whole { (DeviceFrame(first), order(size)) } else { (DeviceFrame(frame), Order::PAGE) })
}

fn take(store: &Store, injector: &Injector, model: &mut Model, step: &Step) {
    match step {
        Step::In(size, fills) => {
            let pages = order(*size).pages();
            let fills = fills.iter().chain(std::iter::repeat(&fills[fills.len() - 1]));
            let pages: Vec<PageBytes> =
                fills.map(|fill| fill.page()).take(pages as usize).collect();
            let Ok(frame) = store.allocate(order(*size)) else { return };
            if copy_in(store, frame, order(*size), &pages) {
                model.extend((frame.0..).zip(pages));
            } else {
                store.free(frame, order(*size));
            }
        }
        Step::Clear(size) => {
            let Ok(to) = store.allocate(order(*size)) else { return };
            let mut jobs = [CopyJob::new(CopyKind::Clear { to }, order(*size))];
            store.copy(&Frames::default(), &mut jobs);
            if jobs[0].is_complete() {
                let pages = order(*size).pages() as usize;
                model.extend((to.0..).zip(vec![[0; PAGE_SIZE]; pages]));
            } else {
                store.free(to, order(*size));
            }
        }
        Step::Free { which, order } => {
            let Some((frame, order)) = block(model, *which, *order) else { return };
            store.free(frame, order);
            model.retain(|&held, _| !(frame.0..frame.0 + order.pages()).contains(&held));
        }
        Step::Out { which, order } => {
            let Some((frame, order)) = block(model, *which, *order) else { return };
            let Some(pages) = copy_out(store, frame, order) else { return };
            let expected = model.range(frame.0..frame.0 + order.pages()).map(|(_, page)| page);
            assert!(pages.iter().eq(expected), "{order:?} at {frame:?} is not what was stored");
        }
        Step::Fail(step) => injector.fail(step, 0),
        Step::Compact(most) => assert!(store.compact(*most) <= *most),
    }
}

fn check(store: &Store, model: &Model) {
    store.check().expect("the statistics are right");
    let statistics = store.statistics();
    assert_eq!(statistics.pages(), model.len() as u64);
    let zero = model.values().filter(|page| page.iter().all(|&byte| byte == 0)).count();
    assert_eq!(statistics.zero_pages, zero as u64);
    assert!(statistics.stored_bytes <= statistics.taken_bytes, "{statistics:?}");
    assert!(statistics.taken_bytes <= statistics.peak_bytes, "{statistics:?}");
    let limit = statistics.limit_bytes.unwrap_or(u64::MAX);
    assert!(statistics.peak_bytes <= limit, "{statistics:?}");
    assert_eq!((statistics.failed_reads, statistics.mismatches), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn stores_beside_a_map(
        limit in prop_oneof![Just(None), (4_u64 << 20..32 << 20).prop_map(Some)],
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let injector = Injector::new();
        let report = |mismatch: &Mismatch| panic!("{mismatch}");
        let options = StoreOptions::new()
            .injector(injector.clone())
            .verification(Verification::report(report));
        for store in stores(limit, &options) {
            injector.clear();
            let mut model = Model::new();
            for step in &steps {
                take(&store, &injector, &mut model, step);
                check(&store, &model);
            }
            injector.clear();
            for (&frame, page) in &model {
                let pages = copy_out(&store, DeviceFrame(frame), Order::PAGE);
                prop_assert_eq!(pages, Some(vec![*page]));
            }
            for &frame in model.keys() {
                store.free(DeviceFrame(frame), Order::PAGE);
            }
            check(&store, &Model::new());
            if let Store::Compressed(store) = &store {
                prop_assert_eq!(store.statistics().taken_bytes, 0);
            }
        }
    }
}

#[test]
fn each_kind_of_page_is_counted_as_what_it_is() {
    let store = Compressed::new(StoreOptions::new());
    let pages = [Fill::Zero, Fill::Word(7), Fill::Bytes(1, 1000), Fill::Noise(2)];
    let frames = pages.map(|fill| {
        let frame = store.allocate(Order::PAGE).expect("there is room");
        assert!(copy_in(&store, frame, Order::PAGE, &[fill.page()]));
        frame
    });
    let held = store.statistics();
    let counts = [held.zero_pages, held.same_filled_pages, held.compressed_pages];
    assert_eq!((counts, held.incompressible_pages), ([1, 1, 1], 1));
    let stored = held.stored_bytes - PAGE_SIZE as u64;
    assert!((1000..1100).contains(&stored), "{stored} bytes for a page of a thousand");
    assert_eq!((held.pages_in, held.pages_out), (4, 0));
    assert_eq!(held.raw_bytes(), 4 * PAGE_SIZE as u64);
    for frame in frames {
        store.free(frame, Order::PAGE);
    }
    assert_eq!(store.statistics().pages(), 0);
}

#[test]
fn a_page_that_comes_again_replaces_what_was_there() {
    for store in stores(None, &StoreOptions::new()) {
        let frame = store.allocate(Order::PAGE).expect("there is room");
        for fill in [Fill::Noise(1), Fill::Bytes(2, 500), Fill::Zero, Fill::Noise(3)] {
            assert!(copy_in(&store, frame, Order::PAGE, &[fill.page()]));
            assert_eq!(copy_out(&store, frame, Order::PAGE), Some(vec![fill.page()]));
            assert_eq!(store.statistics().pages(), 1);
            store.check().expect("the statistics are right");
        }
    }
}

#[test]
fn what_was_never_stored_is_not_handed_out() {
    for store in stores(None, &StoreOptions::new()) {
        let frame = store.allocate(order(1)).expect("there is room");
        assert!(copy_in(&store, frame, Order::PAGE, &[noise(1)]));
        assert_eq!(copy_out(&store, frame, order(1)), None);
        assert_eq!(store.statistics().failed_reads, 1);
    }
}

#[test]
fn at_the_limit_a_page_stays_and_nothing_else_is_lost() {
    for store in stores(Some(4 << 20), &StoreOptions::new()) {
        assert!(store.has_room(1024) && !store.has_room(1025));
        let mut held = BTreeMap::new();
        for seed in 0..2000 {
            let Ok(frame) = store.allocate(Order::PAGE) else { continue };
            if copy_in(&store, frame, Order::PAGE, &[noise(seed)]) {
                held.insert(frame, seed);
            } else {
                store.free(frame, Order::PAGE);
            }
        }
        assert_eq!(held.len(), 1024, "a page takes a page, and the limit is whole slabs");
        assert!(!store.has_room(1));
        assert!(store.statistics().refused > 0);
        assert_eq!(store.statistics().peak_bytes, 4 << 20);
        for (frame, seed) in held {
            assert_eq!(copy_out(&store, frame, Order::PAGE), Some(vec![noise(seed)]));
            store.free(frame, Order::PAGE);
        }
        assert!(store.has_room(1024));
    }
}

#[test]
fn a_store_that_has_become_nearly_empty_takes_little() {
    let store = Compressed::new(StoreOptions::new());
    let page = |seed| compressible(seed, 300 + seed as usize % 500);
    let mut held: Vec<(DeviceFrame, u64)> = (0..4000)
        .map(|seed| {
            let frame = store.allocate(Order::PAGE).expect("there is room");
            assert!(copy_in(&store, frame, Order::PAGE, &[page(seed)]));
            (frame, seed)
        })
        .collect();
    let full = store.statistics();
    for index in (0..held.len()).rev().filter(|index| index % 20 != 0) {
        store.free(held.swap_remove(index).0, Order::PAGE);
    }
    let sparse = store.statistics();
    assert!(sparse.taken_bytes * 2 > full.taken_bytes, "{sparse:?} is compact by itself");
    assert!(store.compact(50) == 50, "there is something to move");
    store.compact(u64::MAX);
    let compact = store.statistics();
    assert!(compact.taken_bytes * 5 < full.taken_bytes, "{compact:?}");
    store.check().expect("the statistics are right");
    for (frame, seed) in held {
        assert_eq!(copy_out(&store, frame, Order::PAGE), Some(vec![page(seed)]));
    }
}

#[test]
fn blocks_that_are_larger_than_asked_for_are_refused() {
    for store in stores(None, &StoreOptions::new().largest_block(order(4))) {
        assert!(store.allocate(order(5)).is_err());
        assert!(store.allocate(order(4)).is_ok());
    }
    for store in stores(None, &StoreOptions::new().largest_block(Order::MAX)) {
        assert!(store.allocate(order(10)).is_err());
        assert!(store.allocate(Order::HUGE).is_ok());
    }
}

#[test]
fn a_page_that_was_overwritten_is_reported_and_kept_back() {
    let reported = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&reported);
    let report = move |mismatch: &Mismatch| lock(&list).push(mismatch.clone());
    let options = StoreOptions::new().verification(Verification::report(report));
    let store = Compressed::new(options);
    let frame = store.allocate(Order::PAGE).expect("there is room");
    assert!(copy_in(&store, frame, Order::PAGE, &[noise(1)]));
    assert_eq!(copy_out(&store, frame, Order::PAGE), Some(vec![noise(1)]));
    store.damage(frame);
    assert_eq!(copy_out(&store, frame, Order::PAGE), None);
    assert_eq!(store.statistics().mismatches, 1);
    let reported = lock(&reported);
    let [mismatch] = &reported[..] else { panic!("{reported:?}") };
    assert_eq!(mismatch.frame, frame);
    assert!(mismatch.to_string().contains("is not what was stored there"), "{mismatch}");
}

#[test]
fn specs_are_read_and_written() {
    let file = |path: &str, limit_bytes| StoreSpec::File { path: path.into(), limit_bytes };
    for (text, spec) in [
        ("lz4", StoreSpec::Compressed { limit_bytes: None }),
        ("lz4:1G", StoreSpec::Compressed { limit_bytes: Some(1 << 30) }),
        ("file:/a/b", file("/a/b", None)),
        ("file:/a/b:4G", file("/a/b", Some(4 << 30))),
        ("file:/a:b", file("/a:b", None)),
        ("file:/a:4/b", file("/a:4/b", None)),
        ("file:.", file(".", None)),
    ] {
        assert_eq!(text.parse::<StoreSpec>().expect(text), spec);
        assert_eq!(spec.to_string().parse::<StoreSpec>().expect(text), spec);
    }
    for (text, message) in [
        ("", "`lz4`"),
        ("zstd", "there is no store `zstd`"),
        ("lz4:", "`` is no size"),
        ("lz4:big", "`big` is no size"),
        ("file", "does not say where"),
        ("file:", "does not say where"),
        ("file::4G", "does not say where"),
        ("file:/a:4X", "`4X` is no size"),
        ("lz4:99999999999999999999", "is no size"),
        ("lz4:99999999999T", "is no size"),
    ] {
        let error = text.parse::<StoreSpec>().expect_err(text).to_string();
        assert!(error.contains(message), "{text}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    for text in ["lz4:1K", "file:.:1M"] {
        let error = Store::parse(text).expect_err(text).to_string();
        assert!(error.contains("too small"), "{error}");
    }
    let error = Store::parse("file:/nonexistent/directory/file").expect_err("no directory");
    assert!(error.to_string().contains("No such file"), "{error}");
}
