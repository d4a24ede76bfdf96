//! Every operation file of the simulation, on live processes: the same answers.

mod common;
#[path = "common/puppets/mod.rs"]
mod puppets;

use std::path::{Path, PathBuf};

use common::{Faults, OwnProcess, in_own_process};
use puppets::{Changes, Puppets};
use uhmm::operations::{OperationFile, run};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../uhmm/tests/operations")
}

fn tell(story: &str, changes: Changes) {
    let path = folder().join(format!("{story}.ops"));
    let text = std::fs::read_to_string(path).expect("an operation file is text");
    let file = OperationFile::parse(story, &text).unwrap_or_else(|error| panic!("{error}"));
    let mut puppets = Puppets::new(changes);
    match run(&file, &mut puppets) {
        Ok(transcript) => println!("{transcript}"),
        Err(error) => panic!("{error}"),
    }
}

/// Makes two tests of each story: one in which the processes announce what they do to their
/// mappings, and one in which they do it and the kernel tells.
macro_rules! stories {
    ($($name:ident)*) => {
        const STORIES: &[&str] = &[$(stringify!($name)),*];

        $(mod $name {
            use super::*;

            #[test]
            fn announced() {
                in_own_process(|| tell(stringify!($name), Changes::Announced));
            }

            #[test]
            fn observed() {
                in_own_process(|| tell(stringify!($name), Changes::Observed));
            }
        })*
    };
}

stories! {
    copy_on_write_by_the_cpu
    copy_on_write_by_the_device
    device_works_in_place
    discard
    evicted_from_both_sides
    eviction_goes_on_after_a_failed_copy
    eviction_when_full
    exclusive_against_the_cpu
    exclusive_and_fork
    exit_with_pages_out
    failed_copy_loses_nothing
    files_and_shared_memory
    fork_with_pages_on_a_device
    home_without_rights
    large_page_without_large_memory
    large_pages
    migrate_and_come_home
    mirror_ends_with_pages_out
    never_touched_pages
    no_memory_to_come_home_to
    parent_exits_first
    partial_unmap
    protect
    remap_of_migrated_pages
    replaced_while_away
    swapped_out
    two_devices_steal_a_page
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
        assert_eq!(files, STORIES);
    });
}

/// Is one of the processes of a story, and nothing where it was not started as one.
#[test]
#[ignore = "the stories start it"]
fn puppet() {
    puppets::puppet::serve();
}
