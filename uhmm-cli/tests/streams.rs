//! What the program sees of its surroundings, which is what it would see without `uhmm`.

mod common;

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use common::{allowed, output, run_sh};

#[test]
fn bytes_pass_as_they_are() {
    if !allowed() {
        return;
    }
    // Every byte, and more than a pipe holds.
    let bytes: Vec<u8> = (0..=255_u8).cycle().take(1 << 20).collect();
    let mut child = run_sh(&["--quiet"], "printf '\\377\\000x' >&2; cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    let written = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&written).expect("it is read"));
    let Output { status, stdout, stderr } = child.wait_with_output().expect("it ends");
    writer.join().expect("all was written");
    assert!(status.success());
    assert!(stdout == bytes, "{} bytes of {} came out, or others", stdout.len(), bytes.len());
    assert_eq!(stderr, b"\xff\0x");
}

#[test]
fn the_report_comes_after_what_the_program_says() {
    if !allowed() {
        return;
    }
    let Output { stdout, stderr, .. } = output(&mut run_sh(&[], "echo out; echo err >&2"));
    assert_eq!(stdout, b"out\n");
    let text = String::from_utf8(stderr).expect("it is text");
    assert!(text.starts_with("err\nuhmm: sh: exit status 0"), "{text}");
}

/// What a program can tell of what it was given: signals, descriptors, limits, its place among
/// processes, and its environment but for what has uhmm's agent loaded.
const SURROUNDINGS: &str = "
    grep -E '^(SigBlk|SigIgn|SigCgt|NoNewPrivs|CapEff|Umask|Groups):' /proc/self/status
    for fd in 0 1 2 3 4 5 6 7 8 9; do
        [ -e /proc/$$/fd/$fd ] && echo fd $fd $(readlink /proc/$$/fd/$fd | tr -d '0-9')
    done
    ulimit -a
    pwd
    umask
    ps -o pgid= -o sid= -o tty= -o nice= -p $$
    env | grep -vE '^(LD_PRELOAD|UHMM_RUN|_|SHLVL)=' | sort
    true
";

/// Runs the same with and without uhmm, both by the words that `before` puts before, which may
/// change what they are given, and compares what they say.
#[track_caller]
fn same(what: &str, before: &str) {
    let folder = common::Folder::new();
    let script = folder.file("surroundings", SURROUNDINGS.as_bytes(), 0o644);
    let program = format!("sh {}", script.display());
    let uhmm = format!("{} run --quiet -- {program}", env!("CARGO_BIN_EXE_uhmm"));
    let [plain, under] = [program, uhmm].map(|command| {
        let result = folder.path("result");
        // The shell leads a group of its own, of which both are to be.
        let before = format!("echo $$ > {}; {before}", folder.path("group").display());
        let whole =
            before.replace("COMMAND", &command).replace("RESULT", &result.display().to_string());
        let mut shell = Command::new("bash");
        let path = std::env::var_os("PATH").expect("there is one");
        shell.args(["-c", &whole]).env_clear().env("PATH", path);
        let Output { status, stderr, .. } = output(&mut shell);
        assert!(status.success(), "{what}: {status:?} {}", String::from_utf8_lossy(&stderr));
        let said = std::fs::read_to_string(&result).expect("it was written");
        let group = std::fs::read_to_string(folder.path("group")).expect("it was written");
        let said = said.replace(&format!("{} ", group.trim()), "the-group ");
        said.lines().map(without_reserved_signals).collect::<Vec<String>>()
    });
    assert!(plain.iter().any(|line| line.starts_with("SigIgn")), "{plain:?}");
    assert_eq!(plain, under, "{what}");
}

/// The C library keeps the signals 32 and 33 to itself, and handles them in a process with threads,
/// as one is that has an agent.
fn without_reserved_signals(line: &str) -> String {
    let Some((name, mask)) = line.split_once(":\t").filter(|(name, _)| name.starts_with("Sig"))
    else {
        return line.to_owned();
    };
    let mask = u64::from_str_radix(mask, 16).expect("a mask of signals");
    format!("{name} {:x}", mask & !(0b11 << 31))
}

#[test]
fn the_program_is_given_what_uhmm_was_given() {
    if !allowed() {
        return;
    }
    let rows = [
        ("nothing special", "COMMAND > RESULT"),
        ("ignored signals", "trap '' PIPE INT CHLD USR1 TERM HUP; COMMAND > RESULT"),
        ("blocked signals", "env --block-signal=USR1,TERM,CHLD,PIPE COMMAND > RESULT"),
        ("no input", "COMMAND > RESULT <&-"),
        ("no errors", "COMMAND > RESULT 2>&-"),
        ("more descriptors", "COMMAND > RESULT 3< /dev/null 7> /dev/null"),
        ("limits", "ulimit -S -n 77; ulimit -S -s 4096; ulimit -c 0; COMMAND > RESULT"),
        ("a place", "cd /; umask 027; nice -n 3 COMMAND > RESULT"),
        ("an environment", "env -i A=1 PATH=$PATH COMMAND > RESULT"),
    ];
    for (what, before) in rows {
        same(what, before);
    }
}

#[test]
fn a_program_whose_reader_has_left_ends_as_ever() {
    if !allowed() {
        return;
    }
    let uhmm = env!("CARGO_BIN_EXE_uhmm");
    let script = format!("{uhmm} run --quiet -- yes | head -n 1; echo ${{PIPESTATUS[0]}}");
    let Output { stdout, .. } = output(Command::new("bash").args(["-c", &script]));
    assert_eq!(String::from_utf8_lossy(&stdout), "y\n141\n");
}
