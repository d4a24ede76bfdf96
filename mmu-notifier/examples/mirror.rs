//! Two devices made of threads mirror an address space that a third thread keeps changing.
//!
//! Each device translates through a page table of its own, and compares every access with the
//! address space: a translation that is used and no longer true is a stale access. There must be
//! none. With `--break` the changes are not announced, and there are; so this would notice.
//! `--json` prints the account as JSON. The exit status is 1 if an access was stale.
#![cfg_attr(any(loom, shuttle), allow(unused, reason = "runs outside of model checkers only"))]

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::time::{Duration, Instant};

use mmu_notifier::{
    Event, EventKind, Fence, Handle, Notifier, ReadBeginError, SubscribeOptions, Subscription,
    Subscriptions, VaRange,
};

const PAGES: u64 = 64;
const PAGE_BYTES: u64 = 4096;

/// A frame number for each page; 0 where nothing is mapped. The address space, and a device's
/// table.
type Frames = Arc<[AtomicU64]>;

/// What a device's hardware has: a page table, and a count that is odd during an access.
struct Hardware {
    table: Frames,
    accesses: AtomicU64,
    stale: AtomicU64,
}

impl Hardware {
    /// Accesses `page` as the table says, and checks it twice; `false` is a page fault.
    fn access(&self, space: &Frames, page: usize) -> bool {
        // SeqCst, here and in `invalidate`: either this access sees that its entry is gone, or the
        // invalidation sees that this access has begun.
        self.accesses.fetch_add(1, SeqCst);
        let frame = self.table[page].load(SeqCst);
        if frame != 0 {
            let before = space[page].load(SeqCst);
            std::thread::yield_now(); // the access takes a while
            let after = space[page].load(SeqCst);
            self.stale.fetch_add(u64::from(before != frame || after != frame), Relaxed);
        }
        self.accesses.fetch_add(1, SeqCst);
        frame != 0
    }
}

/// The driver's side of a device: nothing else writes the table.
struct Mirror(Arc<Hardware>);

/// Over when the access that was under way at the invalidation has ended.
struct Idle(Arc<Hardware>, u64);

impl Fence for Idle {
    fn wait(self) {
        while self.0.accesses.load(SeqCst) == self.1 {
            std::thread::yield_now();
        }
    }

    fn is_over(&self) -> bool {
        self.1.is_multiple_of(2)
    }
}

impl Notifier for Mirror {
    type Fence = Option<Idle>;

    fn invalidate(&mut self, event: &Event) -> Option<Idle> {
        let first = event.range().start() / PAGE_BYTES;
        let last = (event.range().last() / PAGE_BYTES).min(PAGES - 1);
        let entries = &self.0.table[first as usize..=last as usize];
        let dropped = entries.iter().filter(|entry| entry.swap(0, SeqCst) != 0).count();
        (dropped > 0).then(|| Idle(Arc::clone(&self.0), self.0.accesses.load(SeqCst)))
    }
}

/// What a driver does when its device faults: look up, commit, and begin again if that collided.
fn fault(mirror: &Handle<Mirror>, space: &Frames, page: usize) -> Result<(), ReadBeginError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let section = mirror.read_begin_deadline(deadline)?;
        let frame = space[page].load(SeqCst);
        std::thread::yield_now(); // the lookup takes a while
        if let Ok(table) = section.commit() {
            table.0.table[page].store(frame, SeqCst);
            return Ok(());
        }
    }
}

/// Runs a device until `stop`; returns how often it faulted.
fn run(device: &Device, space: &Frames, stop: &AtomicBool) -> u64 {
    let (mut random, mut faults) = (device.pages, 0);
    while !stop.load(Relaxed) {
        let page = (next(&mut random) % device.pages) as usize;
        if !device.hardware.access(space, page) {
            fault(&device.mirror, space, page).expect("every change ends in time");
            faults += 1;
        }
    }
    faults
}

/// Changes the address space until `stop`; returns how often.
fn change(who: &Subscriptions, space: &Frames, announce: bool, stop: &AtomicBool) -> u64 {
    let (mut random, mut frame, mut changes) = (1, 0, 0);
    while !stop.load(Relaxed) {
        let first = next(&mut random) % PAGES;
        let count = 1 + next(&mut random) % 4.min(PAGES - first);
        let kinds = [EventKind::Unmap, EventKind::Clear, EventKind::Migrate];
        let kind = kinds[(next(&mut random) % 3) as usize];
        let range = VaRange::new(first * PAGE_BYTES, count * PAGE_BYTES).expect("it has a page");
        let guard = announce.then(|| who.invalidate_range_start(Event::new(kind, range)));
        let pages = &space[first as usize..(first + count) as usize];
        pages.iter().for_each(|page| page.store(0, SeqCst));
        std::thread::yield_now(); // the change takes a while
        if kind != EventKind::Unmap {
            for page in pages {
                frame += 1; // a frame is never used again, so none passes for another
                page.store(frame, SeqCst);
            }
        }
        drop(guard);
        changes += 1;
        std::thread::sleep(Duration::from_micros(50));
    }
    changes
}

/// Marsaglia's xorshift: the next of a row of numbers, none of them 0.
fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// A device, its subscription, and over how many pages.
struct Device {
    mirror: Subscription<Mirror>,
    hardware: Arc<Hardware>,
    pages: u64,
}

fn main() -> ExitCode {
    let options: Vec<String> = std::env::args().skip(1).collect();
    if options.iter().any(|option| option != "--json" && option != "--break") {
        eprintln!("usage: mirror [--json] [--break]");
        return ExitCode::from(2);
    }
    let given = |name| options.iter().any(|option| option == name);
    let (json, announce) = (given("--json"), !given("--break"));

    let (who, space, stop) = (Subscriptions::new(), frames(), AtomicBool::new(false));
    let devices = [("gpu0", PAGES), ("gpu1", PAGES / 2)].map(|(name, pages)| {
        let counters = || AtomicU64::new(0);
        let hardware = Hardware { table: frames(), accesses: counters(), stale: counters() };
        let hardware = Arc::new(hardware);
        let range = VaRange::new(0, pages * PAGE_BYTES).expect("it has pages");
        let options = SubscribeOptions::new().name(name).statistics();
        let mirror = who.subscribe_with(range, Mirror(Arc::clone(&hardware)), options);
        Device { mirror: mirror.expect("the address space lives"), hardware, pages }
    });

    let (faults, changes) = std::thread::scope(|scope| {
        let (space, stop) = (&space, &stop);
        let runs = devices.each_ref().map(|device| scope.spawn(|| run(device, space, stop)));
        let changer = scope.spawn(|| change(&who, space, announce, stop));
        std::thread::sleep(Duration::from_secs(1));
        stop.store(true, Relaxed);
        let faults = runs.map(|run| run.join().expect("a device does not panic"));
        (faults, changer.join().expect("a changer does not panic"))
    });

    let rows: Vec<_> = devices.iter().zip(faults).map(|(device, n)| row(device, n)).collect();
    let stale: u64 = devices.iter().map(|device| device.hardware.stale.load(Relaxed)).sum();
    // One change is under way, so that the dump has something to show.
    let event = Event::new(EventKind::Unmap, VaRange::new(0, PAGE_BYTES).expect("one page"));
    let guard = who.invalidate_range_start(event);
    if json {
        let object = |row: &Row| {
            let fields = row.each_ref().map(|(key, value)| format!("{key:?}: {value}"));
            format!("{{{}}}", fields.join(", "))
        };
        let devices = rows.iter().map(object).collect::<Vec<_>>().join(", ");
        println!(r#"{{"devices": [{devices}], "changes": {changes}, "stale": {stale},"#);
        println!(r#" "holders": {:?}}}"#, format!("{who:?}"));
    } else {
        let line = |cells: [&str; 9]| println!("{}", cells.map(|c| format!("{c:>13}")).join(" "));
        line(rows[0].each_ref().map(|(key, _)| *key));
        rows.iter().for_each(|row| line(row.each_ref().map(|(_, value)| value.trim_matches('"'))));
        println!("\n{changes} changes, {} announced", if announce { "all" } else { "none" });
        println!("stale accesses: {stale}\n\nWho holds whom, while a page is being unmapped:");
        println!("{who:#?}");
    }
    drop(guard);
    ExitCode::from(u8::from(stale > 0))
}

/// What is said of a device; a value is written as in JSON.
type Row = [(&'static str, String); 9];

fn row(device: &Device, faults: u64) -> Row {
    let counted = device.mirror.statistics().expect("statistics were asked for");
    let waited_for = counted.longest_wait_for.map(|cause| cause.event.to_string());
    [
        ("device", format!("{:?}", device.mirror.name())),
        ("accesses", (device.hardware.accesses.load(Relaxed) / 2).to_string()),
        ("faults", faults.to_string()),
        ("retried", counted.collisions.to_string()),
        ("invalidations", counted.delivered.to_string()),
        ("no_effect", counted.unchanged.to_string()),
        ("stale", device.hardware.stale.load(Relaxed).to_string()),
        ("max_wait_us", counted.longest_wait.as_micros().to_string()),
        ("max_wait_for", format!("{:?}", waited_for.unwrap_or_default())),
    ]
}

fn frames() -> Frames {
    (0..PAGES).map(|_| AtomicU64::new(0)).collect()
}
