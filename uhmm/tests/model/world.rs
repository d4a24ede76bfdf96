//! The simulated machine with test devices, as something that does the operations of files.

use std::collections::BTreeMap;
use std::sync::Arc;

use uhmm::operations::{
    Advice, DeviceName, Executor, FileName, Injection, Memory, Obstacle, OperationFile, Outcome,
    Pages, Place, Refusal, SpaceName, Word,
};
use uhmm::policy::Policies;
use uhmm::sim::{File, Machine, MachineOptions, Mapping, Process, SimError};
use uhmm::{
    Access, Clock, DeviceFrame, DevicePagemap, FaultError, Frame, Injector, Mirror, Owner, Page,
    PageEntry, PageRange, PagemapOptions, RangeFault, Residency,
};

use super::device::{Defect, TestDevice};

/// Where the arena begins in every space: at the edge of a huge page.
const BASE: u64 = 0x4000_0000;

/// The simulated machine's first frame, which is never written to.
const ZEROES: Frame = Frame(0);

/// A machine, its devices, and the address spaces that they mirror.
pub(crate) struct World {
    pub(crate) machine: Machine,
    /// The machine's.
    pub(crate) injector: Injector,
    /// Whether that is also the devices', so that its count is that of all fallible steps.
    one_injector: bool,
    pub(crate) devices: Vec<Gpu>,
    arena: u64,
    files: BTreeMap<FileName, File>,
    spaces: BTreeMap<SpaceName, Space>,
    defect: Defect,
    /// Whether the devices of operation files have their memory in that of the machine.
    in_place: bool,
}

pub(crate) struct Gpu {
    name: DeviceName,
    device: Arc<TestDevice>,
    injector: Injector,
    pub(crate) pagemap: Arc<DevicePagemap>,
}

struct Space {
    // Dropped after the process: a mirror outlives its address space.
    process: Process,
    mirrors: BTreeMap<DeviceName, Mirror<TestDevice>>,
}

/// Where a page is, and which page of memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Seen {
    Hole,
    Empty,
    /// The frame of zeroes that all share who have only ever read.
    Zeroes,
    System(Frame),
    Held(Frame, DeviceName),
    Device(DeviceName, DeviceFrame),
}

/// What there is to see of a page.
pub(crate) struct Fact {
    pub(crate) seen: Seen,
    pub(crate) access: Access,
    /// What each device may do, in the order of the devices.
    pub(crate) by_device: Vec<Access>,
}

/// What is seen of every page of every space.
pub(crate) type Sight = BTreeMap<SpaceName, Vec<Seen>>;

impl World {
    /// Makes a world in which every device's steps fail on their own.
    pub(crate) fn new() -> World {
        World { one_injector: false, ..World::with_defect(Defect::None) }
    }

    /// Makes a world like that, whose devices have their memory in that of the machine.
    pub(crate) fn in_place() -> World {
        World { in_place: true, ..World::new() }
    }

    /// Makes a world whose devices all have this defect, and that counts all fallible steps as one
    /// sequence.
    pub(crate) fn with_defect(defect: Defect) -> World {
        let injector = Injector::new();
        World {
            // Listed rather than panicked about, so that what is found has its operations with it.
            machine: Machine::with(
                MachineOptions::new().injector(injector.clone()).count_violations(),
            ),
            injector,
            one_injector: true,
            devices: Vec::new(),
            arena: 0,
            files: BTreeMap::new(),
            spaces: BTreeMap::new(),
            defect,
            in_place: false,
        }
    }

    /// Adds a device, before there is a space for it to mirror.
    pub(crate) fn add_device(&mut self, name: DeviceName, pages: u64, in_place: bool) {
        let injector = if self.one_injector { self.injector.clone() } else { Injector::new() };
        let device = match in_place {
            true => TestDevice::in_place(self.machine.host_memory(pages), injector.clone()),
            false => TestDevice::new(pages, injector.clone(), self.defect),
        };
        // A clock that stands still: blocks are evicted in the order of their places.
        let options = PagemapOptions::new()
            .name(name.to_string())
            .policies(Policies::none())
            .clock(Clock::manual());
        let pagemap = DevicePagemap::register_with(device.clone(), options);
        self.devices.push(Gpu { name, device, injector, pagemap });
    }

    pub(crate) fn set_arena(&mut self, pages: u64) {
        self.arena = pages;
    }

    /// Looks at every page of every space, and disturbs none.
    pub(crate) fn look(&self) -> Sight {
        let look = |(&name, space): (&SpaceName, &Space)| {
            let entries = space.process.address_space().snapshot(range(Pages::new(0, self.arena)));
            (name, entries.iter().map(|entry| self.seen(entry)).collect())
        };
        self.spaces.iter().map(look).collect()
    }

    fn seen(&self, entry: &PageEntry) -> Seen {
        match entry.residency {
            Residency::Hole => Seen::Hole,
            Residency::Empty => Seen::Empty,
            Residency::System(ZEROES) => Seen::Zeroes,
            Residency::System(frame) => Seen::System(frame),
            Residency::Exclusive { frame, owner } => Seen::Held(frame, self.device_of(owner)),
            Residency::Device(at) => Seen::Device(self.device_of(at.owner), at.frame),
            residency => panic!("{residency:?} with nothing under way"),
        }
    }

    /// Returns the word there, and disturbs nothing; `None` where there is no memory.
    pub(crate) fn peek(&self, space: SpaceName, seen: Seen, offset: u16) -> Option<u64> {
        match seen {
            Seen::Hole | Seen::Empty | Seen::Zeroes => None,
            Seen::System(frame) | Seen::Held(frame, _) => {
                let mut bytes = [0; 8];
                let backend = self.spaces.get(&space)?.process.address_space().backend();
                backend.memory().read(frame, offset.into(), &mut bytes);
                Some(u64::from_le_bytes(bytes))
            }
            Seen::Device(device, frame) => Some(self.gpu(device).device.peek(frame, offset.into())),
        }
    }

    /// Checks what must be true after every operation, of which this is what is seen.
    pub(crate) fn check_against(&self, sight: &Sight) -> Result<(), String> {
        self.machine.check()?;
        self.check_tables()?;
        self.check_accounts(sight)?;
        match self.machine.violations().as_slice() {
            [] => Ok(()),
            violations => Err(violations.join("; ")),
        }
    }

    /// Checks that each translation of each device is one that it could be given now.
    fn check_tables(&self) -> Result<(), String> {
        for (name, space) in &self.spaces {
            let now = space.process.address_space().snapshot(range(Pages::new(0, self.arena)));
            for (device, mirror) in &space.mirrors {
                let stale = mirror.inspect(|table| {
                    let stale = |(page, entry): &(&Page, &PageEntry)| {
                        let now = &now[index_of(**page)];
                        now.residency != entry.residency
                            || now.access_of(mirror.owner()) < entry.access
                    };
                    table.entries.iter().find(stale).map(|(&page, &entry)| (page, entry))
                });
                match stale {
                    Ok(None) => {}
                    Ok(Some((page, entry))) => {
                        let page = index_of(page);
                        return Err(format!(
                            "{device} still has {entry:?} for page {page} of {name}, which is {:?}",
                            now[page]
                        ));
                    }
                    Err(released) => return Err(format!("{device} in {name}: {released}")),
                }
            }
        }
        Ok(())
    }

    /// Checks that the accounts agree with what is seen.
    pub(crate) fn check_accounts(&self, sight: &Sight) -> Result<(), String> {
        for gpu in &self.devices {
            let mut frames: Vec<_> = sight
                .values()
                .flatten()
                .filter_map(|seen| match *seen {
                    Seen::Device(device, frame) if device == gpu.name => Some(frame),
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

    /// Returns what there is to see of every page of every space: what the page table says, and what
    /// each device may do by its own table.
    pub(crate) fn facts(&self) -> Vec<Vec<Fact>> {
        let facts = |space: &Space| -> Vec<Fact> {
            let entries = space.process.address_space().snapshot(range(Pages::new(0, self.arena)));
            let mut facts: Vec<_> = entries
                .iter()
                .map(|entry| Fact {
                    seen: self.seen(entry),
                    access: entry.access,
                    by_device: vec![Access::None; self.devices.len()],
                })
                .collect();
            for (device, gpu) in self.devices.iter().enumerate() {
                let Some(mirror) = space.mirrors.get(&gpu.name) else { continue };
                let note = mirror.inspect(|table| {
                    for (&page, entry) in &table.entries {
                        facts[index_of(page)].by_device[device] = entry.access;
                    }
                });
                note.expect("the space lives");
            }
            facts
        };
        self.spaces.values().map(facts).collect()
    }

    pub(crate) fn process(&self, space: SpaceName) -> Outcome<&Process> {
        Ok(&self.space(space)?.process)
    }

    fn space(&self, space: SpaceName) -> Outcome<&Space> {
        self.spaces.get(&space).ok_or(Obstacle::Refused(Refusal::Ended))
    }

    fn mirror(&self, device: DeviceName, space: SpaceName) -> Outcome<&Mirror<TestDevice>> {
        self.space(space)?.mirrors.get(&device).ok_or(Obstacle::Refused(Refusal::Ended))
    }

    fn gpu(&self, device: DeviceName) -> &Gpu {
        self.devices.iter().find(|gpu| gpu.name == device).expect("a device of the scene")
    }

    fn injector_of(&self, injection: Injection) -> &Injector {
        match injection.device() {
            Some(device) => &self.gpu(device).injector,
            None => &self.injector,
        }
    }

    /// Returns how often a step was taken.
    pub(crate) fn asked(&self, injection: Injection) -> u64 {
        self.injector_of(injection).asked(injection.step())
    }

    fn device_of(&self, owner: Owner) -> DeviceName {
        let gpu = self.devices.iter().find(|gpu| gpu.pagemap.owner() == owner);
        gpu.expect("pages are with devices of the scene").name
    }

    fn enter(&mut self, name: SpaceName, process: Process) -> Outcome<()> {
        let mut mirrors = BTreeMap::new();
        for gpu in &self.devices {
            mirrors.insert(gpu.name, self.new_mirror(&process, gpu)?);
        }
        if self.spaces.insert(name, Space { process, mirrors }).is_some() {
            return broken(format!("there is a space {name} already"));
        }
        Ok(())
    }

    fn new_mirror(&self, process: &Process, gpu: &Gpu) -> Outcome<Mirror<TestDevice>> {
        let all = range(Pages::new(0, self.arena));
        let mirror = process.address_space().mirror_with(&gpu.device, all, &gpu.pagemap);
        mirror.map_err(|error| Obstacle::Broken(error.to_string()))
    }

    fn device_access(
        &self,
        device: DeviceName,
        space: SpaceName,
        word: Word,
        access: Access,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Outcome<u64> {
        let mirror = self.mirror(device, space)?;
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
}

impl Executor for World {
    fn begin(&mut self, file: &OperationFile) -> Outcome<()> {
        self.arena = file.arena;
        for &(name, pages) in &file.devices {
            self.add_device(name, pages, self.in_place);
        }
        self.files =
            file.files.iter().map(|&(name, pages)| (name, self.machine.file(pages))).collect();
        Ok(())
    }

    fn spawn(&mut self, space: SpaceName) -> Outcome<()> {
        let process = self.machine.spawn();
        self.enter(space, process)
    }

    fn fork(&mut self, space: SpaceName, child: SpaceName) -> Outcome<()> {
        let process = self.process(space)?.fork().map_err(failed)?;
        self.enter(child, process)
    }

    fn exit(&mut self, space: SpaceName) -> Outcome<()> {
        let Space { process, mirrors } =
            self.spaces.remove(&space).ok_or(Obstacle::Refused(Refusal::Ended))?;
        process.exit();
        for (device, mirror) in mirrors {
            if mirror.unregister().is_some() {
                return broken(format!("{device} was not released when {space} died"));
            }
        }
        Ok(())
    }

    fn map(
        &mut self,
        space: SpaceName,
        pages: Pages,
        memory: Memory,
        access: Access,
    ) -> Outcome<()> {
        let mapping = match memory {
            Memory::Anonymous => Mapping::anonymous(access),
            Memory::Huge => Mapping::anonymous(access).huge(true),
            Memory::Shared => Mapping::shared(access),
            Memory::File { file, first } => Mapping::file(&self.files[&file], first, access),
            Memory::PrivateFile { file, first } => {
                Mapping::private_file(&self.files[&file], first, access)
            }
        };
        self.process(space)?.map(range(pages), mapping).map_err(failed)
    }

    fn unmap(&mut self, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.process(space)?.unmap(range(pages));
        Ok(())
    }

    fn protect(&mut self, space: SpaceName, pages: Pages, access: Access) -> Outcome<()> {
        self.process(space)?.protect(range(pages), access);
        Ok(())
    }

    fn remap(&mut self, space: SpaceName, pages: Pages, to: u64) -> Outcome<()> {
        self.process(space)?.remap(range(pages), page(to)).map_err(failed)
    }

    fn discard(&mut self, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.process(space)?.discard(range(pages));
        Ok(())
    }

    fn advise(&mut self, advice: Advice, space: SpaceName, pages: Pages) -> Outcome<()> {
        let process = self.process(space)?;
        let range = range(pages);
        match advice {
            Advice::Reclaim => _ = process.reclaim(range),
            Advice::SwapIn => _ = process.swap_in(range),
            Advice::Relocate => _ = process.relocate(range),
            Advice::Merge => _ = self.machine.merge(),
            Advice::Collapse => _ = process.collapse(range),
            Advice::Split => _ = process.split(range),
        }
        Ok(())
    }

    fn read(&mut self, space: SpaceName, word: Word) -> Outcome<u64> {
        self.process(space)?.load_u64(address(word)).map_err(failed)
    }

    fn write(&mut self, space: SpaceName, word: Word, value: u64) -> Outcome<()> {
        self.process(space)?.store_u64(address(word), value).map_err(failed)
    }

    fn add(&mut self, space: SpaceName, word: Word, value: u64) -> Outcome<u64> {
        self.process(space)?.fetch_add_u64(address(word), value).map_err(failed)
    }

    fn device_read(&mut self, device: DeviceName, space: SpaceName, word: Word) -> Outcome<u64> {
        self.device_access(device, space, word, Access::Read, &mut |old| old)
    }

    fn device_write(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<()> {
        self.device_access(device, space, word, Access::Write, &mut |_| value).map(drop)
    }

    fn device_add(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<u64> {
        let mut add = |old: u64| old.wrapping_add(value);
        self.device_access(device, space, word, Access::Atomic, &mut add)
    }

    fn device_fault(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        index: u64,
        access: Access,
    ) -> Outcome<()> {
        let handled = self.mirror(device, space)?.handle_fault(page(index), access);
        let handled = handled.map_err(refused)?;
        match handled.entry.access >= access {
            true => Ok(()),
            false => broken(format!("a fault for {access:?} was served with {handled:?}")),
        }
    }

    fn migrate(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()> {
        let process = self.process(space)?;
        process.address_space().migrate(range(pages), &self.gpu(device).pagemap).run();
        Ok(())
    }

    fn home(&mut self, space: SpaceName, pages: Pages) -> Outcome<()> {
        self.process(space)?.address_space().migrate_home(range(pages));
        Ok(())
    }

    fn evict(&mut self, device: DeviceName, count: u64) -> Outcome<()> {
        self.gpu(device).pagemap.evict(count);
        Ok(())
    }

    fn exclusive(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()> {
        let hold = self.mirror(device, space)?.exclusive(range(pages)).map_err(refused)?;
        if !hold.is_held() {
            return broken(format!("{hold:?} is not held"));
        }
        // To stay until somebody touches the pages: `release` ends it in the device's name.
        std::mem::forget(hold);
        Ok(())
    }

    fn release(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()> {
        let owner = self.gpu(device).pagemap.owner();
        self.process(space)?.address_space().backend().end_exclusive(range(pages), owner);
        Ok(())
    }

    fn attach(&mut self, device: DeviceName, space: SpaceName) -> Outcome<()> {
        let mirror = self.new_mirror(self.process(space)?, self.gpu(device))?;
        let space = self.spaces.get_mut(&space).expect("it was there a moment ago");
        match space.mirrors.insert(device, mirror) {
            Some(_) => broken(format!("{device} is attached already")),
            None => Ok(()),
        }
    }

    fn detach(&mut self, device: DeviceName, space: SpaceName) -> Outcome<()> {
        let space = self.spaces.get_mut(&space).ok_or(Obstacle::Refused(Refusal::Ended))?;
        let mirror = space.mirrors.remove(&device).ok_or(Obstacle::Refused(Refusal::Ended))?;
        match mirror.unregister() {
            Some(_) => Ok(()),
            None => broken("a mirror ended before its address space".into()),
        }
    }

    fn locate(&mut self, space: SpaceName, index: u64) -> Outcome<Place> {
        let entries = self.process(space)?.address_space().snapshot(page(index).into());
        Ok(match self.seen(&entries[0]) {
            Seen::Hole | Seen::Empty => Place::Nowhere,
            Seen::Zeroes | Seen::System(_) => Place::System,
            Seen::Held(_, device) => Place::Held(device),
            Seen::Device(device, _) => Place::Device(device),
        })
    }

    fn truncate(&mut self, file: FileName, pages: u64) -> Outcome<()> {
        self.files[&file].truncate(pages);
        Ok(())
    }

    fn punch(&mut self, file: FileName, pages: Pages) -> Outcome<()> {
        self.files[&file].punch_hole(pages.first, pages.count);
        Ok(())
    }

    fn fail(&mut self, injection: Injection, after: u64) -> Outcome<()> {
        self.injector_of(injection).fail(injection.step(), after);
        Ok(())
    }

    fn succeed(&mut self) -> Outcome<()> {
        self.injector.clear();
        self.devices.iter().for_each(|gpu| gpu.injector.clear());
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        self.check_against(&self.look())
    }

    fn finish(&mut self) -> Result<(), String> {
        let names: Vec<_> = self.spaces.keys().copied().collect();
        for name in names {
            self.exit(name).map_err(|obstacle| format!("exit {name}: {obstacle:?}"))?;
        }
        self.check()?;
        self.files.clear();
        match self.machine.frames() {
            0 => Ok(()),
            frames => Err(format!("{frames} pages of system memory are left")),
        }
    }
}

fn broken<T>(what: String) -> Outcome<T> {
    Err(Obstacle::Broken(what))
}

fn failed(error: SimError) -> Obstacle {
    match error {
        SimError::Fault(error) => refused(error),
        SimError::OutOfMemory => Obstacle::Refused(Refusal::OutOfMemory),
        error => Obstacle::Broken(error.to_string()),
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

fn index_of(page: Page) -> usize {
    (page.number() - Page::containing(BASE).number()) as usize
}

fn address(word: Word) -> u64 {
    page(word.page).address() + u64::from(word.offset)
}
