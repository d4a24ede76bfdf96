//! What a program pays for being attached while nothing of it is out.
//!
//! Two processes of this program do the same work in turns, slice by slice: one is attached. They
//! are told to begin a slice through a pipe, and answer what it took.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use uhmm::Order;
use uhmm_linux::{Options, Process};

use super::bare::{Memory, processor_time, run_on};
use super::rounds::{Effort, Series, median, row, table, time};

/// The argument that makes this program one of the two.
pub(crate) const CHILD: &str = "--child";

const HUGE: usize = Order::HUGE.pages() as usize;

pub(crate) fn run(effort: &Effort) {
    let pairs = if effort.quick { 1 } else { effort.rounds.max(30) * 3 };
    let mut workers = [Worker::start("attached"), Worker::start("plain")];
    let names = ["attached, nothing out", "not attached"];
    let mut walls = names.map(|name| series(name, pairs));
    let mut processors = names.map(|name| series(name, pairs));
    workers.iter_mut().for_each(|worker| _ = worker.slice());
    for pair in 0..pairs {
        for index in [pair % 2, 1 - pair % 2] {
            let (wall, processor) = workers[index].slice();
            walls[index].micros.push(wall);
            processors[index].micros.push(processor);
        }
    }
    drop(workers);
    table(&format!("A program that maps, touches, discards and unmaps, {pairs} pairs of slices"));
    for (of, mut both) in [("time", walls), ("processor time", processors)] {
        both[0].name.push_str(&format!(": {of}"));
        row(&both[0], &[&both[1]], Some(1.02));
    }
}

fn series(name: &str, pairs: usize) -> Series {
    Series { name: name.to_owned(), micros: Vec::with_capacity(pairs) }
}

/// One of the two processes.
struct Worker {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Worker {
    fn start(kind: &str) -> Worker {
        let program = std::env::current_exe().expect("a program has a file");
        let mut child = Command::new(program)
            .args([CHILD, kind])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program can be started again");
        let to = child.stdin.take();
        let from = BufReader::new(child.stdout.take().expect("it was asked for"));
        Worker { child, to, from }
    }

    /// Has it do a slice: what it took, in microseconds, and how much processor time.
    fn slice(&mut self) -> (f64, f64) {
        self.to.as_mut().expect("it has not ended").write_all(b"\n").expect("it lives");
        let mut line = String::new();
        self.from.read_line(&mut line).expect("it lives");
        let mut words = line.split_whitespace().map(|word| word.parse().expect("a number"));
        let mut next = || words.next().expect("two numbers");
        (next(), next())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The end of its input is its end.
        drop(self.to.take());
        let status = self.child.wait().expect("it is ours");
        assert!(status.success(), "{status}");
    }
}

/// Is one of the two processes.
pub(crate) fn child(kind: &str) {
    // Both on one core: which of them has the better core would be chance.
    run_on(&super::bare::processors()[..1]);
    let process = (kind == "attached").then(|| {
        // All of the program may move.
        Process::attach(Options::new()).expect("this can attach")
    });
    for line in std::io::stdin().lines() {
        line.expect("the parent lives");
        let before = processor_time();
        let (mut wall, ()) = time(work);
        let processor = processor_time() - before;
        wall = median(&mut [wall]);
        println!("{wall} {processor}");
    }
    drop(process);
}

/// About ten milliseconds of system calls that change the address space, and page faults.
fn work() {
    for _ in 0..8 {
        for _ in 0..8 {
            let small = Memory::new(16);
            small.fill();
            small.populate(small.range(), true);
        }
        let large = Memory::new(HUGE);
        large.fill();
        large.discard(large.range());
        (0..HUGE).step_by(4).for_each(|page| large.store(page, 1));
        large.shred(8);
        large.unmap(large.page(64).block(Order::new(5).expect("an order")));
        let heap = vec![1_u8; 1 << 20];
        std::hint::black_box(&heap);
    }
}
