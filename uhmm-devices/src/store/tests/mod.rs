//! The parts of stores, and both stores beside a model, with failures.

mod concurrent;
mod frames;
mod model;
mod slabs;

use std::collections::HashMap;
use std::sync::Mutex;

use uhmm::primitive::lock;
use uhmm::{CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, Order, PAGE_SIZE, SystemMemory};

use super::content::PageBytes;

/// System memory whose frames are zeroes until they are written.
#[derive(Default)]
pub(super) struct Frames(Mutex<HashMap<u64, Box<PageBytes>>>);

impl SystemMemory for Frames {
    fn read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) {
        assert_eq!(offset, 0, "stores read whole pages");
        for (page, frame) in bytes.chunks_mut(PAGE_SIZE).zip(frame.0..) {
            match lock(&self.0).get(&frame) {
                Some(held) => page.copy_from_slice(&held[..]),
                None => page.fill(0),
            }
        }
    }

    fn write(&self, frame: Frame, offset: usize, bytes: &[u8]) {
        assert_eq!(offset, 0, "stores write whole pages");
        for (page, frame) in bytes.chunks(PAGE_SIZE).zip(frame.0..) {
            let page = page.try_into().expect("stores write whole pages");
            lock(&self.0).insert(frame, Box::new(page));
        }
    }

    fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
        unreachable!("stores update nothing")
    }
}

/// Returns a block's order.
pub(super) fn order(order: u8) -> Order {
    Order::new(order).expect("a test's order is one")
}

/// Copies pages into a block of the device, and says whether that was done.
pub(super) fn copy_in(
    store: &dyn DeviceMemory,
    to: DeviceFrame,
    order: Order,
    pages: &[PageBytes],
) -> bool {
    let memory = Frames::default();
    for (page, frame) in pages.iter().zip(0..) {
        memory.write(Frame(frame), 0, page);
    }
    let mut jobs = [CopyJob::new(CopyKind::In { from: Frame(0), to }, order)];
    store.copy(&memory, &mut jobs);
    jobs[0].is_complete()
}

/// Copies a block of the device out, if that can be done.
pub(super) fn copy_out(
    store: &dyn DeviceMemory,
    from: DeviceFrame,
    order: Order,
) -> Option<Vec<PageBytes>> {
    let memory = Frames::default();
    let mut jobs = [CopyJob::new(CopyKind::Out { from, to: Frame(0) }, order)];
    store.copy(&memory, &mut jobs);
    let page = |frame| {
        let mut page = [0; PAGE_SIZE];
        memory.read(Frame(frame), 0, &mut page);
        page
    };
    let done = jobs[0].is_complete();
    assert!(done || lock(&memory.0).len() < order.pages() as usize, "a failure looks like success");
    done.then(|| (0..order.pages()).map(page).collect())
}

/// Returns a page whose bytes are drawn at random: it does not compress.
pub(super) fn noise(seed: u64) -> PageBytes {
    let mut state = seed;
    std::array::from_fn(|_| {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as u8
    })
}

/// Returns a page that compresses to about so many bytes.
pub(super) fn compressible(seed: u64, bytes: usize) -> PageBytes {
    let mut page = noise(seed);
    page[bytes.min(PAGE_SIZE)..].fill(seed as u8);
    page
}
