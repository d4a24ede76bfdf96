//! `uhmm doctor`: what this system allows.

use std::io::{self, Write as _};
use std::process::ExitCode;

use rustix::thread::CapabilitySet;
use serde::Serialize;
use uhmm_linux::probe::{Feature, Status};
use uhmm_linux::{NoMigration, Probe};

use crate::args;
use crate::failure::Failure;
use crate::preload;

/// What the answer is, for scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    All = 0,
    WithLosses = 1,
    CannotRun = 2,
}

/// What was found. docs/run.md explains the fields.
#[derive(Debug, Serialize)]
struct Diagnosis {
    schema: u32,
    verdict: Verdict,
    kernel: String,
    features: Vec<Found>,
    losses: Vec<Loss>,
}

/// Something of the kernel's, or of this installation's.
#[derive(Debug, Serialize)]
struct Found {
    name: String,
    status: String,
}

/// Something that is lost, and how to have it.
#[derive(Debug, Serialize)]
struct Loss {
    subject: String,
    /// What is lost.
    lost: String,
    /// What to do.
    remedy: String,
    /// Whether no program can be run because of it.
    prevents: bool,
}

/// Prints what this system allows.
///
/// # Errors
///
/// Where it cannot be printed.
pub(crate) fn doctor(arguments: &args::Doctor) -> Result<ExitCode, Failure> {
    let diagnosis = Diagnosis::of(&uhmm_linux::probe());
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&diagnosis).map(|text| text + "\n"),
        false => Ok(diagnosis.to_string()),
    };
    let text = text.map_err(|error| Failure::own(format!("JSON: {error}")))?;
    let written = io::stdout().write_all(text.as_bytes());
    written.map_err(|error| Failure::own(format!("standard output: {error}")))?;
    Ok(ExitCode::from(diagnosis.verdict as u8))
}

impl Diagnosis {
    fn of(probe: &Probe) -> Diagnosis {
        let mut features: Vec<Found> = probe
            .findings
            .iter()
            .filter(|finding| concerns_a_run(finding.feature))
            .map(|finding| Found {
                name: finding.feature.to_string(),
                status: finding.status.to_string(),
            })
            .collect();
        let mut losses = Vec::new();
        if let Err(why) = probe.migration() {
            losses.push(Loss {
                subject: "memory cannot move".to_owned(),
                lost: "no program can be run under a budget".to_owned(),
                remedy: remedy(why),
                prevents: true,
            });
        }
        let installed = preload::find(&preload::RUN);
        let found = Status::Found.to_string();
        let status =
            installed.as_ref().map_or("missing".to_owned(), |path| path.display().to_string());
        features.push(Found { name: "the library to be preloaded".to_owned(), status });
        if let Err(why) = installed {
            losses.push(Loss {
                subject: "the library to be preloaded".to_owned(),
                lost: "no program can be run under a budget".to_owned(),
                remedy: why.to_string(),
                prevents: true,
            });
        }
        let filter = may_filter();
        let status = if filter { found } else { "not permitted".to_owned() };
        features.push(Found { name: "a filter of one's own system calls".to_owned(), status });
        if !filter {
            losses.push(no_filter());
        }
        losses.extend(remarks(probe));
        Diagnosis::with(probe.kernel.clone(), features, losses)
    }

    fn with(kernel: String, features: Vec<Found>, losses: Vec<Loss>) -> Diagnosis {
        let verdict = match &losses[..] {
            [] => Verdict::All,
            losses if losses.iter().any(|loss| loss.prevents) => Verdict::CannotRun,
            _ => Verdict::WithLosses,
        };
        Diagnosis { schema: 1, verdict, kernel, features, losses }
    }
}

/// Tells whether `uhmm run` uses a feature: it needs no supervisor of system calls.
fn concerns_a_run(feature: Feature) -> bool {
    !matches!(feature, Feature::SeccompNotify | Feature::SeccompWaitKillable)
}

/// What could be better, except for what a run does not use.
fn remarks(probe: &Probe) -> Vec<Loss> {
    let unused: Vec<String> = [Feature::SeccompNotify, Feature::SeccompWaitKillable]
        .iter()
        .map(ToString::to_string)
        .collect();
    let remarks = probe.remarks().into_iter();
    let used = remarks.filter(|remark| !unused.contains(&remark.subject));
    let loss = |remark: uhmm_linux::probe::Remark| Loss {
        subject: remark.subject,
        lost: remark.costs,
        remedy: for_users(&remark.remedy),
        prevents: false,
    };
    used.map(loss).collect()
}

/// Returns why memory cannot move, and what to do about it.
pub(crate) fn remedy(why: NoMigration) -> String {
    match why {
        NoMigration::ForksUnseen => {
            "a child that is made by a raw `clone` while pages are away would find zeroes, since this \
             user is not told of forks: CAP_SYS_PTRACE (run it as root, or by sudo)"
                .to_owned()
        }
        why => why.to_string(),
    }
}

/// Leaves out what only the author of a program can do about something.
fn for_users(remedy: &str) -> String {
    let ways = remedy.split(", or ").filter(|way| !way.contains("Options::"));
    ways.collect::<Vec<&str>>().join(", or ")
}

/// Tells whether a program may filter its system calls: with the right to, or where it can gain no
/// rights (seccomp(2)).
pub(crate) fn may_filter() -> bool {
    let capable = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    capable || rustix::thread::no_new_privs().unwrap_or(false)
}

fn no_filter() -> Loss {
    Loss {
        subject: "a filter of one's own system calls".to_owned(),
        lost: "MADV_GUARD_INSTALL, shmat with SHM_REMAP and remap_file_pages are not refused: where a \
               program uses them on memory that is away, old contents may come back; and changes are not \
               announced (uhmm run --announced)"
            .to_owned(),
        remedy: "setpriv --no-new-privs uhmm run ..., or CAP_SYS_ADMIN".to_owned(),
        prevents: false,
    }
}

impl std::fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "Linux {}", self.kernel)?;
        for Found { name, status } in &self.features {
            writeln!(f, "  {name:<46} {status}")?;
        }
        for Loss { subject, lost, remedy, prevents } in &self.losses {
            let word = if *prevents { "Missing" } else { "Lost" };
            writeln!(f, "\n{word}: {subject}: {lost}.\n  To change that: {remedy}.")?;
        }
        let verdict = match self.verdict {
            Verdict::All => "Programs can be run, and nothing is lost.",
            Verdict::WithLosses => "Programs can be run, with the losses above.",
            Verdict::CannotRun => "Programs cannot be run: see above what is missing.",
        };
        writeln!(f, "\n{verdict}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_user_can_do_is_proposed() {
        let rows = [
            ("sysctl a=1", "sysctl a=1"),
            ("sysctl a=1, or lower Options::b", "sysctl a=1"),
            ("sysctl a=1, or CAP_A, or Options::b", "sysctl a=1, or CAP_A"),
        ];
        for (remedy, shown) in rows {
            assert_eq!(for_users(remedy), shown);
        }
        let reasons = [
            NoMigration::UserModeOnly,
            NoMigration::ForksUnseen,
            NoMigration::NoEvents,
            NoMigration::NoMove,
        ];
        for why in reasons {
            assert!(!remedy(why).contains("Options::"), "{why:?}");
        }
    }

    #[test]
    fn the_verdict_follows_from_what_is_lost() {
        let loss = |prevents| Loss { prevents, ..no_filter() };
        let rows = [
            (vec![], Verdict::All),
            (vec![loss(false)], Verdict::WithLosses),
            (vec![loss(false), loss(true)], Verdict::CannotRun),
        ];
        for (losses, verdict) in rows {
            assert_eq!(Diagnosis::with(String::new(), vec![], losses).verdict, verdict);
        }
    }
}
