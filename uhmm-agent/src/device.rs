//! Where pages go.

use std::fmt;
use std::sync::Arc;

use uhmm::{DeviceMemory, PAGE_SIZE};
use uhmm_devices::gpu::{SoftGpu, SoftGpuOptions};
use uhmm_devices::store::{Store, StoreOptions, StoreSpec, Verification};

use crate::ledger::{Config, Counter, Gauge, Slot};

/// How much memory the software GPU has, in pages: 64 GiB. It takes what is in use.
const GPU_PAGES: u64 = 1 << 24;

/// The device of a process.
pub(crate) enum Device {
    /// A store, in memory or in a file.
    Store(Store),
    /// The memory of a software GPU.
    Gpu(Arc<SoftGpu>),
}

impl Device {
    /// Makes what the user has asked for, or says why not.
    pub(crate) fn make(config: &Config) -> Result<Device, String> {
        let Some(spec) = config.device.to_str() else {
            return Err(format!("the device is no text: {}", config.device.display()));
        };
        if spec == "soft" {
            return Ok(Device::Gpu(SoftGpu::new(SoftGpuOptions::new().memory_pages(GPU_PAGES))));
        }
        let verification = if config.verify { Verification::Abort } else { Verification::Off };
        let options = StoreOptions::new().verification(verification);
        let spec: StoreSpec = spec.parse().map_err(|error| format!("{error}"))?;
        spec.open(options).map(Device::Store).map_err(|error| error.to_string())
    }

    /// Returns its memory.
    pub(crate) fn memory(&self) -> Arc<dyn DeviceMemory> {
        match self {
            Device::Store(store) => store.memory(),
            Device::Gpu(gpu) => Arc::clone(gpu.memory()) as Arc<dyn DeviceMemory>,
        }
    }

    /// Returns how much memory of this process it takes, in bytes, where so many pages are there.
    pub(crate) fn bytes_in_memory(&self, pages: u64) -> u64 {
        match self {
            Device::Store(store) => {
                let statistics = store.statistics();
                let taken = match store {
                    Store::Compressed(_) => statistics.taken_bytes,
                    Store::File(_) => 0,
                };
                taken + statistics.table_bytes
            }
            Device::Gpu(_) => pages * PAGE_SIZE as u64,
        }
    }

    /// Tells whether so many pages more find room.
    pub(crate) fn has_room(&self, pages: u64) -> bool {
        match self {
            Device::Store(store) => store.has_room(pages),
            Device::Gpu(gpu) => gpu.memory().available() >= pages,
        }
    }

    /// Tells the ledger what it holds, of so many pages.
    pub(crate) fn report(&self, slot: &Slot, pages: u64) {
        match self {
            Device::Store(store) => {
                let statistics = store.statistics();
                slot.set(Gauge::Stored, statistics.taken_bytes);
                slot.set(Gauge::Zero, statistics.zero_pages * PAGE_SIZE as u64);
                slot.set(Gauge::SameFilled, statistics.same_filled_pages * PAGE_SIZE as u64);
                // A file keeps all others as they are, and does not try.
                if matches!(self, Device::Store(Store::Compressed(_))) {
                    let pages = statistics.incompressible_pages;
                    slot.set(Gauge::Incompressible, pages * PAGE_SIZE as u64);
                }
                slot.set_counter(Counter::BytesTaken, statistics.pages_in * PAGE_SIZE as u64);
            }
            Device::Gpu(_) => slot.set(Gauge::Stored, pages * PAGE_SIZE as u64),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Device::Store(_) => "Store",
            Device::Gpu(_) => "Gpu",
        };
        f.debug_struct(name).finish_non_exhaustive()
    }
}
