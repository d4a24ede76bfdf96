//! The driver's side of the fault buffer: batches of faults are fetched, served and replayed.
//!
//! A batch is sorted by mirror and address, and what several contexts want of one page is one
//! service, for the strongest access among them (feature F61). Nothing is held while a page is
//! served, so faults may be served by several threads at once, and the service of a fault may run
//! into invalidations, evictions and the end of the mirror as it likes.
//!
//! # What is cancelled
//!
//! Where the strongest access cannot be had, the next weaker one is served first, and then the
//! accesses that failed are cancelled, each in its own context and by what it wanted to do (feature
//! F63): of a page that may be read and not written, readers go on and only the writers end.
//!
//! # Shutdown
//!
//! The drop of a [`FaultService`] stops in the order of acceptance D11: new faults are refused; those
//! in the buffer are served to their end; the thread ends.

use std::fmt;
use std::sync::Arc;

use uhmm::Access;
use uhmm::primitive::atomic::Ordering;
use uhmm::primitive::thread;

use super::fault::{FaultReason, Verdict};
use super::fault_buffer::Packet;
use super::{ReplayPolicy, SoftGpu};

/// A thread that serves the faults of a GPU. Its drop stops it.
///
/// From the drop on faults are refused with [`FaultReason::Stopped`], until another service begins
/// or [`SoftGpu::accept_faults`] says so.
#[must_use = "dropping the service stops it"]
pub struct FaultService {
    gpu: Arc<SoftGpu>,
    thread: Option<thread::JoinHandle<()>>,
}

/// The GPU has a service thread already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device's faults are being served already")]
pub struct AlreadyServed;

/// What was done about the faults in the buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Serviced {
    /// Faults that were taken out of the buffer.
    pub fetched: u64,
    /// Pages that were served, whatever the number of faults on them.
    pub pages: u64,
    /// Accesses that were made to fail.
    pub cancelled: u64,
}

impl SoftGpu {
    /// Starts a thread that serves this GPU's faults.
    ///
    /// # Errors
    ///
    /// [`AlreadyServed`].
    pub fn start_service(self: &Arc<Self>) -> Result<FaultService, AlreadyServed> {
        if !self.faults().open() {
            return Err(AlreadyServed);
        }
        let gpu = Arc::clone(self);
        let thread = thread::spawn(move || gpu.serve_until_stopped());
        Ok(FaultService { gpu: Arc::clone(self), thread: Some(thread) })
    }

    /// Serves the faults that are in the buffer now, on the calling thread: one batch, or under
    /// [`ReplayPolicy::Once`] all of them. Returns at once if there is none.
    pub fn service_once(&self) -> Serviced {
        let mut done = Serviced::default();
        self.serve(self.faults().fetch(self.options().batch), &mut done);
        done
    }

    fn serve_until_stopped(&self) {
        let _abandon = AbandonOnPanic(self);
        loop {
            let packets = self.faults().fetch_blocking(self.options().batch);
            if packets.is_empty() {
                return;
            }
            self.serve(packets, &mut Serviced::default());
        }
    }

    fn serve(&self, mut packets: Vec<Packet>, done: &mut Serviced) {
        if packets.is_empty() {
            return;
        }
        let policy = self.replay_policy();
        self.serve_batch(packets, policy, done);
        match policy {
            // Done after each block.
            ReplayPolicy::Block => {}
            ReplayPolicy::Batch => self.faults().replay(false),
            ReplayPolicy::BatchFlush => self.faults().replay(true),
            ReplayPolicy::Once => {
                // What the buffer holds at a time, so that new faults cannot put the replay off.
                for _ in 1..self.options().fault_buffer.div_ceil(self.options().batch) {
                    packets = self.faults().fetch(self.options().batch);
                    if packets.is_empty() {
                        break;
                    }
                    self.serve_batch(packets, policy, done);
                }
                self.faults().replay(false);
            }
        }
    }

    /// Returns when to replay. A service that stops serves what is in the buffer before it wakes
    /// those who would find it closed.
    fn replay_policy(&self) -> ReplayPolicy {
        if self.faults().is_stopping() { ReplayPolicy::Once } else { self.options().replay }
    }

    fn serve_batch(&self, mut packets: Vec<Packet>, policy: ReplayPolicy, done: &mut Serviced) {
        done.fetched += packets.len() as u64;
        packets.sort_by_key(|packet| (packet.tables.id(), packet.page));
        let block =
            |packet: &Packet| (packet.tables.id(), packet.page.align_down(uhmm::Order::HUGE));
        for block in packets.chunk_by(|one, other| block(one) == block(other)) {
            for same in block.chunk_by(|one, other| one.page == other.page) {
                self.serve_page(same, done);
            }
            if policy == ReplayPolicy::Block {
                self.faults().replay(false);
            }
        }
    }

    /// Serves faults on one page.
    fn serve_page(&self, packets: &[Packet], done: &mut Serviced) {
        let Packet { handle, tables, page, .. } = &packets[0];
        let (page, duplicates) = (*page, packets.len() as u64 - 1);
        let strongest = packets.iter().map(|packet| packet.access).max().unwrap_or_default();
        // An earlier fault of the batch may have brought this page along.
        let now = tables.translation(page).map_or(Access::None, |now| now.access);
        let served = now >= strongest;
        self.faults().count(|statistics| {
            statistics.duplicates += duplicates;
            statistics.already_served += u64::from(served);
        });
        if served {
            return;
        }
        done.pages += 1;
        let mut wanted = Some(strongest);
        let mut failed = Vec::new();
        while let Some(access) = wanted {
            match handle.handle_fault(page, access) {
                Ok(_) => break,
                Err(error) => {
                    tracing::debug!(target: "uhmm", %page, ?access, %error, "not served");
                    failed.push((access, Verdict::of(&error)));
                }
            }
            let weaker = packets.iter().map(|packet| packet.access).filter(|&other| other < access);
            wanted = weaker.max();
        }
        for (access, verdict) in failed {
            let concerned = packets.iter().filter(|packet| packet.access == access);
            done.cancelled += match verdict {
                Verdict::Fatal(reason) => self.faults().cancel(concerned, reason),
                Verdict::Retry => self.retry(concerned),
            };
        }
    }

    /// Leaves the accesses to the next replay, except those that had their share of those.
    fn retry<'a>(&self, packets: impl Iterator<Item = &'a Packet>) -> u64 {
        let limit = self.options().max_retries;
        let (again, spent): (Vec<_>, Vec<_>) = packets.partition(|packet| {
            // Relaxed: a count, which orders nothing.
            packet.failures.fetch_add(1, Ordering::Relaxed) < limit
        });
        self.faults().count(|statistics| statistics.retried += again.len() as u64);
        self.faults().cancel(spent, FaultReason::Internal)
    }
}

/// Where the service panics, contexts are not to sleep until their patience ends.
struct AbandonOnPanic<'a>(&'a SoftGpu);

impl Drop for AbandonOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            // First, so that whoever is woken finds it.
            self.0.violation("the fault service panicked".to_owned());
            self.0.faults().abandon();
        }
    }
}

impl FaultService {
    /// Returns the GPU that is served.
    pub fn gpu(&self) -> &Arc<SoftGpu> {
        &self.gpu
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.gpu.faults().stop();
        // A panic of the thread was reported when it happened.
        let _ended = self.thread.take().map(thread::JoinHandle::join);
        self.gpu.faults().close();
    }
}

impl fmt::Debug for FaultService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultService").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}
