//! What `/proc` tells of processes.

use std::io;
use std::os::linux::fs::MetadataExt;

use super::layout::Identity;

/// Returns what tells the process-id namespace of this process from others.
pub(crate) fn pid_namespace() -> io::Result<u64> {
    Ok(std::fs::metadata("/proc/self/ns/pid")?.st_ino())
}

/// Returns who the process with this number is; nothing if there is none, or it has ended and is
/// only waited for.
pub(crate) fn identity(pid: u32) -> Option<Identity> {
    parse(pid, &std::fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Tells whether this process still exists. It does where nobody says that it does not: `/proc` may
/// be out of reach for other reasons.
pub(crate) fn lives(identity: Identity) -> bool {
    match std::fs::read(format!("/proc/{}/stat", identity.pid)) {
        Ok(stat) => parse(identity.pid, &stat) == Some(identity),
        // ESRCH: it ended between the opening and the reading.
        Err(error) => {
            error.kind() != io::ErrorKind::NotFound
                && error.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error())
        }
    }
}

/// Reads a line of proc_pid_stat(5).
fn parse(pid: u32, stat: &[u8]) -> Option<Identity> {
    // The name, in brackets, may have anything in it.
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let state = fields.first()?;
    let threads: u64 = fields.get(17)?.parse().ok()?;
    let started: u64 = fields.get(19)?.parse().ok()?;
    // The first thread of a process may have ended and others not.
    let ended = *state == "X" || *state == "Z" && threads <= 1;
    (!ended).then_some(Identity { pid, started })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_stat_is_read() {
        let line = |state: &str, threads: u64| {
            format!(
                "77 (a) b (c) {state} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 {threads} 0 4711 9 9"
            )
        };
        let alive = Some(Identity { pid: 77, started: 4711 });
        let rows =
            [("R", 1, alive), ("T", 3, alive), ("Z", 1, None), ("Z", 2, alive), ("X", 1, None)];
        for (state, threads, expected) in rows {
            assert_eq!(parse(77, line(state, threads).as_bytes()), expected, "{state} {threads}");
        }
        assert_eq!(parse(77, b"77 (a"), None);
        assert_eq!(parse(77, b"77 (a) R 1"), None);
    }

    #[test]
    fn a_process_lives_until_it_was_waited_for() {
        let own = identity(std::process::id()).expect("this process exists");
        assert!(lives(own));
        assert!(!lives(Identity { started: own.started + 1, ..own }));

        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("cat starts");
        let identity_of_child = identity(child.id()).expect("it exists");
        assert!(lives(identity_of_child));
        child.kill().expect("it is ours to kill");
        child.wait().expect("it ends");
        assert!(!lives(identity_of_child));
    }
}
