//! One space of a story: a process that has attached to itself, with devices of its own.

mod actions;

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use uhmm::operations::{
    Answer, DeviceName, FileName, Injection, Obstacle, Operation, OperationFile, Outcome, Pages,
    Refusal, SpaceName, Word,
};
use uhmm::{
    Access, EventKind, FaultError, Injector, Mirror, Owner, Page, PageEntry, PageRange, RangeFault,
    Residency,
};
use uhmm_linux::{Options, Process};

use super::wire::{Ask, Said, Steps, Wire};
use super::{Changes, Devices, PUPPET_OF, broken, reap};
use crate::common::device::TestDevice;
use crate::common::leaks::{Holdings, holdings};
use crate::common::memory::{self, TERRITORY};
use crate::common::trap;
use crate::common::{PATIENCE, alarm, die_with_parent, eventually, rig};

/// Where the arena begins in every space: at the edge of a large page.
const BASE: u64 = TERRITORY.start;

/// Is a space, until it is told to exit or nobody is left to tell it anything.
///
/// Returns at once where this process was not made for that.
pub(crate) fn serve() {
    let Ok(who) = std::env::var(PUPPET_OF) else { return };
    die_with_parent(PATIENCE * 6);
    let (space, address) = who.split_once(' ').expect("a space and an address");
    let space = space.chars().next().and_then(SpaceName::new).expect("a space");
    let mut wire = Wire::connect(address).expect("somebody listens");
    wire.hello(space).expect("somebody listens");
    let scene = Scene::parse(&wire.hear_scene().expect("there is a scene"), address);
    Puppet::attach(space, scene, wire).run();
}

/// What is the same for all spaces of a story.
#[derive(Clone)]
struct Scene {
    changes: Changes,
    devices: Devices,
    address: String,
    /// Inherited, and open for as long as the process lives.
    files: BTreeMap<FileName, RawFd>,
    file: OperationFile,
}

struct Puppet {
    space: SpaceName,
    scene: Scene,
    wire: Wire,
    /// What there was before the process attached to itself.
    before: Holdings,
    /// `None` once it has ended.
    process: Option<Process>,
    // Dropped after the process: a mirror outlives its address space.
    mirrors: BTreeMap<DeviceName, Mirror<TestDevice>>,
    gpus: Vec<Gpu>,
    /// The system's steps.
    injector: Injector,
}

struct Gpu {
    name: DeviceName,
    gpu: rig::Gpu,
}

impl std::ops::Deref for Gpu {
    type Target = rig::Gpu;

    fn deref(&self) -> &rig::Gpu {
        &self.gpu
    }
}

impl Scene {
    fn parse(text: &str, address: &str) -> Scene {
        let (setup, rest) = text.split_once('\n').expect("a scene has lines");
        let (changes, devices) = setup.split_once(' ').expect("a setup is of two words");
        let changes = match changes {
            "Announced" => Changes::Announced,
            _ => Changes::Observed,
        };
        let devices = match devices {
            "InPlace" => Devices::InPlace,
            _ => Devices::Apart,
        };
        let mut files = BTreeMap::new();
        let mut scene = rest;
        while let Some((line, rest)) = scene.split_once('\n')
            && !line.starts_with("arena")
        {
            let (name, fd) = line.split_once(' ').expect("a file and a descriptor");
            // The name of a file stands in operations, and nowhere alone.
            let Ok(Operation::Truncate { file, .. }) = format!("truncate {name} 0").parse() else {
                panic!("`{name}` is no file");
            };
            files.insert(file, fd.parse().expect("a descriptor"));
            scene = rest;
        }
        let file = OperationFile::parse("scene", scene).unwrap_or_else(|error| panic!("{error}"));
        Scene { changes, devices, address: address.to_owned(), files, file }
    }

    fn arena(&self) -> PageRange {
        range(Pages::new(0, self.file.arena))
    }

    fn file(&self, name: FileName) -> BorrowedFd<'static> {
        crate::common::memory::borrow(self.files[&name])
    }
}

impl Puppet {
    fn attach(space: SpaceName, scene: Scene, wire: Wire) -> Puppet {
        trap::install();
        let before = holdings();
        let injector = Injector::new();
        // A page that cannot come home at once is refused at once, as in the simulation.
        let options = Options::new().injector(injector.clone()).patience(Duration::ZERO);
        let process = Process::attach(options).unwrap_or_else(|error| panic!("{space}: {error}"));
        let gpu = |&(name, pages): &(DeviceName, u64)| {
            let gpu = match scene.devices {
                Devices::Apart => rig::Gpu::named(&name.to_string(), pages),
                Devices::InPlace => rig::Gpu::in_place(&name.to_string(), pages, &process),
            };
            Gpu { name, gpu }
        };
        let gpus: Vec<_> = scene.file.devices.iter().map(gpu).collect();
        let mut puppet = Puppet {
            space,
            scene,
            wire,
            before,
            process: Some(process),
            mirrors: BTreeMap::new(),
            gpus,
            injector,
        };
        for index in 0..puppet.gpus.len() {
            let name = puppet.gpus[index].name;
            let mirror = puppet.new_mirror(name);
            puppet.mirrors.insert(name, mirror.expect("a new space can be mirrored"));
        }
        puppet
    }

    /// Does what is asked until the space has ended.
    fn run(&mut self) {
        while self.process.is_some() {
            let Some((fail, ask)) = self.wire.asked().expect("what is asked can be understood")
            else {
                // The story went wrong somewhere else.
                return;
            };
            let said = self.with_failures(&fail, |puppet| match puppet.answer(ask) {
                Ok(answer) => Said::Answer(answer),
                Err(Obstacle::Refused(refusal)) => Said::Answer(Answer::Refused(refusal)),
                Err(Obstacle::Unsupported(what)) => Said::Unsupported(what),
                Err(Obstacle::Broken(what)) => Said::Broken(what),
                Err(obstacle) => Said::Broken(format!("{obstacle:?}")),
            });
            let (ran, said) = said;
            self.wire.say(&ran, &said).expect("somebody listens");
        }
    }

    /// Has steps fail meanwhile, and returns how often each of them ran.
    fn with_failures(
        &mut self,
        fail: &Steps,
        f: impl FnOnce(&mut Puppet) -> Said,
    ) -> (Steps, Said) {
        let ran = |puppet: &Puppet, injection| {
            let injector = puppet.injector_of(injection);
            steps_of(injection).iter().map(|step| injector.asked(step)).sum::<u64>()
        };
        let mut before = Vec::new();
        for &(injection, after) in fail {
            before.push(ran(self, injection));
            for step in steps_of(injection) {
                self.injector_of(injection).fail(step, after);
            }
        }
        let said = f(self);
        let count = |(&(injection, _), before): (&(Injection, u64), u64)| {
            (injection, ran(self, injection) - before)
        };
        let ran = fail.iter().zip(before).map(count).collect();
        self.injector.clear();
        self.gpus.iter().for_each(|gpu| gpu.injector.clear());
        (ran, said)
    }

    fn answer(&mut self, ask: Ask) -> Outcome<Answer> {
        match ask {
            Ask::Do(Operation::Evict { device, count }) => {
                Ok(Answer::Value(self.gpu(device).pagemap.evict(count)))
            }
            Ask::Do(operation) => operation.perform(self),
            Ask::Hold(file) => self.hold(file),
            Ask::Over => broken("nothing is held".into()),
            Ask::Reap(pid) => match reap(pid) {
                true => Ok(Answer::Done),
                false => broken(format!("process {pid} did not end well")),
            },
            Ask::Check => self.check_everything().map(|()| Answer::Done),
        }
    }

    fn process(&self) -> Outcome<&Process> {
        self.process.as_ref().ok_or(Obstacle::Refused(Refusal::Ended))
    }

    fn mirror(&self, device: DeviceName) -> Outcome<&Mirror<TestDevice>> {
        self.mirrors.get(&device).ok_or(Obstacle::Refused(Refusal::Ended))
    }

    fn gpu(&self, device: DeviceName) -> &Gpu {
        self.gpus.iter().find(|gpu| gpu.name == device).expect("a device of the scene")
    }

    fn injector_of(&self, injection: Injection) -> &Injector {
        injection.device().map_or(&self.injector, |device| &self.gpu(device).injector)
    }

    fn device_of(&self, owner: Owner) -> DeviceName {
        let gpu = self.gpus.iter().find(|gpu| gpu.pagemap.owner() == owner);
        gpu.expect("pages are with devices of the scene").name
    }

    fn new_mirror(&self, device: DeviceName) -> Outcome<Mirror<TestDevice>> {
        let gpu = self.gpu(device);
        let mirror = self.process()?.mirror_with(&gpu.device, self.scene.arena(), &gpu.pagemap);
        mirror.map_err(|error| Obstacle::Broken(error.to_string()))
    }

    /// Changes mappings, and sees to it that the devices have heard of it: either they are told by
    /// whoever makes the change, or by the kernel a moment later.
    fn change(
        &self,
        kind: EventKind,
        ranges: &[PageRange],
        f: impl FnOnce() -> Outcome<()>,
    ) -> Outcome<()> {
        let process = self.process()?;
        if self.scene.changes == Changes::Announced {
            return within(process, kind, ranges, f);
        }
        f()?;
        let known = |mirror: &Mirror<TestDevice>, range: PageRange| {
            let known =
                mirror.inspect(|table| table.entries.keys().any(|&page| range.contains(page)));
            known.expect("the space lives")
        };
        for (device, mirror) in &self.mirrors {
            for &range in ranges {
                if !eventually(|| !known(mirror, range)) {
                    return broken(format!("{device} never hears of the change of {range}"));
                }
            }
        }
        Ok(())
    }

    /// Announces that a file is about to change, says so, and ends the announcement when told.
    fn hold(&mut self, file: FileName) -> Outcome<Answer> {
        let status = rustix::fs::fstat(self.scene.file(file)).expect("the file is open");
        let mapped = memory::mapped_in(self.scene.arena()).into_iter();
        let of_file = mapped.filter(|(_, line)| line.inode == status.st_ino);
        let ranges: Vec<_> = of_file.map(|(range, _)| range).collect();
        let process = self.process()?.clone();
        within(&process, EventKind::Clear, &ranges, || {
            self.wire.say(&Steps::new(), &Said::Answer(Answer::Done)).expect("somebody listens");
            match self.wire.asked().expect("what is asked can be understood") {
                Some((_, Ask::Over)) => Ok(Answer::Done),
                ask => broken(format!("{ask:?} while a file is held")),
            }
        })
    }

    fn device_access(
        &self,
        device: DeviceName,
        word: Word,
        access: Access,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Outcome<u64> {
        self.process()?;
        let mirror = self.mirror(device)?;
        let (page, offset) = (page(word.page), word.offset.into());
        let mut attempt =
            || mirror.inspect(|table| mirror.device().access(table, page, offset, access, update));
        let request = match access {
            Access::Read => RangeFault::read(page.into()),
            Access::Write => RangeFault::write(page.into()),
            _ => RangeFault::atomic(page.into()),
        };
        for _ in 0..2 {
            if let Some(old) = attempt().map_err(FaultError::from).map_err(refused)? {
                return Ok(old);
            }
            mirror.range_fault(&request).map_err(refused)?;
        }
        match attempt().map_err(FaultError::from).map_err(refused)? {
            Some(_) => broken("one fault of a device was not enough".into()),
            None => broken("a fault that was served left no translation".into()),
        }
    }

    /// Checks what must be true when nothing is under way: each translation is one that the device
    /// could be given now, and the accounts agree with what is seen.
    fn check_everything(&self) -> Outcome<()> {
        let mut found = Ok(());
        // What ends by itself may not have ended yet.
        let settled = eventually(|| {
            found = self.check_tables().and_then(|()| self.check_accounts());
            found.is_ok()
        });
        if settled { Ok(()) } else { found.map_err(Obstacle::Broken) }
    }

    fn check_tables(&self) -> Result<(), String> {
        let Some(process) = &self.process else { return Ok(()) };
        let arena = self.scene.arena();
        let now = process.snapshot(arena);
        for (device, mirror) in &self.mirrors {
            let stale = mirror.inspect(|table| {
                let stale = |(page, entry): &(&Page, &PageEntry)| {
                    let now = &now[arena.index_of(**page).expect("within the mirror")];
                    now.residency != entry.residency || now.access_of(mirror.owner()) < entry.access
                };
                table.entries.iter().find(stale).map(|(&page, &entry)| (page, entry))
            });
            if let Some((page, entry)) =
                stale.map_err(|released| format!("{device}: {released}"))?
            {
                let index = arena.index_of(page).expect("within the mirror");
                return Err(format!(
                    "{device} still has {entry:?} for page {index}, which is {:?}",
                    now[index]
                ));
            }
        }
        Ok(())
    }

    fn check_accounts(&self) -> Result<(), String> {
        let Some(process) = &self.process else { return Ok(()) };
        let entries = process.snapshot(self.scene.arena());
        for gpu in &self.gpus {
            let mut frames: Vec<_> = entries
                .iter()
                .filter_map(|entry| match entry.residency {
                    Residency::Device(at) if at.owner == gpu.pagemap.owner() => Some(at.frame),
                    _ => None,
                })
                .collect();
            frames.sort_unstable();
            frames.dedup();
            let (used, seen) = (gpu.pagemap.used(), frames.len() as u64);
            if used != seen {
                return Err(format!("{} says {used} pages are used, and {seen} are", gpu.name));
            }
        }
        Ok(())
    }

    /// Ends the space, and sees that nothing is left of it.
    fn end(&mut self) -> Outcome<()> {
        drop(self.process.take());
        for (device, mirror) in std::mem::take(&mut self.mirrors) {
            if mirror.unregister().is_some() {
                return broken(format!("{device} was not released when {} died", self.space));
            }
        }
        for gpu in &self.gpus {
            let used = gpu.pagemap.used();
            if used != 0 {
                return broken(format!("{used} pages of {} are used, and nobody lives", gpu.name));
            }
        }
        // Memory of the process's own lasts as long as its device.
        self.gpus.clear();
        let mut difference = String::new();
        let nothing_left = eventually(|| {
            difference = holdings().difference(&self.before);
            difference.is_empty()
        });
        if nothing_left { Ok(()) } else { broken(format!("after the end: {difference}")) }
    }

    /// Is the child: forgets what was its parent's, and becomes a space of its own.
    fn be(&mut self, space: SpaceName) {
        // The parent's threads, locks and devices are none of the child's.
        std::mem::forget(self.process.take());
        std::mem::forget(std::mem::take(&mut self.mirrors));
        std::mem::forget(std::mem::take(&mut self.gpus));
        alarm(PATIENCE * 6);
        let mut wire = Wire::connect(&self.scene.address).expect("somebody listens");
        wire.hello(space).expect("somebody listens");
        let parent = std::mem::replace(self, Puppet::attach(space, self.scene.clone(), wire));
        std::mem::forget(parent);
        self.run();
    }
}

/// Announces changes of several ranges one within the other, and makes them.
fn within<R>(process: &Process, kind: EventKind, ranges: &[PageRange], f: impl FnOnce() -> R) -> R {
    fn nested(process: &Process, kind: EventKind, ranges: &[PageRange], f: &mut dyn FnMut()) {
        match ranges {
            [] => f(),
            [first, rest @ ..] => process.change(*first, kind, || nested(process, kind, rest, f)),
        }
    }
    let (mut f, mut result) = (Some(f), None);
    nested(process, kind, ranges, &mut || result = f.take().map(|f| f()));
    result.expect("it is called once")
}

/// Returns the steps of a live process that fail where a step of the simulation does; none where
/// nothing of ours can.
pub(super) fn steps_of(injection: Injection) -> &'static [&'static str] {
    match injection {
        Injection::Frame => &["buffer"],
        Injection::Split => &[],
        Injection::Allocate(_) => &["allocate"],
        Injection::Copy(_) => &["copy"],
        Injection::Clear(_) => &["clear"],
    }
}

fn refused(error: FaultError) -> Obstacle {
    Obstacle::Refused(match error {
        FaultError::Released => Refusal::Ended,
        FaultError::Hole { .. } => Refusal::Hole,
        FaultError::Denied { .. } => Refusal::Denied,
        FaultError::EndOfFile { .. } => Refusal::EndOfFile,
        FaultError::OutOfMemory { .. } => Refusal::OutOfMemory,
        FaultError::CopyFailed { .. } => Refusal::CopyFailed,
        FaultError::NotExclusive { .. } => Refusal::NotExclusive,
        error => return Obstacle::Broken(error.to_string()),
    })
}

fn page(index: u64) -> Page {
    Page::containing(BASE).checked_add(index).expect("the arena is within the address space")
}

fn range(pages: Pages) -> PageRange {
    PageRange::from_pages(page(pages.first), pages.count).expect("pages of the arena")
}
