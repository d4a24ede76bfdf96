//! Execution contexts: what kernels run on.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm::primitive::atomic::{AtomicU32, Ordering};
use uhmm::primitive::{lock, thread};
use uhmm::{Access, MirrorHandle, PAGE_SIZE, Page, Released};

use super::SoftGpu;
use super::fault::{FaultReason, KernelFault};
use super::fault_buffer::{FaultBuffer, Outcome, Packet};
use super::tables::Tables;
use super::tlb::{Tlb, TlbCell};
use super::tree::{Leaf, Target};
use super::view::DeviceMemoryView;

/// A thread of execution of the GPU in one address space, with a TLB of its own.
///
/// Made by [`SoftGpu::context`]. It keeps neither the mirror nor the address space alive: when
/// either has ended, accesses fail with [`FaultReason::Gone`].
pub struct Context {
    gpu: Arc<SoftGpu>,
    handle: MirrorHandle<SoftGpu>,
    tables: Arc<Tables>,
    cell: Arc<TlbCell>,
}

/// A kernel that runs on a thread of its own.
#[must_use = "a kernel that nobody joins may fault unseen"]
pub struct RunningKernel<R> {
    thread: thread::JoinHandle<Result<R, KernelFault>>,
}

/// How long an access waits after the first try that failed in a way that may pass. It waits twice
/// as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_micros(10);

/// How long it waits at most.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// The faults of one access. Its drop ends the access.
struct Faults<'a> {
    buffer: &'a FaultBuffer,
    packet: Packet,
    /// Until when they may take; `None` is for ever.
    deadline: Option<Instant>,
    /// The tries that have been paused after.
    paused: u32,
}

impl Context {
    pub(crate) fn new(
        gpu: &Arc<SoftGpu>,
        handle: &MirrorHandle<SoftGpu>,
    ) -> Result<Context, Released> {
        assert!(Arc::ptr_eq(gpu, handle.device()), "the mirror is another device's");
        let tables = handle.inspect(|table| Arc::clone(table.tables()))?;
        let cell = Arc::new(TlbCell::new(gpu.next_context(), gpu.options().tlb_entries));
        // From here it is flushed: before its first walk.
        tables.add_context(Arc::clone(&cell));
        Ok(Context { gpu: Arc::clone(gpu), handle: handle.clone(), tables, cell })
    }

    /// Runs a kernel on the calling thread, which sleeps while its faults are served.
    ///
    /// # Errors
    ///
    /// What the kernel returns, which is the [`KernelFault`] of an access unless it made one up.
    pub fn run<R>(
        &self,
        kernel: impl FnOnce(&DeviceMemoryView<'_>) -> Result<R, KernelFault>,
    ) -> Result<R, KernelFault> {
        let result = kernel(&DeviceMemoryView::new(self));
        if let Err(fault) = &result {
            tracing::debug!(target: "uhmm", context = self.cell.id, %fault, "kernel ended");
        }
        result
    }

    /// Runs a kernel on a new thread. The context ends with it.
    pub fn spawn<R: Send + 'static>(
        self,
        kernel: impl FnOnce(&DeviceMemoryView<'_>) -> Result<R, KernelFault> + Send + 'static,
    ) -> RunningKernel<R> {
        RunningKernel { thread: thread::spawn(move || self.run(kernel)) }
    }

    /// Returns the number of the context, which no other of the GPU has.
    pub fn id(&self) -> u64 {
        self.cell.id
    }

    /// Returns how many translations the context has cached.
    pub fn cached(&self) -> usize {
        lock(&self.cell.tlb).entries().count()
    }

    /// Copies bytes of one page out.
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), KernelFault> {
        let offset = offset_of(address, bytes.len());
        self.access(address, Access::Read, |leaf| match leaf.target {
            Target::System(frame) => self.tables.system().read(frame, offset, bytes),
            Target::Local(frame, stamp) => {
                self.gpu.local_memory().read(frame, stamp, offset, bytes);
            }
        })
    }

    /// Copies bytes into one page.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), KernelFault> {
        let offset = offset_of(address, bytes.len());
        self.access(address, Access::Write, |leaf| match leaf.target {
            Target::System(frame) => self.tables.system().write(frame, offset, bytes),
            Target::Local(frame, stamp) => {
                self.gpu.local_memory().write(frame, stamp, offset, bytes);
            }
        })
    }

    /// Updates an aligned word in one step. `update` is this crate's, and takes no lock.
    pub(super) fn update(
        &self,
        address: u64,
        mut update: impl FnMut(u64) -> u64,
    ) -> Result<u64, KernelFault> {
        let offset = offset_of(address, size_of::<u64>());
        self.access(address, Access::Atomic, |leaf| match leaf.target {
            Target::System(frame) => self.tables.system().fetch_update(frame, offset, &mut update),
            Target::Local(frame, stamp) => {
                self.gpu.local_memory().fetch_update(frame, stamp, offset, &mut update)
            }
        })
    }

    /// Makes one access, with as many faults as it takes. `perform` runs once, under the lock of the
    /// TLB, while the translation is good.
    fn access<R>(
        &self,
        address: u64,
        access: Access,
        perform: impl FnOnce(Leaf) -> R,
    ) -> Result<R, KernelFault> {
        let page = Page::containing(address);
        let mut faults = None;
        for _ in 0..=self.gpu.options().max_replays {
            {
                let mut tlb = lock(&self.cell.tlb);
                if let Some(leaf) = self.translate(&mut tlb, page, access) {
                    return Ok(perform(leaf));
                }
            }
            let faults = faults.get_or_insert_with(|| self.faults(page, access));
            if let Outcome::Cancelled(reason) = self.report(faults) {
                return Err(KernelFault { reason, address, access });
            }
            self.pause(faults);
        }
        Err(KernelFault { reason: FaultReason::Internal, address, access })
    }

    /// Returns what leads to `page` and allows `access`, from the TLB or by a walk.
    fn translate(&self, tlb: &mut Tlb, page: Page, access: Access) -> Option<Leaf> {
        if let Some(leaf) = tlb.get(page) {
            if leaf.access >= access {
                return Some(leaf);
            }
            // The tables may allow more by now.
            tlb.remove(page);
        }
        let walked = self.tables.walk(page, &mut tlb.walks)?;
        if self.gpu.injector().fails("spurious-fault") {
            return None;
        }
        tlb.insert(page, walked.leaf, walked.order);
        (walked.leaf.access >= access).then_some(walked.leaf)
    }

    /// Begins the faults of an access.
    fn faults(&self, page: Page, access: Access) -> Faults<'_> {
        let packet = Packet {
            ticket: None,
            handle: self.handle.clone(),
            tables: Arc::clone(&self.tables),
            page,
            access,
            failures: Arc::new(AtomicU32::new(0)),
        };
        let deadline = in_future(self.gpu.options().patience);
        Faults { buffer: self.gpu.faults(), packet, deadline, paused: 0 }
    }

    /// Reports a fault and sleeps until it has an outcome.
    fn report(&self, faults: &mut Faults<'_>) -> Outcome {
        let injector = self.gpu.injector();
        if injector.fails("overflow") {
            self.gpu.faults().overflow();
            thread::yield_now();
            return Outcome::Replayed;
        }
        let twice = injector.fails("duplicate-fault");
        faults.buffer.report(&mut faults.packet, twice, faults.deadline)
    }

    /// Gives what was in the way of the last try some time to pass: else the tries would be over
    /// in no time. Nothing is held meanwhile, and no other context waits for it.
    fn pause(&self, faults: &mut Faults<'_>) {
        // Relaxed: written by the service before the outcome, which came under the buffer's lock.
        let failures = faults.packet.failures.load(Ordering::Relaxed);
        if failures == faults.paused {
            return;
        }
        faults.paused = failures;
        let longer = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST_PAUSE);
        let now = Instant::now();
        let left = faults.deadline.map_or(longer, |end| end.saturating_duration_since(now));
        self.gpu.clock().sleep(longer.min(left));
    }
}

/// Returns when the patience is over. Under the schedule checker time does not pass.
fn in_future(patience: Duration) -> Option<Instant> {
    if cfg!(shuttle) { None } else { Instant::now().checked_add(patience) }
}

/// Returns the offset of an access in its page.
fn offset_of(address: u64, length: usize) -> usize {
    let offset = address as usize % PAGE_SIZE;
    assert!(offset + length <= PAGE_SIZE, "an access of one page stays in it");
    offset
}

impl<R> RunningKernel<R> {
    /// Waits for the kernel to end.
    ///
    /// # Errors
    ///
    /// As [`Context::run`].
    ///
    /// # Panics
    ///
    /// If the kernel panicked: with what it panicked with.
    pub fn join(self) -> Result<R, KernelFault> {
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Tells whether the kernel has ended, so that [`join`](RunningKernel::join) returns at once.
    #[cfg(not(shuttle))]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Drop for Faults<'_> {
    fn drop(&mut self) {
        if self.packet.ticket.is_some() {
            self.buffer.end_access();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.tables.remove_context(&self.cell);
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context {} of {:?}", self.cell.id, self.handle)
    }
}

impl<R> fmt::Debug for RunningKernel<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningKernel").finish_non_exhaustive()
    }
}
