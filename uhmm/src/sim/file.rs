//! Files: pages that belong to no address space.

use std::fmt;
use std::sync::Arc;

use mmu_notifier::EventKind;

use super::error::SimError;
use super::object::{FileId, ObjectId};
use super::page_table::{Announced, Concern};
use super::state::{FileState, Found, Shared, State};
use super::vma::Backing;
use crate::address_space::SpaceId;
use crate::page::{PAGE_SIZE, PageRange};

/// A file in memory, of zeroes at first. Its handles are one file.
///
/// It lives until the last handle and the last mapping of it are gone.
#[derive(Clone)]
pub struct File(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    id: FileId,
}

impl File {
    pub(super) fn new(shared: &Arc<Shared>, pages: u64) -> File {
        let mut state = shared.lock();
        let id = FileId(state.number());
        let file = FileState { pages: Default::default(), length: pages, users: 1 };
        state.files.insert(id, file);
        drop(state);
        File(Arc::new(Handle { shared: Arc::clone(shared), id }))
    }

    pub(super) fn id(&self) -> FileId {
        self.0.id
    }

    /// Tells whether the file is one of this machine's.
    pub(super) fn is_on(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.0.shared, shared)
    }

    /// Returns the length of the file, in pages.
    pub fn pages(&self) -> u64 {
        self.0.shared.lock().files[&self.0.id].length
    }

    /// Makes the file `pages` pages long. On return nothing beyond is mapped anywhere, not even
    /// what private mappings had made of it; new pages are zeroes.
    ///
    /// Announces [`EventKind::Clear`] wherever pages from `pages` on are mapped, also where the file
    /// grows and they were out of its bounds.
    pub fn truncate(&self, pages: u64) {
        let id = self.0.id;
        let find = |state: &State| {
            let mut concern = Concern::default();
            for (space, range) in state.mapped_from(id, pages) {
                concern.add(space, range);
            }
            Found::Concern(concern)
        };
        self.0.shared.change(EventKind::Clear, None, find, |state, announced| {
            for (space, range) in state.mapped_from(id, pages) {
                state.zap(space, range, announced);
            }
            let file = state.files.get_mut(&id).expect("the handle holds it");
            file.length = pages;
            let dropped = file.pages.split_off(&pages);
            dropped.into_values().for_each(|page| state.free_if_unused(page));
        });
    }

    /// Makes `pages` pages from `first` zeroes again, and gives their memory back. Copies that
    /// private mappings have made stay.
    ///
    /// Announces [`EventKind::Clear`] in every address space that has the pages mapped.
    pub fn punch_hole(&self, first: u64, pages: u64) {
        let id = self.0.id;
        let hole = first..first.saturating_add(pages);
        let cached = |state: &State| -> Vec<ObjectId> {
            state.files[&id].pages.range(hole.clone()).map(|(_, &page)| page).collect()
        };
        let find = |state: &State| {
            let mut concern = Concern::default();
            cached(state).into_iter().for_each(|page| state.add_mappings(page, &mut concern));
            Found::Concern(concern)
        };
        self.0.shared.change(EventKind::Clear, None, find, |state, announced| {
            for page in cached(state) {
                let file = state.files.get_mut(&id).expect("the handle holds it");
                let (_, index) = state.objects[&page].file.expect("a page of a file");
                file.pages.remove(&index);
                state.unmap_everywhere(page, announced);
            }
        });
    }

    /// Makes the file's dirty pages clean: the next store to each through a mapping is noticed.
    /// Returns how many pages were dirty.
    ///
    /// Announces [`EventKind::ProtectionPage`] wherever such a page is mapped.
    #[doc(alias = "page_mkclean")]
    pub fn write_back(&self) -> u64 {
        let id = self.0.id;
        let find = |state: &State| {
            let mut concern = Concern::default();
            for page in state.dirty_pages(id) {
                state.add_mappings(page, &mut concern);
            }
            Found::Concern(concern)
        };
        self.0.shared.change(EventKind::ProtectionPage, None, find, |state, announced| {
            let pages = state.dirty_pages(id);
            for &page in &pages {
                state.object_mut(page).dirty = false;
                for (space, at) in state.object(page).mappings.clone() {
                    state.table(space).change(at, announced, |entry| {
                        entry.writable = false;
                        entry.flags.dirty = false;
                    });
                }
            }
            pages.len() as u64
        })
    }

    /// Reads from the file, `offset` bytes into it, as a system call does.
    ///
    /// # Errors
    ///
    /// [`SimError::OutOfBounds`] past the end of the file. Nothing was read.
    pub fn load(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SimError> {
        let state = self.0.shared.lock();
        let file = &state.files[&self.0.id];
        check_bounds(file, offset, bytes.len())?;
        for (index, inside, piece) in pieces(offset, bytes.len()) {
            let target = &mut bytes[piece];
            let frame = file.pages.get(&index).map(|&page| state.object(page).frame());
            match frame {
                Some(frame) => {
                    state.ram.load(frame.expect("file pages stay in memory"), inside, target);
                }
                None => target.fill(0),
            }
        }
        Ok(())
    }

    /// Writes to the file, `offset` bytes into it, as a system call does. All who have the page
    /// mapped see it.
    ///
    /// # Errors
    ///
    /// [`SimError::OutOfBounds`] past the end of the file: nothing was written.
    /// [`SimError::OutOfMemory`]: the bytes before the page that could not be had were written.
    pub fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), SimError> {
        let mut state = self.0.shared.lock();
        check_bounds(&state.files[&self.0.id], offset, bytes.len())?;
        for (index, inside, piece) in pieces(offset, bytes.len()) {
            let page = state.file_page(self.0.id, index).ok_or(SimError::OutOfMemory)?;
            let frame = state.object(page).frame().expect("file pages stay in memory");
            state.ram.store(frame, inside, &bytes[piece]);
            state.object_mut(page).dirty = true;
        }
        Ok(())
    }
}

fn check_bounds(file: &FileState, offset: u64, bytes: usize) -> Result<(), SimError> {
    let bytes = bytes as u64;
    let end = offset.checked_add(bytes).map(|end| end.div_ceil(PAGE_SIZE as u64));
    match end {
        Some(end) if end <= file.length => Ok(()),
        _ => Err(SimError::OutOfBounds { address: offset, bytes }),
    }
}

/// Cuts `length` bytes at `offset` at the edges of pages: which page, where in it, and which bytes.
fn pieces(
    offset: u64,
    length: usize,
) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset + done as u64;
        let inside = (at % PAGE_SIZE as u64) as usize;
        let end = length.min(done + PAGE_SIZE - inside);
        let piece = done..end;
        done = end;
        Some((at / PAGE_SIZE as u64, inside, piece))
    })
}

impl State {
    /// Returns where the pages of a file from `first` on are mapped, whether or not anything is
    /// there.
    fn mapped_from(&self, file: FileId, first: u64) -> Vec<(SpaceId, PageRange)> {
        let mut places = Vec::new();
        for (&id, space) in &self.spaces {
            for vma in space.vmas.iter() {
                let Backing::File { file: of, first: start, .. } = vma.backing else { continue };
                let skipped = first.saturating_sub(start);
                if of != file || skipped >= vma.range.pages() {
                    continue;
                }
                let from = vma.range.first().checked_add(skipped);
                let range = from.and_then(|from| PageRange::from_bounds(from, vma.range.last()));
                places.extend(range.map(|range| (id, range)));
            }
        }
        places
    }

    fn dirty_pages(&self, file: FileId) -> Vec<ObjectId> {
        let is_dirty = |&id: &ObjectId| {
            let object = self.object(id);
            object.dirty
                || object.mappings.iter().any(|&(space, page)| {
                    self.entry(space, page)
                        .is_some_and(|(_, entry)| entry.writable || entry.flags.dirty)
                })
        };
        self.files[&file].pages.values().copied().filter(is_dirty).collect()
    }

    fn unmap_everywhere(&mut self, id: ObjectId, announced: &Announced<'_>) {
        if self.object(id).mappings.is_empty() {
            self.free_if_unused(id);
            return;
        }
        for (space, page) in self.object(id).mappings.clone() {
            self.unmap_entry(space, page, announced);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().put_files([self.id]);
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File").field("id", &self.0.id).field("pages", &self.pages()).finish()
    }
}
