//! What goes on beside the program while it runs: dead processes are taken out of the ledger, and a
//! line on the terminal tells how it goes.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use uhmm_agent::ledger::{Counter, Ledger, Stock};

use crate::args::Progress;
use crate::size::Bytes;

/// How often the ledger is looked at.
const PERIOD: Duration = Duration::from_millis(250);

/// How many of these a line stays.
const PERIODS_OF_A_LINE: u32 = 2;

/// A thread that looks at the ledger until this is dropped. Then the line is gone.
#[derive(Debug)]
pub(crate) struct Watch {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Whether there is a line on the terminal now. Held while one is written.
static LINE: Mutex<bool> = Mutex::new(false);

impl Watch {
    /// Begins.
    pub(crate) fn begin(ledger: &Ledger, progress: Progress) -> io::Result<Watch> {
        let (end, ended) = mpsc::channel();
        let (ledger, shown) = (ledger.clone(), is_shown(progress));
        let look = move || {
            let mut tick = 0_u32;
            let mut before = 0;
            while ended.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                ledger.reap();
                let stock = ledger.take_stock();
                tick = tick.wrapping_add(1);
                if shown && tick.is_multiple_of(PERIODS_OF_A_LINE) {
                    let home = ledger.totals().numbers.counter(Counter::PagesHome);
                    let seconds = PERIOD.as_secs_f64() * f64::from(PERIODS_OF_A_LINE);
                    let rate = home.saturating_sub(before) as f64 / seconds;
                    before = home;
                    draw(&line(stock, ledger.config().budget, rate));
                }
            }
        };
        let thread = thread::Builder::new().name("uhmm-watch".to_owned()).spawn(look)?;
        Ok(Watch { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // What went wrong there was printed there.
            let _ = thread.join();
        }
        wipe();
    }
}

/// Tells whether the line is to be shown.
fn is_shown(progress: Progress) -> bool {
    match progress {
        Progress::Always => true,
        Progress::Never => false,
        // A program whose output goes elsewhere does not draw on the terminal.
        Progress::Auto => io::stderr().is_terminal() && !io::stdout().is_terminal(),
    }
}

/// Writes the line over the one before.
fn draw(text: &str) {
    let mut shown = LINE.lock().unwrap_or_else(PoisonError::into_inner);
    if !in_foreground() {
        return;
    }
    *shown = true;
    // One write: it comes out in one piece. A line that wraps could not be wiped.
    let width = rustix::termios::tcgetwinsize(io::stderr()).map_or(80, |size| size.ws_col.max(20));
    let text: String = text.chars().take(usize::from(width) - 1).collect();
    let _ = io::stderr().write_all(format!("\r{text}\x1b[K").as_bytes());
}

/// Takes the line away, if there is one.
pub(crate) fn wipe() {
    let mut shown = LINE.lock().unwrap_or_else(PoisonError::into_inner);
    if std::mem::take(&mut *shown) {
        let _ = io::stderr().write_all(b"\r\x1b[K");
    }
}

/// Tells whether the terminal is this job's: else who writes could be stopped for it. True where
/// the standard error output is no terminal, which nobody is stopped for.
fn in_foreground() -> bool {
    match rustix::termios::tcgetpgrp(io::stderr()) {
        Ok(group) => group == rustix::process::getpgrp(),
        Err(_) => true,
    }
}

/// Says how it goes.
fn line(stock: Stock, budget: u64, home_per_second: f64) -> String {
    let Stock { resident, away, stored, .. } = stock;
    let ratio = match (away, stored) {
        (0, _) | (_, 0) => String::new(),
        _ => format!(" in {}", Bytes(stored)),
    };
    format!(
        "uhmm: {} of {} at home, {} away{ratio}, {home_per_second:.0} pages/s coming home",
        Bytes(resident),
        Bytes(budget),
        Bytes(away)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_where() {
        let stock = Stock { resident: 400 << 20, ..Stock::default() };
        let all_home = "uhmm: 400 MiB of 512 MiB at home, 0 B away, 0 pages/s coming home";
        assert_eq!(line(stock, 512 << 20, 0.0), all_home);
        let stock = Stock { away: 3 << 29, stored: 1 << 29, ..stock };
        let some_away =
            "uhmm: 400 MiB of 512 MiB at home, 1.5 GiB away in 512 MiB, 12 pages/s coming home";
        assert_eq!(line(stock, 512 << 20, 12.4), some_away);
    }
}
