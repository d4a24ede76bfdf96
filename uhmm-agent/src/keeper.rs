//! The keeper: the thread that keeps a process within its budget.
//!
//! It looks at the process now and then, the oftener the less room there is; attaches to it when it
//! has grown; and moves what is cold to the device when there is too much. It is a thread like any
//! other: it may wait for pages, and for the C library's locks, and nobody waits for it but those
//! who are made to wait for room, for a limited time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm::{DevicePagemap, PAGE_SIZE, PagemapOptions, policy::Policies};
use uhmm_linux::{Options, Process};

use crate::device::Device;
use crate::ledger::{Counter, Gauge, Slot};
use crate::policy::account::{self, Account};
use crate::policy::hand::Hand;
use crate::policy::recall::Recall;
use crate::policy::room::Room;

/// How much memory without a file a process must have before it is worth to attach, in bytes; less
/// where the budget is small.
pub(crate) const ATTACH_BYTES: u64 = 4 << 20;

/// How fast memory is taken to grow at most, in bytes a second.
const GROWTH: u64 = 4 << 30;

/// The longest time between two looks, and the shortest.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
const SHORTEST_PAUSE: Duration = Duration::from_micros(500);

/// How many pages are moved before the account is looked at again.
const MOST_AT_ONCE: u64 = 1024;

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
    budget: u64,
    /// How long it last waited since nothing could leave.
    idle: Duration,
    /// Whether the user has been told that the device is full.
    full: bool,
}

impl Keeper {
    /// Looks after the process for as long as it runs.
    pub(crate) fn run(slot: Arc<Slot>, pause: Duration) {
        std::thread::sleep(pause);
        let config = slot.ledger().config();
        let enough = ATTACH_BYTES.min(config.budget / 4);
        loop {
            let has = account::anonymous_bytes();
            if has >= enough {
                break;
            }
            std::thread::sleep(pause_for(enough - has));
        }
        match Keeper::attach(slot) {
            Ok(mut keeper) => keeper.keep(),
            Err((slot, why)) => slot.not_managed(&why),
        }
    }

    /// Attaches, or says why that is not to be.
    fn attach(slot: Arc<Slot>) -> Result<Keeper, (Arc<Slot>, String)> {
        let config = slot.ledger().config();
        let process = match Process::attach(Options::new().own_descriptors(true)) {
            Ok(process) => process,
            Err(error) => return Err((slot, error.to_string())),
        };
        // From here on this thread has descriptors of its own, also for the file of a store.
        let device = match Device::make(&config) {
            Ok(device) => device,
            Err(why) => return Err((slot, why)),
        };
        if let Err(why) = process.migration() {
            return Err((slot, why.to_string()));
        }
        process.reserve_this_thread();
        process.reserve_arguments();
        let room = Arc::new(Room::new());
        let recall = Arc::new(Recall::new(Arc::clone(&slot), Arc::clone(&room)));
        let policies = Policies::none().and_shared(recall.clone());
        let options = PagemapOptions::new().name("the store").policies(policies);
        let pagemap = DevicePagemap::register_with(device.memory(), options);
        slot.attached();
        let account = Account::new(&process);
        let hand = Hand::new(recall);
        let budget = config.budget;
        Ok(Keeper {
            slot,
            process,
            device,
            pagemap,
            account,
            hand,
            room,
            budget,
            idle: Duration::ZERO,
            full: false,
        })
    }

    /// Keeps the process within its budget, until it ends.
    fn keep(&mut self) {
        loop {
            let resident = self.account.estimate(self.device.bytes_in_memory(self.pages_away()));
            let target = self.report(resident);
            let slack = slack_of(target);
            let room = target.saturating_sub(resident);
            self.room.set(room > slack / 4);
            if room <= slack / 2 {
                self.make_room(target, slack);
            } else {
                std::thread::sleep(pause_for(room - slack / 2));
            }
        }
    }

    fn pages_away(&self) -> u64 {
        self.pagemap.statistics().used
    }

    /// Tells the ledger what there is, and returns how much of the budget is for this process.
    fn report(&self, resident: u64) -> u64 {
        let slot = &self.slot;
        slot.set(Gauge::Resident, resident);
        let away = self.pages_away();
        slot.set(Gauge::Away, away * PAGE_SIZE as u64);
        self.device.report(slot, away);
        let happened = self.process.statistics();
        let both = [
            (Counter::Faults, happened.faults),
            (Counter::FaultsRefused, happened.refused),
            (Counter::ForkOverrun, happened.fork_overrun),
            (Counter::UnforeseenForks, happened.unforeseen_forks),
            (Counter::Unmapped, happened.unmapped_out + happened.unmapped_in_transit),
            (Counter::Discarded, happened.discarded_out + happened.discarded_in_transit),
            (Counter::Remapped, happened.remapped_out + happened.remapped_in_transit),
            (Counter::Replaced, happened.replaced),
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
        self.room.set(true);
        std::thread::sleep(LONGEST_PAUSE);
    }

    /// Moves what is cold to the device until there is room, or nothing moves any more.
    fn make_room(&mut self, target: u64, slack: u64) {
        self.process.reserve_loader();
        let wanted = target.saturating_sub(slack);
        let began = Instant::now();
        loop {
            let resident = {
                let device = self.device.bytes_in_memory(self.pages_away());
                self.account.measure_if_due(&self.process, device, &mut self.hand)
            };
            let Some(excess) = resident.checked_sub(wanted).filter(|&excess| excess > 0) else {
                break;
            };
            let pages = excess.div_ceil(PAGE_SIZE as u64).min(MOST_AT_ONCE);
            if !self.device.has_room(pages.min(ROOM_PAGES)) {
                self.say_full();
                break;
            }
            let moved = self.hand.evict(&self.process, &self.pagemap, &self.slot, pages);
            self.account.left(moved * PAGE_SIZE as u64);
            self.room.set(moved == 0 || self.account.current() <= target);
            if moved == 0 {
                // What is left cannot leave, or the process forks: nobody need wait for that.
                self.idle = (self.idle * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
                std::thread::sleep(self.idle);
                break;
            }
            self.idle = Duration::ZERO;
            if began.elapsed() > LONGEST_PAUSE {
                break;
            }
        }
    }
}

/// Returns how much of the budget is kept free.
fn slack_of(target: u64) -> u64 {
    (target / 32).min(16 << 20)
}

/// Returns how long it takes at least until memory has grown by `bytes`, within bounds.
fn pause_for(bytes: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(GROWTH);
    let pause = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
    pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}
