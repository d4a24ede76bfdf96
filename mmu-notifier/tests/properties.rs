//! Random sequences of operations, beside a model that does one thing after the other; and the
//! arithmetic of ranges, beside sets of addresses.
#![cfg(not(any(loom, shuttle)))]

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mmu_notifier::{
    Class, Event, EventKind, Fence, Handle, Notifier, Operation, Owner, PairedNotifier,
    RangeInvalidation, ReadBeginError, ReadSection, SelfWait, SubscribeError, SubscribeOptions,
    Subscription, Subscriptions, TimedOut, UnsubscribeError, VaRange, WouldBlock,
};
use proptest::prelude::*;

// What a notifier was asked, and what it said.

/// The number of a notifier, in the order in which they were made.
type Id = usize;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    /// There is nothing to wait for.
    Over,
    /// A fence.
    Fence,
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    Start { id: Id, event: Event, answer: Answer },
    End { id: Id, event: Event },
    FenceOver { id: Id },
    Release { id: Id },
}

type Log = Arc<Mutex<Vec<Call>>>;

/// How a notifier answers.
#[derive(Clone, Copy, Debug)]
struct Manner {
    /// It returns fences that have to be waited for.
    fences: bool,
    /// One bit for each of eight non-blockable events, and then again: it refuses.
    refuses: u8,
}

impl Manner {
    fn answer(self) -> Answer {
        if self.fences { Answer::Fence } else { Answer::Over }
    }

    fn try_answer(self, attempt: u32) -> Answer {
        if self.refuses >> (attempt % 8) & 1 == 1 { Answer::Refused } else { self.answer() }
    }
}

/// Writes down what it is asked. `find` tells those of different `KIND` apart.
struct Recorder<const KIND: u8> {
    id: Id,
    manner: Manner,
    attempts: u32,
    commits: u64,
    log: Log,
}

impl<const KIND: u8> Recorder<KIND> {
    fn note(&self, call: Call) {
        self.log.lock().unwrap().push(call);
    }

    fn start(&self, event: &Event, answer: Answer) -> Option<Recorded> {
        self.note(Call::Start { id: self.id, event: *event, answer });
        let fence = Recorded { id: self.id, log: Arc::clone(&self.log) };
        (answer == Answer::Fence).then_some(fence)
    }
}

/// Writes down when it has been waited for.
struct Recorded {
    id: Id,
    log: Log,
}

impl Fence for Recorded {
    fn wait(self) {
        self.log.lock().unwrap().push(Call::FenceOver { id: self.id });
    }
}

impl<const KIND: u8> Notifier for Recorder<KIND> {
    type Fence = Option<Recorded>;

    fn invalidate(&mut self, event: &Event) -> Option<Recorded> {
        self.start(event, self.manner.answer())
    }

    fn try_invalidate(&mut self, event: &Event) -> Result<Option<Recorded>, WouldBlock> {
        let answer = self.manner.try_answer(self.attempts);
        self.attempts += 1;
        let fence = self.start(event, answer);
        if answer == Answer::Refused { Err(WouldBlock) } else { Ok(fence) }
    }

    fn release(self) {
        self.note(Call::Release { id: self.id });
    }
}

impl<const KIND: u8> PairedNotifier for Recorder<KIND> {
    fn invalidate_range_end(&mut self, event: &Event) {
        self.note(Call::End { id: self.id, event: *event });
    }
}

type Known = Recorder<0>;
type Stranger = Recorder<1>;

// What is done.

#[derive(Clone, Copy, Debug)]
struct Announcement {
    kind: EventKind,
    range: VaRange,
    owner: Option<usize>,
}

/// One step. A `usize` chooses among whatever there is then; where there is nothing, nothing is
/// done.
#[derive(Clone, Debug)]
enum Op {
    Subscribe {
        range: VaRange,
        owner: Option<usize>,
        class: Class,
        paired: bool,
        statistics: bool,
        manner: Manner,
    },
    SubscribeAll(Manner),
    /// Subscribes a stranger to everything, or ends the one there is.
    Stranger(Manner),
    Unsubscribe(usize),
    Drop(usize),
    SetRange(usize, VaRange),
    Start(Announcement),
    TryStart(Announcement),
    End(usize),
    ReadBegin(usize),
    Commit(usize),
    Abandon(usize),
    BeginOperation(usize),
    EndOperation(usize),
    Find(u64),
    Release,
}

/// Addresses that are first, last, or neighbours of one another.
const CORNERS: [u64; 12] = [
    0,
    1,
    0xfff,
    0x1000,
    0x1001,
    0x1fff,
    0x2000,
    0x2fff,
    0x8000_0000_0000_0000,
    u64::MAX - 0x1000,
    u64::MAX - 1,
    u64::MAX,
];

fn any_address() -> impl Strategy<Value = u64> {
    prop::sample::select(CORNERS.as_slice())
}

fn any_range() -> impl Strategy<Value = VaRange> {
    let between = |(a, b): (u64, u64)| VaRange::from_bounds(a.min(b), a.max(b)).unwrap();
    prop_oneof![
        6 => (any_address(), any_address()).prop_map(between),
        2 => any_address().prop_map(move |address| between((address, address))),
        1 => Just(VaRange::ALL),
    ]
}

fn any_owner() -> impl Strategy<Value = Option<usize>> {
    prop::option::of(0..2usize)
}

fn any_manner() -> impl Strategy<Value = Manner> {
    let refuses = prop_oneof![3 => Just(0u8), 2 => any::<u8>(), 1 => Just(u8::MAX)];
    (any::<bool>(), refuses).prop_map(|(fences, refuses)| Manner { fences, refuses })
}

fn any_announcement() -> impl Strategy<Value = Announcement> {
    let kinds = [
        EventKind::Unmap,
        EventKind::Clear,
        EventKind::ProtectionVma,
        EventKind::ProtectionPage,
        EventKind::SoftDirty,
        EventKind::Release,
        EventKind::Migrate,
        EventKind::Migrate,
        EventKind::Exclusive,
        EventKind::Exclusive,
    ];
    let kind = prop::sample::select(kinds.to_vec());
    (kind, any_range(), any_owner()).prop_map(|(kind, range, owner)| Announcement {
        kind,
        range,
        owner,
    })
}

fn any_op() -> impl Strategy<Value = Op> {
    let which = || any::<usize>();
    let class = prop::sample::select(vec![Class::Interval, Class::Interval, Class::List]);
    let subscribe = (any_range(), any_owner(), class, any::<bool>(), any::<bool>(), any_manner())
        .prop_map(|(range, owner, class, paired, statistics, manner)| Op::Subscribe {
            range,
            owner,
            class,
            paired,
            statistics,
            manner,
        });
    prop_oneof![
        20 => subscribe,
        3 => any_manner().prop_map(Op::SubscribeAll),
        2 => any_manner().prop_map(Op::Stranger),
        6 => which().prop_map(Op::Unsubscribe),
        3 => which().prop_map(Op::Drop),
        12 => (which(), any_range()).prop_map(|(which, range)| Op::SetRange(which, range)),
        14 => any_announcement().prop_map(Op::Start),
        12 => any_announcement().prop_map(Op::TryStart),
        20 => which().prop_map(Op::End),
        24 => which().prop_map(Op::ReadBegin),
        20 => which().prop_map(Op::Commit),
        2 => which().prop_map(Op::Abandon),
        3 => which().prop_map(Op::BeginOperation),
        4 => which().prop_map(Op::EndOperation),
        8 => any_address().prop_map(Op::Find),
        1 => Just(Op::Release),
    ]
}

// The model.

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Live,
    /// A release has met an operation, and given up.
    Dying,
    Dead,
}

/// What is known of one subscription.
#[derive(Debug)]
struct Subscriber {
    range: VaRange,
    owner: Option<Owner>,
    class: Class,
    paired: bool,
    statistics: bool,
    manner: Manner,
    stranger: bool,
    attempts: u32,
    /// Moves with everything that a read section does not survive.
    sequence: u64,
    /// It hears of events.
    linked: bool,
    /// No read section begins.
    closed: bool,
    /// The notifier is neither handed back nor released.
    alive: bool,
    commits: u64,
    delivered: u64,
    unchanged: u64,
    collisions: u64,
}

impl Subscriber {
    /// What its place in a round depends on.
    fn place(&self) -> (Class, u64) {
        (self.class, self.range.start())
    }

    /// Whether `event` is for it, spelled as the documentation does.
    fn concerned_by(&self, event: &Event) -> bool {
        let own = self.owner.is_some() && self.owner == event.owner();
        let spared = own && matches!(event.kind(), EventKind::Migrate | EventKind::Exclusive);
        let shares_an_address = event.range().start().max(self.range.start())
            <= event.range().last().min(self.range.last());
        self.linked && shares_an_address && !spared
    }

    /// It heard an event, and said that.
    fn was_told(&mut self, answer: Answer) {
        if answer != Answer::Refused {
            self.sequence += 1;
            self.delivered += 1;
            self.unchanged += u64::from(answer == Answer::Over);
        }
    }
}

/// A change under way.
struct Change<'a> {
    guard: RangeInvalidation<'a>,
    event: Event,
    /// Somebody was subscribed when it began.
    recorded: bool,
    /// Who is to hear of its end.
    heard: Vec<Id>,
}

/// The real thing and the model beside it. Dropped in this order: nothing is left that the end of a
/// subscription would wait for.
struct World<'a> {
    sections: Vec<(ReadSection<'a, Known>, Id, u64)>,
    operations: Vec<(Operation<Known>, Id)>,
    changes: Vec<Change<'a>>,
    owned: Vec<(Subscription<Known>, Id)>,
    stranger: Option<(Subscription<Stranger>, Id)>,
    /// One for each subscriber but strangers, until the end: a section borrows it.
    handles: &'a [OnceCell<Handle<Known>>],
    space: &'a Arc<Subscriptions>,
    log: Log,
    owners: [Owner; 2],
    limit: usize,
    phase: Phase,
    subscribers: Vec<Subscriber>,
    /// There have been more unrecorded changes at a time than a thread remembers.
    unrecorded_beyond_memory: bool,
}

/// How many unrecorded changes a thread remembers that they are its own.
const REMEMBERED: usize = 4;

/// How many changes are under way at most.
const CHANGES: usize = 12;

impl<'a> World<'a> {
    fn new(
        space: &'a Arc<Subscriptions>,
        limit: usize,
        handles: &'a [OnceCell<Handle<Known>>],
    ) -> World<'a> {
        World {
            sections: Vec::new(),
            operations: Vec::new(),
            changes: Vec::new(),
            owned: Vec::new(),
            stranger: None,
            handles,
            space,
            log: Log::default(),
            owners: [Owner::new(), Owner::new()],
            limit,
            phase: Phase::Live,
            subscribers: Vec::new(),
            unrecorded_beyond_memory: false,
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Subscribe { range, owner, class, paired, statistics, manner } => {
                let owner = owner.map(|owner| self.owners[owner]);
                self.subscribe(range, owner, class, paired, statistics, manner);
            }
            Op::SubscribeAll(manner) => self.subscribe_all(manner),
            Op::Stranger(manner) => self.toggle_stranger(manner),
            Op::Unsubscribe(which) => {
                if let Some(at) = choose(which, self.owned.len()) {
                    self.unsubscribe(at);
                }
            }
            Op::Drop(which) => {
                // Not while an operation is under way, which it would wait for.
                let free: Vec<_> = (0..self.owned.len())
                    .filter(|&at| !self.has_operation(self.owned[at].1))
                    .collect();
                if let Some(at) = choose(which, free.len()) {
                    self.drop_subscription(free[at]);
                }
            }
            Op::SetRange(which, range) => {
                if let Some(at) = choose(which, self.owned.len()) {
                    self.set_range(at, range);
                }
            }
            Op::Start(announcement) => self.start(announcement, true),
            Op::TryStart(announcement) => self.start(announcement, false),
            Op::End(which) => {
                if let Some(at) = choose(which, self.changes.len()) {
                    self.end(at);
                }
            }
            Op::ReadBegin(which) => {
                let known: Vec<_> =
                    (0..self.subscribers.len()).filter(|&id| self.handle(id).is_some()).collect();
                if let Some(at) = choose(which, known.len()) {
                    self.read_begin(known[at]);
                }
            }
            Op::Commit(which) => {
                if let Some(at) = choose(which, self.sections.len()) {
                    self.commit(at);
                }
            }
            Op::Abandon(which) => {
                if let Some(at) = choose(which, self.sections.len()) {
                    drop(self.sections.swap_remove(at));
                }
            }
            Op::BeginOperation(which) => {
                let known: Vec<_> =
                    (0..self.subscribers.len()).filter(|&id| self.handle(id).is_some()).collect();
                if let Some(at) = choose(which, known.len()) {
                    self.begin_operation(known[at]);
                }
            }
            Op::EndOperation(which) => {
                if let Some(at) = choose(which, self.operations.len()) {
                    drop(self.operations.swap_remove(at));
                }
            }
            Op::Find(address) => self.find(address),
            Op::Release => self.release(),
        }
        self.check();
    }

    fn handle(&self, id: Id) -> Option<&'a Handle<Known>> {
        self.handles[id].get()
    }

    fn has_operation(&self, id: Id) -> bool {
        self.operations.iter().any(|(_, of)| *of == id)
    }

    fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// Demands that nobody was called since the last look.
    #[track_caller]
    fn assert_no_calls(&self) {
        assert_eq!(self.take_calls(), [], "nobody is to be called");
    }

    fn linked(&self) -> impl Iterator<Item = Id> + '_ {
        (0..self.subscribers.len()).filter(|&id| self.subscribers[id].linked)
    }

    // What is checked after each step.

    fn check(&mut self) {
        self.assert_no_calls();
        let strangers = usize::from(self.stranger.is_some());
        let known = self.handles.iter().filter(|handle| handle.get().is_some()).count();
        assert_eq!(self.space.live(), known + strangers);
        for (id, subscriber) in self.subscribers.iter().enumerate() {
            let Some(handle) = self.handle(id) else { continue };
            assert_eq!(handle.range(), subscriber.range);
            let commits = handle.inspect(|notifier| notifier.commits).ok();
            assert_eq!(commits, subscriber.alive.then_some(subscriber.commits));
            let statistics = handle.statistics();
            assert_eq!(statistics.is_some(), subscriber.statistics);
            if let Some(statistics) = statistics {
                assert_eq!(statistics.delivered, subscriber.delivered);
                assert_eq!(statistics.unchanged, subscriber.unchanged);
                assert_eq!(statistics.collisions, subscriber.collisions);
            }
        }
        for (section, id, sequence) in &self.sections {
            let collided = self.subscribers[*id].sequence != *sequence;
            assert_eq!(section.check_retry(), collided, "check_retry of {id}");
        }
    }

    // Subscribing.

    fn recorder<const KIND: u8>(&self, manner: Manner) -> Recorder<KIND> {
        let (id, log) = (self.subscribers.len(), Arc::clone(&self.log));
        Recorder { id, manner, attempts: 0, commits: 0, log }
    }

    fn add_subscriber(
        &mut self,
        range: VaRange,
        class: Class,
        manner: Manner,
        stranger: bool,
    ) -> &mut Subscriber {
        self.subscribers.push(Subscriber {
            range,
            owner: None,
            class,
            paired: false,
            statistics: false,
            manner,
            stranger,
            attempts: 0,
            sequence: 0,
            linked: true,
            closed: false,
            alive: true,
            commits: 0,
            delivered: 0,
            unchanged: 0,
            collisions: 0,
        });
        self.subscribers.last_mut().unwrap()
    }

    /// Why nobody can subscribe.
    fn obstacle(&self) -> Option<SubscribeError> {
        if self.phase != Phase::Live {
            return Some(SubscribeError::Released);
        }
        (self.linked().count() >= self.limit).then_some(SubscribeError::Limit)
    }

    fn subscribe(
        &mut self,
        range: VaRange,
        owner: Option<Owner>,
        class: Class,
        paired: bool,
        statistics: bool,
        manner: Manner,
    ) {
        let (id, notifier) = (self.subscribers.len(), self.recorder(manner));
        let mut options = SubscribeOptions::new().class(class);
        if let Some(owner) = owner {
            options = options.owner(owner);
        }
        if statistics {
            options = options.statistics();
        }
        let result = if paired {
            self.space.subscribe_paired(range, notifier, options)
        } else if owner.is_none() && class == Class::Interval && !statistics {
            self.space.subscribe(range, notifier)
        } else {
            self.space.subscribe_with(range, notifier, options)
        };
        match (result, self.obstacle()) {
            (Ok(subscription), None) => {
                self.keep(subscription, id);
                let subscriber = self.add_subscriber(range, class, manner, false);
                subscriber.owner = owner;
                subscriber.paired = paired;
                subscriber.statistics = statistics;
            }
            (Err(refused), Some(reason)) => {
                assert_eq!(refused.reason, reason);
                assert_eq!(refused.notifier.id, id, "the notifier comes back");
            }
            (result, obstacle) => panic!("expected {obstacle:?}, got {result:?}"),
        }
    }

    fn subscribe_all(&mut self, manner: Manner) {
        let (id, notifier) = (self.subscribers.len(), self.recorder(manner));
        match (self.space.subscribe_all(notifier), self.obstacle()) {
            (Ok(subscription), None) => {
                self.keep(subscription, id);
                self.add_subscriber(VaRange::ALL, Class::List, manner, false);
            }
            (Err(refused), Some(reason)) => assert_eq!(refused.reason, reason),
            (result, obstacle) => panic!("expected {obstacle:?}, got {result:?}"),
        }
    }

    fn keep(&mut self, subscription: Subscription<Known>, id: Id) {
        assert!(self.handles[id].set(Handle::clone(&subscription)).is_ok());
        self.owned.push((subscription, id));
    }

    fn toggle_stranger(&mut self, manner: Manner) {
        if let Some((subscription, id)) = self.stranger.take() {
            let notifier = subscription.unsubscribe();
            self.check_end(id, notifier.map(|notifier| notifier.id));
            return;
        }
        let id = self.subscribers.len();
        match (self.space.subscribe_all(self.recorder(manner)), self.obstacle()) {
            (Ok(subscription), None) => {
                self.stranger = Some((subscription, id));
                self.add_subscriber(VaRange::ALL, Class::List, manner, true);
            }
            (Err(refused), Some(reason)) => assert_eq!(refused.reason, reason),
            (result, obstacle) => panic!("expected {obstacle:?}, got {result:?}"),
        }
    }

    // The end of a subscription, and a new range.

    fn unsubscribe(&mut self, at: usize) {
        let (subscription, id) = self.owned.swap_remove(at);
        let alive = self.subscribers[id].alive;
        match subscription.unsubscribe_deadline(Instant::now()) {
            Ok(notifier) => {
                assert!(!alive || !self.has_operation(id), "an operation is to be waited for");
                self.check_end(id, notifier.map(|notifier| notifier.id));
            }
            Err(unfinished) => {
                assert!(alive && self.has_operation(id), "there is nothing to wait for");
                assert_eq!(unfinished.reason, UnsubscribeError::TimedOut(TimedOut));
                self.check_told_to_stop(id);
                self.owned.push((unfinished.subscription, id));
            }
        }
    }

    fn drop_subscription(&mut self, at: usize) {
        let (subscription, id) = self.owned.swap_remove(at);
        drop(subscription);
        let back = self.subscribers[id].alive.then_some(id);
        self.check_end(id, back);
    }

    /// The subscription has ended, and handed this notifier back.
    #[track_caller]
    fn check_end(&mut self, id: Id, back: Option<Id>) {
        self.check_told_to_stop(id);
        let subscriber = &mut self.subscribers[id];
        assert_eq!(back, subscriber.alive.then_some(id), "handed back, unless released before");
        subscriber.alive = false;
    }

    /// The subscription begins to end: its device is told to stop, unless a release did so.
    #[track_caller]
    fn check_told_to_stop(&mut self, id: Id) {
        let range = self.subscribers[id].range;
        if self.subscribers[id].linked {
            let calls = self.take_calls();
            // Whoever was told by a release need not be told again.
            if !(self.subscribers[id].closed && calls.is_empty()) {
                self.check_told_alone(id, &calls, &[range], false);
            }
            self.subscribers[id].sequence += 1;
        }
        self.subscribers[id].linked = false;
        self.subscribers[id].closed = true;
    }

    /// The notifier, and nobody else, was told to give up these ranges, one after the other; and
    /// where it goes `on` after that, that it is over, if it hears of ends.
    #[track_caller]
    fn check_told_alone(&mut self, id: Id, calls: &[Call], ranges: &[VaRange], on: bool) {
        let subscriber = &mut self.subscribers[id];
        let answer = subscriber.manner.answer();
        let mut expected = Vec::new();
        for &range in ranges {
            let event = Event::new(EventKind::Release, range);
            expected.push(Call::Start { id, event, answer });
            if answer == Answer::Fence {
                expected.push(Call::FenceOver { id });
            }
            if on && subscriber.paired {
                expected.push(Call::End { id, event });
            }
            subscriber.was_told(answer);
        }
        assert_eq!(calls, expected);
    }

    fn set_range(&mut self, at: usize, range: VaRange) {
        let (subscription, id) = &mut self.owned[at];
        let id = *id;
        let subscriber = &self.subscribers[id];
        if subscriber.linked && subscriber.closed {
            // While the address space dies it may succeed, to no effect: no use.
            return;
        }
        let result = subscription.set_range(range);
        let calls = self.take_calls();
        if !self.subscribers[id].linked {
            assert!(result.is_err());
            assert_eq!(calls, []);
            return;
        }
        result.unwrap();
        let old = self.subscribers[id].range;
        // By hand: what is below the new range, and what is above it.
        let mut given_up = Vec::new();
        if old.start() < range.start() {
            given_up.push(VaRange::from_bounds(old.start(), old.last().min(range.start() - 1)));
        }
        if old.last() > range.last() {
            given_up.push(VaRange::from_bounds(old.start().max(range.last() + 1), old.last()));
        }
        let given_up: Vec<_> = given_up.into_iter().map(Option::unwrap).collect();
        self.check_told_alone(id, &calls, &given_up, true);
        self.subscribers[id].range = range;
        self.subscribers[id].sequence += 1;
    }

    // Changes.

    fn start(&mut self, announcement: Announcement, blockable: bool) {
        if self.changes.len() == CHANGES {
            return;
        }
        let Announcement { kind, range, owner } = announcement;
        let mut event = Event::new(kind, range);
        if let Some(owner) = owner {
            event = event.owned_by(self.owners[owner]);
        }
        let recorded = self.linked().next().is_some();
        let result = if blockable {
            Ok(self.space.invalidate_range_start(event))
        } else {
            self.space.try_invalidate_range_start(event)
        };
        let hits: Vec<_> =
            self.linked().filter(|&id| self.subscribers[id].concerned_by(&event)).collect();
        let calls = self.take_calls();
        let (told, refused, rest) = self.check_round(&calls, &hits, &event, blockable);
        let heard: Vec<_> = told.into_iter().filter(|&id| self.subscribers[id].paired).collect();
        match result {
            Ok(guard) => {
                assert!(!refused, "somebody refused, and there is a guard");
                assert_eq!(rest, []);
                assert_eq!(guard.event().range(), range);
                self.changes.push(Change { guard, event, recorded, heard });
                let unrecorded = self.changes.iter().filter(|change| !change.recorded).count();
                self.unrecorded_beyond_memory |= unrecorded > REMEMBERED;
            }
            Err(WouldBlock) => {
                assert!(refused, "nobody refused, and there is no guard");
                self.check_ends(rest, &heard, &event);
            }
        }
    }

    /// Checks one round of calls. Returns who accepted, whether somebody refused, and the calls
    /// that came after the round.
    #[track_caller]
    fn check_round<'c>(
        &mut self,
        calls: &'c [Call],
        hits: &[Id],
        event: &Event,
        blockable: bool,
    ) -> (Vec<Id>, bool, &'c [Call]) {
        let mut told = Vec::new();
        let (mut called, mut fences) = (BTreeSet::new(), Vec::new());
        let (mut last, mut refused, mut over) = (None, false, false);
        let starts = calls.iter().take_while(|call| matches!(call, Call::Start { .. })).count();
        for call in &calls[..starts] {
            let &Call::Start { id, event: heard, answer } = call else { unreachable!() };
            assert!(!over, "a refusal in the first class ends the round: {calls:?}");
            assert!(hits.contains(&id), "{id} is not concerned by {event}: {calls:?}");
            assert!(called.insert(id), "{id} was called twice: {calls:?}");
            assert_eq!((heard.range(), heard.kind()), (event.range(), event.kind()));
            assert_eq!((heard.owner(), heard.is_blockable()), (event.owner(), blockable));
            let subscriber = &mut self.subscribers[id];
            let place = Some(subscriber.place());
            assert!(last <= place, "{id} was called too late: {calls:?}");
            last = place;
            let expected = if blockable {
                subscriber.manner.answer()
            } else {
                subscriber.attempts += 1;
                subscriber.manner.try_answer(subscriber.attempts - 1)
            };
            assert_eq!(answer, expected);
            subscriber.was_told(answer);
            match answer {
                Answer::Refused => {
                    refused = true;
                    over = subscriber.class == Class::Interval;
                }
                Answer::Fence => fences.push(Call::FenceOver { id }),
                Answer::Over => {}
            }
            if answer != Answer::Refused {
                told.push(id);
            }
        }
        for &id in hits {
            let late = over && Some(self.subscribers[id].place()) >= last;
            assert!(called.contains(&id) || late, "{id} was not told of {event}: {calls:?}");
        }
        // Each fence once, in the order of the calls, when all have been called.
        let (waited, rest) = calls[starts..].split_at(fences.len().min(calls.len() - starts));
        assert_eq!(waited, fences);
        (told, refused, rest)
    }

    /// These were told of the end of `event`, each once, and nobody else.
    #[track_caller]
    fn check_ends(&self, calls: &[Call], heard: &[Id], event: &Event) {
        let mut ends = Vec::new();
        for call in calls {
            let Call::End { id, event: end } = call else { panic!("no end: {call:?}") };
            assert_eq!((end.range(), end.kind()), (event.range(), event.kind()));
            ends.push(*id);
        }
        ends.sort_unstable();
        let mut heard = heard.to_vec();
        heard.retain(|&id| self.subscribers[id].linked);
        heard.sort_unstable();
        assert_eq!(ends, heard, "who hears of the end of {event}");
    }

    fn end(&mut self, at: usize) {
        let Change { guard, event, heard, .. } = self.changes.swap_remove(at);
        drop(guard);
        self.check_ends(&self.take_calls(), &heard, &event);
        self.unrecorded_beyond_memory &= self.changes.iter().any(|change| !change.recorded);
    }

    // Read sections.

    fn read_begin(&mut self, id: Id) {
        let subscriber = &self.subscribers[id];
        let unrecorded = self.changes.iter().any(|change| !change.recorded);
        let blocked = self
            .changes
            .iter()
            .any(|change| change.recorded && subscriber.concerned_by(&change.event));
        let result = self.handle(id).unwrap().read_begin_deadline(Instant::now());
        match result {
            Ok(section) => {
                assert!(!subscriber.closed, "{id} is closed, and a section began");
                assert!(!blocked && !unrecorded, "{id}'s range changes, and a section began");
                self.sections.push((section, id, subscriber.sequence));
            }
            Err(ReadBeginError::Released(_)) => {
                assert!(subscriber.closed, "{id} has not been released");
            }
            Err(ReadBeginError::SelfWait(SelfWait)) => {
                assert!(!subscriber.closed, "{id} has been released");
                assert!(blocked || unrecorded, "there is nothing that {id} could wait for");
            }
            Err(ReadBeginError::TimedOut(TimedOut)) => {
                let forgotten = unrecorded && self.unrecorded_beyond_memory;
                assert!(forgotten, "{id} would have waited for this very thread");
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn commit(&mut self, at: usize) {
        let (section, id, sequence) = self.sections.swap_remove(at);
        let subscriber = &mut self.subscribers[id];
        let current = subscriber.sequence == sequence;
        match section.commit() {
            Ok(mut update) => {
                assert!(current, "{id} committed over an event");
                assert_eq!(update.range(), subscriber.range);
                update.commits += 1;
                subscriber.commits += 1;
            }
            Err(_) => {
                assert!(!current, "{id} could not commit, and nothing had come between");
                subscriber.collisions += 1;
            }
        }
    }

    // Operations, lookups, the end of it all.

    fn begin_operation(&mut self, id: Id) {
        let subscriber = &self.subscribers[id];
        let possible = self.phase == Phase::Live && subscriber.linked && !subscriber.closed;
        let operation = self.handle(id).unwrap().begin_operation();
        assert_eq!(operation.is_ok(), possible);
        self.operations.extend(operation.ok().map(|operation| (operation, id)));
    }

    fn find(&mut self, address: u64) {
        for stranger in [false, true] {
            let holding: Vec<_> = self
                .linked()
                .filter(|&id| self.subscribers[id].stranger == stranger)
                .filter(|&id| self.subscribers[id].range.contains(address))
                .collect();
            let last = holding.iter().map(|&id| self.subscribers[id].range.start()).max();
            let id = |found: Option<Id>| {
                assert_eq!(found.is_some(), last.is_some(), "find at {address:#x}");
                if let Some(id) = found {
                    assert!(holding.contains(&id), "found {id} at {address:#x}");
                    assert_eq!(Some(self.subscribers[id].range.start()), last);
                }
            };
            if stranger {
                let found = self.space.find::<Stranger>(address);
                id(found.map(|handle| handle.inspect(|notifier| notifier.id).unwrap()));
            } else {
                let found = self.space.find::<Known>(address);
                id(found.map(|handle| handle.inspect(|notifier| notifier.id).unwrap()));
            }
        }
    }

    fn release(&mut self) {
        let hits: Vec<_> = self.linked().collect();
        let result = self.space.release_deadline(Instant::now());
        let calls = self.take_calls();
        let mut rest = &calls[..];
        if self.phase == Phase::Live {
            let event = Event::new(EventKind::Release, VaRange::ALL);
            (_, _, rest) = self.check_round(&calls, &hits, &event, true);
            for &id in &hits {
                self.subscribers[id].closed = true;
                self.subscribers[id].sequence += 1;
            }
        }
        for call in rest {
            let &Call::Release { id } = call else { panic!("not a release: {call:?}") };
            assert!(!self.has_operation(id), "{id} was released under an operation");
            let subscriber = &mut self.subscribers[id];
            assert!(subscriber.linked && subscriber.alive, "{id} had ended");
            subscriber.linked = false;
            subscriber.alive = false;
        }
        let left: Vec<_> = self.linked().collect();
        match result {
            Ok(()) => {
                assert_eq!(left, [], "all have been released");
                assert!(self.operations.is_empty(), "an operation is to be waited for");
                self.phase = Phase::Dead;
            }
            Err(TimedOut) => {
                // Also one of a subscription that has been unlinked and not yet ended.
                assert!(!self.operations.is_empty(), "there was nothing to wait for");
                self.phase = Phase::Dying;
            }
        }
    }

    /// Ends what is left, and leaves nothing behind.
    fn finish(mut self) {
        while !self.changes.is_empty() {
            self.end(0);
        }
        self.operations.clear();
        self.sections.clear();
        while !self.owned.is_empty() {
            self.drop_subscription(0);
        }
        if let Some((subscription, id)) = self.stranger.take() {
            let back = subscription.unsubscribe().map(|notifier| notifier.id);
            self.check_end(id, back);
        }
        assert_eq!(self.linked().count(), 0);
        assert_eq!(self.take_calls(), []);
    }
}

/// The one of `count` things that `which` stands for.
fn choose(which: usize, count: usize) -> Option<usize> {
    which.checked_rem(count)
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(CASES)
    })]

    /// Whatever is done, one thing after the other: who is called and with what, in which order,
    /// who hears of ends, which read sections begin and commit, what is found and what is refused
    /// is as the documentation says (E01-E12, A13, X01, X02, X06, X07).
    #[test]
    fn e01_e11_against_a_serial_model(
        limit in prop_oneof![4 => Just(usize::MAX), 1 => 1..6usize],
        ops in prop::collection::vec(any_op(), 1..100),
    ) {
        let space = Subscriptions::with_limit(limit);
        let handles: Vec<_> = ops.iter().map(|_| OnceCell::new()).collect();
        let mut world = World::new(&space, limit, &handles);
        ops.iter().for_each(|op| world.apply(op));
        world.finish();
        drop(handles);
        assert_eq!(space.live(), 0, "somebody has been left behind");
    }
}

/// How many random sequences are tried.
const CASES: u32 = 500;

/// A reader that finds nothing in its way has not waited.
#[test]
fn a_reader_that_need_not_wait_counts_no_wait() {
    let space = Subscriptions::new();
    let manner = Manner { fences: false, refuses: 0 };
    let notifier: Known = Recorder { id: 0, manner, attempts: 0, commits: 0, log: Log::default() };
    let options = SubscribeOptions::new().statistics();
    let subscription = space.subscribe_with(VaRange::ALL, notifier, options).unwrap();
    drop(subscription.read_begin().unwrap().commit().unwrap());
    assert_eq!(subscription.statistics().unwrap().waits, 0);
}

// Ranges.

/// A few addresses at the bottom, in the middle, and at the top, with the gaps between them: a
/// range between any two of them is one of a set of these.
fn universe() -> Vec<u64> {
    let middle = 1 << 63;
    let bottom = 0..5;
    bottom.chain(middle - 2..middle + 2).chain(u64::MAX - 4..=u64::MAX).collect()
}

fn all_ranges() -> Vec<VaRange> {
    let all = universe();
    let pairs = all.iter().flat_map(|&start| all.iter().map(move |&last| (start, last)));
    pairs.filter_map(|(start, last)| VaRange::from_bounds(start, last)).collect()
}

/// The addresses of the universe that a range holds.
fn set(range: VaRange) -> BTreeSet<u64> {
    universe().into_iter().filter(|&a| range.start() <= a && a <= range.last()).collect()
}

/// Of any two ranges, what they share, and what the one has of the other, is what sets of addresses
/// say.
#[test]
fn ranges_are_sets_of_addresses() {
    let ranges: Vec<_> = all_ranges().into_iter().map(|range| (range, set(range))).collect();
    for (a, a_set) in &ranges {
        for address in universe() {
            assert_eq!(a.contains(address), a_set.contains(&address));
        }
        for (b, b_set) in &ranges {
            let both: BTreeSet<_> = a_set & b_set;
            assert_eq!(a.overlaps(*b), !both.is_empty(), "{a} overlaps {b}");
            assert_eq!(a.covers(*b), b_set.is_subset(a_set), "{a} covers {b}");
            assert_eq!(a.intersection(*b).map(set).unwrap_or_default(), both, "{a} and {b}");
            let [below, above] = a.difference(*b);
            let pieces: Vec<_> = [below, above].into_iter().flatten().collect();
            let left: BTreeSet<_> = pieces.iter().flat_map(|piece| set(*piece)).collect();
            assert_eq!(left, a_set - b_set, "{a} without {b}");
            assert!(pieces.iter().all(|piece| !piece.overlaps(*b) && a.covers(*piece)));
            assert!(below.is_none_or(|piece| piece.last() < b.start()));
            assert!(above.is_none_or(|piece| piece.start() > b.last()));
            // To the byte, also in the gaps: the pieces and what is shared add up.
            let shared = a.intersection(*b).map_or(0, VaRange::len);
            let kept: u128 = pieces.iter().map(|piece| piece.len()).sum();
            assert_eq!(kept + shared, a.len(), "{a} without {b}");
        }
    }
}

/// A range made of a start and a length, or of Rust's ranges, is the same range; what would be
/// empty or wrap is refused.
#[test]
fn ranges_are_made_of_what_fits() {
    for range in all_ranges() {
        if let Ok(bytes) = u64::try_from(range.len()) {
            assert_eq!(VaRange::new(range.start(), bytes), Ok(range));
            let room = u64::MAX - range.start();
            let wraps =
                room.checked_add(2).and_then(|bytes| VaRange::new(range.start(), bytes).err());
            assert_eq!(wraps.is_some(), range.start() > 1);
        } else {
            assert_eq!(range, VaRange::ALL);
        }
        assert!(VaRange::new(range.start(), 0).is_err());
        assert_eq!(VaRange::try_from(range.start()..=range.last()), Ok(range));
        if let Some(end) = range.last().checked_add(1) {
            assert_eq!(VaRange::try_from(range.start()..end), Ok(range));
        }
        if range.start() < range.last() {
            assert_eq!(VaRange::from_bounds(range.last(), range.start()), None);
        }
    }
}
