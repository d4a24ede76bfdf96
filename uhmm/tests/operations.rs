//! Every operation file, on the simulated machine; and the format itself.
#![cfg(not(any(loom, shuttle)))]

mod model;

use std::path::{Path, PathBuf};

use model::world::World;
use proptest::prelude::*;
use uhmm::Access;
use uhmm::operations::{
    Advice, Answer, DeviceName, FileName, Injection, Line, Memory, Operation, OperationFile, Pages,
    Place, Refusal, RunError, SpaceName, Word, run,
};

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/operations");
    let entries = std::fs::read_dir(folder).expect("the folder of operation files is there");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("it can be read").path()).collect();
    files.sort();
    files
}

fn read(path: &Path) -> OperationFile {
    let name = path.file_name().expect("a file has a name").to_string_lossy();
    let text = std::fs::read_to_string(path).expect("an operation file is text");
    OperationFile::parse(&name, &text).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn every_file_answers_as_it_says() {
    let files = files();
    assert!(files.len() >= 12, "{} operation files", files.len());
    let mut failures = Vec::new();
    for path in files {
        if let Err(error) = run(&read(&path), &mut World::new()) {
            failures.push(error.to_string());
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// What a program sees does not depend on where a device has its memory, but for the copies, and the
/// memory to copy to: they cannot fail where there are none.
#[test]
fn every_file_answers_the_same_where_nothing_is_copied() {
    let (mut ran, mut failures) = (0, Vec::new());
    for path in files() {
        let file = read(&path);
        let of_a_copy = |line: &Line| match line.operation {
            Operation::Fail { injection, .. } => {
                matches!(injection, Injection::Copy(_) | Injection::Frame)
            }
            _ => false,
        };
        if file.devices.is_empty() || file.lines.iter().any(of_a_copy) {
            continue;
        }
        ran += 1;
        if let Err(error) = run(&file, &mut World::in_place()) {
            failures.push(error.to_string());
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    assert!(ran >= 20, "{ran} files copy nothing");
}

/// Each story must say something: a file without expectations would pass anywhere.
#[test]
fn every_file_expects_answers() {
    for path in files() {
        let file = read(&path);
        let expecting = file.lines.iter().filter(|line| !line.expected.is_empty()).count();
        assert!(expecting >= 4, "{} expects {expecting} answers", file.name);
    }
}

#[test]
fn a_file_that_is_written_out_reads_the_same() {
    for path in files() {
        let file = read(&path);
        let written = OperationFile::parse(&file.name, &file.to_string());
        let written = written.unwrap_or_else(|error| panic!("{error}"));
        let plain = |file: &OperationFile| -> Vec<_> {
            file.lines.iter().map(|line| (line.operation, line.expected.clone())).collect()
        };
        assert_eq!(plain(&written), plain(&file), "{}", file.name);
        assert_eq!(
            (written.arena, &written.devices, &written.files),
            (file.arena, &file.devices, &file.files)
        );
    }
}

fn story(text: &str) -> Result<uhmm::operations::Transcript, RunError> {
    let file = OperationFile::parse("story.ops", text).unwrap_or_else(|error| panic!("{error}"));
    run(&file, &mut World::new())
}

#[test]
fn a_wrong_answer_is_reported_by_file_and_line() {
    let error = story("arena 1\nspawn A\nmap A 0 1 anon rw\nwrite A 0 1\n\nread A 0 => 2 | hole\n")
        .expect_err("it is 1");
    assert_eq!(error.to_string(), "story.ops:6: `read A 0`: expected 0x2 or hole, got 0x1");
}

#[test]
fn a_refusal_that_nobody_expects_is_a_mismatch() {
    let error = story("arena 1\nspawn A\nwrite A 0 1\n").expect_err("nothing is mapped");
    let expected = "story.ops:3: `write A 0 0x1`: expected anything but a refusal, got hole";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_transcript_can_be_run_again() {
    let scene = "arena 2\ndevice g0 1\n";
    let text = "spawn A\nmap A 0 2 anon rw\nadd A 1 3\nmigrate g0 A 1 1\nwhere A 1\nread A 1\n";
    let first = story(&format!("{scene}{text}")).expect("nothing is expected");
    assert_eq!(first.0.last().map(|record| record.answer), Some(Answer::Value(3)));
    let again = story(&format!("{scene}{first}")).expect("the answers are the same");
    assert_eq!(again, first);
}

#[test]
fn what_is_no_operation_is_refused_with_its_line() {
    let cases = [
        ("spawn A", "f:1: expected `arena` and a number of pages first, found `spawn A`"),
        ("arena 0", "f:1: expected how many pages the arena has, found `0`"),
        ("arena 4\n\nspawn a", "f:3: expected a space, `A` to `Z`, found `a`"),
        ("arena 4\nspawn", "f:2: expected a space, `A` to `Z`, found the end of the line"),
        ("arena 4\nspawn A B", "f:2: expected the end of the line, found `B`"),
        ("arena 4\nfly A", "f:2: expected an operation, found `fly`"),
        ("arena 4\nunmap A 3 2", "f:2: expected a page below 4, found `4`"),
        ("arena 4\nremap A 0 2 3", "f:2: expected a page below 4, found `4`"),
        (
            "arena 4\nread A 1+4",
            "f:2: expected a page, or a page and an offset such as `3+0x8`, found `1+4`",
        ),
        ("arena 4\nmap A 0 1 anon wr", "f:2: expected `none`, `r` or `rw`, found `wr`"),
        ("arena 4\nmigrate g0 A 0 1", "f:2: expected a device of the scene, found `g0`"),
        ("arena 4\ntruncate f1 2", "f:2: expected a file of the scene, found `f1`"),
        ("arena 4\nread A 0 => maybe", "f:2: expected an answer, found `maybe`"),
        ("arena 4\nread A 0 => 1 |", "f:2: expected an answer, found the end of the line"),
        ("arena 4\nwrite A 0 +1", "f:2: expected a value, found `+1`"),
        (
            "arena 4\nspawn A\ndevice g0 1",
            "f:3: expected `arena` once and first, then the scene, then operations, found `device`",
        ),
    ];
    for (text, expected) in cases {
        let error = OperationFile::parse("f", text).expect_err(text);
        assert_eq!(error.to_string(), expected);
    }
}

fn space() -> impl Strategy<Value = SpaceName> {
    prop::char::range('A', 'Z').prop_map(|letter| SpaceName::new(letter).expect("a letter"))
}

fn device() -> impl Strategy<Value = DeviceName> {
    any::<u8>().prop_map(DeviceName)
}

fn pages() -> impl Strategy<Value = Pages> {
    (0..u64::MAX / 2, 1..=u64::MAX / 2).prop_map(|(first, count)| Pages { first, count })
}

fn word() -> impl Strategy<Value = Word> {
    (any::<u64>(), 0..512_u16).prop_map(|(page, word)| Word { page, offset: word * 8 })
}

fn access(of: &'static [Access]) -> impl Strategy<Value = Access> {
    prop::sample::select(of)
}

fn allowed() -> impl Strategy<Value = Access> {
    access(&[Access::None, Access::Read, Access::Write])
}

fn memory() -> impl Strategy<Value = Memory> {
    let file = || (any::<u8>().prop_map(FileName), any::<u64>());
    prop_oneof![
        Just(Memory::Anonymous),
        Just(Memory::Huge),
        Just(Memory::Shared),
        file().prop_map(|(file, first)| Memory::File { file, first }),
        file().prop_map(|(file, first)| Memory::PrivateFile { file, first }),
    ]
}

fn injection() -> impl Strategy<Value = Injection> {
    prop_oneof![
        Just(Injection::Frame),
        Just(Injection::Split),
        device().prop_map(Injection::Allocate),
        device().prop_map(Injection::Copy),
        device().prop_map(Injection::Clear),
    ]
}

fn system_operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let value = any::<u64>;
    let advice = prop::sample::select(&Advice::ALL[..]);
    prop_oneof![
        space().prop_map(|space| Spawn { space }),
        (space(), space()).prop_map(|(space, child)| Fork { space, child }),
        space().prop_map(|space| Exit { space }),
        (space(), pages(), memory(), allowed()).prop_map(|(space, pages, memory, access)| Map {
            space,
            pages,
            memory,
            access
        }),
        (space(), pages()).prop_map(|(space, pages)| Unmap { space, pages }),
        (space(), pages(), allowed()).prop_map(|(space, pages, access)| Protect {
            space,
            pages,
            access
        }),
        (space(), pages(), 0..u64::MAX / 2).prop_map(|(space, pages, to)| Remap {
            space,
            pages,
            to
        }),
        (space(), pages()).prop_map(|(space, pages)| Discard { space, pages }),
        (advice, space(), pages()).prop_map(|(advice, space, pages)| Advise {
            advice,
            space,
            pages
        }),
        (space(), word()).prop_map(|(space, word)| Read { space, word }),
        (space(), word(), value()).prop_map(|(space, word, value)| Write { space, word, value }),
        (space(), word(), value()).prop_map(|(space, word, value)| Add { space, word, value }),
        (space(), pages()).prop_map(|(space, pages)| Home { space, pages }),
        (space(), value()).prop_map(|(space, page)| Where { space, page }),
        (any::<u8>(), value()).prop_map(|(file, pages)| Truncate { file: FileName(file), pages }),
        (any::<u8>(), pages()).prop_map(|(file, pages)| Punch { file: FileName(file), pages }),
        (injection(), value()).prop_map(|(injection, after)| Fail { injection, after }),
        Just(Succeed),
    ]
}

fn device_operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let value = any::<u64>;
    let wanted = access(&[Access::Read, Access::Write, Access::Atomic]);
    prop_oneof![
        (device(), space(), word()).prop_map(|(device, space, word)| DeviceRead {
            device,
            space,
            word
        }),
        (device(), space(), word(), value()).prop_map(|(device, space, word, value)| DeviceWrite {
            device,
            space,
            word,
            value
        }),
        (device(), space(), word(), value()).prop_map(|(device, space, word, value)| DeviceAdd {
            device,
            space,
            word,
            value
        }),
        (device(), space(), value(), wanted).prop_map(|(device, space, page, access)| {
            DeviceFault { device, space, page, access }
        }),
        (device(), space(), pages()).prop_map(|(device, space, pages)| Migrate {
            device,
            space,
            pages
        }),
        (device(), value()).prop_map(|(device, count)| Evict { device, count }),
        (device(), space(), pages()).prop_map(|(device, space, pages)| Exclusive {
            device,
            space,
            pages
        }),
        (device(), space(), pages()).prop_map(|(device, space, pages)| Release {
            device,
            space,
            pages
        }),
        (device(), space()).prop_map(|(device, space)| Attach { device, space }),
        (device(), space()).prop_map(|(device, space)| Detach { device, space }),
    ]
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        Just(Answer::Done),
        any::<u64>().prop_map(Answer::Value),
        prop::sample::select(&Refusal::ALL[..]).prop_map(Answer::Refused),
        Just(Answer::At(Place::Nowhere)),
        Just(Answer::At(Place::System)),
        device().prop_map(|device| Answer::At(Place::Device(device))),
        device().prop_map(|device| Answer::At(Place::Held(device))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_operation_that_is_written_out_reads_the_same(
        operation in prop_oneof![system_operation(), device_operation()],
    ) {
        prop_assert_eq!(operation.to_string().parse::<Operation>(), Ok(operation));
    }

    #[test]
    fn an_answer_that_is_written_out_reads_the_same(answer in answer()) {
        prop_assert_eq!(answer.to_string().parse::<Answer>(), Ok(answer));
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[a-zA-Z0-9 =>|+#\n]{0,60}") {
        let _ = OperationFile::parse("f", &format!("arena 4\ndevice g0 1\n{text}"));
    }
}
