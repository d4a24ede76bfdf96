//! What it costs that changes are announced, beside the bare mechanism.
//!
//! `cargo bench -p uhmm-linux --bench announced`. A filter cannot be taken off again, so each side is a
//! process of its own, which measures a round when it is told to; the sides take turns:
//!
//! * *plain*: no filter;
//! * *bare*: a filter that stops the same call, and a thread in the same process, without the filter,
//!   that makes it and hands over the result, with nothing else around it;
//! * *announced*: `Options::announced`, with nobody subscribed, and with one subscriber of the range.
//!
//! What is compared is the medians of the rounds; the interval is one of 95 percent for the median of
//! the rounds' ratios. The figures are in `docs/performance.md`.

mod bare;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mmu_notifier::{Event, Notifier, Subscription};
use uhmm_linux::{Options, Process};

/// As programs are to be built that attach.
#[global_allocator]
static ALLOCATOR: uhmm_linux::Allocator = uhmm_linux::Allocator::new();

/// What a process is told to be.
const SIDES: [&str; 4] = ["plain", "bare", "announced", "subscribed"];

/// What a round is of.
const WORK: [&str; 5] = ["munmap", "mprotect", "madvise", "getppid", "mmap"];

/// How often it is done in a round.
const SAMPLES: usize = 200;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(side) = arguments.iter().find_map(|argument| argument.strip_prefix("--side=")) {
        return serve(side);
    }
    let quick = arguments.iter().any(|argument| argument == "--test");
    let rounds = if quick { 2 } else { 61 };
    let mut sides: Vec<Side> = SIDES.iter().map(|name| Side::start(name)).collect();
    for work in WORK {
        let mut times = vec![Vec::new(); sides.len()];
        for round in 0..rounds {
            for index in 0..sides.len() {
                let index = (index + round) % sides.len();
                times[index].push(sides[index].round(work));
            }
        }
        report(work, &times);
    }
    println!("\n### From the call to the stopped device\n");
    println!("{}", sides[3].ask("latency"));
}

/// Prints the row of one kind of work.
fn report(work: &str, times: &[Vec<f64>]) {
    if work == WORK[0] {
        println!(
            "| call | plain us | bare us | announced us | of bare | 95 % | with a subscriber | of bare |"
        );
        println!("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |");
    }
    let medians: Vec<f64> = times.iter().map(|times| median(times.clone())).collect();
    let ratios = times[2].iter().zip(&times[1]).map(|(ours, bare)| ours / bare);
    let mut ratios: Vec<f64> = ratios.collect();
    ratios.sort_by(f64::total_cmp);
    let aside = 0.98 * (ratios.len() as f64).sqrt();
    let low = (ratios.len() as f64 / 2.0 - aside).floor().max(0.0) as usize;
    let high = ((ratios.len() as f64 / 2.0 + aside).ceil() as usize).min(ratios.len() - 1);
    println!(
        "| {work} | {:.3} | {:.3} | {:.3} | {:.2} | {:.2} to {:.2} | {:.3} | {:.2} |",
        medians[0],
        medians[1],
        medians[2],
        medians[2] / medians[1],
        ratios[low],
        ratios[high],
        medians[3],
        medians[3] / medians[1],
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A process that measures.
struct Side {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Side {
    fn start(name: &str) -> Side {
        let program = std::env::current_exe().expect("a program has a file");
        let mut child = Command::new(program)
            .arg(format!("--side={name}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program can be started again");
        let to = child.stdin.take().expect("it was asked for");
        let from = BufReader::new(child.stdout.take().expect("it was asked for"));
        Side { child, to, from }
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.to, "{what}").expect("it listens");
        let mut line = String::new();
        let read = self.from.read_line(&mut line).expect("it answers");
        assert!(read > 0, "a side has ended: {:?}", self.child.wait());
        line.trim_end().to_owned()
    }

    /// Returns what one call took in this round, in microseconds.
    fn round(&mut self, work: &str) -> f64 {
        self.ask(work).parse().expect("a number")
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A subscriber that notes when it was told.
struct Clock(Arc<AtomicU64>, Instant);

impl Notifier for Clock {
    type Fence = ();

    fn invalidate(&mut self, _event: &Event) {
        // Release: partner of the load after the call, on the thread that waited for it.
        self.0.store(self.1.elapsed().as_nanos() as u64, Ordering::Release);
    }
}

/// What makes a side what it is, kept while it measures.
struct Setting {
    process: Option<Process>,
    subscription: Option<Subscription<Clock>>,
    told: Arc<AtomicU64>,
    began: Instant,
}

fn serve(side: &str) {
    let memory = bare::Memory::reserve(SAMPLES);
    let mut setting =
        Setting { process: None, subscription: None, told: Arc::default(), began: Instant::now() };
    match side {
        "bare" => bare::supervise(),
        "announced" | "subscribed" => {
            let process = Process::attach(Options::new().announced(true));
            let process = process.unwrap_or_else(|error| panic!("{error}"));
            if side == "subscribed" {
                let clock = Clock(Arc::clone(&setting.told), setting.began);
                let notifiers = process.backend().notifiers();
                let range = memory.range().va_range();
                setting.subscription = notifiers.subscribe(range, clock).ok();
            }
            setting.process = Some(process);
        }
        _ => {}
    }
    for line in std::io::stdin().lines() {
        match line.expect("it is text").as_str() {
            "latency" => println!("{}", latency(&memory, &setting)),
            work => println!("{}", measure(work, &memory)),
        }
    }
}

/// Does some work so often, and returns what one took, in microseconds: the median.
fn measure(work: &str, memory: &bare::Memory) -> f64 {
    memory.fill();
    let mut times = Vec::with_capacity(SAMPLES);
    for page in 0..SAMPLES {
        let began = Instant::now();
        match work {
            "munmap" => memory.unmap(page),
            "mprotect" => memory.protect(page),
            "madvise" => memory.discard(page),
            "mmap" => memory.map_over(page),
            _ => drop(rustix::process::getppid()),
        }
        times.push(began.elapsed().as_nanos() as f64 / 1000.0);
    }
    median(times)
}

/// Returns the distribution of the time from a call to the moment when its subscriber has been told.
fn latency(memory: &bare::Memory, setting: &Setting) -> String {
    let mut times = Vec::new();
    for _ in 0..20 {
        memory.fill();
        for page in 0..SAMPLES {
            let began = setting.began.elapsed().as_nanos() as u64;
            memory.protect(page);
            // Acquire: as in `Clock`.
            times.push(setting.told.load(Ordering::Acquire).saturating_sub(began) as f64 / 1000.0);
        }
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let shares = [0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0];
    let text = shares.map(|share| format!("p{}: {:.1} us", share * 100.0, at(share)));
    text.join(", ")
}
