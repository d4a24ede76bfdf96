//! Devices whose memory is the machine's own.

use std::fmt;
use std::sync::Arc;

use super::ram::View;
use super::state::Shared;
use crate::backend::SystemMemory;
use crate::device::{CopyJob, CopyKind, DeviceMemory, OutOfDeviceMemory};
use crate::entry::{DeviceFrame, Frame};
use crate::page::{Order, PAGE_SIZE};
use crate::primitive::{Mutex, lock};

/// A part of a machine's system memory as the memory of a device: pages go there and come home
/// without being copied. Made by [`Machine::host_memory`](super::Machine::host_memory).
///
/// The numbers of its pages are those of the frames, so none is used twice, and a device that uses
/// a page after it has left is found out like one that uses a stale translation to system memory.
/// What it allocates is taken from the machine (step `"frame"`), and counts among
/// [`Machine::frames`](super::Machine::frames).
pub struct HostMemory {
    shared: Arc<Shared>,
    own: View,
    pages: u64,
    used: Mutex<u64>,
}

impl HostMemory {
    pub(super) fn new(shared: &Arc<Shared>, pages: u64) -> HostMemory {
        let own = View::of_hosts(&shared.ram);
        HostMemory { shared: Arc::clone(shared), own, pages, used: Mutex::new(0) }
    }

    /// Copies `bytes.len()` bytes out of a page and its successors, from `offset` bytes into it, as
    /// the device does.
    pub fn read(&self, frame: DeviceFrame, offset: usize, bytes: &mut [u8]) {
        self.own.read(Frame(frame.0), offset, bytes);
    }

    /// Copies `bytes` into a page and its successors, from `offset` bytes into it, as the device
    /// does.
    pub fn write(&self, frame: DeviceFrame, offset: usize, bytes: &[u8]) {
        self.own.write(Frame(frame.0), offset, bytes);
    }

    /// Makes a block of pages that `get` gives, if there is room for them.
    fn take(&self, order: Order, get: impl FnOnce() -> Option<Frame>) -> Option<DeviceFrame> {
        let mut used = lock(&self.used);
        if self.pages - *used < order.pages() {
            return None;
        }
        let Frame(first) = get()?;
        *used += order.pages();
        Some(DeviceFrame(first))
    }

    fn do_job(&self, memory: &dyn SystemMemory, kind: CopyKind, order: Order) {
        let mut bytes = [0; PAGE_SIZE];
        for offset in (0..order.bytes()).step_by(PAGE_SIZE) {
            match kind {
                CopyKind::In { from, to } => {
                    memory.read(from, offset, &mut bytes);
                    self.write(to, offset, &bytes);
                }
                CopyKind::Out { from, to } => {
                    self.read(from, offset, &mut bytes);
                    memory.write(to, offset, &bytes);
                }
                CopyKind::Clear { to } => self.write(to, offset, &bytes),
            }
        }
    }
}

impl DeviceMemory for HostMemory {
    fn capacity(&self) -> u64 {
        self.pages
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        let block = self.take(order, || self.shared.ram.allocate_host(order));
        block.ok_or(OutOfDeviceMemory { order })
    }

    fn adopt(&self, memory: &dyn SystemMemory, from: Frame, order: Order) -> Option<DeviceFrame> {
        self.in_place(memory, DeviceFrame(from.0))?;
        self.take(order, || {
            self.shared.ram.adopt(from, order);
            Some(from)
        })
    }

    fn in_place(&self, memory: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        self.shared.is_memory(memory).then_some(Frame(frame.0))
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        self.shared.ram.free_host(Frame(frame.0), order);
        *lock(&self.used) -= order.pages();
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        for job in jobs {
            self.do_job(memory, job.kind(), job.order());
            job.complete();
        }
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostMemory")
            .field("pages", &self.pages)
            .field("used", &*lock(&self.used))
            .finish_non_exhaustive()
    }
}
