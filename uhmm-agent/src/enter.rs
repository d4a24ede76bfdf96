//! How a program comes under management: at its start, after `execve`, and after `fork`.
//!
//! The library is loaded with the program, and its constructor runs before `main`. It does as
//! little as can be: it looks for a ledger, installs the filter, and starts one thread, the
//! *keeper*. The program attaches when the keeper finds that it has grown ([`ATTACH_BYTES`]): most
//! of a shell script's programs never do, and pay for a thread and no more. Where the user wants it to
//! attach at its start, the constructor waits for that, so that all of `main` is managed.
//!
//! Nothing here may fail the program. What goes wrong is a remark in the ledger, and the program
//! runs on as if nobody had asked.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::edge::{children, filter, process};
use crate::keeper::Keeper;
use crate::ledger::{Ledger, Slot};

/// The variable of the environment that says where the ledger is.
pub const LOCATION: &str = "UHMM_RUN";

/// The ledger that the environment named. Children of `fork` inherit it.
static LEDGER: OnceLock<Ledger> = OnceLock::new();

/// How long a child of `fork` must live before it is managed: most execute another program at once,
/// or end.
const CHILD_PAUSE: Duration = Duration::from_millis(100);

/// How long a program may be held up until it is managed, where it is to be from its start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long the keeper of a new program waits before it first looks.
const PROGRAM_PAUSE: Duration = Duration::from_millis(2);

/// Does what the constructor of the preloaded library is to do. Without a ledger it does nothing.
pub fn enter() {
    // Looked up now, while nobody else can be changing the environment.
    let Some(location) = std::env::var_os(LOCATION) else { return };
    // Where it is gone the supervisor has ended, and nobody wants anything any more.
    let Ok(ledger) = Ledger::open(&location) else { return };
    let Some(slot) = claim(LEDGER.get_or_init(|| ledger)) else { return };
    match filter::install() {
        Ok(()) => {}
        Err(error) => slot.warn(&format!(
            "MADV_GUARD_INSTALL, SHM_REMAP and remap_file_pages are not refused ({error}): where a \
             program uses them on memory that is away, old contents may come back; run as root, or \
             with NO_NEW_PRIVS (setpriv --no-new-privs)"
        )),
    }
    children::follow(child);
    begin(slot, PROGRAM_PAUSE);
}

/// Begins to look after a child of `fork`, in it.
fn child() {
    let started = process::start_thread("uhmm-keeper", || {
        std::thread::sleep(CHILD_PAUSE);
        if let Some(slot) = LEDGER.get().and_then(claim) {
            Keeper::run(Arc::new(slot), Duration::ZERO, None);
        }
    });
    if let Err(error) = started
        && let Some(slot) = LEDGER.get().and_then(claim)
    {
        slot.not_managed(&format!("there is no room for a thread ({error})"));
    }
}

/// Starts the keeper.
fn begin(slot: Slot, pause: Duration) {
    let slot = Arc::new(slot);
    let keeper = Arc::clone(&slot);
    let at_once = slot.ledger().config().attach_at == Some(0);
    let pause = if at_once { Duration::ZERO } else { pause };
    let (decided, when_decided) = channel();
    let run = move || Keeper::run(keeper, pause, at_once.then_some(decided));
    if let Err(error) = process::start_thread("uhmm-keeper", run) {
        slot.not_managed(&format!("there is no room for a thread ({error})"));
        return;
    }
    // Nothing is ever sent: the other side is dropped.
    if at_once && when_decided.recv_timeout(START_LIMIT) == Err(RecvTimeoutError::Timeout) {
        slot.warn("a program began before it was managed: the machine is busy");
    }
}

/// Takes a slot.
fn claim(ledger: &Ledger) -> Option<Slot> {
    ledger.claim(std::process::id(), &name())
}

/// Returns the name of the program: as it was called, up to 15 bytes.
fn name() -> OsString {
    let name = std::fs::read("/proc/self/comm").unwrap_or_else(|_| b"?".to_vec());
    OsString::from_vec(name.trim_ascii_end().to_vec())
}
