//! What the compiler refuses: one item for each guarantee that is kept by types.
//!
//! Each item shows a program that must not compile, with the code of the error that stops it, and
//! then the same program put right. The second differs from the first in what the guarantee is
//! about and in nothing else, so the first fails for that reason and no other. The codes are
//! checked where documentation tests run on a nightly compiler; a stable one checks only that the
//! first fails and the second passes.

/// What was not copied cannot be committed.
///
/// ```compile_fail,E0599
/// # fn f(space: &uhmm::AddressSpace, range: uhmm::PageRange, gpu: &std::sync::Arc<uhmm::DevicePagemap>) {
/// space.migrate(range, gpu).commit();
/// # }
/// ```
///
/// ```
/// # fn f(space: &uhmm::AddressSpace, range: uhmm::PageRange, gpu: &std::sync::Arc<uhmm::DevicePagemap>) {
/// space.migrate(range, gpu).copy().commit();
/// # }
/// ```
pub mod a_migration_is_copied_before_it_is_committed {}

/// A migration ends once: its pages are in one place afterwards, whoever asks again.
///
/// ```compile_fail,E0382
/// # fn f(space: &uhmm::AddressSpace, range: uhmm::PageRange, gpu: &std::sync::Arc<uhmm::DevicePagemap>) {
/// let migration = space.migrate(range, gpu).copy();
/// let first = migration.commit();
/// let second = migration.commit();
/// # }
/// ```
///
/// ```
/// # fn f(space: &uhmm::AddressSpace, range: uhmm::PageRange, gpu: &std::sync::Arc<uhmm::DevicePagemap>) {
/// let migration = space.migrate(range, gpu).copy();
/// let first = migration.commit();
/// let second = space.migrate(range, gpu).copy().commit();
/// # }
/// ```
pub mod a_migration_is_committed_once {}

/// A migration stays on the thread that would wait for itself if it touched the pages.
///
/// ```compile_fail,E0277
/// # fn f(migration: uhmm::Migration<uhmm::Isolated>) {
/// std::thread::spawn(move || drop(migration));
/// # }
/// ```
///
/// ```
/// # fn f(migration: uhmm::Migration<uhmm::Isolated>) {
/// std::thread::spawn(move || ());
/// drop(migration);
/// # }
/// ```
pub mod a_migration_stays_on_its_thread {}

/// An address space is taken apart by its last user's drop, and by nobody else.
///
/// ```compile_fail,E0423
/// # fn f(space: uhmm::AddressSpace) {
/// space.backend().exit(uhmm::Death(()));
/// # }
/// ```
///
/// ```
/// # fn f(space: uhmm::AddressSpace) {
/// drop(space);
/// # }
/// ```
pub mod only_the_last_user_ends_an_address_space {}

/// Nothing is written into a device's page table but by a range fault, which checks under the lock
/// that what it writes is still true (E02, E23).
///
/// ```compile_fail,E0596
/// # fn f<D: uhmm::Device<PageTable = Vec<u64>>>(mirror: &uhmm::Mirror<D>) {
/// mirror.inspect(|table| table.push(42)).ok();
/// # }
/// ```
///
/// ```
/// # fn f<D: uhmm::Device<PageTable = Vec<u64>>>(mirror: &uhmm::Mirror<D>) {
/// mirror.inspect(|table| table.contains(&42)).ok();
/// # }
/// ```
pub mod no_translation_without_a_range_fault {}

/// A mirror is gone when it has been unregistered (B05).
///
/// ```compile_fail,E0382
/// # fn f<D: uhmm::Device>(mirror: uhmm::Mirror<D>) {
/// let table = mirror.unregister();
/// mirror.range_fault(&uhmm::RangeFault::read(mirror.range())).ok();
/// # }
/// ```
///
/// ```
/// # fn f<D: uhmm::Device>(mirror: uhmm::Mirror<D>) {
/// mirror.range_fault(&uhmm::RangeFault::read(mirror.range())).ok();
/// let table = mirror.unregister();
/// # }
/// ```
pub mod a_mirror_is_not_used_after_unregister {}

/// Who holds a mere reference must ask whether the address space lives before using it (A06).
///
/// ```compile_fail,E0599
/// # fn f(mm: &uhmm::Mm, range: uhmm::PageRange) {
/// let entries = mm.snapshot(range);
/// # }
/// ```
///
/// ```
/// # fn f(mm: &uhmm::Mm, range: uhmm::PageRange) {
/// let entries = mm.users().map(|space| space.snapshot(range));
/// # }
/// ```
pub mod a_dead_address_space_has_no_pages {}

/// Device memory is freed by whoever owns it, once.
///
/// ```compile_fail,E0382
/// # fn f(block: uhmm::DeviceBlock) {
/// let pieces = block.split();
/// drop(block);
/// # }
/// ```
///
/// ```
/// # fn f(block: uhmm::DeviceBlock) {
/// let pieces = block.split();
/// drop(pieces);
/// # }
/// ```
pub mod device_memory_is_freed_once {}

/// A hold ends before the mirror does, so nothing is left held for a device that is gone.
///
/// ```compile_fail,E0505
/// # fn f<D: uhmm::Device>(mirror: uhmm::Mirror<D>) -> Result<(), uhmm::FaultError> {
/// let hold = mirror.exclusive(mirror.range())?;
/// mirror.unregister();
/// drop(hold);
/// # Ok(())
/// # }
/// ```
///
/// ```
/// # fn f<D: uhmm::Device>(mirror: uhmm::Mirror<D>) -> Result<(), uhmm::FaultError> {
/// let hold = mirror.exclusive(mirror.range())?;
/// drop(hold);
/// mirror.unregister();
/// # Ok(())
/// # }
/// ```
pub mod an_exclusive_hold_ends_before_its_mirror {}

/// A device cannot refuse to stop, except where whoever asks gives up rather than wait (E12, E13).
///
/// ```compile_fail,E0053
/// # use std::sync::Arc;
/// # use uhmm::{Device, Event, PageEntry, PageRange, SystemMemory, WouldBlock};
/// # struct Gpu;
/// impl Device for Gpu {
///     # type PageTable = ();
///     # type Fence = ();
///     # fn page_table(&self, _: PageRange, _: &Arc<dyn SystemMemory>) {}
///     # fn map(&self, _: &mut (), _: PageRange, _: &[PageEntry]) {}
///     # fn try_invalidate(&self, _: &mut (), _: &Event) -> Result<(), WouldBlock> { Err(WouldBlock) }
///     fn invalidate(&self, _: &mut (), _: &Event) -> Result<(), WouldBlock> {
///         Err(WouldBlock)
///     }
/// }
/// ```
///
/// ```
/// # use std::sync::Arc;
/// # use uhmm::{Device, Event, PageEntry, PageRange, SystemMemory, WouldBlock};
/// # struct Gpu;
/// impl Device for Gpu {
///     # type PageTable = ();
///     # type Fence = ();
///     # fn page_table(&self, _: PageRange, _: &Arc<dyn SystemMemory>) {}
///     # fn map(&self, _: &mut (), _: PageRange, _: &[PageEntry]) {}
///     # fn try_invalidate(&self, _: &mut (), _: &Event) -> Result<(), WouldBlock> { Err(WouldBlock) }
///     fn invalidate(&self, _: &mut (), _: &Event) {}
/// }
/// ```
pub mod a_device_cannot_refuse_to_stop {}
