//! `uhmm` in the place of a program: signals, job control, and what outlives it.

mod common;

use std::ffi::{CString, OsStr};
use std::io::Read as _;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use common::{Folder, Running, allowed, pid_of, run, run_sh, send, state_of, until};
use rustix::process::Signal;

/// A script that says its number, and then what each signal is that it gets. It ends with the
/// status 5 when it reads a line, and with 6 at the end of what it reads.
const LISTENER: &str = r#"
    for signal in HUP INT QUIT TERM USR1 USR2; do trap "echo $signal" $signal; done
    echo $$
    while :; do
        # A signal interrupts the reading, and then it goes on.
        if read line; then exit 5; elif [ $? -le 128 ]; then exit 6; fi
    done
"#;

#[test]
fn what_is_sent_to_uhmm_is_sent_on() {
    if !allowed() {
        return;
    }
    // `read` of bash, unlike that of dash, says whether a signal has interrupted it.
    let mut running = Running::start(&mut run(&["--quiet"], &["bash", "-c", LISTENER]));
    running.line().expect("its number");
    let rows = [
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
        (Signal::QUIT, "QUIT"),
        (Signal::TERM, "TERM"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
    ];
    for (signal, name) in rows {
        running.send(signal);
        running.expect_line(name);
    }
    running.say("enough");
    assert_eq!(running.end().code(), Some(5));
}

#[test]
fn a_signal_that_was_sent_on_ends_both() {
    if !allowed() {
        return;
    }
    let mut running = Running::start(&mut run_sh(&["--quiet"], "echo ready; read line"));
    running.expect_line("ready");
    running.send(Signal::TERM);
    assert_eq!(running.end().signal(), Some(Signal::TERM.as_raw()));
}

#[test]
fn a_signal_that_comes_at_any_moment_is_not_lost() {
    if !allowed() {
        return;
    }
    let start = || Running::start(&mut run_sh(&["--quiet"], "echo started; read line"));
    let began = Instant::now();
    let mut running = start();
    running.expect_line("started");
    let takes = began.elapsed();
    drop(running);
    // From before the program is started until after: uhmm ends by it in any case, and so does the
    // program, which would hold its output open otherwise.
    let mut started = [0_u32; 2];
    for step in 0..=24 {
        let mut running = start();
        match step {
            // At last, when it has started for certain.
            24 => running.expect_line("started"),
            step => std::thread::sleep(takes * step / 20),
        }
        running.send(Signal::TERM);
        assert_eq!(running.end().signal(), Some(Signal::TERM.as_raw()), "step {step}");
        let said = running.line().is_some() || step == 24;
        assert_eq!(running.line(), None, "the program runs on at step {step}");
        started[usize::from(said)] += 1;
    }
    assert!(started.iter().all(|&times| times > 0), "only before or only after: {started:?}");
}

#[test]
fn uhmm_stops_and_goes_on_with_the_program() {
    if !allowed() {
        return;
    }
    let script = "echo $$; read line; echo $line; exit 4";
    let mut running = Running::start(&mut run_sh(&["--quiet"], script));
    let program = pid_of(running.line().expect("its number").parse().expect("a number"));
    for _ in 0..3 {
        // Somebody stops the program.
        send(program, Signal::STOP);
        running.stopped();
        assert_eq!(state_of(program), Some('T'));
        // Somebody lets uhmm go on.
        running.send(Signal::CONT);
        until("the program goes on", || state_of(program).filter(|state| *state != 'T'));
        // Somebody stops uhmm as a terminal does: the program decides.
        running.send(Signal::TSTP);
        running.stopped();
        assert_eq!(state_of(program), Some('T'));
        // A shell lets all of the job go on.
        send(program, Signal::CONT);
        running.send(Signal::CONT);
        until("the program goes on", || state_of(program).filter(|state| *state != 'T'));
    }
    running.say("on");
    running.expect_line("on");
    assert_eq!(running.end().code(), Some(4));
}

/// A program that takes a while to stop: one of its threads makes a child as vfork(2) does, and is
/// not stopped before that has executed, which opens `fifo` first.
fn slow_to_stop(fifo: &OsStr) -> ! {
    println!("PUPPET {}", std::process::id());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("somebody writes");
    let fifo = CString::new(fifo.as_bytes()).expect("a path");
    let maker = std::thread::spawn(move || {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: it initialises the actions.
        assert_eq!(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) }, 0);
        let (path, flags) = (fifo.as_ptr(), libc::O_WRONLY);
        let actions = actions.as_mut_ptr();
        // SAFETY: they are initialised, and the path, which is copied, ends with a zero.
        let added = unsafe { libc::posix_spawn_file_actions_addopen(actions, 9, path, flags, 0) };
        assert_eq!(added, 0);
        let arguments = [c"true".as_ptr().cast_mut(), std::ptr::null_mut()];
        let environment = [std::ptr::null_mut()];
        let mut child = 0;
        // SAFETY: paths end with zeroes, lists with nulls, and all of it lives until it returns.
        let made = unsafe {
            libc::posix_spawn(
                &raw mut child,
                c"/bin/true".as_ptr(),
                actions,
                std::ptr::null(),
                arguments.as_ptr(),
                environment.as_ptr(),
            )
        };
        assert_eq!(made, 0);
        // SAFETY: the child is ours, and nobody asks for its status.
        assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
    });
    maker.join().expect("it does not panic");
    line.clear();
    std::io::stdin().read_line(&mut line).expect("somebody writes");
    std::process::exit(7)
}

/// Tells whether a thread of the process waits and is not to be stopped.
fn has_unstoppable_thread(pid: rustix::process::Pid) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()));
    tasks.expect("it runs").flatten().any(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
    })
}

#[test]
fn a_stop_that_is_under_way_is_not_taken_back() {
    if let Some(fifo) = std::env::var_os("UHMM_CLI_FIFO") {
        slow_to_stop(&fifo);
    }
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let fifo = folder.path("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().expect("it runs");
    assert!(made.success());
    let binary = std::env::current_exe().expect("it runs");
    let test = "a_stop_that_is_under_way_is_not_taken_back";
    let program = [binary.as_os_str(), "--exact".as_ref(), test.as_ref(), "--nocapture".as_ref()];
    let mut running = Running::start(run(&["--quiet"], &program).env("UHMM_CLI_FIFO", &fifo));
    let program = puppet_of(&mut running);
    send(program, Signal::STOP);
    running.stopped();
    // The program goes on alone, and then somebody stops it again: not all of it stops at once.
    send(program, Signal::CONT);
    until("the program goes on", || state_of(program).filter(|state| *state != 'T'));
    running.say("make a child");
    until("a thread waits", || has_unstoppable_thread(program).then_some(()));
    send(program, Signal::STOP);
    until("the program stops", || state_of(program).filter(|state| *state == 'T'));
    running.send(Signal::CONT);
    until("uhmm has looked", || state_of(running.pid()).filter(|state| *state == 'S'));
    assert_eq!(state_of(program), Some('T'), "nobody has let it go on");
    // Now the rest of it stops.
    drop(std::fs::File::open(&fifo).expect("the child opens it"));
    running.stopped();
    assert_eq!(state_of(program), Some('T'));
    running.send(Signal::CONT);
    running.say("enough");
    assert_eq!(running.end().code(), Some(7));
}

#[test]
fn a_program_survives_uhmm() {
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let result = folder.path("result");
    let script =
        format!("echo $$; read line; sh -c 'exit 3'; echo $line $? > {}", result.display());
    let mut running = Running::start(&mut run_sh(&["--quiet"], &script));
    let program = pid_of(running.line().expect("its number").parse().expect("a number"));
    running.send(Signal::KILL);
    assert_eq!(running.end().signal(), Some(Signal::KILL.as_raw()));
    assert_ne!(state_of(program), None, "it runs on");
    running.say("alone");
    let said = until("the program ends", || {
        std::fs::read_to_string(&result).ok().filter(|said| said.ends_with('\n'))
    });
    assert_eq!(said, "alone 3\n");
    until("it is gone", || state_of(program).is_none_or(|state| state == 'Z').then_some(()));
}

/// How much memory the puppet has, in words, and its budget.
const WORDS: u64 = 3 << 20;
const BUDGET: &str = "8M";

/// What the word at `index` is: pages that compress.
fn word(index: u64) -> u64 {
    (index / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The puppet: this test binary under `uhmm`. It has more memory than its budget, and says whether
/// it is what it wrote.
fn puppet() {
    let words: Vec<u64> = (0..WORDS).map(word).collect();
    println!("PUPPET {}", std::process::id());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("somebody writes");
    let wrong = words.iter().zip(0..).filter(|&(&found, index)| found != word(index)).count();
    println!("WRONG {wrong}");
    std::process::exit(if wrong == 0 { 11 } else { 12 });
}

/// Starts a puppet, and waits until it has its memory.
fn start_puppet(test: &str, options: &[&str]) -> (Running, rustix::process::Pid) {
    let binary = std::env::current_exe().expect("it runs");
    let binary = binary.to_str().expect("its path is text");
    let mut command = run(options, &[binary, "--exact", test, "--nocapture"]);
    let mut running = Running::start(command.env("UHMM_CLI_PUPPET", "1"));
    let program = puppet_of(&mut running);
    (running, program)
}

/// Waits until a puppet says its number.
fn puppet_of(running: &mut Running) -> rustix::process::Pid {
    loop {
        let line = running.line().expect("it says its number");
        // The harness writes too, and not always a whole line.
        if let Some((_, number)) = line.split_once("PUPPET ") {
            return pid_of(number.parse().expect("a number"));
        }
    }
}

/// Tells whether this is the puppet. It does not return then.
fn is_puppet() {
    if std::env::var_os("UHMM_CLI_PUPPET").is_some() {
        puppet();
    }
}

fn resident_bytes(pid: rustix::process::Pid) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero());
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[test]
fn a_program_with_memory_away_survives_uhmm() {
    is_puppet();
    if !allowed() {
        return;
    }
    let test = "a_program_with_memory_away_survives_uhmm";
    let (mut running, program) = start_puppet(test, &["--quiet", "--budget", BUDGET]);
    until("most of its memory is away", || (resident_bytes(program) < WORDS * 8).then_some(()));
    running.send(Signal::KILL);
    assert_eq!(running.end().signal(), Some(Signal::KILL.as_raw()));
    running.say("now");
    assert_eq!(running.line().as_deref(), Some("WRONG 0"));
}

#[test]
fn a_program_is_stopped_with_memory_away_and_goes_on() {
    is_puppet();
    if !allowed() {
        return;
    }
    let test = "a_program_is_stopped_with_memory_away_and_goes_on";
    let (mut running, program) = start_puppet(test, &["--quiet", "--budget", BUDGET]);
    until("most of its memory is away", || (resident_bytes(program) < WORDS * 8).then_some(()));
    send(program, Signal::STOP);
    running.stopped();
    running.send(Signal::CONT);
    running.say("now");
    assert_eq!(running.line().as_deref(), Some("WRONG 0"));
    assert_eq!(running.end().code(), Some(11));
}

#[test]
fn a_device_that_is_full_does_not_stop_a_program() {
    is_puppet();
    if !allowed() {
        return;
    }
    let test = "a_device_that_is_full_does_not_stop_a_program";
    let folder = Folder::new();
    let report = folder.path("report");
    let report = report.to_str().expect("text");
    let file = format!("file:{}:2M", folder.path("").display());
    for device in ["lz4:2M", &file] {
        let options = ["--report", report, "--device", device, "--budget", BUDGET];
        let (mut running, _) = start_puppet(test, &options);
        running.say("now");
        assert_eq!(running.line().as_deref(), Some("WRONG 0"), "{device}");
        assert_eq!(running.end().code(), Some(11), "{device}");
        let said = std::fs::read_to_string(report).expect("it was written");
        assert!(said.contains("the device is full"), "{said}");
    }
}

#[test]
fn nothing_is_left_of_what_a_program_had_away() {
    is_puppet();
    if !allowed() {
        return;
    }
    let test = "nothing_is_left_of_what_a_program_had_away";
    for signal in [Signal::KILL, Signal::ABORT, Signal::TERM] {
        let folder = Folder::new();
        let device = format!("file:{}", folder.path("").display());
        let options = ["--quiet", "--device", &device, "--budget", BUDGET];
        let (mut running, program) = start_puppet(test, &options);
        until("most of its memory is away", || (resident_bytes(program) < WORDS * 8).then_some(()));
        send(program, signal);
        assert_eq!(running.end().signal(), Some(signal.as_raw()));
        assert_eq!(std::fs::read_dir(folder.path("")).expect("it is there").count(), 0);
        assert!(state_of(program).is_none_or(|state| state == 'Z'), "it has ended");
    }
}

#[test]
fn a_daemon_outlives_uhmm() {
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let (fifo, result) = (folder.path("fifo"), folder.path("result"));
    let made = Command::new("mkfifo").arg(&fifo).status().expect("it runs");
    assert!(made.success());
    let script = format!(
        "setsid sh -c 'read line < {}; echo $line > {}' < /dev/null > /dev/null & exit 2",
        fifo.display(),
        result.display()
    );
    let mut running = Running::start(run_sh(&["--quiet"], &script).stderr(Stdio::null()));
    assert_eq!(running.end().code(), Some(2), "nobody waits for the daemon");
    std::fs::write(&fifo, "later\n").expect("the daemon reads");
    let said = until("the daemon ends", || {
        std::fs::read_to_string(&result).ok().filter(|said| said.ends_with('\n'))
    });
    assert_eq!(said, "later\n");
}

/// A terminal, by script(1): what is said is typed there, and what is read is shown there.
fn on_a_terminal(command: &str) -> Option<Running> {
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--flush", "--command", command, "/dev/null"]);
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("NOT TESTED: script(1) is not installed");
        return None;
    }
    Some(Running::start(script.stderr(Stdio::null())))
}

/// Reads until a line has `word` in it, and returns it.
#[track_caller]
fn read_until(running: &mut Running, word: &str) -> String {
    let mut seen = Vec::new();
    loop {
        let Some(line) = running.line() else { panic!("no `{word}` in {seen:?}") };
        if line.contains(word) {
            return line;
        }
        seen.push(line);
    }
}

#[test]
fn a_terminal_interrupts_the_program_and_not_uhmm() {
    if !allowed() {
        return;
    }
    let uhmm = env!("CARGO_BIN_EXE_uhmm");
    let inner = "trap \"echo interrupted\" INT; echo rea\"\"dy; read line; echo got $line; exit 5";
    // script(1) gives it to a shell, which the interrupt would end.
    let command = format!("exec {uhmm} run --progress=never -- bash -c '{inner}'");
    let Some(mut running) = on_a_terminal(&command) else { return };
    read_until(&mut running, "ready");
    // ^C, to the foreground: bash runs its trap, and goes on to read.
    running.press("\x03");
    read_until(&mut running, "interrupted");
    running.say("on");
    read_until(&mut running, "got on");
    read_until(&mut running, "exit status 5");
    running.hang_up();
    assert_eq!(running.end().code(), Some(5));
}

#[test]
fn a_shell_stops_the_job_and_lets_it_go_on() {
    if !allowed() {
        return;
    }
    let Some(mut running) =
        on_a_terminal("exec env PS1= PS2= TERM=dumb bash --norc --noprofile -i")
    else {
        return;
    };
    let uhmm = env!("CARGO_BIN_EXE_uhmm");
    let inner = "echo rea\"\"dy; read line; echo got-$line; exit 5";
    for round in 0..3 {
        running.say(&format!("{uhmm} run --quiet -- sh -c '{inner}'"));
        read_until(&mut running, "ready");
        // ^Z: the shell says that the job has stopped, and has the terminal.
        running.press("\x1a");
        read_until(&mut running, "Stopped");
        running.say("fg");
        // The shell says which job it is.
        read_until(&mut running, "run --quiet");
        running.say(&format!("round{round}"));
        read_until(&mut running, &format!("got-round{round}"));
        running.say("echo status=$?");
        read_until(&mut running, "status=5");
    }
    running.say("exit 0");
    running.hang_up();
    running.end();
}

#[test]
fn nothing_of_it_is_left() {
    if !allowed() {
        return;
    }
    // Whoever of the program's tree is still there would hold the pipe open.
    let (mut reader, writer) = std::io::pipe().expect("there is room");
    let mut command = run_sh(&["--quiet"], "sh -c 'true' | cat; (exit 1); true");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer);
    let status = command.status().expect("it starts");
    drop(command);
    assert!(status.success());
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("it ends");
    assert_eq!(text, "");
}
