//! Where pages go.

use std::fmt;
use std::sync::Arc;

use uhmm::{DevicePagemap, PAGE_SIZE, PagemapOptions};
use uhmm_devices::gpu::{SoftGpu, SoftGpuOptions};
use uhmm_devices::store::{Store, StoreOptions, StoreSpec, Verification};
use uhmm_linux::Process;

use crate::ledger::{Config, Counter, Gauge, Slot};
use crate::verify::{Book, Checker, Findings, TLB_ENTRIES};

/// How much memory the software GPU has, in pages: 64 GiB. It takes what is in use.
const GPU_PAGES: u64 = 1 << 24;

/// The device of a process.
pub(crate) enum Device {
    /// A store, in memory or in a file, and whether it verifies what it gives back.
    Store(Store, Verified),
    /// The memory of a software GPU.
    Gpu(Arc<SoftGpu>),
}

/// Whether pages are compared with what they were.
type Verified = bool;

impl Device {
    /// Makes what the user has asked for, and registers its memory, or says why not.
    pub(crate) fn make(
        config: &Config,
        slot: &Arc<Slot>,
        options: PagemapOptions,
    ) -> Result<(Device, Arc<DevicePagemap>), String> {
        let Some(spec) = config.device.to_str() else {
            return Err(format!("the device is no text: {}", config.device.display()));
        };
        let slot = Arc::clone(slot);
        if spec == "soft" {
            let gpu = SoftGpuOptions::new().memory_pages(GPU_PAGES).pagemap(options);
            let gpu = match config.verify {
                true => gpu
                    .checksums(true)
                    .observed()
                    .tlb_entries(TLB_ENTRIES)
                    .alarm(move |violation| end(&slot, violation)),
                false => gpu,
            };
            let gpu = SoftGpu::new(gpu);
            let pagemap = gpu.pagemap().map(Arc::clone).ok_or("the GPU has no memory")?;
            return Ok((Device::Gpu(gpu), pagemap));
        }
        let verification = match config.verify {
            true => Verification::report(move |mismatch| end(&slot, &mismatch.to_string())),
            false => Verification::Off,
        };
        let store = StoreOptions::new().verification(verification);
        let spec: StoreSpec = spec.parse().map_err(|error| format!("{error}"))?;
        let store = spec.open(store).map_err(|error| error.to_string())?;
        let pagemap = DevicePagemap::register_with(store.memory(), options);
        Ok((Device::Store(store, config.verify), pagemap))
    }

    /// Begins to compare what the device sees of `process` with what is to be noted in the book that
    /// is returned. A store sees nothing: what it gives back is verified when it comes home.
    pub(crate) fn verify(&self, process: &Process, slot: &Arc<Slot>) -> Option<Arc<Book>> {
        let Device::Gpu(gpu) = self else { return None };
        let book = Arc::new(Book::default());
        match Checker::new(process, gpu, &book, Arc::clone(slot)).start() {
            Ok(()) => Some(book),
            Err(error) => {
                slot.warn(&format!(
                    "there is no room for a thread that verifies ({error}): pages are verified \
                     when they come home, and not while they are away"
                ));
                None
            }
        }
    }

    /// Returns how much memory of this process it takes, in bytes, where so many pages are there.
    pub(crate) fn bytes_in_memory(&self, pages: u64) -> u64 {
        match self {
            Device::Store(store, _) => {
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

    /// Closes gaps, for up to `pages` pages, where its pages have left them.
    pub(crate) fn compact(&self, pages: u64) {
        if let Device::Store(store, ..) = self {
            store.compact(pages);
        }
    }

    /// Tells whether so many pages more find room.
    pub(crate) fn has_room(&self, pages: u64) -> bool {
        match self {
            Device::Store(store, _) => store.has_room(pages),
            Device::Gpu(gpu) => gpu.memory().available() >= pages,
        }
    }

    /// Tells the ledger what it holds, of so many pages.
    pub(crate) fn report(&self, slot: &Slot, pages: u64) {
        match self {
            Device::Store(store, verified) => {
                let statistics = store.statistics();
                slot.set(Gauge::Stored, statistics.taken_bytes);
                slot.set(Gauge::Zero, statistics.zero_pages * PAGE_SIZE as u64);
                slot.set(Gauge::SameFilled, statistics.same_filled_pages * PAGE_SIZE as u64);
                // A file keeps all others as they are, and does not try.
                if matches!(store, Store::Compressed(_)) {
                    let pages = statistics.incompressible_pages;
                    slot.set(Gauge::Incompressible, pages * PAGE_SIZE as u64);
                }
                slot.set_counter(Counter::BytesTaken, statistics.pages_in * PAGE_SIZE as u64);
                if *verified {
                    slot.set_counter(Counter::PagesVerified, statistics.pages_out);
                }
            }
            Device::Gpu(_) => slot.set(Gauge::Stored, pages * PAGE_SIZE as u64),
        }
    }
}

impl Findings for Arc<Slot> {
    fn confirmed(&self, pages: u64) {
        self.add(Counter::PagesVerified, pages);
    }

    fn differs(&self, what: &str) {
        end(self, what);
    }
}

/// Ends the process, since what it would go on with is wrong: with a line on its standard error
/// output, and a remark in the ledger, as that may be closed.
fn end(slot: &Slot, what: &str) -> ! {
    slot.warn(&format!("--verify has ended a process: {what}"));
    // The standard error output of this thread is not the program's.
    Process::tell(&format!("uhmm: --verify: {what}\n"));
    std::process::abort()
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Device::Store(..) => "Store",
            Device::Gpu(_) => "Gpu",
        };
        f.debug_struct(name).finish_non_exhaustive()
    }
}
