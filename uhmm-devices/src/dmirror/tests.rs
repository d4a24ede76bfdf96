//! The tables by themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu_notifier::{Event, EventKind, Owner};
use uhmm::{
    Access, Device as _, DeviceFrame, DeviceLocation, Frame, PAGE_SIZE, Page, PageEntry, PageRange,
    Residency, SystemMemory,
};

use super::{Dmirror, Residents, Tag};

/// Memory whose words are the numbers of frames, with nothing from a frame on.
struct Until(u64);

impl SystemMemory for Until {
    fn read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) {
        self.try_read(frame, offset, bytes);
    }

    fn write(&self, frame: Frame, offset: usize, bytes: &[u8]) {
        self.try_write(frame, offset, bytes);
    }

    fn try_read(&self, frame: Frame, _: usize, bytes: &mut [u8]) -> usize {
        let frames = self.0.saturating_sub(frame.0) as usize;
        let pages = bytes.chunks_exact_mut(PAGE_SIZE).take(frames).enumerate();
        let read = pages.map(|(index, page)| page.fill((frame.0 + index as u64) as u8)).count();
        read * PAGE_SIZE
    }

    fn try_write(&self, frame: Frame, _: usize, bytes: &[u8]) -> usize {
        bytes.len().min(self.0.saturating_sub(frame.0) as usize * PAGE_SIZE)
    }

    fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
        unreachable!("the device has no atomic operations")
    }
}

fn pages(first: u64, pages: u64) -> PageRange {
    PageRange::from_pages(Page::new(first).expect("a page"), pages).expect("a range")
}

fn system(frame: u64, access: Access) -> PageEntry {
    let residency = Residency::System(Frame(frame));
    PageEntry { residency, access, allowed: access, ..PageEntry::default() }
}

fn table(end: u64) -> (Dmirror, super::PageTable) {
    let device = Dmirror::new();
    let memory: Arc<dyn SystemMemory> = Arc::new(Until(end));
    let table = device.page_table(PageRange::ALL, &memory);
    (device, table)
}

#[test]
fn pages_are_tagged_by_where_they_are_and_what_may_be_done() {
    let (device, mut table) = table(100);
    let held = Residency::Exclusive { frame: Frame(50), owner: Owner::new() };
    let location = DeviceLocation { owner: Owner::new(), frame: DeviceFrame(60) };
    let entry = |residency, access| PageEntry { residency, access, ..PageEntry::default() };
    let entries = [
        system(10, Access::Read),
        system(11, Access::Write),
        system(12, Access::None),
        entry(held, Access::Atomic),
        entry(Residency::Device(location), Access::Atomic),
        entry(Residency::InTransit, Access::None),
    ];
    device.map(&mut table, pages(10, 6), &entries);
    let expected = [
        (pages(10, 1), Tag::Read),
        (pages(11, 1), Tag::Write),
        (pages(13, 1), Tag::Atomic),
        (pages(14, 1), Tag::Write),
    ];
    assert_eq!(table.translated(PageRange::ALL), expected);
    assert!(table.has_exclusively(pages(0, 14)) && !table.has_exclusively(pages(14, 9)));
    table.protect(pages(0, 13));
    assert_eq!(table.translated(pages(11, 1)), [(pages(11, 1), Tag::Read)]);
    // What is entered again replaces what was there, also by nothing.
    device.map(&mut table, pages(13, 1), &[system(13, Access::None)]);
    assert!(!table.has_exclusively(PageRange::ALL));
}

#[test]
fn a_copy_goes_as_far_as_the_translations() {
    let (device, mut table) = table(100);
    let entries: Vec<_> = (20..24).map(|frame| system(frame, Access::Write)).collect();
    device.map(&mut table, pages(10, 4), &entries);
    let mut bytes = vec![0; 6 * PAGE_SIZE];
    assert_eq!(table.load(pages(10, 1).first(), &mut bytes), 4);
    assert_eq!([bytes[0], bytes[PAGE_SIZE], bytes[4 * PAGE_SIZE]], [20, 21, 0]);
    assert_eq!(table.load(pages(9, 1).first(), &mut bytes), 0);
    table.protect(pages(12, 1));
    assert_eq!(table.store(pages(10, 1).first(), &bytes), 2);
    assert_eq!(table.load(pages(10, 1).first(), &mut bytes), 4);
    // An invalidation takes its pages and no other.
    let event = Event::new(EventKind::Unmap, pages(11, 1).va_range());
    device.invalidate(&mut table, &event);
    assert_eq!(table.load(pages(10, 1).first(), &mut bytes), 1);
    assert_eq!(table.load(pages(12, 1).first(), &mut bytes), 2);
}

#[test]
fn what_leads_nowhere_is_forgotten() {
    let (device, mut table) = table(22);
    let entries: Vec<_> = (20..24).map(|frame| system(frame, Access::Write)).collect();
    device.map(&mut table, pages(10, 4), &entries);
    let mut bytes = vec![0; 4 * PAGE_SIZE];
    assert_eq!(table.load(pages(10, 1).first(), &mut bytes), 2);
    assert_eq!(table.translated(PageRange::ALL), [(pages(10, 2), Tag::Write)]);
    assert_eq!(table.store(pages(11, 1).first(), &bytes), 1);
}

#[test]
fn residents_come_as_there_is_room_and_leave_once() {
    let left = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&left);
    let device = Residents::new(move |pages| {
        counted.fetch_add(pages, Ordering::SeqCst);
    });
    let memory: Arc<dyn SystemMemory> = Arc::new(Until(100));
    let mut table = device.page_table(PageRange::ALL, &memory);
    let entries: Vec<_> = (20..26).map(|frame| system(frame, Access::Read)).collect();
    device.map(&mut table, pages(20, 6), &entries);
    assert_eq!(table.residents(PageRange::ALL), []);
    table.make_room(4);
    device.map(&mut table, pages(20, 3), &entries[..3]);
    // Those that are there take no room again.
    device.map(&mut table, pages(20, 6), &entries);
    assert_eq!(table.residents(PageRange::ALL), [pages(20, 4)]);
    assert_eq!(table.take_room(), 0);
    for kind in [EventKind::ProtectionVma, EventKind::Exclusive, EventKind::SoftDirty] {
        device.invalidate(&mut table, &Event::new(kind, PageRange::ALL.va_range()));
    }
    assert_eq!(left.load(Ordering::SeqCst), 0);
    for _ in 0..2 {
        device.invalidate(&mut table, &Event::new(EventKind::Clear, pages(21, 2).va_range()));
    }
    assert_eq!(left.load(Ordering::SeqCst), 2);
    assert_eq!(table.residents(PageRange::ALL), [pages(20, 1), pages(23, 1)]);
    drop(table);
    assert_eq!(left.load(Ordering::SeqCst), 4);
}
