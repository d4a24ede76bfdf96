//! The broker, with both sides of it in this process.

use std::sync::mpsc::{self, Receiver};

use rustix::net::socketpair;

use super::*;
use crate::dmirror::{Command, Request};

/// A broker on a thread, and its lifeline.
struct Running {
    place: Place,
    lifeline: Option<OwnedFd>,
    ended: Receiver<io::Result<()>>,
}

impl Running {
    fn start() -> Running {
        let (sockets, name) = Broker::listen().expect("there is room");
        let (unix, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (lifeline, other) =
            socketpair(unix, kind, SocketFlags::CLOEXEC, None).expect("there is room");
        Broker::hand_over(sockets, &lifeline).expect("somebody reads");
        let broker = Broker::take_over(other).expect("there is room");
        let (end, ended) = mpsc::channel();
        // Nobody hears of it where the test has failed.
        std::thread::spawn(move || drop(end.send(broker.run())));
        Running { place: Place::new(&name), lifeline: Some(lifeline), ended }
    }

    /// A connection for calls, on which this was asked.
    fn ask(&self, question: Question) -> OwnedFd {
        let socket = wire::connect(&self.place.calls().expect("short"), true).expect("it listens");
        wire::send(&socket, &question, None, SendFlags::empty()).expect("somebody reads");
        socket
    }

    /// An agent, and its slot.
    fn agent(&self) -> (OwnedFd, u64) {
        let socket = self.ask(Question::Enlist);
        let (answer, memory) = wire::receive::<Answer>(&socket, RecvFlags::empty()).expect("one");
        assert!(memory.is_some());
        answer.result.expect("there is a slot");
        (socket, answer.detail)
    }

    /// Opens a unit, as the file of this number.
    fn open(&self, unit: Unit, file: u64, slot: u64) -> (OwnedFd, Result<Counts, Errno>) {
        let address = self.place.node(Node::Unit(unit)).expect("short");
        let socket = wire::connect(&address, true).expect("it listens");
        let question = Question::Open { file, slot };
        wire::send(&socket, &question, None, SendFlags::empty()).expect("somebody reads");
        let result = result(&socket);
        (socket, result)
    }

    /// Hangs up, and waits for the end.
    fn end(mut self) {
        drop(self.lifeline.take());
        let ended = self.ended.recv_timeout(wire::SOON).expect("nobody is connected any more");
        ended.expect("nothing is wrong");
    }
}

fn order(agent: &OwnedFd) -> Order {
    wire::receive(agent, RecvFlags::empty()).expect("there is one").0
}

fn result(socket: &OwnedFd) -> Result<Counts, Errno> {
    wire::receive::<Answer>(socket, RecvFlags::empty()).expect("there is one").0.result
}

/// Does as it is told to evict.
fn evict(agent: &OwnedFd, expected: Unit) {
    let Order::Evict { job, unit } = order(agent) else { panic!("another order") };
    assert_eq!(unit, expected);
    report(agent, job, Ok(Counts::default()));
}

fn report(agent: &OwnedFd, job: u64, result: Result<Counts, Errno>) {
    let answer = Answer { job, result, detail: 0 };
    wire::send(agent, &answer, None, SendFlags::empty()).expect("somebody reads");
}

fn says_nothing(socket: &OwnedFd) -> bool {
    let nothing = wire::receive::<Answer>(socket, RecvFlags::DONTWAIT);
    nothing.err() == Some(Errno::AGAIN)
}

const UNIT: Unit = Unit::ALL[1];

#[test]
fn a_last_close_is_seen_to_by_all_before_who_asks_is_answered() {
    let broker = Running::start();
    let ((a, slot), (b, _)) = (broker.agent(), broker.agent());
    let (file, opened) = broker.open(UNIT, 77, slot);
    assert_eq!(opened, Ok(Counts::default()));
    let (again, opened) = broker.open(UNIT, 77, slot);
    assert_eq!(opened, Err(Errno::INVAL), "there is one of this number");
    let other = rustix::io::dup(&file).expect("there is room");
    drop(file);
    assert!(result(&broker.ask(Question::Settle)).is_ok(), "there is another of it");
    drop(other);
    let caller = broker.ask(Question::Settle);
    assert_eq!(order(&a), Order::Close { file: 77 });
    evict(&a, UNIT);
    let Order::Evict { job, .. } = order(&b) else { panic!("another order") };
    assert!(says_nothing(&caller));
    report(&b, job, Ok(Counts::default()));
    assert!(result(&caller).is_ok());
    drop((a, b, caller, again));
    broker.end();
}

#[test]
fn a_request_goes_to_the_opener_and_its_answer_to_who_asked() {
    let broker = Running::start();
    let (agent, slot) = broker.agent();
    let (file, opened) = broker.open(UNIT, 5, slot);
    opened.expect("it opens");
    let request = Request { addr: 4096, npages: 2 };
    let command = Command::Snapshot;
    let caller = broker.ask(Question::Execute { file: 5, unit: UNIT, command, request });
    let Order::Execute { job, file: 5, command: Command::Snapshot, request: asked } = order(&agent)
    else {
        panic!("another order")
    };
    assert_eq!(asked, request);
    let counts = Counts { cpages: 2, faults: 0 };
    report(&agent, job, Ok(counts));
    assert_eq!(result(&caller), Ok(counts));
    drop(caller);
    // Files that are not open, or of another unit.
    for (file, unit) in [(6, UNIT), (5, Unit::ALL[0])] {
        let caller = broker.ask(Question::Execute { file, unit, command, request });
        assert_eq!(result(&caller), Err(Errno::INVAL));
    }
    // One that was asked and then ends.
    let caller = broker.ask(Question::Execute { file: 5, unit: UNIT, command, request });
    let release = broker.ask(Question::Release { unit: UNIT });
    order(&agent);
    drop(agent);
    assert_eq!((result(&caller), result(&release)), (Err(Errno::INVAL), Ok(Counts::default())));
    drop((caller, release, file));
    broker.end();
}

#[test]
fn who_makes_no_sense_is_hung_up_on_and_nobody_else_is() {
    let broker = Running::start();
    let (agent, slot) = broker.agent();
    let (file, opened) = broker.open(UNIT, 9, slot);
    opened.expect("it opens");
    let calls = broker.place.calls().expect("short");
    for nonsense in [&b"x"[..], &[0xff; 64], &[0; 200]] {
        let socket = wire::connect(&calls, true).expect("it listens");
        rustix::io::write(&socket, nonsense).expect("somebody reads");
        let end = wire::receive::<Answer>(&socket, RecvFlags::empty()).err();
        assert_eq!(end, Some(Errno::CONNRESET));
        // What a program writes into its open file is read by nobody.
        rustix::io::write(&file, nonsense).expect("there is room");
    }
    // Questions where they do not belong.
    let enlisted = wire::connect(&broker.place.node(Node::Unit(UNIT)).expect("short"), true);
    let enlisted = enlisted.expect("it listens");
    wire::send(&enlisted, &Question::Enlist, None, SendFlags::empty()).expect("somebody reads");
    assert!(wire::receive::<Answer>(&enlisted, RecvFlags::empty()).is_err());
    let caller = broker.ask(Question::Release { unit: UNIT });
    evict(&agent, UNIT);
    assert!(result(&caller).is_ok());
    drop((agent, file, caller, enlisted));
    broker.end();
}

#[test]
fn it_lives_as_long_as_anybody_is_connected() {
    let mut broker = Running::start();
    let (agent, _) = broker.agent();
    drop(broker.lifeline.take());
    let caller = broker.ask(Question::Release { unit: UNIT });
    evict(&agent, UNIT);
    assert!(result(&caller).is_ok());
    drop((agent, caller));
    broker.end();
}
