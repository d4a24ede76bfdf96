//! The command line: what `--help`, the man page and the completions are made from.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

/// Runs programs under a memory budget.
///
/// A program that needs more memory than it should use goes on as ever, while what it has not
/// touched for a while lives on a device: compressed, or in a file. A page comes home when it is
/// touched. The program need not be changed or know of it.
#[derive(Debug, Parser)]
#[command(name = "uhmm", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Task,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    Run(Run),
    Dmirror(Dmirror),
    /// What `uhmm dmirror` runs beside the program.
    #[command(hide = true)]
    DmirrorBroker,
    Doctor(Doctor),
    /// Print the completions for a shell.
    ///
    /// For bash: uhmm completions bash > ~/.local/share/bash-completion/completions/uhmm
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the man page.
    ///
    /// To read it: uhmm man | man -l -
    Man {
        /// The command that it is about, for one of its own.
        #[arg(value_parser = ["run", "dmirror", "doctor", "completions", "man"])]
        command: Option<String>,
    },
}

/// Run a program, and all that it starts, under a memory budget.
///
/// The private memory of the program and of all processes that it starts is held within the budget:
/// what has not been touched for a while moves to the device, and comes home when it is touched.
/// The program's input, output, signals, terminal and exit status are its own. At its end a report
/// says what happened.
///
/// The exit status is that of the program; if a signal ends it, the same signal ends uhmm. It is
/// 125 if uhmm itself fails, 126 if the program cannot be run this way, as statically linked and
/// setuid programs cannot, and 127 if there is no such program.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// How much memory the program may have at home, with all that it starts: 512M, 1.5G, or 25% of
    /// the machine's memory.
    #[arg(long, value_name = "SIZE", default_value = "50%")]
    pub(crate) budget: String,

    /// Where pages go: `lz4` compresses them in memory, `file:PATH` writes them to a file that
    /// nobody else sees, in the folder PATH or at PATH, `soft` is the memory of a software GPU. A
    /// limit may follow: `lz4:4G`, `file:/var/tmp:20G`.
    #[arg(long, value_name = "DEVICE", default_value = "lz4")]
    pub(crate) device: OsString,

    /// How it is decided which pages go. There is one way so far: a clock's hand goes round the
    /// addresses, and what came home since it last came by stays for another round.
    #[arg(
        long,
        value_name = "POLICY",
        default_value = uhmm_agent::POLICY,
        value_parser = [uhmm_agent::POLICY]
    )]
    pub(crate) policy: String,

    /// Check each page that comes home against what had left, and end the program if they differ.
    #[arg(long)]
    pub(crate) verify: bool,

    /// Announce what the program does to its mappings before it is done, so that no device uses what
    /// is about to go.
    ///
    /// Without this, a device is told after most changes. Each call that changes mappings takes some
    /// microseconds longer, also in processes that the program starts; of them, those are announced
    /// whose parents are not.
    #[arg(long)]
    pub(crate) announced: bool,

    /// How much private memory a process must have before it is managed: a size, or `start` for from
    /// its start. The default is 4M, or a quarter of the budget where that is less.
    #[arg(long, value_name = "SIZE")]
    pub(crate) attach_at: Option<String>,

    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,

    /// Write the report to a file, and not to the standard error output.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) report: Option<PathBuf>,

    /// Print no report.
    #[arg(long, conflicts_with_all = ["json", "report"])]
    pub(crate) quiet: bool,

    /// Whether a line tells how it goes while the program runs. `auto`: where the standard error
    /// output is a terminal and the standard output is none, so that the line is in nobody's way.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Progress::Auto)]
    pub(crate) progress: Progress,

    /// The program and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_name = "PROGRAM",
        value_hint = ValueHint::CommandWithArguments
    )]
    pub(crate) program: Vec<OsString>,
}

/// When there is a line that tells how it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Progress {
    Auto,
    Always,
    Never,
}

/// Run a program with the mirror device of the kernel's HMM tests.
///
/// The program, and all that it starts, finds the device of the kernel's test driver: the units
/// /dev/hmm_dmirror0 and 1, whose memory the CPU does not reach, and 2 and 3, whose memory it does,
/// and /sys/kernel/debug/gup_test. Behind them is a device in user space, so that the kernel's own
/// tests, hmm-tests, run against it as they are. Nothing is seen of it outside.
///
/// The exit status is that of the program; if a signal ends it, the same signal ends uhmm. It is
/// 125 if uhmm itself fails, 126 if the program cannot be run this way, as statically linked and
/// setuid programs cannot, and 127 if there is no such program.
#[derive(Debug, Args)]
pub(crate) struct Dmirror {
    /// The program and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_name = "PROGRAM",
        value_hint = ValueHint::CommandWithArguments
    )]
    pub(crate) program: Vec<OsString>,
}

/// Say what this system allows, what is lost, and how to change that.
///
/// The exit status is 0 if there is nothing to be said, 1 if programs can be run with something
/// lost, and 2 if they cannot be run.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Print it as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
