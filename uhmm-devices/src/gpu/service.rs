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
//! The drop of a [`FaultService`] stops in the order of acceptance D11: accesses that have not
//! faulted yet are refused; those that have are served to their end, as often as they fault; the
//! thread ends.
//!
//! # Panics
//!
//! A panic while a page is served, in a policy say, is a violation. The accesses to that page fail,
//! and all others that sleep are replayed. Where it was the service thread's, nobody is left who
//! would serve them, so they find the buffer closed.

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
/// From the drop on accesses that begin to fault are refused with [`FaultReason::Stopped`], until
/// another service begins or [`SoftGpu::accept_faults`] says so. Those that wait for a fault then are
/// served to their end before the drop returns.
///
/// It is one thread, for all mirrors of the GPU: where a policy makes it wait, or a page takes long,
/// all of them wait. [`SoftGpu::service_once`] may serve beside it, from any number of threads.
#[must_use = "dropping the service stops it"]
pub struct FaultService {
    gpu: Arc<SoftGpu>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Why a service did not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The GPU has a service thread already.
    #[error("the device's faults are being served already")]
    AlreadyServed,
    /// The system gave no thread. Nothing has changed.
    #[error("there is no thread to serve the device's faults")]
    NoThread(#[source] std::io::Error),
}

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
    /// [`ServiceError`].
    pub fn start_service(self: &Arc<Self>) -> Result<FaultService, ServiceError> {
        if !self.faults().open() {
            return Err(ServiceError::AlreadyServed);
        }
        // Made first, so that its drop closes the buffer where no thread begins.
        let mut service = FaultService { gpu: Arc::clone(self), thread: None };
        service.thread = Some(self.spawn_service().map_err(ServiceError::NoThread)?);
        Ok(service)
    }

    fn spawn_service(self: &Arc<Self>) -> std::io::Result<thread::JoinHandle<()>> {
        if self.injector().fails("service-thread") {
            return Err(std::io::Error::other("injected"));
        }
        let gpu = Arc::clone(self);
        let builder = thread::Builder::new().name("gpu faults".to_owned());
        builder.spawn(move || gpu.serve_until_stopped())
    }

    /// Serves the faults that are in the buffer now, on the calling thread: one batch, or under
    /// [`ReplayPolicy::Once`] all of them. Returns at once if there is none. Any number of threads
    /// may do so at once, and beside a [`FaultService`].
    ///
    /// # Panics
    ///
    /// If a policy does. That is a violation too; accesses to the page that was being served fail
    /// with [`FaultReason::Internal`], and nobody is left asleep.
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
        let _replay = ReplayOnPanic(self);
        let policy = self.options().replay;
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
        let _cancel = CancelOnPanic(self, packets);
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
        // One try was made of each access, however often it was reported.
        let mut packets: Vec<_> = packets.collect();
        packets.sort_by_key(|packet| packet.ticket);
        packets.dedup_by_key(|packet| packet.ticket);
        let (again, spent): (Vec<_>, Vec<_>) = packets.into_iter().partition(|packet| {
            // Relaxed: a count, which orders nothing.
            packet.failures.fetch_add(1, Ordering::Relaxed) < limit
        });
        self.faults().count(|statistics| statistics.retried += again.len() as u64);
        self.faults().cancel(spent, FaultReason::Internal)
    }
}

/// Where serving a page panics, the accesses to it fail.
struct CancelOnPanic<'a>(&'a SoftGpu, &'a [Packet]);

/// Where serving a batch panics, whoever has a fault in it is not to sleep on.
struct ReplayOnPanic<'a>(&'a SoftGpu);

/// Where the service thread panics, nobody is to wait for it.
struct AbandonOnPanic<'a>(&'a SoftGpu);

impl Drop for CancelOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let CancelOnPanic(gpu, packets) = *self;
            // First, so that whoever is woken finds it.
            gpu.violation(format!("serving a fault at {} panicked", packets[0].page));
            gpu.faults().cancel(packets, FaultReason::Internal);
        }
    }
}

impl Drop for ReplayOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.faults().replay(false);
        }
    }
}

impl Drop for AbandonOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
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
