//! The keeper: the thread that keeps a process within its budget.
//!
//! It looks at the process now and then, the oftener the less room there is; attaches to it when it
//! has grown; and moves what is cold to the device when there is too much. It is a thread like any
//! other: it may wait for pages, and for the C library's locks, and nobody waits for it but those
//! who are made to wait for room, for a limited time.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use uhmm::{DevicePagemap, PAGE_SIZE, PagemapOptions, policy::Policies};
use uhmm_linux::{AttachError, Growth, NoAnnouncement, Options, Process};

use crate::device::Device;
use crate::edge::turns::take_short_turns;
use crate::ledger::{Counter, Gauge, Slot};
use crate::policy::POLICY;
use crate::policy::account::{self, Account, Footprint};
use crate::policy::growth::{Gate, guard_of};
use crate::policy::hand::Hand;
use crate::policy::recall::Recall;
use crate::policy::room::Room;
use crate::policy::staying::Staying;

/// How much memory without a file a process must have before it is worth to attach, in bytes; less
/// where the budget is small.
pub(crate) const ATTACH_BYTES: u64 = 4 << 20;

/// How fast memory is taken to grow at most, in bytes a second.
const GROWTH: u64 = 4 << 30;

/// The longest time between two looks, and the shortest.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
const SHORTEST_PAUSE: Duration = Duration::from_micros(500);

/// How fast a thread fills memory that is mapped while growth is held, before that is held too, in
/// bytes a second; and the longest time until that is looked for.
const FILLING: u64 = 2 << 30;
const LONGEST_HELD_PAUSE: Duration = Duration::from_millis(4);

/// How many pages are moved before the process is looked at again, and for what it has mapped.
const MOST_AT_ONCE: u64 = 128;

/// To look for new mappings may take one part in so many of the time.
const HOLDING: u32 = 8;

/// What part of the budget may be exceeded for a run to become warm: one in so many.
const WARM: u64 = 64;

/// For how many pages the device closes gaps each time that there is time for it.
const COMPACTED: u64 = 64;

/// For how many pages the device must have room before any is moved there.
const ROOM_PAGES: u64 = 64;

/// The keeper of one process.
#[derive(Debug)]
pub(crate) struct Keeper {
    slot: Arc<Slot>,
    process: Process,
    device: Device,
    pagemap: Arc<DevicePagemap>,
    account: Account,
    hand: Hand,
    room: Arc<Room>,
    gate: Arc<dyn Growth>,
    /// What the process was like when its growth was last held, while it is.
    held: Option<Footprint>,
    /// When what was mapped since may be looked for.
    hold_due: Instant,
    budget: u64,
    /// How much room had been taken at the last look.
    taken: u64,
    /// How many pages had come home for forks at the last look.
    overrun: u64,
    /// How long it last waited since nothing could leave.
    idle: Duration,
    /// Whether the user has been told that the device is full.
    full: bool,
    staying: Staying,
}

impl Keeper {
    /// Looks after the process for as long as it runs.
    ///
    /// When it is decided whether the process is managed, `decided` is dropped.
    pub(crate) fn run(slot: Arc<Slot>, pause: Duration, decided: Option<Sender<()>>) {
        // The servers are made by this thread, and inherit that.
        take_short_turns();
        std::thread::sleep(pause);
        let config = slot.ledger().config();
        let enough = config.attach_at.unwrap_or(ATTACH_BYTES.min(config.budget / 4));
        loop {
            let has = account::anonymous_bytes();
            if has >= enough {
                break;
            }
            slot.set(Gauge::TooSmall, has);
            std::thread::sleep(pause_for(enough - has));
        }
        let attached = Keeper::attach(slot);
        drop(decided);
        match attached {
            Ok(mut keeper) => keeper.keep(),
            Err((slot, why)) => slot.not_managed(&why),
        }
    }

    /// Attaches, or says why that is not to be.
    fn attach(slot: Arc<Slot>) -> Result<Keeper, (Arc<Slot>, String)> {
        let config = slot.ledger().config();
        if config.policy != POLICY {
            let why = format!("there is no policy {}: the only one is {POLICY}", config.policy);
            return Err((slot, why));
        }
        let process = match attach_process(&slot, config.announced) {
            Ok(process) => process,
            Err(error) => return Err((slot, error.to_string())),
        };
        // From here on this thread has descriptors of its own, also for the file of a store.
        let room = Arc::new(Room::new());
        let recall = Arc::new(Recall::new(Arc::clone(&slot), Arc::clone(&room)));
        let policies = Policies::none().and_shared(recall.clone());
        let options = PagemapOptions::new().name("the store").policies(policies);
        let (device, pagemap) = match Device::make(&config, &slot, options) {
            Ok(made) => made,
            Err(why) => return Err((slot, why)),
        };
        if let Err(why) = process.migration() {
            return Err((slot, why.to_string()));
        }
        process.reserve_this_thread();
        process.reserve_arguments();
        slot.set(Gauge::TooSmall, 0);
        slot.attached();
        let account = Account::new(&process);
        let book = config.verify.then(|| device.verify(&process, &slot)).flatten();
        let hand = Hand::new(recall, book);
        let budget = config.budget;
        let gate: Arc<dyn Growth> = Arc::new(Gate::new(Arc::clone(&slot), Arc::clone(&room)));
        Ok(Keeper {
            slot,
            process,
            device,
            pagemap,
            account,
            hand,
            room,
            gate,
            held: None,
            hold_due: Instant::now(),
            budget,
            taken: 0,
            overrun: 0,
            idle: Duration::ZERO,
            full: false,
            staying: Staying::new(),
        })
    }

    /// Keeps the process within its budget, until it ends.
    fn keep(&mut self) {
        let mut wanted = false;
        loop {
            let before = self.account.footprint();
            let view = self.look(wanted, false);
            if view.left() <= signed(view.slack / 2) {
                self.make_room();
                wanted = true;
                continue;
            }
            self.tidy_up();
            let pause = match self.held {
                // The kernel tells of no new mapping, so they are looked for.
                Some(_) if self.account.footprint() != before => SHORTEST_PAUSE,
                Some(_) => pause_while_held(view.slack),
                None => pause_for(view.until_held()),
            };
            wanted = self.room.wait_until_wanted(pause);
        }
    }

    /// Looks at how much there is, tells everybody, and says how much room there is. `wanted` says
    /// that somebody has just asked for room; `exactly`, that the pages are to be counted where that
    /// is not too often.
    fn look(&mut self, wanted: bool, exactly: bool) -> View {
        let taken = self.room.taken();
        let device = self.device.bytes_in_memory(self.pages_away());
        let resident = match exactly {
            true => self.account.measure_if_due(&self.process, device, &mut self.hand),
            false => self.account.estimate(device),
        };
        let share = self.report(resident);
        let wanted = wanted || taken != self.taken;
        self.taken = taken;
        let promised = resident.saturating_add(self.slot.promise(resident, wanted));
        // Who wants nothing now need not make room for what others have been promised.
        let limit = if wanted { share.min(promised) } else { share };
        let slack = slack_of(share);
        let view = View { resident, share, limit, slack };
        self.hold_growth(&view);
        let pages = |bytes: i64| bytes / PAGE_SIZE as i64;
        let left = self.held.map(|_| pages(signed(share.min(promised)) - signed(resident)));
        if self.room.set(taken, left, slack / 4 / PAGE_SIZE as u64) {
            self.process.resume_growth();
        }
        view
    }

    /// Holds growth where there is little room left, and ends that where there is plenty.
    fn hold_growth(&mut self, view: &View) {
        let room = view.share.saturating_sub(view.resident);
        let guard = guard_of(view.share);
        let footprint = self.account.footprint();
        match self.held {
            None if room < guard => {}
            Some(held)
                if room < 2 * guard && held != footprint && Instant::now() >= self.hold_due => {}
            Some(_) if room >= 2 * guard => {
                self.process.end_hold();
                self.held = None;
                return;
            }
            _ => return,
        }
        let began = Instant::now();
        // What could not be registered now may be the next time.
        self.process.hold_growth(&self.gate);
        self.held = Some(footprint);
        self.hold_due = Instant::now() + began.elapsed() * HOLDING;
    }

    /// Has nobody wait for room: nothing can leave now.
    fn let_everybody_go(&self) {
        if self.room.set(self.room.taken(), None, 0) {
            self.process.resume_growth();
        }
    }

    /// Does what there is time for now.
    fn tidy_up(&mut self) {
        // What has been unmapped leaves gaps, and nobody else closes them.
        self.device.compact(COMPACTED);
        let device = self.device.bytes_in_memory(self.pages_away());
        self.staying.look_if_due(&self.process, &self.slot, self.account.footprint(), device);
    }

    fn pages_away(&self) -> u64 {
        self.pagemap.statistics().used
    }

    /// Tells the ledger what there is, and returns how much of the budget is for this process.
    fn report(&mut self, resident: u64) -> u64 {
        let slot = &self.slot;
        let happened = self.process.statistics();
        if happened.fork_overrun != std::mem::replace(&mut self.overrun, happened.fork_overrun) {
            slot.ledger().set_warm(false);
        }
        slot.set(Gauge::Resident, resident);
        let away = self.pages_away();
        slot.set(Gauge::Away, away * PAGE_SIZE as u64);
        self.device.report(slot, away);
        let both = [
            (Counter::Faults, happened.faults),
            (Counter::FaultsRefused, happened.refused),
            (Counter::ForkOverrun, happened.fork_overrun),
            (Counter::UnforeseenForks, happened.unforeseen_forks),
            (Counter::Unmapped, happened.unmapped_out + happened.unmapped_in_transit),
            (Counter::Discarded, happened.discarded_out + happened.discarded_in_transit),
            (Counter::Remapped, happened.remapped_out + happened.remapped_in_transit),
            (Counter::Replaced, happened.replaced),
            (Counter::Announced, happened.announced),
        ];
        both.into_iter().for_each(|(counter, count)| slot.set_counter(counter, count));
        let all = slot.ledger().take_stock().resident;
        account::share(self.budget, resident, all)
    }

    /// Says, once, that the device is full, and waits a little. The program goes on with more memory
    /// than its budget.
    fn say_full(&mut self) {
        if !self.full {
            self.full = true;
            self.slot.warn(
                "the device is full, and programs keep more memory than the budget: give it more \
                 room, or another device",
            );
        }
        self.let_everybody_go();
        std::thread::sleep(LONGEST_PAUSE);
    }

    /// Moves what is cold to the device until there is room, or nothing moves any more.
    fn make_room(&mut self) {
        self.process.reserve_loader();
        let began = Instant::now();
        let mut some = false;
        loop {
            let view = self.look(true, true);
            if some {
                self.note_warmth();
            }
            let excess = signed(view.slack) - view.left();
            if excess <= 0 {
                break;
            }
            let pages = excess.unsigned_abs().div_ceil(PAGE_SIZE as u64).min(MOST_AT_ONCE);
            if !self.device.has_room(pages.min(ROOM_PAGES)) {
                self.say_full();
                break;
            }
            let moved = self.hand.evict(&self.process, &self.pagemap, &self.slot, pages);
            self.account.left(moved * PAGE_SIZE as u64);
            if moved == 0 {
                // What is left cannot leave, or the process forks: nobody need wait for that.
                self.idle = (self.idle * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
                self.let_everybody_go();
                std::thread::sleep(self.idle);
                break;
            }
            self.idle = Duration::ZERO;
            some = true;
            if began.elapsed() > LONGEST_PAUSE {
                break;
            }
        }
    }

    /// Notes that pages have left and there is no more than the budget at home, if that is so of all
    /// processes together.
    fn note_warmth(&self) {
        let ledger = self.slot.ledger();
        // Who went on without room for a page or two is no reason.
        if ledger.take_stock().resident <= self.budget + self.budget / WARM {
            ledger.set_warm(true);
        }
    }
}

/// What there is at a look, in bytes.
#[derive(Clone, Copy, Debug)]
struct View {
    /// How much is at home.
    resident: u64,
    /// How much of the budget is for this process.
    share: u64,
    /// How much it is to keep to now.
    limit: u64,
    /// How much room is to be kept.
    slack: u64,
}

impl View {
    /// Returns how much room there is: less than none where there is too much at home.
    fn left(&self) -> i64 {
        signed(self.limit) - signed(self.resident)
    }

    /// Returns how much may come until growth is held.
    fn until_held(&self) -> u64 {
        let room = self.share.saturating_sub(self.resident);
        room.saturating_sub(guard_of(self.share))
    }
}

/// Returns it as a number to count with. Memory is never so large that it does not fit.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Attaches to this process, with its changes `announced` where that is asked for and can be.
///
/// # Errors
///
/// Why it cannot.
fn attach_process(slot: &Slot, announced: bool) -> Result<Process, AttachError> {
    let options = Options::new().own_descriptors(true);
    match Process::attach(options.clone().announced(announced)) {
        // The listener of a process that this one comes from hears its calls too. That one lets them
        // through, and the kernel has no second listener: what happens here is observed.
        Err(AttachError::NotAnnounced { why: NoAnnouncement::Listened }) => {
            slot.warn(
                "changes are not announced in a process that comes from one whose changes are, \
                 and are observed there: start it under a `uhmm run` of its own",
            );
            Process::attach(options)
        }
        attached => attached,
    }
}

/// Returns how much of the budget is kept free.
fn slack_of(target: u64) -> u64 {
    (target / 32).min(16 << 20)
}

/// Returns how long it takes to fill what is kept free, within bounds.
fn pause_while_held(slack: u64) -> Duration {
    time_for(slack, FILLING).clamp(SHORTEST_PAUSE, LONGEST_HELD_PAUSE)
}

/// Returns how long it takes at least until memory has grown by `bytes`, within bounds.
fn pause_for(bytes: u64) -> Duration {
    time_for(bytes, GROWTH).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

/// Returns how long `bytes` take at so many bytes a second.
fn time_for(bytes: u64, per_second: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(per_second);
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}
