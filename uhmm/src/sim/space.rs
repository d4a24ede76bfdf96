//! The address space as the layer above sees it.

use std::sync::Arc;
use std::time::Instant;

use mmu_notifier::{EventKind, Owner, Subscriptions};

use super::fault::Space;
use super::object::Location;
use super::page_table::{Entry, Sight, Target};
use super::ram::ZERO;
use super::state::State;
use super::vma::Vma;
use crate::address_space::{Death, SpaceId};
use crate::backend::{Backend, Coherence, Isolation, Select, SystemMemory};
use crate::entry::{Access, DeviceFrame, DeviceLocation, Frame, PageEntry, Residency};
use crate::error::FaultError;
use crate::page::{Page, PageRange};

impl Backend for Space {
    fn id(&self) -> SpaceId {
        self.id
    }

    fn notifiers(&self) -> &Arc<Subscriptions> {
        &self.notifiers
    }

    fn coherence(&self) -> Coherence {
        Coherence::Announced
    }

    fn memory(&self) -> Arc<dyn SystemMemory> {
        Arc::clone(&self.shared.devices) as Arc<dyn SystemMemory>
    }

    fn snapshot(&self, range: PageRange, entries: &mut Vec<PageEntry>) {
        let state = self.shared.lock();
        let Some(space) = state.space(self.id) else {
            entries.extend(range.iter().map(|_| PageEntry::default()));
            return;
        };
        let mut vmas = space.vmas.overlapping(range).peekable();
        let mut mapped = space.table.overlapping(range).peekable();
        for page in range.iter() {
            while vmas.next_if(|vma| vma.range.last() < page).is_some() {}
            let ends = |first: Page, entry: &Entry| first.block(entry.order).last() < page;
            while mapped.next_if(|&(first, entry)| ends(first, entry)).is_some() {}
            let vma = vmas.peek().filter(|vma| vma.range.contains(page));
            let entry = mapped.peek().filter(|(first, _)| *first <= page);
            entries.push(state.page_entry(page, vma.copied(), entry.copied()));
        }
    }

    fn fault(
        &self,
        range: PageRange,
        access: Access,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        range.iter().try_for_each(|page| self.fault_page(page, access, keep, deadline))
    }

    fn isolate(&self, range: PageRange, select: Select) -> Box<dyn Isolation> {
        Box::new(Space::isolate(self, range, select))
    }

    fn exclusive(
        &self,
        range: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        self.take_exclusive(range, owner, deadline)
    }

    fn end_exclusive(&self, range: PageRange, owner: Owner) {
        self.give_back(range, owner);
    }

    fn exit(&self, _death: Death) {
        // Nobody subscribes to a dead address space; the announcement is what `zap` asks for.
        self.shared.change_range(EventKind::Unmap, self.id, PageRange::ALL, |state, announced| {
            if state.space(self.id).is_none() {
                return;
            }
            state.zap(self.id, PageRange::ALL, announced);
            let vmas = state.take_vmas(self.id, PageRange::ALL);
            state.put_files(super::vma::files(&vmas));
            state.spaces.remove(&self.id);
        });
    }
}

impl State {
    fn page_entry(
        &self,
        page: Page,
        vma: Option<&Vma>,
        entry: Option<(Page, &Entry)>,
    ) -> PageEntry {
        let Some(vma) = vma else { return PageEntry::default() };
        let allowed = vma.rights;
        match entry {
            None => PageEntry { residency: Residency::Empty, allowed, ..PageEntry::default() },
            Some((first, entry)) => {
                let residency = self.residency(first, entry, page);
                let access = access_now(vma, entry);
                PageEntry { residency, access, allowed, order: entry.order }
            }
        }
    }

    fn residency(&self, first: Page, entry: &Entry, page: Page) -> Residency {
        let Target::Object { id, .. } = entry.target else { return Residency::System(ZERO) };
        let index = page.number() - first.number();
        match (&self.object(id).location, entry.sight) {
            (Location::Transit(_), _) => Residency::InTransit,
            (Location::Swap(_), _) => Residency::Empty,
            (&Location::System(Frame(frame)), Sight::Exclusive(owner)) => {
                Residency::Exclusive { frame: Frame(frame + index), owner }
            }
            (&Location::System(Frame(frame)), _) => Residency::System(Frame(frame + index)),
            (Location::Device(block), _) => {
                let DeviceLocation { owner, frame: DeviceFrame(frame) } = block.location();
                Residency::Device(DeviceLocation { owner, frame: DeviceFrame(frame + index) })
            }
        }
    }
}

/// Returns what an entry lets its user do now.
fn access_now(vma: &Vma, entry: &Entry) -> Access {
    let entry_access = match entry.sight {
        Sight::Hidden => return Access::None,
        Sight::Exclusive(_) => return Access::Atomic,
        Sight::Visible if entry.writable => Access::Write,
        Sight::Visible => Access::Read,
    };
    entry_access.min(vma.rights)
}
