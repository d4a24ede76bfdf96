//! Two GPUs and two CPUs work on the memory of one process, while its pages move about.
//!
//! Each GPU counts the bytes of an array into one histogram, over and over, with memory of its own
//! for a quarter of what it needs. Meanwhile one CPU counts too, and another swaps pages out, moves
//! them to other frames, forks, and drops what it can. In the end every count must be there, and no
//! GPU may have used a page that it had been told to give up.
//!
//! With `--break` the GPUs forget to flush their TLBs, and are found out. `--json` prints the account
//! as JSON. The exit status is 1 if a count is wrong or a stale page was used.
#![cfg_attr(shuttle, allow(unused, reason = "runs outside of model checkers only"))]

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use uhmm::sim::{Machine, MachineOptions, Mapping, Process};
use uhmm::{Access, PAGE_SIZE, PageRange};
use uhmm_devices::gpu::{SoftGpu, SoftGpuOptions, kernels};

/// How many pages of bytes are counted.
const DATA_PAGES: u64 = 32;

/// How many pages of the process's memory are mapped: the data, and the histogram.
const PAGES: u64 = DATA_PAGES + 1;

/// How many bins the histogram has.
const BINS: u64 = 64;

/// How many pages each GPU has.
const GPU_PAGES: u64 = PAGES / 4;

/// How much of the array is counted at a time, in bytes.
const CHUNK: u64 = PAGE_SIZE as u64 / 4;

const BASE: u64 = 0x7f00_0000_0000;
const HISTOGRAM: u64 = BASE + DATA_PAGES * PAGE_SIZE as u64;

const RUN: Duration = Duration::from_millis(1500);

/// What happened.
#[derive(Default)]
struct Account {
    counted_by_gpus: AtomicU64,
    counted_by_cpu: AtomicU64,
    mutations: AtomicU64,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("shared_memory: {error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool, Box<dyn Error>> {
    let (mut json, mut broken) = (false, false);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--json" => json = true,
            "--break" => broken = true,
            // What `cargo bench` and `cargo test` pass on.
            "--test" | "--bench" => {}
            other => return Err(format!("unknown argument `{other}`: --json, --break").into()),
        }
    }
    let machine = Machine::with(MachineOptions::new().count_violations());
    let process = machine.spawn();
    let range = PageRange::new(BASE, PAGES * PAGE_SIZE as u64)?;
    process.map(range, Mapping::anonymous(Access::Write))?;
    for address in (BASE..HISTOGRAM).step_by(8) {
        process.store_u64(address, address.wrapping_mul(0x9e37_79b9_7f4a_7c15))?;
    }
    let gpu = || {
        let options = SoftGpuOptions::new().memory_pages(GPU_PAGES);
        SoftGpu::new(if broken { options.break_flush() } else { options })
    };
    let gpus = [gpu(), gpu()];
    let account = Arc::new(Account::default());
    work(&process, range, &gpus, &account, !broken)?;
    report(&machine, &process, &gpus, &account, json)
}

/// Runs everything for a while.
fn work(
    process: &Process,
    range: PageRange,
    gpus: &[Arc<SoftGpu>; 2],
    account: &Arc<Account>,
    strict: bool,
) -> Result<(), Box<dyn Error>> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut services = Vec::new();
    let mut mirrors = Vec::new();
    let mut kernels = Vec::new();
    for gpu in gpus {
        let mirror = gpu.mirror(process.address_space(), range)?;
        services.push(gpu.start_service()?);
        let context = gpu.context(&mirror)?;
        let (stop, account) = (Arc::clone(&stop), Arc::clone(account));
        kernels.push(context.spawn(move |view| {
            let mut offset = 0;
            while !stop.load(Relaxed) {
                kernels::histogram(view, BASE + offset, CHUNK, HISTOGRAM, BINS)?;
                account.counted_by_gpus.fetch_add(CHUNK, Relaxed);
                offset = (offset + CHUNK) % (HISTOGRAM - BASE);
            }
            Ok(())
        }));
        mirrors.push(mirror);
    }
    let end = Instant::now() + RUN;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < end {
                count(process, account).expect("the memory is there");
            }
        });
        for step in (0..).take_while(|_| Instant::now() < end) {
            disturb(process, range, step);
            account.mutations.fetch_add(1, Relaxed);
        }
    });
    stop.store(true, Relaxed);
    for kernel in kernels {
        let result = kernel.join();
        // A broken device may well trip over itself.
        if strict {
            result?;
        }
    }
    drop(services);
    drop(mirrors);
    Ok(())
}

/// Counts a few bytes on a CPU.
fn count(process: &Process, account: &Account) -> Result<(), uhmm::sim::SimError> {
    let mut bytes = [0; 64];
    process.load(BASE, &mut bytes)?;
    for byte in bytes {
        process.fetch_add_u64(HISTOGRAM + u64::from(byte) % BINS * 8, 1)?;
        account.counted_by_cpu.fetch_add(1, Relaxed);
    }
    Ok(())
}

/// Does to the process's memory what a kernel does behind its back.
fn disturb(process: &Process, range: PageRange, step: u64) {
    let first = range.iter().nth((step * 7 % (PAGES - 4)) as usize).expect("within the range");
    let some = PageRange::from_pages(first, 4).expect("four pages");
    match step % 5 {
        0 => _ = process.reclaim(some),
        1 => _ = process.relocate(some),
        2 => _ = process.address_space().migrate_home(some),
        3 => process.write_protect(some),
        _ => {
            if let Ok(child) = process.fork() {
                child.exit();
            }
        }
    }
}

fn report(
    machine: &Machine,
    process: &Process,
    gpus: &[Arc<SoftGpu>; 2],
    account: &Account,
    json: bool,
) -> Result<bool, Box<dyn Error>> {
    let mut found = 0;
    for bin in 0..BINS {
        found += process.load_u64(HISTOGRAM + 8 * bin)?;
    }
    let (by_gpus, by_cpu) =
        (account.counted_by_gpus.load(Relaxed), account.counted_by_cpu.load(Relaxed));
    let wrong = found.abs_diff(by_gpus + by_cpu);
    let stale =
        machine.violations().len() + gpus.iter().map(|gpu| gpu.violations().len()).sum::<usize>();
    let memory = gpus.each_ref().map(|gpu| gpu.pagemap().expect("it has memory").statistics());
    let sum = |f: fn(&uhmm::MemoryStatistics) -> u64| memory.iter().map(f).sum::<u64>();
    let space = process.address_space().mm().statistics();
    let lines = [
        ("counted_by_gpus", by_gpus),
        ("counted_by_cpu", by_cpu),
        ("device_faults", space.device_faults),
        ("invalidations", space.invalidations),
        ("collisions", space.collisions),
        ("pages_to_a_gpu", sum(|memory| memory.in_by_device_fault)),
        ("pages_home_for_a_cpu", sum(|memory| memory.home_by_cpu_fault)),
        ("pages_home_for_the_other_gpu", sum(|memory| memory.home_by_peer_fault)),
        ("pages_home_on_request", sum(|memory| memory.home_by_request)),
        ("pages_evicted", sum(|memory| memory.home_by_eviction)),
        ("mutations", account.mutations.load(Relaxed)),
        ("counts_lost_or_gained", wrong),
        ("stale_accesses", stale as u64),
    ];
    if json {
        let fields: Vec<String> =
            lines.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        println!("{{{}}}", fields.join(", "));
    } else {
        println!("two GPUs of {GPU_PAGES} pages, two CPUs, {PAGES} pages of memory, {RUN:?}");
        for (name, value) in lines {
            println!("{value:>12}  {}", name.replace('_', " "));
        }
    }
    Ok(wrong == 0 && stale == 0)
}
