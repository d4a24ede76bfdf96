//! Every operation file of the simulation, on live processes: the same answers.

mod common;
#[path = "common/puppets/mod.rs"]
mod puppets;

use std::path::{Path, PathBuf};

use common::{Faults, OwnProcess, in_own_process};
use puppets::{Changes, Devices, Puppets};
use uhmm::operations::{Injection, Line, Operation, OperationFile, run};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../uhmm/tests/operations")
}

fn read(story: &str) -> OperationFile {
    let path = folder().join(format!("{story}.ops"));
    let text = std::fs::read_to_string(path).expect("an operation file is text");
    OperationFile::parse(story, &text).unwrap_or_else(|error| panic!("{error}"))
}

fn tell(story: &str, changes: Changes, devices: Devices) {
    let file = read(story);
    let mut puppets = Puppets::new(changes, devices);
    match run(&file, &mut puppets) {
        Ok(transcript) => println!("{transcript}"),
        Err(error) => panic!("{error}"),
    }
}

/// Makes tests of each story: one in which the processes announce what they do to their mappings,
/// one in which they do it and the kernel tells; and where no copy is to fail, one in which nothing
/// is copied.
macro_rules! stories {
    (copied { $($copied:ident)* } anywhere { $($anywhere:ident)* }) => {
        const COPIED: &[&str] = &[$(stringify!($copied)),*];
        const ANYWHERE: &[&str] = &[$(stringify!($anywhere)),*];

        $(mod $copied {
            use super::*;

            stories!($copied: announced, Announced, Apart);
            stories!($copied: observed, Observed, Apart);
        })*

        $(mod $anywhere {
            use super::*;

            stories!($anywhere: announced, Announced, Apart);
            stories!($anywhere: observed, Observed, Apart);
            stories!($anywhere: in_place, Announced, InPlace);
            stories!($anywhere: observed_in_place, Observed, InPlace);
        })*
    };
    ($story:ident: $name:ident, $changes:ident, $devices:ident) => {
        #[test]
        fn $name() {
            in_own_process(|| tell(stringify!($story), Changes::$changes, Devices::$devices));
        }
    };
}

stories! {
    copied {
        eviction_goes_on_after_a_failed_copy
        failed_copy_loses_nothing
        large_page_without_large_memory
        large_pages
        no_memory_to_come_home_to
    }
    anywhere {
        copy_on_write_by_the_cpu
        copy_on_write_by_the_device
        device_works_in_place
        discard
        evicted_from_both_sides
        eviction_when_full
        exclusive_against_the_cpu
        exclusive_and_fork
        exit_with_pages_out
        files_and_shared_memory
        fork_with_pages_on_a_device
        home_without_rights
        migrate_and_come_home
        mirror_ends_with_pages_out
        never_touched_pages
        parent_exits_first
        partial_unmap
        protect
        remap_of_migrated_pages
        replaced_while_away
        swapped_out
        two_devices_steal_a_page
    }
}

/// A file that nobody lists would never be run.
#[test]
fn every_file_is_a_story_here() {
    OwnProcess::new().needs(Faults::None).run(|| {
        let entries = std::fs::read_dir(folder()).expect("the folder of operation files is there");
        let mut files: Vec<_> = entries
            .map(|entry| entry.expect("it can be read").path())
            .map(|path| path.file_stem().expect("a file has a name").to_string_lossy().into_owned())
            .collect();
        files.sort();
        // Where nothing is copied no copy can fail, nor lack the memory to copy to.
        let of_a_copy = |line: &Line| match line.operation {
            Operation::Fail { injection, .. } => {
                matches!(injection, Injection::Copy(_) | Injection::Frame)
            }
            _ => false,
        };
        let (copied, anywhere): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|story| read(story).lines.iter().any(of_a_copy));
        assert_eq!(copied, COPIED);
        assert_eq!(anywhere, ANYWHERE);
    });
}

/// Is one of the processes of a story, and nothing where it was not started as one.
#[test]
#[ignore = "the stories start it"]
fn puppet() {
    puppets::puppet::serve();
}
