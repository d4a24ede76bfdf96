//! What a process holds, to be compared before and after.

use std::fmt;
use std::fs;

use super::memory;

/// What a process holds at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// What each descriptor is.
    pub(crate) descriptors: Vec<String>,
    /// The name of each thread.
    pub(crate) threads: Vec<String>,
    /// How many mappings there are. Steady only once the allocators and the cache of stacks are.
    pub(crate) mappings: usize,
    /// Mappings that are registered with a userfaultfd.
    pub(crate) registered: Vec<String>,
}

/// Returns what this process holds.
pub(crate) fn holdings() -> Holdings {
    let mut descriptors: Vec<_> = entries("/proc/self/fd")
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        // The one that lists them.
        .filter(|target| !target.ends_with("/fd"))
        .collect();
    descriptors.sort();
    let mut threads: Vec<_> = entries("/proc/self/task")
        .filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    threads.sort();
    let mappings = memory::lines().len();
    Holdings { descriptors, threads, mappings, registered: registered() }
}

impl Holdings {
    /// Says what there is more or less of than before; an empty text if nothing. Mappings count only
    /// if they are registered and were not: what an allocator keeps is its own affair, and a child
    /// has what its parent registered until the parent lets go of it.
    pub(crate) fn difference(&self, before: &Holdings) -> String {
        let mut report = String::new();
        compare("descriptors", &before.descriptors, &self.descriptors, &mut report);
        compare("threads", &before.threads, &self.threads, &mut report);
        let new = |line: &&String| !before.registered.contains(line);
        let new: Vec<_> = self.registered.iter().filter(new).collect();
        if !new.is_empty() {
            report += &format!("registered mappings: new {new:?}\n");
        }
        report
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holdings { descriptors, threads, mappings, registered } = self;
        write!(
            f,
            "{} descriptors, {} threads, {mappings} mappings, {} of them registered",
            descriptors.len(),
            threads.len(),
            registered.len()
        )
    }
}

/// Returns the mappings that `/proc/self/smaps` says a userfaultfd is told of.
fn registered() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/smaps").expect("proc is mounted");
    let mut found = Vec::new();
    let mut mapping = "";
    for line in text.lines() {
        match line.strip_prefix("VmFlags:") {
            // Missing, write-protect, minor.
            Some(flags) if flags.split(' ').any(|flag| ["um", "uw", "ui"].contains(&flag)) => {
                found.push(mapping.to_owned());
            }
            Some(_) => {}
            None if line.starts_with(|letter: char| {
                letter.is_ascii_hexdigit() && !letter.is_ascii_uppercase()
            }) =>
            {
                mapping = line
            }
            None => {}
        }
    }
    found
}

fn entries(folder: &str) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(folder).expect("proc is mounted").flatten()
}

fn compare(what: &str, before: &[String], after: &[String], report: &mut String) {
    let mut gone: Vec<_> = before.to_vec();
    let mut new = Vec::new();
    for item in after {
        match gone.iter().position(|known| known == item) {
            Some(at) => drop(gone.swap_remove(at)),
            None => new.push(item),
        }
    }
    if !new.is_empty() || !gone.is_empty() {
        *report += &format!("{what}: new {new:?}, gone {gone:?}\n");
    }
}
