//! The agent of one address space: its open files, and the threads that obey the broker.
//!
//! There is one for each address space that has opened a unit, made at the first open ([`PerMm`]). A
//! child finds none, and makes its own when it opens something.
//!
//! The connection to the broker must end with the address space, and at no other time. A descriptor of
//! the program's would be inherited by children, and closed by whoever closes all that he finds. So two
//! threads have descriptors of their own, in which there is nothing else: one *receives* orders, the
//! other *reports*. What is to be done to the address space is done by a third one, the *hand*, and by
//! threads that it makes, which have the program's descriptors, as the attached process has.
//!
//! ```text
//! broker ──▶ receiver ──(tasks)──▶ hand ──▶ a thread for each request
//!        ◀── reporter ◀──(done)──────┴─────────────┘
//! ```
//!
//! Memory files for data stay with the receiver and the reporter: among the program's descriptors their
//! numbers are somebody else's.
//!
//! The hand closes and evicts by itself, in the order in which it is told: so when an eviction has been
//! reported, what was closed before is closed.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};

use super::name;
use super::units::SharedUnits;
use super::wire::{self, Answer, Order, Question, SOON};
use crate::dmirror::{Command, Counts, Mm, OpenFile, Request, Unit};
use crate::edge::mapping::Mapping;
use crate::edge::per_mm::PerMm;
use crate::edge::process;

/// The agent of this address space.
pub(super) static AGENT: PerMm<Agent> = PerMm::new();

/// How many requests of other processes run at a time.
const AT_A_TIME: usize = 64;

/// How many buffers are kept, and how large they may be.
const BUFFERS: usize = 4;
const LARGEST_BUFFER: usize = 8 << 20;

/// What this address space has open.
#[derive(Debug)]
pub(super) struct Agent {
    mm: Arc<Mm>,
    slot: u64,
    /// By their cookies.
    files: Mutex<HashMap<u64, Arc<OpenFile>>>,
    /// Memory for data, kept so that not every request has to have it made.
    buffers: Mutex<Vec<Vec<u8>>>,
    /// How many requests of other processes are running.
    running: AtomicUsize,
}

impl Agent {
    /// Returns the agent of this address space, made now if there is none.
    ///
    /// # Errors
    ///
    /// `ENXIO`: the broker is gone. What kept the process from being attached.
    pub(super) fn here() -> Result<&'static Agent, Errno> {
        AGENT.get_or_make(|| {
            let (units, tasks, done) = begin()?;
            let slot = units.slot();
            let mm = Mm::attach(Arc::new(units))?;
            let (prepared, is_prepared) = mpsc::channel();
            let worker = Arc::clone(&mm);
            // It waits until the agent that is made here can be found. And nothing goes on before it has
            // what it needs of the program's heap, which may be in no state to give that later: the
            // kernel's tests themselves overrun theirs.
            let work = move || {
                worker.prepare_this_thread();
                drop(worker);
                // Whoever started it waits.
                let _ = prepared.send(());
                obey(&tasks, &done);
            };
            process::start_thread("uhmm-dmirror", work).map_err(|_| Errno::AGAIN)?;
            is_prepared.recv().map_err(|_| Errno::AGAIN)?;
            let agent = Agent {
                mm,
                slot,
                files: Mutex::default(),
                buffers: Mutex::default(),
                running: AtomicUsize::new(0),
            };
            Ok(agent)
        })
    }

    /// The number by which the broker knows it.
    pub(super) fn slot(&self) -> u64 {
        self.slot
    }

    /// The address space.
    pub(super) fn mm(&self) -> &Arc<Mm> {
        &self.mm
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u64, Arc<OpenFile>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a unit, as the open file with this cookie.
    pub(super) fn open(&self, file: u64, unit: Unit) -> Result<(), Errno> {
        let opened = Arc::new(self.mm.open(unit)?);
        self.files().insert(file, opened);
        Ok(())
    }

    /// Forgets an open file.
    pub(super) fn close(&self, file: u64) {
        let closed = self.files().remove(&file);
        // It may take a while: not under the lock.
        drop(closed);
    }

    /// The open file with this cookie, if this address space opened it.
    pub(super) fn file(&self, file: u64) -> Option<Arc<OpenFile>> {
        self.files().get(&file).cloned()
    }

    fn buffers(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty buffer.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.buffers().pop().unwrap_or_default()
    }

    /// Takes a buffer back.
    pub(super) fn keep(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut buffers = self.buffers();
        if buffers.len() < BUFFERS && buffer.capacity() <= LARGEST_BUFFER {
            buffers.push(buffer);
        }
    }
}

/// What the hand is to do.
#[derive(Debug)]
enum Task {
    Close { file: u64 },
    Evict { job: u64, unit: Unit },
    Execute { job: u64, what: Requested },
}

/// A request of another process, with what it writes.
#[derive(Debug)]
struct Requested {
    file: u64,
    command: Command,
    request: Request,
    input: Vec<u8>,
}

/// What was done: for which job, and what came of it, with what the caller is to get.
#[derive(Debug)]
struct Done {
    job: u64,
    result: Result<(Counts, Vec<u8>), Errno>,
}

/// The connection to the broker, and memory files for data by job: what the receiver and the reporter
/// have in their own descriptors.
#[derive(Debug)]
struct Post {
    broker: OwnedFd,
    data: Mutex<HashMap<u64, OwnedFd>>,
}

impl Post {
    fn data(&self) -> MutexGuard<'_, HashMap<u64, OwnedFd>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an agent needs of its connection: the units, what it is to do, and where it says what was done.
type Connected = (SharedUnits, Receiver<Task>, Sender<Done>);

/// Tells the broker that there is an agent, and starts the threads that have to do with the broker.
/// They end when the receiver of tasks is dropped and the next order comes, or with the broker.
fn begin() -> Result<Connected, Errno> {
    let (say, said) = mpsc::channel();
    let receive = move || {
        let broker = process::own_descriptors().and_then(|()| enlist());
        let (units, broker) = match broker {
            Ok(both) => both,
            Err(errno) => return drop(say.send(Err(errno))),
        };
        let (task, tasks) = mpsc::channel();
        let (done, reports) = mpsc::channel();
        let post = Arc::new(Post { broker, data: Mutex::default() });
        let outgoing = Arc::clone(&post);
        let reporter =
            process::start_thread("uhmm-dmirror-tx", move || report(&outgoing, &reports));
        if reporter.is_err() {
            return drop(say.send(Err(Errno::AGAIN)));
        }
        if say.send(Ok((units, tasks, done.clone()))).is_ok() {
            hear(&post, &task, &done);
        }
    };
    process::start_thread("uhmm-dmirror-rx", receive).map_err(|_| Errno::AGAIN)?;
    said.recv_timeout(SOON).unwrap_or(Err(Errno::NXIO))
}

/// Connects, and becomes an agent.
fn enlist() -> Result<(SharedUnits, OwnedFd), Errno> {
    let calls = name::place().ok_or(Errno::NXIO)?.calls()?;
    let broker = wire::connect(&calls, true)?;
    sockopt::set_socket_timeout(&broker, sockopt::Timeout::Recv, Some(SOON))?;
    wire::send(&broker, &Question::Enlist, None, SendFlags::empty())?;
    let (answer, memory) = wire::receive::<Answer>(&broker, RecvFlags::empty())?;
    answer.result?;
    // From now on it waits for orders, for as long as the process lives.
    sockopt::set_socket_timeout(&broker, sockopt::Timeout::Recv, None)?;
    let usage = Mapping::of(memory.ok_or(Errno::PROTO)?.as_fd())?;
    Ok((SharedUnits::new(Arc::new(usage), answer.detail)?, broker))
}

/// Receives orders, and hands them on with what is written.
fn hear(post: &Post, task: &Sender<Task>, done: &Sender<Done>) {
    while let Ok((order, data)) = wire::receive::<Order>(&post.broker, RecvFlags::empty()) {
        let next = match order {
            Order::Close { file } => Task::Close { file },
            Order::Evict { job, unit } => Task::Evict { job, unit },
            Order::Execute { job, file, command, request } => {
                match input(command, request, data.as_ref()) {
                    Ok(input) => {
                        if let Some(data) = data {
                            post.data().insert(job, data);
                        }
                        let what = Requested { file, command, request, input };
                        Task::Execute { job, what }
                    }
                    Err(errno) => {
                        // The reporter lives as long as there are senders.
                        let _ = done.send(Done { job, result: Err(errno) });
                        continue;
                    }
                }
            }
        };
        if task.send(next).is_err() {
            break;
        }
    }
}

/// Reads what is to be written.
fn input(command: Command, request: Request, data: Option<&OwnedFd>) -> Result<Vec<u8>, Errno> {
    let bytes = command.input_bytes(request)?;
    let mut input = Vec::new();
    if bytes > 0 {
        let data = data.ok_or(Errno::PROTO)?;
        input.try_reserve_exact(bytes).map_err(|_| Errno::NOMEM)?;
        input.resize(bytes, 0);
        let mut done = 0;
        while done < bytes {
            match rustix::io::pread(data, &mut input[done..], done as u64) {
                // The caller has put less there than there must be.
                Ok(0) => return Err(Errno::FAULT),
                Ok(more) => done += more,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok(input)
}

/// Reports what has been done.
fn report(post: &Post, done: &Receiver<Done>) {
    while let Ok(Done { job, result }) = done.recv() {
        let data = post.data().remove(&job);
        let result = result.and_then(|(counts, output)| {
            put(&output, data.as_ref()).map(|()| (counts, output.len() as u64))
        });
        let detail = result.map_or(0, |(_, bytes)| bytes);
        let answer = Answer { job, result: result.map(|(counts, _)| counts), detail };
        if wire::send(&post.broker, &answer, None, SendFlags::empty()).is_err() {
            break;
        }
    }
}

/// Puts what the caller is to get where he gets it.
fn put(output: &[u8], data: Option<&OwnedFd>) -> Result<(), Errno> {
    let mut done = 0;
    while done < output.len() {
        match rustix::io::pwrite(data.ok_or(Errno::PROTO)?, &output[done..], done as u64) {
            Ok(0) => return Err(Errno::NOSPC),
            Ok(more) => done += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Is the hand: does what the broker orders, until the broker is gone.
fn obey(tasks: &Receiver<Task>, done: &Sender<Done>) {
    // It was not made in the end where there is none.
    let Ok(agent) = AGENT.get_or_make(|| Err(Errno::NXIO)) else { return };
    while let Ok(task) = tasks.recv() {
        match task {
            Task::Close { file } => agent.close(file),
            Task::Evict { job, unit } => {
                agent.mm.evict(unit);
                let result = Ok((Counts::default(), Vec::new()));
                // Where nobody reports any more, nobody waits.
                let _ = done.send(Done { job, result });
            }
            Task::Execute { job, what } => execute(agent, done, job, what),
        }
    }
}

/// Does something for another process, on a thread of its own.
fn execute(agent: &'static Agent, done: &Sender<Done>, job: u64, what: Requested) {
    let refuse = |errno| drop(done.send(Done { job, result: Err(errno) }));
    // Relaxed: only this thread adds, and it is but a limit.
    if agent.running.load(Ordering::Relaxed) >= AT_A_TIME {
        return refuse(Errno::BUSY);
    }
    agent.running.fetch_add(1, Ordering::Relaxed);
    let report = done.clone();
    let run = move || {
        let result = perform(agent, &what);
        agent.running.fetch_sub(1, Ordering::Relaxed);
        let _ = report.send(Done { job, result });
    };
    if process::start_thread("uhmm-dmirror-op", run).is_err() {
        agent.running.fetch_sub(1, Ordering::Relaxed);
        refuse(Errno::NOMEM);
    }
}

fn perform(agent: &Agent, what: &Requested) -> Result<(Counts, Vec<u8>), Errno> {
    // Closed by everybody: then nobody asks any more, but what was asked before may come late.
    let open = agent.file(what.file).ok_or(Errno::BADF)?;
    let mut output = Vec::new();
    let counts = open.ioctl(what.command, what.request, &what.input, &mut output)?;
    Ok((counts, output))
}
