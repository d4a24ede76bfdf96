//! What the stand-ins for the C library's functions do where it is about one of our nodes.
//!
//! Each first finds out whether it is: by the path, or by what the kernel says of the descriptor. Where
//! it is not, the stand-in calls the function that it stands in for, and nothing here has been done but
//! a system call. That may be in a signal handler.

use core::ffi::{CStr, c_char, c_int};
use std::os::fd::{AsFd as _, AsRawFd as _, IntoRawFd as _, OwnedFd};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use uhmm::PAGE_SIZE;

use super::agent::{AGENT, Agent};
use super::name::{self, Node};
use super::wire::{self, Answer, Question};
use super::{LOCATION, gup};
use crate::dmirror::abi::STRUCT_BYTES;
use crate::dmirror::{Command, Counts, Request, Unit, abi};
use crate::edge::copy;
use crate::edge::socket::{self, NoSignals};

pub use crate::edge::populate::{MapRequest, mmap};

/// Prepares this process, before `main`. Without a broker there is nothing to do, and the stand-ins
/// find nothing of ours.
pub fn enter() {
    // Looked up now, while nobody else can be changing the environment.
    let Some(name) = std::env::var_os(LOCATION).and_then(|name| name.into_string().ok()) else {
        return;
    };
    // Without the page units cannot be opened, and say so (ENXIO).
    let _ = AGENT.prepare();
    name::settle_on(&name);
}

/// A descriptor of one of our nodes.
#[derive(Clone, Copy, Debug)]
pub struct Ours {
    fd: c_int,
    node: Node,
}

/// Finds out whether a descriptor is ours: `None` for everything else, and for what is no descriptor.
/// Leaves `errno` undefined.
pub fn recognise(fd: c_int) -> Option<Ours> {
    let place = name::place()?;
    let node = socket::peer_name(fd, |name| place.node_of(name))??;
    Some(Ours { fd, node })
}

/// Opens a node, as open(2) with these flags; returns the descriptor.
///
/// # Errors
///
/// `EEXIST` and `ENOTDIR` for flags that say so; `EMFILE`, `ENFILE`; `EACCES`: the broker is another
/// user's; `ENXIO`: it is gone; and what keeps this process from being attached.
pub fn open(node: Node, flags: c_int) -> Result<c_int, Errno> {
    if flags & libc::O_CREAT != 0 && flags & libc::O_EXCL != 0 {
        return Err(Errno::EXIST);
    }
    if flags & libc::O_DIRECTORY != 0 {
        return Err(Errno::NOTDIR);
    }
    let _signals = NoSignals::begin();
    let address = name::place().ok_or(Errno::NXIO)?.node(node)?;
    let agent = match node {
        Node::Unit(_) => Some(Agent::here()?),
        Node::GupTest => None,
    };
    let socket = wire::connect(&address, flags & libc::O_CLOEXEC != 0).map_err(without_broker)?;
    socket::set_tag(socket.as_fd(), flags & libc::O_ACCMODE)?;
    let file = socket::cookie(socket.as_raw_fd())?;
    if let (Some(agent), Node::Unit(unit)) = (agent, node) {
        agent.open(file, unit)?;
    }
    let slot = agent.map_or(0, Agent::slot);
    match register(&socket, Question::Open { file, slot }) {
        Ok(_) => Ok(socket.into_raw_fd()),
        Err(errno) => {
            if let Some(agent) = agent {
                agent.close(file);
            }
            Err(errno)
        }
    }
}

fn register(socket: &OwnedFd, question: Question) -> Result<Answer, Errno> {
    wire::send(socket, &question, None, SendFlags::empty()).map_err(without_broker)?;
    match wire::receive::<Answer>(socket, RecvFlags::empty()) {
        Ok((answer, _)) => answer.result.map(|_| answer),
        // It hangs up on those who have no business here.
        Err(Errno::CONNRESET) => Err(Errno::ACCESS),
        Err(errno) => Err(errno),
    }
}

fn without_broker(errno: Errno) -> Errno {
    match errno {
        Errno::CONNREFUSED | Errno::CONNRESET | Errno::PIPE => Errno::NXIO,
        errno => errno,
    }
}

/// The numbers of the `ioctl(2)`s that the kernel answers before it asks a file: they are
/// for the socket.
const FOR_EVERY_FILE: [u64; 4] = [libc::FIOCLEX, libc::FIONCLEX, libc::FIONBIO, libc::FIOASYNC];

/// Does an `ioctl(2)`; `None` where it is for the kernel to do.
pub fn ioctl(ours: Ours, number: u64, argument: u64) -> Option<Result<(), Errno>> {
    if FOR_EVERY_FILE.contains(&number) {
        return None;
    }
    let _signals = NoSignals::begin();
    // The kernel takes 32 bits of it, whatever is above.
    let number = number as u32;
    Some(match ours.node {
        Node::Unit(unit) => command(ours.fd, unit, number, argument),
        Node::GupTest => gup::ioctl(number, argument),
    })
}

/// Does a command of the mirror device: section by section as the kernel's driver does.
fn command(fd: c_int, unit: Unit, number: u32, argument: u64) -> Result<(), Errno> {
    let mut bytes = [0_u8; STRUCT_BYTES];
    copy::read(argument, &mut bytes)?;
    let word = |index: usize| {
        let place = &bytes[8 * index..8 * index + 8];
        u64::from_ne_bytes(place.try_into().expect("eight bytes"))
    };
    let (request, pointer) = (Request { addr: word(0), npages: word(2) }, word(1));
    abi::check(request)?;
    let command = Command::of(number)?;
    let file = socket::cookie(fd)?;
    let own = AGENT.get().and_then(|agent| Some((agent, agent.file(file)?)));
    let counts = match (command, own) {
        // Carried out by all, in whose name it does not matter.
        (Command::Release, _) => ask(Question::Release { unit }).map(|_| Counts::default())?,
        (_, Some((agent, open))) => {
            let mut input = agent.buffer();
            copy::append(pointer, command.input_bytes(request)?, &mut input)?;
            let mut output = agent.buffer();
            let counts = open.ioctl(command, request, &input, &mut output)?;
            copy::write(pointer, &output)?;
            agent.keep(input);
            agent.keep(output);
            counts
        }
        (_, None) => elsewhere(file, unit, command, request, pointer)?,
    };
    bytes[24..32].copy_from_slice(&counts.cpages.to_ne_bytes());
    bytes[32..40].copy_from_slice(&counts.faults.to_ne_bytes());
    copy::write(argument, &bytes)
}

/// Has the process do it that has opened the file.
fn elsewhere(
    file: u64,
    unit: Unit,
    command: Command,
    request: Request,
    pointer: u64,
) -> Result<Counts, Errno> {
    let bytes = command.input_bytes(request)?;
    let data = rustix::fs::memfd_create("uhmm-dmirror-data", MemfdFlags::CLOEXEC);
    let data = data.map_err(|_| Errno::NOMEM)?;
    copy::to_file(data.as_fd(), pointer, bytes)?;
    let question = Question::Execute { file, unit, command, request };
    let answer = ask_with(question, Some(&data))?;
    let bytes = usize::try_from(answer.detail).map_err(|_| Errno::FAULT)?;
    copy::from_file(data.as_fd(), pointer, bytes)?;
    answer.result
}

/// Asks the broker, and waits for what it says.
fn ask(question: Question) -> Result<Answer, Errno> {
    ask_with(question, None)
}

fn ask_with(question: Question, data: Option<&OwnedFd>) -> Result<Answer, Errno> {
    let calls = name::place().ok_or(Errno::NXIO)?.calls()?;
    let broker = wire::connect(&calls, true).map_err(|errno| match without_broker(errno) {
        // An ioctl of a driver is not refused for want of descriptors.
        Errno::MFILE | Errno::NFILE => Errno::NOMEM,
        errno => errno,
    })?;
    let data = data.map(|data| data.as_fd());
    wire::send(&broker, &question, data, SendFlags::empty()).map_err(without_broker)?;
    match wire::receive::<Answer>(&broker, RecvFlags::empty()) {
        Ok((answer, _)) => answer.result.map(|_| answer),
        // It was too long in coming.
        Err(Errno::AGAIN) => Err(Errno::BUSY),
        Err(errno) => Err(without_broker(errno)),
    }
}

/// Has every process evict a unit. Without a broker there is no other process to ask.
pub(super) fn release(unit: Unit) {
    if ask(Question::Release { unit }).is_err()
        && let Some(agent) = AGENT.get()
    {
        agent.mm().evict(unit);
    }
}

/// Waits, after a descriptor of ours has been closed, until what follows from that has been done: the
/// eviction of the unit, if it was the last one.
pub fn closed(ours: Ours) {
    let _signals = NoSignals::begin();
    match ours.node {
        // Without a broker nobody knows of the close, and the pages stay until they are touched.
        Node::Unit(_) => drop(ask(Question::Settle)),
        Node::GupTest => {}
    }
}

/// Makes what is mapped where a node is: memory of so many bytes, zeroed, all of it allocated, and for
/// this mapping alone. Returns with it whether its pages are writable from the start. The offset means
/// nothing.
///
/// # Errors
///
/// `ENODEV` for a node that cannot be mapped; `EACCES` as the file was opened; `EINVAL`, `ENOMEM`.
pub(crate) fn memory(
    ours: Ours,
    request: MapRequest,
    offset: i64,
) -> Result<(OwnedFd, bool), Errno> {
    let Node::Unit(unit) = ours.node else { return Err(Errno::NODEV) };
    let MapRequest { length, protection, flags, .. } = request;
    let shared = flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
    let writable = shared && protection & libc::PROT_WRITE != 0;
    match socket::tag(ours.fd)? {
        libc::O_WRONLY => return Err(Errno::ACCESS),
        libc::O_RDONLY if writable => return Err(Errno::ACCESS),
        _ => {}
    }
    let bytes = u64::try_from(length).map_err(|_| Errno::NOMEM)?;
    if bytes == 0 || offset % PAGE_SIZE as i64 != 0 {
        return Err(Errno::INVAL);
    }
    let bytes = bytes.checked_next_multiple_of(PAGE_SIZE as u64).ok_or(Errno::NOMEM)?;
    if bytes > total_memory() {
        return Err(Errno::NOMEM);
    }
    // By this name it is known that the pages do not migrate.
    let name = format!("hmm_dmirror{}", unit.number());
    let memory = rustix::fs::memfd_create(&*name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, bytes).map_err(|_| Errno::NOMEM)?;
    let allocate = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&memory, allocate, 0, bytes).map_err(|_| Errno::NOMEM)?;
    Ok((memory, writable))
}

/// Returns how much memory the machine has: nothing that takes more can be done.
pub(super) fn total_memory() -> u64 {
    let system = rustix::system::sysinfo();
    system.totalram.saturating_mul(u64::from(system.mem_unit))
}

/// Reads from or writes to a node, which cannot be done.
///
/// # Errors
///
/// `EINVAL`, always.
pub fn transfer(_: Ours) -> Result<isize, Errno> {
    Err(Errno::INVAL)
}

/// Moves the position of a node, which has no meaning: returns the offset, as lseek(2).
///
/// # Errors
///
/// `EINVAL` for an offset or an origin that makes no sense; `ESPIPE` where there is no position.
pub fn seek(ours: Ours, offset: i64, origin: c_int) -> Result<i64, Errno> {
    match (ours.node, origin) {
        (Node::GupTest, _) => Err(Errno::SPIPE),
        (Node::Unit(_), libc::SEEK_SET) if offset >= 0 => Ok(offset),
        (Node::Unit(_), libc::SEEK_CUR | libc::SEEK_END) => Ok(0),
        _ => Err(Errno::INVAL),
    }
}

/// The bytes of the longest path of a node, with the zero at its end.
const LONGEST_PATH: usize = c"/sys/kernel/debug/gup_test".count_bytes() + 1;

/// Returns the node whose path is at this address, which may be any: `None` for other paths, for what is
/// no path, and where there is no device at all.
pub fn node_at(path: *const c_char) -> Option<Node> {
    name::place()?;
    let mut bytes = [0; LONGEST_PATH];
    let address = path.expose_provenance() as u64;
    let got = copy::read_some(address, &mut bytes);
    CStr::from_bytes_until_nul(&bytes[..got]).ok().and_then(Node::at)
}
