//! The command `uhmm`: runs a program under a memory budget.

#![forbid(unsafe_code)]

mod args;
mod device;
mod dmirror;
mod doctor;
mod failure;
mod preload;
mod program;
mod report;
mod run;
mod size;
mod supervise;
mod watch;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::args::{Arguments, Task};
use crate::failure::{Failure, status};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return not_understood(&error),
    };
    let done = match arguments.command {
        Task::Run(run) => run::run(&run),
        Task::Dmirror(dmirror) => dmirror::dmirror(&dmirror),
        Task::DmirrorBroker => dmirror::serve(),
        Task::Doctor(doctor) => doctor::doctor(&doctor),
        Task::Completions { shell } => completions(shell),
        Task::Man { command } => man(command.as_deref()),
    };
    done.unwrap_or_else(|failure| {
        complain(&failure.to_string());
        ExitCode::from(failure.status())
    })
}

/// Writes one line to the standard error output, if there is one.
fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "uhmm: {line}");
}

/// Answers a command line that asks for help, or makes no sense: that is the status 125 and one
/// line, as env(1) has it, so that it is not taken for a status of the program.
fn not_understood(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let printed = error.print();
        return printed.map_or(ExitCode::from(status::FAILED), |()| ExitCode::SUCCESS);
    }
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = first.split_whitespace().collect();
    let line = words.join(" ");
    complain(&format!("{}; see uhmm --help", line.strip_prefix("error: ").unwrap_or(&line)));
    ExitCode::from(status::FAILED)
}

fn completions(shell: clap_complete::Shell) -> Result<ExitCode, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "uhmm", &mut text);
    print(&text)
}

fn man(command: Option<&str>) -> Result<ExitCode, Failure> {
    let mut definition = Arguments::command();
    definition.build();
    let page = command.and_then(|name| definition.find_subcommand(name)).unwrap_or(&definition);
    // A page of its own is called as the command is: uhmm-run(1).
    let name = page.get_display_name().unwrap_or(page.get_name()).to_owned();
    let mut text = Vec::new();
    let rendered = clap_mangen::Man::new(page.clone().name(name)).render(&mut text);
    rendered.map_err(|error| Failure::own(format!("the man page: {error}")))?;
    print(&text)
}

/// Writes to the standard output.
fn print(text: &[u8]) -> Result<ExitCode, Failure> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text).and_then(|()| out.flush());
    written.map_err(|error| Failure::own(format!("standard output: {error}")))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_defined() {
        Arguments::command().debug_assert();
    }
}
