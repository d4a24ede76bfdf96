//! Devices that do as little as one can.

use std::hint::black_box;
use std::sync::{Arc, Mutex, MutexGuard};

use uhmm::{
    CopyJob, CopyKind, Device, DeviceFrame, DeviceMemory, Event, Order, OutOfDeviceMemory,
    PAGE_SIZE, PageEntry, PageRange, SystemMemory,
};

/// A device with a page table that it does not fill, and memory of its own in single pages.
pub(crate) struct Trivial {
    memory: Mutex<Memory>,
    pages: usize,
}

struct Memory {
    bytes: Vec<u8>,
    free: Vec<u64>,
}

impl Trivial {
    pub(crate) fn new(pages: usize) -> Arc<Trivial> {
        // Filled by something else than zeroes: these are pages, and not promises of pages.
        let bytes = vec![1; pages * PAGE_SIZE];
        let free = (0..pages as u64).rev().collect();
        Arc::new(Trivial { memory: Mutex::new(Memory { bytes, free }), pages })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().expect("no panic")
    }
}

impl Device for Trivial {
    type PageTable = ();
    type Fence = ();

    fn page_table(&self, _: PageRange, _: &Arc<dyn SystemMemory>) {}

    fn map(&self, (): &mut (), _: PageRange, entries: &[PageEntry]) {
        black_box(entries);
    }

    fn invalidate(&self, (): &mut (), event: &Event) {
        black_box(event);
    }
}

impl DeviceMemory for Trivial {
    fn capacity(&self) -> u64 {
        self.pages as u64
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        let frame = match order {
            Order::PAGE => self.memory().free.pop(),
            _ => None,
        };
        frame.map(DeviceFrame).ok_or(OutOfDeviceMemory { order })
    }

    fn free(&self, frame: DeviceFrame, _: Order) {
        self.memory().free.push(frame.0);
    }

    fn copy(&self, system: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        let mut memory = self.memory();
        for job in jobs {
            let bytes = job.order().bytes();
            let at = |frame: DeviceFrame| frame.0 as usize * PAGE_SIZE;
            match job.kind() {
                CopyKind::In { from, to } => {
                    system.read(from, 0, &mut memory.bytes[at(to)..][..bytes]);
                }
                CopyKind::Out { from, to } => {
                    system.write(to, 0, &memory.bytes[at(from)..][..bytes]);
                }
                CopyKind::Clear { to } => memory.bytes[at(to)..][..bytes].fill(0),
            }
            job.complete();
        }
    }
}
