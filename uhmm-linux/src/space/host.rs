//! Device memory that is system memory: pages that move there stay where they are put when they are
//! taken from the program, and no byte is copied in either direction.

use std::fmt;
use std::sync::Arc;

use uhmm::{
    CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, Order, OutOfDeviceMemory, PAGE_SIZE, Page,
    SystemMemory,
};

use super::Space;
use super::memory::ProcessMemory;
use super::pool::Pool;

/// The memory of a device whose memory is this process's own: of an emulated device, of software
/// that works on pages in the program's stead. Made by
/// [`Process::host_memory`](crate::Process::host_memory).
///
/// Its frames are frames of the address space's [`SystemMemory`] too, of the same number, and a
/// device reaches them through that.
pub struct HostMemory {
    staging: Arc<Pool>,
    memory: Arc<ProcessMemory>,
    capacity: u64,
}

impl HostMemory {
    pub(crate) fn new(space: &Space, capacity: u64) -> HostMemory {
        let (staging, memory) = (Arc::clone(&space.staging), Arc::clone(&space.memory));
        HostMemory { staging, memory, capacity }
    }

    fn is_own(&self, memory: &dyn SystemMemory) -> bool {
        std::ptr::addr_eq(memory, Arc::as_ptr(&self.memory))
    }

    fn page(&self, frame: u64) -> Option<Page> {
        Page::new(frame).filter(|&page| self.staging.range().contains(page))
    }

    fn copy_out(&self, memory: &dyn SystemMemory, from: DeviceFrame, to: Frame, order: Order) {
        let mut bytes = [0; PAGE_SIZE];
        for index in 0..order.pages() {
            let Some(page) = self.page(from.0 + index) else { continue };
            self.staging.read(page, 0, &mut bytes);
            memory.write(Frame(to.0 + index), 0, &bytes);
        }
    }
}

impl DeviceMemory for HostMemory {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        let block = self.staging.allocate(order).ok_or(OutOfDeviceMemory { order })?;
        let frame = DeviceFrame(block.first().number());
        block.leak();
        Ok(frame)
    }

    fn adopt(&self, memory: &dyn SystemMemory, from: Frame, _: Order) -> Option<DeviceFrame> {
        let page = self.page(from.0).filter(|_| self.is_own(memory))?;
        self.staging.begin_adoption(page);
        Some(DeviceFrame(from.0))
    }

    fn in_place(&self, memory: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        self.is_own(memory).then_some(Frame(frame.0))
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        let page = self.page(frame.0).expect("it was given out from staging");
        if !self.staging.end_adoption(page) {
            drop(self.staging.own(page, order));
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        for job in jobs {
            match job.kind() {
                // What is fresh here holds nothing.
                CopyKind::Clear { .. } => job.complete(),
                CopyKind::Out { from, to } => {
                    self.copy_out(memory, from, to, job.order());
                    job.complete();
                }
                // Staging is filled by moving pages there, and what is to come in is there already.
                CopyKind::In { .. } => {}
            }
        }
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostMemory").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}
