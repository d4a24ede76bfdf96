//! What things cost as a process grows: in mappings, and in bytes.

use uhmm::{Order, PAGE_SIZE, RangeFault};

use super::bare::Memory;
use super::leaving::Bare;
use super::plot::{Curve, Plot};
use super::rig::Rig;
use super::rounds::{Effort, time};

const HUGE: usize = Order::HUGE.pages() as usize;

pub(crate) fn run(effort: &Effort) {
    for plot in [by_mappings(effort), by_bytes(effort)] {
        println!("\n### {}\n\n{}", plot.title, plot.csv());
        if let Some(folder) = &effort.out {
            plot.write(folder);
        }
    }
}

/// Adds a point to the curve of a name, which is made at its first.
fn add(curves: &mut Vec<Curve>, name: &str, point: (f64, f64)) {
    match curves.iter_mut().find(|curve| curve.name == name) {
        Some(curve) => curve.points.push(point),
        None => curves.push(Curve { name: name.to_owned(), points: vec![point] }),
    }
}

/// Returns the least that something takes of so many times: whatever else the machine does adds to
/// it, and here nothing is compared that took turns.
fn least(times: usize, run: impl FnMut() -> f64) -> f64 {
    std::iter::repeat_with(run).take(times).fold(f64::INFINITY, f64::min)
}

/// Operations on one page, in a process with so many mappings.
fn by_mappings(effort: &Effort) -> Plot {
    let counts: &[usize] =
        if effort.quick { &[10] } else { &[10, 30, 100, 300, 1000, 3000, 10_000, 30_000] };
    let mut curves = Vec::new();
    for &count in counts {
        let others = Memory::new(count);
        others.shred(count);
        let rig = Rig::new(64);
        let memory = Memory::new(HUGE);
        memory.fill();
        let page = memory.page(0);
        let mirror = rig.mirror(&memory);
        let mut point = |name: &str, run: &mut dyn FnMut() -> f64| {
            let times = if effort.quick { 2 } else { 400 };
            add(&mut curves, name, (count as f64, least(times, run)));
        };
        point("CPU fault, plain", &mut || {
            others.discard(others.page(count - 1).into());
            time(|| others.load(count - 1)).0
        });
        point("snapshot", &mut || time(|| rig.process.snapshot(page.into())).0);
        point("device fault, cold", &mut || {
            memory.discard(page.into());
            let request = RangeFault::write(page.into());
            time(|| mirror.range_fault(&request).expect("it can be had")).0
        });
        memory.fill();
        point("migrate", &mut || {
            let taken = time(|| rig.send(page.into(), &rig.in_place)).0;
            rig.fetch(page.into());
            taken
        });
        point("CPU fault, back, mirrored", &mut || {
            rig.send(page.into(), &rig.in_place);
            time(|| memory.load(0)).0
        });
        point("exclusive", &mut || {
            time(|| drop(mirror.exclusive(page.into()).expect("it can be held"))).0
        });
    }
    Plot {
        name: "by-mappings",
        title: "One page, in a process of so many mappings: the least of 400",
        across: "mappings",
        up: "us",
        curves,
    }
}

/// What the kernel takes for the same on so many pages.
fn floors(pages: usize, times: usize, add: &mut dyn FnMut(&str, f64)) {
    let bare = Bare::new(pages, false);
    let send = || {
        let taken = time(|| bare.send()).0;
        bare.fetch();
        taken
    };
    add("bare MOVE", least(times, send));
    drop(bare);
    let memory = Memory::new(pages);
    let populate = || {
        memory.discard(memory.range());
        time(|| memory.populate(memory.range(), true)).0
    };
    add("bare MADV_POPULATE_WRITE", least(times, populate));
}

/// Operations on a whole range, for each page of it.
fn by_bytes(effort: &Effort) -> Plot {
    let most = if effort.quick { 1 } else { 2048 };
    let mut curves = Vec::new();
    let mut mebibytes = 1;
    while mebibytes <= most {
        let pages = (mebibytes << 20) / PAGE_SIZE;
        let rig = Rig::new(pages);
        let memory = Memory::new(pages);
        let range = memory.range();
        let mirror = rig.mirror(&memory);
        let times = if effort.quick { 1 } else { (256 / mebibytes).clamp(3, 25) };
        let mut point = |name: &str, run: &mut dyn FnMut() -> f64| {
            let taken = least(times, run) / pages as f64;
            add(&mut curves, name, (mebibytes as f64, taken));
        };
        point("device fault, cold", &mut || {
            memory.discard(range);
            time(|| mirror.range_fault(&RangeFault::write(range)).expect("all can be had")).0
        });
        memory.fill();
        point("device fault, warm", &mut || {
            time(|| mirror.range_fault(&RangeFault::write(range)).expect("they are there")).0
        });
        point("snapshot", &mut || time(|| rig.process.snapshot(range)).0);
        point("migrate", &mut || {
            let taken = time(|| rig.send(range, &rig.in_place)).0;
            rig.fetch(range);
            taken
        });
        point("migrate home", &mut || {
            rig.send(range, &rig.in_place);
            time(|| rig.fetch(range)).0
        });
        point("CPU fault, back, mirrored", &mut || {
            rig.send(range, &rig.in_place);
            time(|| (0..pages).for_each(|page| assert_eq!(memory.load(page), page as u64))).0
        });
        drop((mirror, memory, rig));
        floors(pages, times, &mut |name, taken| {
            add(&mut curves, name, (mebibytes as f64, taken / pages as f64));
        });
        mebibytes *= 2;
    }
    Plot {
        name: "by-bytes",
        title: "A whole range of 4 KiB pages, for each page: the least of some",
        across: "MiB",
        up: "us",
        curves,
    }
}
