//! The broker: who has which unit open, and who has to be asked.
//!
//! One thread, which neither blocks nor shares anything: each connection is nonblocking, what does not
//! go out at once is queued, and what waits for an agent is a *job* with a deadline. A connection is an
//! open file (the program sends one message and nothing more), an agent, or a caller. The end of a
//! connection is the last close of a file, the end of an address space, or a caller who has died.
//!
//! A last close becomes orders to agents: the opener's forgets the file, and all evict the unit.
//! Whoever asks to settle, after a close, is answered when these are done. The kernel marks the
//! broker's side of a socket as hung up before close(2) returns on the other, so at that question the
//! broker looks at all files first, and misses none.

mod jobs;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, accept_with, sockopt,
};
use rustix::process::Resource;

use self::jobs::Jobs;
use super::name::{Node, Place};
use super::units::{self, SLOTS, Usage};
use super::wire::{self, Answer, Order, Question};
use crate::dmirror::{Counts, Unit};
use crate::edge::mapping::Mapping;

/// How many connections there can be.
const CONNECTIONS: usize = 16_384;

/// How many orders an agent can have before it that it has not taken. One that takes none for so long
/// is stopped, and counts as gone.
const ORDERS: usize = 65_536;

/// How many connections wait to be accepted.
const BACKLOG: i32 = 1024;

/// How many events are taken at a time.
const EVENTS: usize = 64;

/// What is waited for that is no connection: listeners by their index, and the lifeline.
const LIFELINE: u64 = 1 << 32;
const FIRST_CONNECTION: u64 = LIFELINE + 1;

/// Hands out the device, as long as somebody may want it.
#[derive(Debug)]
pub struct Broker {
    epoll: OwnedFd,
    listeners: Vec<(OwnedFd, Option<Node>)>,
    listening: bool,
    lifeline: Option<OwnedFd>,
    connections: HashMap<u64, Connection>,
    next: u64,
    /// By their cookies, the connections of the open files.
    files: HashMap<u64, u64>,
    /// By their slots, the connections of the agents.
    agents: HashMap<usize, u64>,
    jobs: Jobs,
    memory: OwnedFd,
    usage: Mapping<Usage>,
}

/// Somebody who is connected.
#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    role: Role,
}

#[derive(Debug)]
enum Role {
    /// It has connected to a node, and has not said more.
    Opening(Node),
    /// An open file, and the agent of the address space that opened it.
    File { file: u64, node: Node, agent: u64 },
    /// It asks questions.
    Caller,
    /// An agent, and what it could not yet be sent.
    Agent { slot: usize, orders: VecDeque<(Order, Option<OwnedFd>)> },
}

impl Broker {
    /// Begins to listen, and returns the sockets and the name to be put into the environment
    /// ([`LOCATION`](super::LOCATION)). Whoever connects before the broker [runs](Broker::run) waits
    /// for it.
    ///
    /// # Errors
    ///
    /// Those of socket(2), bind(2) and getrandom(2).
    pub fn listen() -> io::Result<(Vec<OwnedFd>, String)> {
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let random = u64::from_ne_bytes(random);
        let name = format!("uhmm-dmirror-{}-{random:016x}", std::process::id());
        let place = Place::new(&name);
        let addresses = Node::all().map(|node| place.node(node)).chain([place.calls()]);
        let sockets = addresses.map(|address| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let unix = AddressFamily::UNIX;
            let socket = rustix::net::socket_with(unix, SocketType::SEQPACKET, flags, None)?;
            rustix::net::bind(&socket, &address?)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        });
        let sockets = sockets.collect::<Result<Vec<OwnedFd>, Errno>>()?;
        Ok((sockets, name))
    }

    /// Hands these sockets to the process at the other end of `to`, which makes the broker of them.
    /// `to` is its lifeline from then on: when it hangs up, nobody is left who starts programs.
    ///
    /// # Errors
    ///
    /// Those of sendmsg(2).
    pub fn hand_over(sockets: Vec<OwnedFd>, to: &OwnedFd) -> io::Result<()> {
        for socket in sockets {
            wire::send(to, &Question::Settle, Some(socket.as_fd()), SendFlags::empty())?;
        }
        Ok(())
    }

    /// Makes the broker of the sockets that are [handed over](Broker::hand_over) on `lifeline`.
    ///
    /// # Errors
    ///
    /// `EINVAL`: other things come from there. Those of epoll_create(2) and memfd_create(2).
    pub fn take_over(lifeline: OwnedFd) -> io::Result<Broker> {
        let nodes: Vec<Option<Node>> = Node::all().map(Some).chain([None]).collect();
        let take = |node| {
            let (_, socket) = wire::receive::<Question>(&lifeline, RecvFlags::empty())?;
            Ok((socket.ok_or(Errno::INVAL)?, node))
        };
        let listeners = nodes.into_iter().map(take).collect::<Result<Vec<_>, Errno>>()?;
        raise_limit();
        let (memory, usage) = units::create()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // It says nothing: only its end counts, of which is always told.
        let mark = epoll::EventData::new_u64(LIFELINE);
        epoll::add(&epoll, &lifeline, mark, epoll::EventFlags::empty())?;
        let mut broker = Broker {
            epoll,
            listeners,
            listening: false,
            lifeline: Some(lifeline),
            connections: HashMap::new(),
            next: FIRST_CONNECTION,
            files: HashMap::new(),
            agents: HashMap::new(),
            jobs: Jobs::default(),
            memory,
            usage,
        };
        broker.listen_again()?;
        Ok(broker)
    }

    /// Serves until the lifeline has hung up and nobody is connected any more. Then nobody can
    /// connect, as nobody listens.
    ///
    /// # Errors
    ///
    /// Those of epoll_wait(2).
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        while self.lifeline.is_some() || !self.connections.is_empty() {
            let patience = self.jobs.next_deadline().map(until);
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), patience.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            for &event in &events {
                self.happened(event.data.u64(), event.flags);
            }
            self.finish_late();
        }
        Ok(())
    }

    /// Sees to one thing that has happened.
    fn happened(&mut self, mark: u64, flags: epoll::EventFlags) {
        match mark {
            LIFELINE => self.lifeline = None,
            ..LIFELINE => self.accept(usize::try_from(mark).unwrap_or(usize::MAX)),
            id => {
                if flags.contains(epoll::EventFlags::OUT) {
                    self.send_orders(id);
                }
                if flags.contains(epoll::EventFlags::IN) {
                    self.hear(id);
                }
                if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                    self.lose(id);
                }
            }
        }
    }

    /// Takes one more connection, if there is room: else the others wait until one has ended.
    fn accept(&mut self, listener: usize) {
        let Some((socket, node)) = self.listeners.get(listener) else { return };
        let accepted = accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let socket = match accepted {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Err(_) => return self.listen_no_more(),
        };
        if !is_trusted(&socket) {
            // The end of the connection says so.
            return;
        }
        let role = node.map_or(Role::Caller, Role::Opening);
        let id = self.next;
        self.next += 1;
        let mark = epoll::EventData::new_u64(id);
        if epoll::add(&self.epoll, &socket, mark, epoll::EventFlags::IN).is_ok() {
            self.connections.insert(id, Connection { socket, role });
        }
        if self.connections.len() >= CONNECTIONS {
            self.listen_no_more();
        }
    }

    fn listen_no_more(&mut self) {
        self.listening = false;
        for (listener, _) in &self.listeners {
            // It was added, and goes away with the broker at the latest.
            let _ = epoll::delete(&self.epoll, listener);
        }
    }

    fn listen_again(&mut self) -> Result<(), Errno> {
        if self.listening {
            return Ok(());
        }
        for (index, (listener, _)) in self.listeners.iter().enumerate() {
            let mark = epoll::EventData::new_u64(index as u64);
            epoll::add(&self.epoll, listener, mark, epoll::EventFlags::IN)?;
        }
        self.listening = true;
        Ok(())
    }

    /// Takes a message from somebody.
    fn hear(&mut self, id: u64) {
        let Some(connection) = self.connections.get(&id) else { return };
        let socket = connection.socket.as_fd();
        match connection.role {
            Role::Agent { .. } => match wire::receive::<Answer>(socket, RecvFlags::DONTWAIT) {
                Ok((answer, _)) => self.answered(id, answer),
                Err(Errno::AGAIN) => {}
                Err(_) => self.lose(id),
            },
            Role::File { .. } => {}
            Role::Opening(_) | Role::Caller => {
                match wire::receive::<Question>(socket, RecvFlags::DONTWAIT) {
                    Ok((question, with)) => self.asked(id, question, with),
                    Err(Errno::AGAIN) => {}
                    Err(_) => self.lose(id),
                }
            }
        }
    }

    /// Does what somebody has asked for.
    fn asked(&mut self, id: u64, question: Question, with: Option<OwnedFd>) {
        let Some(connection) = self.connections.get(&id) else { return };
        match (&connection.role, question) {
            (&Role::Opening(node), Question::Open { file, slot }) => {
                self.open(id, node, file, slot);
            }
            (Role::Caller, Question::Enlist) => self.enlist(id),
            (Role::Caller, Question::Execute { file, unit, command, request }) => {
                let Some(agent) = self.opener(file, unit) else {
                    return self.answer(id, Answer::new(jobs::without_opener(command)));
                };
                let job = self.jobs.execute(id, agent, command);
                self.order(agent, Order::Execute { job, file, command, request }, with);
            }
            (Role::Caller, Question::Release { unit }) => {
                let jobs = self.evict(unit);
                self.answer_after(id, jobs);
            }
            (Role::Caller, Question::Settle) => {
                self.notice_closed();
                let jobs = self.jobs.evictions();
                self.answer_after(id, jobs);
            }
            _ => self.lose(id),
        }
    }

    /// Makes a connection an open file.
    fn open(&mut self, id: u64, node: Node, file: u64, slot: u64) {
        let agent = match node {
            Node::GupTest => Some(0),
            Node::Unit(_) => {
                usize::try_from(slot).ok().and_then(|slot| self.agents.get(&slot)).copied()
            }
        };
        let (Some(agent), false) = (agent, self.files.contains_key(&file)) else {
            return self.answer(id, Answer::new(Err(Errno::INVAL)));
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.role = Role::File { file, node, agent };
        let mark = epoll::EventData::new_u64(id);
        // What programs write there is nobody's business; only that it ends, of which is always told.
        let quiet =
            epoll::modify(&self.epoll, &connection.socket, mark, epoll::EventFlags::empty());
        self.files.insert(file, id);
        self.answer(id, Answer::new(quiet.map(|()| Counts::default())));
    }

    /// Makes a connection that of an agent.
    fn enlist(&mut self, id: u64) {
        let free = (0..SLOTS).find(|slot| !self.agents.contains_key(slot));
        let Some(slot) = free else {
            return self.answer(id, Answer::new(Err(Errno::NFILE)));
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.role = Role::Agent { slot, orders: VecDeque::new() };
        self.usage.empty(slot);
        self.agents.insert(slot, id);
        let answer = Answer { detail: slot as u64, ..Answer::new(Ok(Counts::default())) };
        let memory = Some(self.memory.as_fd());
        if wire::send(&connection.socket, &answer, memory, SendFlags::DONTWAIT).is_err() {
            self.lose(id);
        }
    }

    /// The agent of the address space that opened a file, if that is still there.
    fn opener(&self, file: u64, unit: Unit) -> Option<u64> {
        let connection = self.connections.get(self.files.get(&file)?)?;
        match connection.role {
            Role::File { node, agent, .. } if node == Node::Unit(unit) => {
                self.connections.contains_key(&agent).then_some(agent)
            }
            _ => None,
        }
    }

    /// Has all agents evict a unit, and returns the job.
    fn evict(&mut self, unit: Unit) -> Vec<u64> {
        let agents: Vec<u64> = self.agents.values().copied().collect();
        if agents.is_empty() {
            return Vec::new();
        }
        let job = self.jobs.evict(agents.iter().copied().collect());
        for agent in agents {
            self.order(agent, Order::Evict { job, unit }, None);
        }
        vec![job]
    }

    /// Sends an order, or has it wait until the agent takes more.
    fn order(&mut self, agent: u64, order: Order, with: Option<OwnedFd>) {
        let Some(Connection { role: Role::Agent { orders, .. }, .. }) =
            self.connections.get_mut(&agent)
        else {
            return self.agent_is_gone(agent);
        };
        orders.push_back((order, with));
        let too_many = orders.len() > ORDERS;
        self.send_orders(agent);
        if too_many {
            self.lose(agent);
        }
    }

    /// Sends what waits for an agent, as far as it goes.
    fn send_orders(&mut self, agent: u64) {
        let Some(Connection { socket, role: Role::Agent { orders, .. } }) =
            self.connections.get_mut(&agent)
        else {
            return;
        };
        let mut wanted = epoll::EventFlags::IN;
        while let Some((order, with)) = orders.front() {
            let with = with.as_ref().map(AsFd::as_fd);
            match wire::send(&*socket, order, with, SendFlags::DONTWAIT) {
                Ok(()) => drop(orders.pop_front()),
                Err(Errno::AGAIN) => {
                    wanted |= epoll::EventFlags::OUT;
                    break;
                }
                Err(_) => return self.lose(agent),
            }
        }
        let mark = epoll::EventData::new_u64(agent);
        if epoll::modify(&self.epoll, &*socket, mark, wanted).is_err() {
            self.lose(agent);
        }
    }

    /// An agent has done what it was told.
    fn answered(&mut self, agent: u64, answer: Answer) {
        if let Some(caller) = self.jobs.executed(agent, answer.job) {
            self.answer(caller, Answer { job: 0, ..answer });
        } else {
            self.jobs.evicted(agent, answer.job);
        }
        self.answer_ready();
    }

    /// Answers a caller once all these jobs are done.
    fn answer_after(&mut self, caller: u64, jobs: Vec<u64>) {
        self.jobs.wait(caller, jobs);
        self.answer_ready();
    }

    fn answer_ready(&mut self) {
        for (caller, result) in self.jobs.take_ready() {
            self.answer(caller, Answer::new(result));
        }
    }

    /// Answers. Who does not take it has gone, or asks without waiting.
    fn answer(&mut self, id: u64, answer: Answer) {
        let Some(connection) = self.connections.get(&id) else { return };
        if wire::send(&connection.socket, &answer, None, SendFlags::DONTWAIT).is_err() {
            self.lose(id);
        }
    }

    /// What should have been done by now is over.
    fn finish_late(&mut self) {
        for (caller, result) in self.jobs.give_up(Instant::now()) {
            self.answer(caller, Answer::new(result));
        }
        self.answer_ready();
    }

    /// Looks whether files have been closed of which nobody has told yet.
    fn notice_closed(&mut self) {
        let files: Vec<u64> = self.files.values().copied().collect();
        for id in files {
            let Some(connection) = self.connections.get(&id) else { continue };
            let mut look =
                [rustix::event::PollFd::new(&connection.socket, rustix::event::PollFlags::empty())];
            let none = Timespec { tv_sec: 0, tv_nsec: 0 };
            if matches!(rustix::event::poll(&mut look, Some(&none)), Ok(1..)) {
                self.lose(id);
            }
        }
    }

    /// Somebody is not connected any more.
    fn lose(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else { return };
        // The descriptor goes with it, and with that what was told of it.
        match connection.role {
            Role::Opening(_) => {}
            Role::Caller => self.jobs.forget_caller(id),
            Role::File { file, node, agent } => {
                self.files.remove(&file);
                if let Node::Unit(unit) = node {
                    if self.connections.contains_key(&agent) {
                        self.order(agent, Order::Close { file }, None);
                    }
                    self.evict(unit);
                }
            }
            Role::Agent { slot, .. } => {
                self.agents.remove(&slot);
                self.usage.empty(slot);
                self.agent_is_gone(id);
            }
        }
        // Where it cannot listen now, it does when the next one goes.
        let _ = self.listen_again();
    }

    /// Nobody waits for an agent any more.
    fn agent_is_gone(&mut self, agent: u64) {
        for (caller, result) in self.jobs.forget_agent(agent) {
            self.answer(caller, Answer::new(result));
        }
        self.answer_ready();
    }
}

/// Tells whether somebody may have the device: the broker's user, and root. The kernel's nodes are
/// root's alone.
fn is_trusted(socket: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == own || peer.uid.is_root())
}

/// Allows as many descriptors as there can be. Where that cannot be, there are fewer connections.
fn raise_limit() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

/// Returns how long it is until then.
fn until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    // A moment more, so that it is over then.
    let left = left + Duration::from_millis(1);
    Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 })
}

#[cfg(test)]
mod tests;
