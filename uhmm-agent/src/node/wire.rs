//! What programs, agents and the broker say to each other: messages of eight 64-bit numbers, at most
//! one descriptor with each, and how long anybody waits.
//!
//! Both sides are of one build (the command hands the library its own broker), but what comes in may
//! be anything: a program may write into any of its descriptors. What cannot be understood is no
//! message, and ends the connection.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg,
    sockopt,
};

use crate::dmirror::{Command, Counts, Request, Unit};

/// How long an agent may take to evict a unit. One that is stopped cannot.
pub(super) const EVICTION: Duration = Duration::from_secs(10);

/// How long an opener may take for a request from another process.
pub(super) const REQUEST: Duration = Duration::from_secs(60);

/// How long a caller waits for the broker, which answers when those who have to do with it have or
/// their time is over.
const ANSWER: Duration = Duration::from_secs(90);

/// How long a caller waits for a broker that need ask nobody.
pub(super) const SOON: Duration = Duration::from_secs(10);

/// The bytes of a message.
const BYTES: usize = 64;

/// The numbers of a message.
type Words = [u64; 8];

/// What can be sent.
pub(super) trait Message: Sized {
    /// Its numbers.
    fn words(&self) -> Words;

    /// What these numbers say, if anything.
    fn of(words: Words) -> Option<Self>;
}

/// What a program asks the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// On a connection to a node: this is the open file with this cookie, of the agent in this slot.
    /// For a node without an agent the slot means nothing.
    Open { file: u64, slot: u64 },
    /// On a connection for calls: this connection is that of an agent from now on.
    Enlist,
    /// Have the opener of a file do this. With a memory file for data.
    Execute { file: u64, unit: Unit, command: Command, request: Request },
    /// Evict a unit everywhere.
    Release { unit: Unit },
    /// Answer when all that has been closed before is over and done with.
    Settle,
}

/// What the broker has an agent do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Do this; with a memory file for data.
    Execute { job: u64, file: u64, command: Command, request: Request },
    /// Nobody has this file open any more.
    Close { file: u64 },
    /// Evict the unit.
    Evict { job: u64, unit: Unit },
}

/// What is answered, by the broker or an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// To which order; of the broker 0.
    pub(super) job: u64,
    /// What came of it.
    pub(super) result: Result<Counts, Errno>,
    /// How many bytes of data are in the memory file; for an agent that enlists, its slot.
    pub(super) detail: u64,
}

/// Puts a command and a request into numbers.
fn put(command: Command, request: Request) -> [u64; 3] {
    [u64::from(command.number()), request.addr, request.npages]
}

fn take([number, addr, npages]: [u64; 3]) -> Option<(Command, Request)> {
    let command = Command::of(u32::try_from(number).ok()?).ok()?;
    Some((command, Request { addr, npages }))
}

fn unit(number: u64) -> Option<Unit> {
    Unit::new(u8::try_from(number).ok()?)
}

impl Message for Question {
    fn words(&self) -> Words {
        match *self {
            Question::Open { file, slot } => [1, file, slot, 0, 0, 0, 0, 0],
            Question::Enlist => [2, 0, 0, 0, 0, 0, 0, 0],
            Question::Execute { file, unit, command, request } => {
                let [number, addr, npages] = put(command, request);
                [3, file, unit.number().into(), number, addr, npages, 0, 0]
            }
            Question::Release { unit } => [4, unit.number().into(), 0, 0, 0, 0, 0, 0],
            Question::Settle => [5, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    fn of(words: Words) -> Option<Question> {
        match words {
            [1, file, slot, ..] => Some(Question::Open { file, slot }),
            [2, ..] => Some(Question::Enlist),
            [3, file, of, number, addr, npages, ..] => {
                let (command, request) = take([number, addr, npages])?;
                Some(Question::Execute { file, unit: unit(of)?, command, request })
            }
            [4, of, ..] => Some(Question::Release { unit: unit(of)? }),
            [5, ..] => Some(Question::Settle),
            _ => None,
        }
    }
}

impl Message for Order {
    fn words(&self) -> Words {
        match *self {
            Order::Execute { job, file, command, request } => {
                let [number, addr, npages] = put(command, request);
                [1, job, file, number, addr, npages, 0, 0]
            }
            Order::Close { file } => [2, file, 0, 0, 0, 0, 0, 0],
            Order::Evict { job, unit } => [3, job, unit.number().into(), 0, 0, 0, 0, 0],
        }
    }

    fn of(words: Words) -> Option<Order> {
        match words {
            [1, job, file, number, addr, npages, ..] => {
                let (command, request) = take([number, addr, npages])?;
                Some(Order::Execute { job, file, command, request })
            }
            [2, file, ..] => Some(Order::Close { file }),
            [3, job, of, ..] => Some(Order::Evict { job, unit: unit(of)? }),
            _ => None,
        }
    }
}

impl Answer {
    /// The answer to nothing in particular.
    pub(super) fn new(result: Result<Counts, Errno>) -> Answer {
        Answer { job: 0, result, detail: 0 }
    }
}

impl Message for Answer {
    fn words(&self) -> Words {
        let (errno, Counts { cpages, faults }) = match self.result {
            Ok(counts) => (0, counts),
            Err(errno) => (u64::from(errno.raw_os_error().unsigned_abs()), Counts::default()),
        };
        [1, self.job, errno, cpages, faults, self.detail, 0, 0]
    }

    fn of(words: Words) -> Option<Answer> {
        let [1, job, errno, cpages, faults, detail, ..] = words else { return None };
        let result = match errno {
            0 => Ok(Counts { cpages, faults }),
            // The kernel's numbers for errors end at 4095.
            1..4096 => Err(Errno::from_raw_os_error(i32::try_from(errno).ok()?)),
            _ => return None,
        };
        Some(Answer { job, result, detail })
    }
}

/// Connects to `address`, with limits to how long everything on this connection waits.
///
/// # Errors
///
/// `ECONNREFUSED`: nobody listens there. `EMFILE` and others of socket(2); `EAGAIN`: in vain.
pub(super) fn connect(address: &SocketAddrUnix, close_on_exec: bool) -> Result<OwnedFd, Errno> {
    let flags = if close_on_exec { SocketFlags::CLOEXEC } else { SocketFlags::empty() };
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(SOON))?;
    rustix::net::connect(&socket, address)?;
    Ok(socket)
}

/// Sends a message, and a descriptor with it.
///
/// # Errors
///
/// Those of sendmsg(2): `EPIPE` where nobody is there any more, `EAGAIN` where it would have to wait
/// (or has, too long).
pub(super) fn send(
    socket: impl AsFd,
    message: &impl Message,
    with: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> Result<(), Errno> {
    let mut bytes = [0_u8; BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip(message.words()) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = with.map(|fd| [fd]);
    if let Some(descriptors) = &descriptors {
        let pushed = control.push(SendAncillaryMessage::ScmRights(descriptors));
        debug_assert!(pushed, "there is room for one");
    }
    let flags = flags | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Receives a message, and the descriptor that came with it.
///
/// # Errors
///
/// `ECONNRESET`: there is nobody any more. `EAGAIN`: there is nothing yet, or there was nothing for
/// too long. `EPROTO`: it is no message.
pub(super) fn receive<M: Message>(
    socket: impl AsFd,
    flags: RecvFlags,
) -> Result<(M, Option<OwnedFd>), Errno> {
    let mut bytes = [0_u8; BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg(&socket, &mut parts, &mut control, flags) {
            Ok(got) => break got.bytes,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    };
    let mut with = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            with = descriptors.last();
        }
    }
    if got == 0 {
        return Err(Errno::CONNRESET);
    }
    if got != BYTES {
        return Err(Errno::PROTO);
    }
    let mut words = [0; 8];
    for (word, place) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(place.try_into().expect("eight bytes"));
    }
    M::of(words).map(|message| (message, with)).ok_or(Errno::PROTO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_is_understood() {
        let unit = Unit::ALL[3];
        let request = Request { addr: 0x7000, npages: 9 };
        for command in Command::ALL {
            let question = Question::Execute { file: 7, unit, command, request };
            assert_eq!(Question::of(question.words()), Some(question));
            let order = Order::Execute { job: 5, file: 7, command, request };
            assert_eq!(Order::of(order.words()), Some(order));
        }
        let questions = [
            Question::Open { file: u64::MAX, slot: 1 },
            Question::Enlist,
            Question::Release { unit },
            Question::Settle,
        ];
        for question in questions {
            assert_eq!(Question::of(question.words()), Some(question));
        }
        for order in [Order::Close { file: 1 }, Order::Evict { job: 2, unit }] {
            assert_eq!(Order::of(order.words()), Some(order));
        }
        let counts = Counts { cpages: 1, faults: 2 };
        for result in [Ok(counts), Err(Errno::FAULT)] {
            let answer = Answer { job: 3, result, detail: 4 };
            assert_eq!(Answer::of(answer.words()), Some(answer));
        }
    }

    #[test]
    fn what_makes_no_sense_is_no_message() {
        let wrong = [
            [0; 8],
            [u64::MAX; 8],
            [3, 1, 9, 0xc028_4800, 0, 1, 0, 0],
            [3, 1, 0, 0xc028_4899, 0, 1, 0, 0],
            [4, 256, 0, 0, 0, 0, 0, 0],
        ];
        for words in wrong {
            assert_eq!(Question::of(words), None, "{words:?}");
        }
        assert_eq!(Order::of([3, 1, 4, 0, 0, 0, 0, 0]), None);
        assert_eq!(Answer::of([1, 0, 4096, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn a_message_takes_a_descriptor_along() {
        let (a, b) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("there is room");
        send(&a, &Question::Settle, Some(a.as_fd()), SendFlags::empty()).expect("somebody reads");
        let (question, with) = receive::<Question>(&b, RecvFlags::empty()).expect("it was sent");
        assert_eq!((question, with.is_some()), (Question::Settle, true));
        rustix::io::write(&a, b"x").expect("somebody reads");
        assert_eq!(receive::<Question>(&b, RecvFlags::empty()).err(), Some(Errno::PROTO));
        let nothing = receive::<Question>(&b, RecvFlags::DONTWAIT).err();
        assert_eq!(nothing, Some(Errno::AGAIN));
        drop((a, with));
        assert_eq!(receive::<Question>(&b, RecvFlags::empty()).err(), Some(Errno::CONNRESET));
    }
}
