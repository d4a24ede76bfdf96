//! Which system calls change what is mapped, and what is done about each.
//!
//! The table is the one place: the filter is made from it, the executors look calls up in it, and a
//! test compares `docs/announced.md` with it. What is not in it does not stop.

use crate::sys::seccomp;

/// When a call stops. Arguments are counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// Always.
    Always,
    /// If an argument has any of these bits.
    Any(usize, u32),
    /// If an argument is one of these.
    OneOf(usize, &'static [u32]),
    /// If an argument is not 0.
    NotZero(usize),
}

/// The calls that stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the kernel's")]
pub(crate) enum Call {
    Munmap,
    Mmap,
    Mremap,
    Mprotect,
    PkeyMprotect,
    Madvise,
    ProcessMadvise,
    Brk,
    Shmat,
    Shmdt,
    RemapFilePages,
    Truncate,
    Ftruncate,
    Fallocate,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "the name is for those who debug, and for a test")
)]
pub(crate) struct Row {
    pub(crate) call: Call,
    pub(crate) name: &'static str,
    /// Its number among the system's own calls.
    pub(crate) number: i64,
    pub(crate) when: When,
}

/// The advice that drops or replaces pages: DONTNEED, FREE, REMOVE, DONTNEED_LOCKED, GUARD_INSTALL.
pub(crate) const DESTRUCTIVE: &[u32] =
    &[libc::MADV_DONTNEED as u32, libc::MADV_FREE as u32, libc::MADV_REMOVE as u32, 24, 102];

/// `FALLOC_FL_PUNCH_HOLE`, `COLLAPSE_RANGE`, `ZERO_RANGE` and `INSERT_RANGE`.
const REPLACES: u32 = 0x02 | 0x08 | 0x10 | 0x20;

const fn row(call: Call, name: &'static str, number: i64, when: When) -> Row {
    Row { call, name, number, when }
}

/// What stops, the most frequent first.
pub(crate) const STOPS: &[Row] = &[
    row(Call::Munmap, "munmap", libc::SYS_munmap, When::Always),
    row(Call::Mprotect, "mprotect", libc::SYS_mprotect, When::Always),
    row(Call::Mmap, "mmap", libc::SYS_mmap, When::Any(3, libc::MAP_FIXED as u32)),
    row(Call::Madvise, "madvise", libc::SYS_madvise, When::OneOf(2, DESTRUCTIVE)),
    row(Call::Brk, "brk", libc::SYS_brk, When::NotZero(0)),
    row(Call::Mremap, "mremap", libc::SYS_mremap, When::Always),
    row(Call::PkeyMprotect, "pkey_mprotect", libc::SYS_pkey_mprotect, When::Always),
    row(
        Call::ProcessMadvise,
        "process_madvise",
        libc::SYS_process_madvise,
        When::OneOf(3, DESTRUCTIVE),
    ),
    row(Call::Shmat, "shmat", libc::SYS_shmat, When::Any(2, libc::SHM_REMAP as u32)),
    row(Call::Shmdt, "shmdt", libc::SYS_shmdt, When::Always),
    row(Call::RemapFilePages, "remap_file_pages", libc::SYS_remap_file_pages, When::Always),
    row(Call::Truncate, "truncate", libc::SYS_truncate, When::Always),
    row(Call::Ftruncate, "ftruncate", libc::SYS_ftruncate, When::Always),
    row(Call::Fallocate, "fallocate", libc::SYS_fallocate, When::Any(1, REPLACES)),
];

/// The numbers of the same calls for programs of 32 bits on x86 (`int 0x80`): from threads of this
/// process they are refused, since what they say is not looked at.
pub(crate) const COMPAT: &[u32] =
    &[91, 125, 163, 219, 45, 90, 192, 397, 398, 257, 92, 93, 193, 194, 324, 380, 440, 117];

/// The bit of the numbers of calls in the x32 manner.
pub(crate) const X32: u32 = 0x4000_0000;

/// Finds the row of a call that has stopped. `None` if it is not of the system's own kind.
pub(crate) fn find(call: &seccomp::Notification) -> Option<&'static Row> {
    let native = call.architecture == seccomp::NATIVE;
    native.then(|| STOPS.iter().find(|row| row.number == i64::from(call.number))).flatten()
}

/// Tells whether a call is made in the x32 manner.
pub(crate) fn is_x32(call: &seccomp::Notification) -> bool {
    call.architecture == seccomp::NATIVE && call.number as u32 & X32 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page has a row for each call, and no others.
    #[test]
    fn the_page_for_users_has_the_same_calls() {
        let page = include_str!("../../docs/announced.md");
        let rows = page.lines().filter(|line| line.contains("| proxy"));
        let name = |line: &str| line.split('`').nth(1).map(str::to_owned);
        let mut written: Vec<String> = rows.filter_map(name).collect();
        let mut stops: Vec<String> = STOPS.iter().map(|row| row.name.to_owned()).collect();
        written.sort();
        stops.sort();
        assert_eq!(written, stops);
    }
}
