//! What a live process costs when it is attached, beside what the kernel takes for the same.
//!
//! `cargo bench -p uhmm-linux --bench process` prints tables. Arguments choose among the groups by a
//! part of their names. `--out FOLDER` has the tables written there as well, as `tables.csv`, and the
//! curves as `.csv` and `.svg`. `--rounds N` measures longer. `--load PART` measures only loads and
//! placements so named, for a profile.
//!
//! Each figure stands beside a floor that is measured in the same run: the same work by bare system
//! calls ([`bare`]). Subject and floors take turns, round by round, so that what else the machine
//! does meets all of them alike; what is compared is the medians of the rounds, and the interval is
//! one of 95 percent for the median of the rounds' ratios.
//!
//! The figures and the machine are in `docs/performance.md`.

mod bare;
mod coming_home;
mod curves;
mod device;
mod leaving;
mod mirroring;
mod overhead;
mod plot;
mod rig;
mod rounds;

use std::path::PathBuf;

use rounds::Effort;

/// As programs are to be built that attach.
#[global_allocator]
static ALLOCATOR: uhmm_linux::Allocator = uhmm_linux::Allocator::new();

/// A group, with its name.
type Group = (&'static str, fn(&Effort));

/// The groups.
const GROUPS: [Group; 6] = [
    ("coming home", coming_home::run),
    ("leaving", leaving::run),
    ("mirroring", mirroring::run),
    ("nothing out", overhead::run),
    ("placement", coming_home::run_placement),
    ("curves", curves::run),
];

fn main() {
    let mut effort = Effort::default();
    let mut wanted = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // What `cargo bench` says, and nobody has to.
            "--bench" => {}
            "--test" => effort = Effort::quick(),
            "--rounds" => {
                let rounds = arguments.next().and_then(|rounds| rounds.parse().ok());
                effort.rounds = rounds.expect("--rounds takes a number");
            }
            "--out" => {
                effort.out = Some(PathBuf::from(arguments.next().expect("--out takes a folder")));
            }
            "--load" => {
                effort.load = Some(arguments.next().expect("--load takes a part of a name"))
            }
            overhead::CHILD => {
                return overhead::child(&arguments.next().expect("it is told what to be"));
            }
            part => wanted.push(part.to_owned()),
        }
    }
    if let Err(error) = bare::Uffd::available() {
        println!("SKIPPED: userfaultfd: {error}");
        let required = std::env::var_os("UHMM_REQUIRE_UFFD").is_some_and(|value| value == "1");
        assert!(!required, "userfaultfd: {error} (UHMM_REQUIRE_UFFD=1)");
        return;
    }
    for (name, run) in GROUPS {
        if wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())) {
            run(&effort);
        }
    }
    if let Some(folder) = &effort.out {
        rounds::write_tables(folder);
    }
}
