//! What programs take under `uhmm run`, beside what the kernel's own way takes: a cgroup with a limit
//! of as much memory, and compressed swap (zram).
//!
//! `cargo bench -p uhmm-cli --bench programs` prints tables. Arguments choose among the groups
//! (`pressure`, `calm`) and the programs by a part of their names. `--rounds N` measures longer, and
//! `--size N` makes the programs larger or smaller, in percent.
//!
//! All sides take turns, round by round, so that what else the machine does meets all of them alike;
//! what is compared is medians. `pressure` needs root, zram, and the memory controller of cgroups, and
//! says in one line what is missing. It makes a swap device, and a cgroup for each run, and takes them
//! away at the end, however it ends; see [`limits`].
//!
//! The figures and the machine are in `docs/performance.md`.

mod calm;
mod limits;
mod measure;
mod pressure;
mod rounds;
mod workload;

use std::process::ExitCode;

use workload::Workload;

/// How much is measured, and what of.
#[derive(Debug)]
struct Effort {
    /// How often each side has its turn; the group decides if nobody says.
    rounds: Option<usize>,
    /// How large the programs are, in percent.
    size: u64,
    /// Parts of the names of what is wanted; all if there is none.
    wanted: Vec<String>,
}

impl Effort {
    /// Reads the arguments.
    fn from_arguments() -> Result<Effort, String> {
        let mut effort = Effort { rounds: None, size: 100, wanted: Vec::new() };
        let mut is_measured = false;
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut number = || {
                let number = arguments.next().and_then(|number| number.parse::<u32>().ok());
                number.filter(|&number| number > 0).ok_or(format!("{argument} takes a number"))
            };
            match argument.as_str() {
                "--bench" => is_measured = true,
                "--rounds" => effort.rounds = Some(number()? as usize),
                "--size" => effort.size = number()?.into(),
                part => effort.wanted.push(part.to_owned()),
            }
        }
        if !is_measured {
            // As a test: each body once, as small as it may be.
            effort.rounds.get_or_insert(1);
            effort.size = effort.size.min(5);
        }
        Ok(effort)
    }

    /// Tells whether a group, or a program, is wanted, where these are all that there are.
    fn wants(&self, name: &str, among: &[&str]) -> bool {
        let chosen = |name: &str| self.wanted.iter().any(|part| name.contains(part.as_str()));
        !among.iter().any(|name| chosen(name)) || chosen(name)
    }
}

/// The groups.
const GROUPS: [&str; 2] = ["pressure", "calm"];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("programs: {message}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<(), String> {
    let effort = Effort::from_arguments()?;
    let workloads = Workload::all(effort.size)?;
    let names: Vec<&str> = workloads.iter().map(|workload| workload.name).collect();
    let wanted = |workload: &&Workload| effort.wants(workload.name, &names);
    let workloads: Vec<&Workload> = workloads.iter().filter(wanted).collect();
    if effort.wants("pressure", &GROUPS) {
        pressure::run(&workloads, effort.rounds.unwrap_or(5))?;
    }
    if effort.wants("calm", &GROUPS) {
        calm::run(&workloads, effort.rounds.unwrap_or(31))?;
    }
    Ok(())
}
