//! Where the threads of a process are, for the report of a test that hangs.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Says of each thread of each process of a group what it is doing, in the kernel and before it.
pub(crate) fn of_group(group: u32) -> String {
    let mut report = String::new();
    for pid in members(group) {
        report += &of_process(pid);
    }
    report
}

/// Returns the processes of a group that have not ended.
pub(crate) fn members(group: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("proc is mounted").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let lives = |pid: &u32| {
        let path = PathBuf::from(format!("/proc/{pid}"));
        let group = group.to_string();
        stat_field(&path, 2).is_some_and(|of| of == group)
            && stat_field(&path, 0).is_some_and(|state| state != "Z")
    };
    pids.filter(lives).collect()
}

/// Says of each thread of a process what it is doing.
pub(crate) fn of_process(pid: u32) -> String {
    let mut report = String::new();
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return format!("process {pid} is gone\n");
    };
    for thread in threads.flatten() {
        let path = thread.path();
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        let id = thread.file_name();
        let state = stat_field(&path, 0).unwrap_or_default();
        let _ = writeln!(
            report,
            "process {pid}, thread {} `{}`: state {state}, waits in {}, system call {}",
            id.to_string_lossy(),
            read("comm").trim(),
            read("wchan").trim(),
            read("syscall").trim(),
        );
        // Only for root, and only where the kernel keeps them.
        read("stack").lines().for_each(|line| _ = writeln!(report, "    {line}"));
    }
    report
}

/// Returns a field of `stat`, counted from the state.
fn stat_field(path: &Path, field: usize) -> Option<String> {
    let stat = fs::read_to_string(path.join("stat")).ok()?;
    // The name before the fields may hold anything, and ends at the last parenthesis.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(field).map(str::to_owned)
}
