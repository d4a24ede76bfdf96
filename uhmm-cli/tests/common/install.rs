//! Programs that tests run, from Debian where they are missing.
//!
//! Only root can install, and only with apt-get(8). What is fetched is fetched first, which can be
//! given up at any moment and is, after a while: a machine may be offline. What has been fetched is
//! installed without a limit, since a package that is half installed is worse than none. Tests of
//! several programs and processes may want this at once: one does it, and the others wait for it. It
//! is tried once in a process.
//!
//! `UHMM_INSTALL_PROGRAMS=0` says that nothing is to be installed.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process_group};

/// The packages that the programs of all tests are in.
const PACKAGES: [&str; 8] = [
    "bsdutils",
    "coreutils",
    "gcc",
    "libc6-dev",
    "python3",
    "redis-server",
    "stress-ng",
    "util-linux",
];

/// How long all that is fetched may take, with the wait for who does it already.
const PATIENCE: Duration = Duration::from_secs(120);

/// Who has this file locked installs. It is not removed: another one could have opened it already.
const LOCK: &str = "uhmm-test-install.lock";

/// Installs what is missing, or says why not; once.
pub(crate) fn install() -> Result<(), String> {
    static DONE: OnceLock<Result<(), String>> = OnceLock::new();
    DONE.get_or_init(|| {
        let done = try_install();
        if let Err(why) = &done {
            eprintln!("NOT INSTALLED: {}: {why}", PACKAGES.join(" "));
        }
        done
    })
    .clone()
}

fn try_install() -> Result<(), String> {
    if std::env::var_os("UHMM_INSTALL_PROGRAMS").is_some_and(|value| value == "0") {
        return Err("UHMM_INSTALL_PROGRAMS=0".to_owned());
    }
    if !rustix::process::getuid().is_root() {
        return Err("only root can install: apt-get install them, or run this as root".to_owned());
    }
    let deadline = Instant::now() + PATIENCE;
    let _lock = lock(deadline)?;
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(PACKAGES);
    let mut fetch = install.clone();
    fetch.insert(1, "--download-only");
    // A fresh machine has no lists, an old one those of packages that are gone.
    if apt_get(&fetch, Some(deadline)).is_err() {
        apt_get(&["update"], Some(deadline))?;
        apt_get(&fetch, Some(deadline))?;
    }
    install.insert(1, "--no-download");
    apt_get(&install, None)
}

/// Waits until nobody else installs.
fn lock(deadline: Instant) -> Result<File, String> {
    let path = std::env::temp_dir().join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| format!("{}: {error}", path.display()))?;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > deadline {
            return Err(format!("{} is locked by somebody else for too long", path.display()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(file)
}

/// Runs apt-get; until `deadline`, if there is one. Says its last words where it fails.
fn apt_get(arguments: &[&str], deadline: Option<Instant>) -> Result<(), String> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=60"]);
    command.args(["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10"]).args(arguments);
    let words = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    let output = |file: &File| file.try_clone().map_err(|error| error.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(output(words.as_file())?);
    let mut child = command
        .process_group(0)
        .spawn()
        .map_err(|error| format!("apt-get: {error}: install the programs by hand"))?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            break status;
        }
        if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            // It may have ended just now.
            let _ = group.map(|group| kill_process_group(group, Signal::KILL));
            let _ = child.wait();
            return Err(format!("apt-get took more than {PATIENCE:?}: is this machine offline?"));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    if status.success() {
        return Ok(());
    }
    let words = std::fs::read_to_string(words.path()).unwrap_or_default();
    let last = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
    Err(format!("apt-get {}: {status}: {last}", arguments[0]))
}
