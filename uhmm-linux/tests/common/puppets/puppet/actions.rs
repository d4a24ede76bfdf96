//! What a space does when it is asked: system calls, accesses of CPUs, and what devices do.

use std::panic::{AssertUnwindSafe, catch_unwind};

use uhmm::operations::{
    Advice, DeviceName, Executor, FileName, Injection, Memory, Obstacle, OperationFile, Outcome,
    Pages, Place, Refusal, SpaceName, Word,
};
use uhmm::{Access, EventKind, Residency};

use super::super::broken;
use super::{Puppet, page, range, refused, within};
use crate::common::memory::{self, Backing};
use crate::common::trap::{self, Trap};

impl Executor for Puppet {
    fn begin(&mut self, _: &OperationFile) -> Outcome<()> {
        unreachable!("the scene was set before this process was made")
    }

    fn spawn(&mut self, _: SpaceName) -> Outcome<()> {
        unreachable!("a process does not spawn others")
    }

    fn fork(&mut self, _: SpaceName, child: SpaceName) -> Outcome<()> {
        match crate::common::fork() {
            Some(_) => Ok(()),
            None => {
                // Nobody must return into what was the parent's.
                let code = catch_unwind(AssertUnwindSafe(|| self.be(child))).map_or(101, |()| 0);
                crate::common::exit_now(code)
            }
        }
    }

    fn exit(&mut self, _: SpaceName) -> Outcome<()> {
        self.end()
    }

    fn map(&mut self, _: SpaceName, pages: Pages, memory: Memory, access: Access) -> Outcome<()> {
        let backing = match memory {
            Memory::Anonymous => Backing::Anonymous,
            Memory::Huge => Backing::Huge,
            Memory::Shared => Backing::Shared,
            Memory::File { file, first } => Backing::File(self.scene.file(file), first),
            Memory::PrivateFile { file, first } => {
                Backing::PrivateFile(self.scene.file(file), first)
            }
        };
        let range = range(pages);
        self.change(EventKind::Unmap, &[range], || {
            memory::map(range, backing, memory::rights(access)).map_err(failed)
        })
    }

    fn unmap(&mut self, _: SpaceName, pages: Pages) -> Outcome<()> {
        let range = range(pages);
        self.change(EventKind::Unmap, &[range], || {
            memory::unmap(range);
            Ok(())
        })
    }

    fn protect(&mut self, _: SpaceName, pages: Pages, access: Access) -> Outcome<()> {
        let range = range(pages);
        // No event tells of it.
        within(self.process()?, EventKind::ProtectionVma, &[range], || {
            // Of what there is: mprotect(2) stops at a hole.
            let mapped = memory::mapped_in(range).into_iter();
            let mut parts = mapped.map(|(part, _)| part);
            parts.try_for_each(|part| memory::protect(part, memory::rights(access)).map_err(failed))
        })
    }

    fn remap(&mut self, _: SpaceName, pages: Pages, to: u64) -> Outcome<()> {
        let from = range(pages);
        let target = range(Pages::new(to, pages.count));
        self.change(EventKind::Unmap, &[from, target], || {
            // One by one: mremap(2) takes no more than a mapping.
            let mapped = memory::mapped_in(from).into_iter();
            let mut parts = mapped.map(|(part, _)| part);
            parts.try_for_each(|part| {
                let distance = part.first().number() - from.first().number();
                let to = target.first().checked_add(distance).expect("within the arena");
                memory::remap(part, to).map_err(failed)
            })
        })
    }

    fn discard(&mut self, _: SpaceName, pages: Pages) -> Outcome<()> {
        let range = range(pages);
        self.change(EventKind::Clear, &[range], || {
            // ENOMEM says that there was a hole; what is around it was discarded.
            match memory::advise(range, libc::MADV_DONTNEED) {
                Ok(()) | Err(rustix::io::Errno::NOMEM) => Ok(()),
                Err(error) => Err(failed(error)),
            }
        })
    }

    fn advise(&mut self, advice: Advice, _: SpaceName, pages: Pages) -> Outcome<()> {
        /// `MADV_COLLAPSE` (Linux 6.1).
        const COLLAPSE: i32 = 25;
        self.process()?;
        let range = range(pages);
        let advices: &[_] = match advice {
            Advice::Reclaim => &[libc::MADV_PAGEOUT],
            Advice::SwapIn => &[libc::MADV_WILLNEED],
            // Only between nodes, of which there may be one.
            Advice::Relocate => &[],
            Advice::Merge => &[libc::MADV_MERGEABLE],
            Advice::Collapse => &[COLLAPSE],
            // Page by page, which takes a large page apart.
            Advice::Split => &[libc::MADV_COLD],
        };
        for &number in advices {
            let each = if advice == Advice::Split { 1 } else { range.pages() };
            for first in (0..range.pages()).step_by(each as usize) {
                // A backend may do nothing, and so may the kernel.
                let _ = memory::advise(memory::part(range, first, each), number);
            }
        }
        Ok(())
    }

    fn read(&mut self, _: SpaceName, word: Word) -> Outcome<u64> {
        self.process()?;
        trap::load(address(word)).map_err(|trap| trapped(trap, word))
    }

    fn write(&mut self, _: SpaceName, word: Word, value: u64) -> Outcome<()> {
        self.process()?;
        trap::store(address(word), value).map_err(|trap| trapped(trap, word))
    }

    fn add(&mut self, _: SpaceName, word: Word, value: u64) -> Outcome<u64> {
        self.process()?;
        trap::add(address(word), value).map_err(|trap| trapped(trap, word))
    }

    fn device_read(&mut self, device: DeviceName, _: SpaceName, word: Word) -> Outcome<u64> {
        self.device_access(device, word, Access::Read, &mut |old| old)
    }

    fn device_write(
        &mut self,
        device: DeviceName,
        _: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<()> {
        self.device_access(device, word, Access::Write, &mut |_| value).map(drop)
    }

    fn device_add(
        &mut self,
        device: DeviceName,
        _: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<u64> {
        let mut add = |old: u64| old.wrapping_add(value);
        self.device_access(device, word, Access::Atomic, &mut add)
    }

    fn device_fault(
        &mut self,
        device: DeviceName,
        _: SpaceName,
        index: u64,
        access: Access,
    ) -> Outcome<()> {
        let handled = self.mirror(device)?.handle_fault(page(index), access);
        let handled = handled.map_err(refused)?;
        match handled.entry.access >= access {
            true => Ok(()),
            false => broken(format!("a fault for {access:?} was served with {handled:?}")),
        }
    }

    fn migrate(&mut self, device: DeviceName, _: SpaceName, pages: Pages) -> Outcome<()> {
        self.process()?.migrate(range(pages), &self.gpu(device).pagemap).run();
        Ok(())
    }

    fn home(&mut self, _: SpaceName, pages: Pages) -> Outcome<()> {
        self.process()?.migrate_home(range(pages));
        Ok(())
    }

    fn evict(&mut self, device: DeviceName, count: u64) -> Outcome<()> {
        self.gpu(device).pagemap.evict(count);
        Ok(())
    }

    fn exclusive(&mut self, device: DeviceName, _: SpaceName, pages: Pages) -> Outcome<()> {
        let hold = self.mirror(device)?.exclusive(range(pages)).map_err(refused)?;
        if !hold.is_held() {
            return broken(format!("{hold:?} is not held"));
        }
        // To stay until somebody touches the pages: `release` ends it in the device's name.
        std::mem::forget(hold);
        Ok(())
    }

    fn release(&mut self, device: DeviceName, _: SpaceName, pages: Pages) -> Outcome<()> {
        let owner = self.gpu(device).pagemap.owner();
        self.process()?.backend().end_exclusive(range(pages), owner);
        Ok(())
    }

    fn attach(&mut self, device: DeviceName, _: SpaceName) -> Outcome<()> {
        let mirror = self.new_mirror(device)?;
        match self.mirrors.insert(device, mirror) {
            Some(_) => broken(format!("{device} is attached already")),
            None => Ok(()),
        }
    }

    fn detach(&mut self, device: DeviceName, _: SpaceName) -> Outcome<()> {
        let mirror = self.mirrors.remove(&device).ok_or(Obstacle::Refused(Refusal::Ended))?;
        match mirror.unregister() {
            Some(_) => Ok(()),
            None => broken("a mirror ended before its address space".into()),
        }
    }

    fn locate(&mut self, _: SpaceName, index: u64) -> Outcome<Place> {
        let entries = self.process()?.snapshot(page(index).into());
        Ok(match entries[0].residency {
            Residency::Hole | Residency::Empty => Place::Nowhere,
            Residency::System(_) => Place::System,
            Residency::Exclusive { owner, .. } => Place::Held(self.device_of(owner)),
            Residency::Device(at) => Place::Device(self.device_of(at.owner)),
            residency => return broken(format!("page {index} is {residency:?}")),
        })
    }

    fn truncate(&mut self, _: FileName, _: u64) -> Outcome<()> {
        unreachable!("files are changed by who runs the story")
    }

    fn punch(&mut self, _: FileName, _: Pages) -> Outcome<()> {
        unreachable!("files are changed by who runs the story")
    }

    fn fail(&mut self, _: Injection, _: u64) -> Outcome<()> {
        unreachable!("what is to fail comes with each request")
    }

    fn succeed(&mut self) -> Outcome<()> {
        unreachable!("what is to fail comes with each request")
    }

    fn finish(&mut self) -> Result<(), String> {
        unreachable!("a space ends when it is told to")
    }
}

/// Returns what an access of a CPU was refused for.
fn trapped(trap: Trap, word: Word) -> Obstacle {
    let page = page(word.page).into();
    let mapped = memory::mapped_in(page).pop();
    Obstacle::Refused(match (trap, mapped) {
        (Trap::Unmapped, None) => Refusal::Hole,
        (Trap::Denied, Some(_)) => Refusal::Denied,
        (Trap::NoPage, Some((_, line))) if line.inode != 0 => Refusal::EndOfFile,
        (Trap::NoPage, Some((_, line))) if line.inode == 0 => Refusal::OutOfMemory,
        (Trap::Hardware, Some(_)) => Refusal::CopyFailed,
        (trap, mapped) => {
            return Obstacle::Broken(format!("an access to {word} got {trap} at {mapped:?}"));
        }
    })
}

fn failed(error: rustix::io::Errno) -> Obstacle {
    Obstacle::Broken(error.to_string())
}

fn address(word: Word) -> u64 {
    page(word.page).address() + u64::from(word.offset)
}
