//! What it costs that a device mirrors memory: faults, looks, holds, and what the program does to
//! what is mirrored.

use uhmm::{Order, PageRange, RangeFault};

use super::bare::{Handler, Memory, Pagemap, Uffd, Wait};
use super::rig::Rig;
use super::rounds::{Effort, Side, median, row, table, take_turns, time};

const HUGE: usize = Order::HUGE.pages() as usize;

pub(crate) fn run(effort: &Effort) {
    cold_faults(effort);
    looks(effort);
    holds(effort);
    changes(effort);
}

/// A device faults on pages that were never touched.
fn cold_faults(effort: &Effort) {
    table("range_fault of pages that were never touched, for each page");
    let many = if effort.quick { HUGE } else { 32 * HUGE };
    for (name, pages, longer) in [("one page", 1, 1), ("2 MiB", HUGE, 1), ("64 MiB", many, 2)] {
        let rig = Rig::new(1);
        let times = if pages == 1 { effort.samples } else { 1 };
        let (memory, bare) = (Memory::new(times * pages), Memory::new(times * pages));
        let mirror = rig.mirror(&memory);
        // The median of the pieces: the first meets what is still done about the discard.
        let cold = |memory: &Memory, run: &dyn Fn(PageRange)| {
            memory.discard(memory.range());
            let starts = (0..times).map(|index| memory.page(index * pages));
            let pieces = starts.map(|first| PageRange::from_pages(first, pages as u64));
            let pieces = pieces.map(|piece| piece.expect("of this memory"));
            median(&mut pieces.map(|piece| time(|| run(piece)).0).collect::<Vec<_>>())
                / pages as f64
        };
        let fault =
            |request: RangeFault<'_>| _ = mirror.range_fault(&request).expect("all can be had");
        let series = take_turns(
            effort.rounds_of(longer),
            vec![
                Side::new(format!("{name}, for writing"), || {
                    cold(&memory, &|piece| fault(RangeFault::write(piece)))
                }),
                Side::new("MADV_POPULATE_WRITE", || {
                    cold(&bare, &|piece| bare.populate(piece, true))
                }),
                Side::new(format!("{name}, for reading"), || {
                    cold(&memory, &|piece| fault(RangeFault::read(piece)))
                }),
                Side::new("MADV_POPULATE_READ", || {
                    cold(&bare, &|piece| bare.populate(piece, false))
                }),
            ],
        );
        row(&series[0], &[&series[1]], Some(1.25));
        row(&series[2], &[&series[3]], Some(1.25));
    }
}

/// Snapshots, and faults on what is there.
fn looks(effort: &Effort) {
    table("Looking at pages that are there");
    let rig = Rig::new(1);
    let pagemap = Pagemap::open();
    for pages in [1, HUGE, if effort.quick { HUGE } else { 32 * HUGE }] {
        let memory = Memory::new(pages);
        memory.fill();
        let range = memory.range();
        let mirror = rig.mirror(&memory);
        mirror.range_fault(&RangeFault::write(range)).expect("all can be had");
        let times = (HUGE / pages).clamp(1, effort.samples);
        let mean = |run: &dyn Fn()| {
            let (taken, ()) = time(|| (0..times).for_each(|_| run()));
            taken / times as f64
        };
        let series = take_turns(
            effort.rounds,
            vec![
                Side::new(format!("snapshot of {pages}"), || {
                    mean(&|| assert_eq!(rig.process.snapshot(range).len(), pages))
                }),
                Side::new("PAGEMAP_SCAN", || {
                    mean(&|| assert_eq!(pagemap.present(range), pages as u64))
                }),
                Side::new(format!("range_fault of {pages}, warm"), || {
                    mean(&|| {
                        _ = mirror.range_fault(&RangeFault::write(range)).expect("they are there")
                    })
                }),
            ],
        );
        row(&series[0], &[&series[1]], None);
        row(&series[2], &[&series[1]], None);
    }
}

/// Exclusive access.
fn holds(effort: &Effort) {
    table("Exclusive access: taken and given back");
    for pages in [1, HUGE] {
        let rig = Rig::new(1);
        let (memory, bare, away) = (Memory::new(pages), Memory::new(pages), Memory::new(pages));
        [&memory, &bare].into_iter().for_each(Memory::fill);
        let uffd = Uffd::open(Wait::Read, false);
        [&bare, &away].into_iter().for_each(|memory| uffd.register(memory.range()));
        let range = memory.range();
        let mirror = rig.mirror(&memory);
        let times = (HUGE / pages / 4).clamp(1, effort.samples);
        let mean = |run: &dyn Fn()| {
            let (taken, ()) = time(|| (0..times).for_each(|_| run()));
            taken / times as f64
        };
        let series = take_turns(
            effort.rounds,
            vec![
                Side::new(format!("{pages} pages"), || {
                    mean(&|| drop(mirror.exclusive(range).expect("they can be held")))
                }),
                Side::new("MOVE and MOVE, page by page", || {
                    mean(&|| {
                        for page in 0..pages {
                            uffd.move_pages(bare.address(page), away.address(page), 1);
                        }
                        for page in 0..pages {
                            uffd.move_pages(away.address(page), bare.address(page), 1);
                        }
                    })
                }),
            ],
        );
        row(&series[0], &[&series[1]], None);
    }
}

/// What the program does to its memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Discard,
    Unmap,
}

/// The program unmaps and discards what a device has mapped.
fn changes(effort: &Effort) {
    table("The program changes what a device mirrors");
    for (size, pages) in [("4 KiB", 1), ("2 MiB", HUGE)] {
        let rig = Rig::new(1);
        let handler = Handler::start(Wait::Read, true, |_, address| {
            unreachable!("nobody touches {address:#x}")
        });
        let [mirrored, plain, told] = [(); 3].map(|()| Memory::new(pages));
        let range = mirrored.range();
        let mirror = rig.mirror(&mirrored);
        let times = (effort.samples / pages).max(1);
        let ready = || _ = mirror.range_fault(&RangeFault::write(range)).expect("all can be had");
        let listen = || handler.uffd().register(told.range());
        for (name, change) in [("MADV_DONTNEED", Change::Discard), ("munmap", Change::Unmap)] {
            let series = take_turns(
                effort.rounds,
                vec![
                    Side::new(format!("{name} of {size}"), || {
                        make(change, &mirrored, times, &ready)
                    }),
                    Side::new("unregistered", || make(change, &plain, times, &|| {})),
                    Side::new("a bare reader of events", || make(change, &told, times, &listen)),
                ],
            );
            row(&series[0], &[&series[1]], None);
            row(&series[0], &[&series[2]], None);
        }
    }
}

/// Changes memory that is filled and made `ready` each time, and returns what a change takes.
fn make(change: Change, memory: &Memory, times: usize, ready: &dyn Fn()) -> f64 {
    let range = memory.range();
    let mut sum = 0.0;
    for _ in 0..times {
        memory.fill();
        ready();
        sum += time(|| match change {
            Change::Discard => memory.discard(range),
            Change::Unmap => memory.unmap(range),
        })
        .0;
        // A new mapping is not registered.
        if change == Change::Discard {
            memory.unmap(range);
        }
        memory.map_again(range);
    }
    sum / times as f64
}
