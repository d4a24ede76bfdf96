//! Live processes as something that does the operations of files: one process for each space.
//!
//! A space is a process that has attached to itself, has devices of its own, and does what it is
//! asked to. `spawn` starts the program again, as a process of which [`puppet::serve`] is all it
//! does; `fork` has such a process call fork(2), and the child attaches itself anew. Each has a
//! socket to the process that runs the story.
//!
//! What is of one machine in the simulation is made to look so: a step that is to fail does so once
//! in all processes together, and eviction goes on in the next process until enough has gone.
//! Device memory is not: each process has as much as the scene says.

pub(crate) mod puppet;
mod wire;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use uhmm::Access;
use uhmm::operations::{
    Advice, Answer, DeviceName, Executor, FileName, Injection, Memory, Obstacle, Operation,
    OperationFile, Outcome, Pages, Place, Refusal, SpaceName, Word,
};

use crate::common::{PATIENCE, ends_within, memory, stacks};
use wire::{Ask, Said, Steps, Wire};

/// How the processes tell uhmm of what they do to their mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changes {
    /// By `AddressSpace::change`.
    Announced,
    /// Not at all where the kernel tells of it: unmap, map, remap and discard.
    Observed,
}

/// Where the devices have their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Devices {
    /// In memory of their own, which pages are copied to and from.
    Apart,
    /// In the process's own: pages move there and back, and nothing is copied.
    InPlace,
}

/// The name of the test that [`puppet::serve`] is run in.
pub(crate) const PUPPET: &str = "puppet";

/// Says to a process who it is, and where it is asked.
pub(crate) const PUPPET_OF: &str = "UHMM_TEST_PUPPET_OF";

/// The processes of a story.
pub(crate) struct Puppets {
    changes: Changes,
    devices: Devices,
    address: String,
    listener: UnixListener,
    scene: String,
    files: BTreeMap<FileName, OwnedFd>,
    spaces: BTreeMap<SpaceName, Puppet>,
    /// What is to fail, after how many that succeed.
    plans: Steps,
}

struct Puppet {
    wire: Wire,
    pid: u32,
    from: From,
}

/// Who made a process, and so has to reap it.
enum From {
    Spawn(Child),
    Fork(SpaceName),
    /// Whose parent has ended: it is ours now.
    Orphan,
}

impl Puppets {
    pub(crate) fn new(changes: Changes, devices: Devices) -> Puppets {
        let address = format!("uhmm-test-{}", std::process::id());
        let name = SocketAddr::from_abstract_name(&address).expect("a short name");
        let listener = UnixListener::bind_addr(&name).expect("nobody else has our number");
        let own = Some(rustix::process::getpid());
        rustix::process::set_child_subreaper(own).expect("prctl");
        Puppets {
            changes,
            devices,
            address,
            listener,
            scene: String::new(),
            files: BTreeMap::new(),
            spaces: BTreeMap::new(),
            plans: Steps::new(),
        }
    }

    /// Waits for a process to say that it is this space.
    fn enter(&mut self, space: SpaceName, from: From) -> Outcome<()> {
        let timeout = Timespec::try_from(PATIENCE).expect("a short time");
        let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
        if poll(&mut polled, Some(&timeout)) != Ok(1) {
            return broken(format!("nobody has become {space} within {PATIENCE:?}"));
        }
        let (stream, _) = self.listener.accept().map_err(|error| lost(space, error))?;
        let mut wire = Wire::new(stream);
        let hello = wire.patience(PATIENCE * 2).and_then(|()| wire.heard_hello());
        let (name, pid) = hello.map_err(|error| lost(space, error))?;
        if name != space {
            return broken(format!("{name} came where {space} was to"));
        }
        if let From::Spawn(_) = from {
            wire.tell_scene(&self.scene).map_err(|error| lost(space, error))?;
        }
        self.spaces.insert(space, Puppet { wire, pid, from });
        // Answered once it has attached itself.
        self.ask(space, Ask::Check).map(drop)
    }

    /// Has the process of a space do something, and hears what it says.
    fn ask(&mut self, space: SpaceName, ask: Ask) -> Outcome<Answer> {
        let puppet = self.spaces.get_mut(&space).ok_or(Obstacle::Refused(Refusal::Ended))?;
        let asked = puppet.wire.ask(&self.plans, ask);
        let (ran, said) = match asked.and_then(|()| puppet.wire.said()) {
            Ok(said) => said,
            Err(error) => {
                let stacks = stacks::of_process(puppet.pid);
                return broken(format!("{space} did not answer to {ask:?}: {error}\n{stacks}"));
            }
        };
        self.account(&ran);
        match said {
            Said::Answer(Answer::Refused(refusal)) => Err(refusal.into()),
            Said::Answer(answer) => Ok(answer),
            Said::Unsupported(what) => Err(Obstacle::Unsupported(what)),
            Said::Broken(what) => broken(what),
        }
    }

    /// Takes from what is to fail what has failed, and counts what has run.
    fn account(&mut self, ran: &Steps) {
        self.plans.retain_mut(|(injection, after)| {
            let times =
                ran.iter().find(|(step, _)| step == injection).map_or(0, |&(_, times)| times);
            let left = after.checked_sub(times);
            *after = left.unwrap_or(0);
            left.is_some()
        });
    }

    fn done(&mut self, space: SpaceName, operation: Operation) -> Outcome<()> {
        match self.ask(space, Ask::Do(operation))? {
            Answer::Done => Ok(()),
            answer => broken(format!("`{operation}` answers {answer}")),
        }
    }

    fn value(&mut self, space: SpaceName, operation: Operation) -> Outcome<u64> {
        match self.ask(space, Ask::Do(operation))? {
            Answer::Value(value) => Ok(value),
            answer => broken(format!("`{operation}` answers {answer}")),
        }
    }

    /// Changes a file within announcements of the change in every process.
    fn change(&mut self, file: FileName, change: impl FnOnce(&OwnedFd)) -> Outcome<()> {
        let spaces: Vec<_> = self.spaces.keys().copied().collect();
        for &space in &spaces {
            self.ask(space, Ask::Hold(file))?;
        }
        change(&self.files[&file]);
        spaces.into_iter().try_for_each(|space| self.ask(space, Ask::Over).map(drop))
    }

    /// Sees that a process that said it would end does so, and well.
    fn reap(&mut self, space: SpaceName, puppet: Puppet) -> Outcome<()> {
        let Puppet { pid, from, wire } = puppet;
        drop(wire);
        if !ends_within(pid, PATIENCE) {
            let stacks = stacks::of_process(pid);
            return broken(format!("{space} does not end:\n{stacks}"));
        }
        for child in self.spaces.values_mut() {
            if matches!(child.from, From::Fork(parent) if parent == space) {
                child.from = From::Orphan;
            }
        }
        let success = match from {
            From::Spawn(mut child) => child.wait().is_ok_and(|status| status.success()),
            From::Fork(parent) => self.ask(parent, Ask::Reap(pid)).is_ok(),
            From::Orphan => reap(pid),
        };
        if success { Ok(()) } else { broken(format!("the process of {space} did not end well")) }
    }
}

/// Reaps a child that has ended, and tells whether it ended well.
fn reap(pid: u32) -> bool {
    let pid = Pid::from_raw(pid as i32).expect("a process has a number");
    let reaped = waitpid(Some(pid), WaitOptions::empty()).expect("it is our child");
    reaped.is_some_and(|(_, status)| status.exit_status() == Some(0))
}

impl Drop for Puppets {
    /// Only where a story went wrong is there anything left.
    fn drop(&mut self) {
        for puppet in self.spaces.values() {
            let pid = Pid::from_raw(puppet.pid as i32).expect("a process has a number");
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

impl Executor for Puppets {
    fn begin(&mut self, file: &OperationFile) -> Outcome<()> {
        let files = file.files.iter().map(|&(name, pages)| (name, memory::memory_file(pages)));
        self.files = files.collect();
        for fd in self.files.values() {
            // For the processes to inherit.
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).expect("it is open");
        }
        let scene = OperationFile { lines: Vec::new(), ..file.clone() };
        self.scene = format!("{:?} {:?}\n", self.changes, self.devices);
        for (name, fd) in &self.files {
            self.scene += &format!("{name} {}\n", fd.as_raw_fd());
        }
        self.scene += &scene.to_string();
        Ok(())
    }

    fn spawn(&mut self, space: SpaceName) -> Outcome<()> {
        let child = Command::new(std::env::current_exe().expect("a program has a file"))
            .args([PUPPET, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
            .env(PUPPET_OF, format!("{space} {}", self.address))
            .stdin(Stdio::null())
            .spawn();
        let child = child.map_err(|error| lost(space, error))?;
        self.enter(space, From::Spawn(child))
    }

    fn fork(&mut self, space: SpaceName, child: SpaceName) -> Outcome<()> {
        self.done(space, Operation::Fork { space, child })?;
        self.enter(child, From::Fork(space))
    }

    fn exit(&mut self, space: SpaceName) -> Outcome<()> {
        self.done(space, Operation::Exit { space })?;
        let puppet = self.spaces.remove(&space).expect("it has just answered");
        self.reap(space, puppet)
    }

    fn map(
        &mut self,
        space: SpaceName,
        pages: Pages,
        memory: Memory,
        access: Access,
    ) -> Outcome<()> {
        self.done(space, Operation::Map { space, pages, memory, access })
    }

    fn unmap(&mut self, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.done(space, Operation::Unmap { space, pages })
    }

    fn protect(&mut self, space: SpaceName, pages: Pages, access: Access) -> Outcome<()> {
        self.done(space, Operation::Protect { space, pages, access })
    }

    fn remap(&mut self, space: SpaceName, pages: Pages, to: u64) -> Outcome<()> {
        self.done(space, Operation::Remap { space, pages, to })
    }

    fn discard(&mut self, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.done(space, Operation::Discard { space, pages })
    }

    fn advise(&mut self, advice: Advice, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.done(space, Operation::Advise { advice, space, pages })
    }

    fn read(&mut self, space: SpaceName, word: Word) -> Outcome<u64> {
        self.value(space, Operation::Read { space, word })
    }

    fn write(&mut self, space: SpaceName, word: Word, value: u64) -> Outcome<()> {
        self.done(space, Operation::Write { space, word, value })
    }

    fn add(&mut self, space: SpaceName, word: Word, value: u64) -> Outcome<u64> {
        self.value(space, Operation::Add { space, word, value })
    }

    fn device_read(&mut self, device: DeviceName, space: SpaceName, word: Word) -> Outcome<u64> {
        self.value(space, Operation::DeviceRead { device, space, word })
    }

    fn device_write(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<()> {
        self.done(space, Operation::DeviceWrite { device, space, word, value })
    }

    fn device_add(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<u64> {
        self.value(space, Operation::DeviceAdd { device, space, word, value })
    }

    fn device_fault(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        page: u64,
        access: Access,
    ) -> Outcome<()> {
        self.done(space, Operation::DeviceFault { device, space, page, access })
    }

    fn migrate(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.done(space, Operation::Migrate { device, space, pages })
    }

    fn home(&mut self, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.done(space, Operation::Home { space, pages })
    }

    fn evict(&mut self, device: DeviceName, count: u64) -> Outcome<()> {
        let spaces: Vec<_> = self.spaces.keys().copied().collect();
        let mut left = count;
        for space in spaces {
            if left > 0 {
                let evicted = self.value(space, Operation::Evict { device, count: left })?;
                left = left.saturating_sub(evicted);
            }
        }
        Ok(())
    }

    fn exclusive(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.done(space, Operation::Exclusive { device, space, pages })
    }

    fn release(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.done(space, Operation::Release { device, space, pages })
    }

    fn attach(&mut self, device: DeviceName, space: SpaceName) -> Outcome<()> {
        self.done(space, Operation::Attach { device, space })
    }

    fn detach(&mut self, device: DeviceName, space: SpaceName) -> Outcome<()> {
        self.done(space, Operation::Detach { device, space })
    }

    fn locate(&mut self, space: SpaceName, page: u64) -> Outcome<Place> {
        match self.ask(space, Ask::Do(Operation::Where { space, page }))? {
            Answer::At(place) => Ok(place),
            answer => broken(format!("page {page} is at {answer}")),
        }
    }

    fn truncate(&mut self, file: FileName, pages: u64) -> Outcome<()> {
        self.change(file, |file| memory::truncate(file, pages))
    }

    fn punch(&mut self, file: FileName, pages: Pages) -> Outcome<()> {
        self.change(file, |file| memory::punch(file, pages.first, pages.count))
    }

    fn fail(&mut self, injection: Injection, after: u64) -> Outcome<()> {
        if puppet::steps_of(injection).is_empty() {
            return Err(Obstacle::Unsupported(format!("{} is the kernel's", injection.step())));
        }
        self.plans.retain(|&(planned, _)| planned != injection);
        self.plans.push((injection, after));
        Ok(())
    }

    fn succeed(&mut self) -> Outcome<()> {
        self.plans.clear();
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        let spaces: Vec<_> = self.spaces.keys().copied().collect();
        for space in spaces {
            self.ask(space, Ask::Check).map_err(|obstacle| format!("{space}: {obstacle:?}"))?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        let spaces: Vec<_> = self.spaces.keys().copied().collect();
        for space in spaces {
            self.exit(space).map_err(|obstacle| format!("exit {space}: {obstacle:?}"))?;
        }
        self.files.clear();
        Ok(())
    }
}

fn broken<T>(what: String) -> Outcome<T> {
    Err(Obstacle::Broken(what))
}

fn lost(space: SpaceName, error: io::Error) -> Obstacle {
    Obstacle::Broken(format!("{space}: {error}"))
}
