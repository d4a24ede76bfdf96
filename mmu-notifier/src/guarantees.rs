//! What the compiler refuses: one item for each guarantee that is kept by types.
//!
//! Each item shows a program that must not compile, with the code of the error that stops it, and
//! then the same program put right. The second differs from the first in what the guarantee is
//! about and in nothing else, so the first fails for that reason and no other. The codes are
//! checked where documentation tests run on a nightly compiler; a stable one checks only that the
//! first fails and the second passes.
//!
//! One more is kept inside this crate, out of reach of a documentation test: to call a notifier
//! while the registry lock is held does not compile, because the call wants a witness that the
//! lock's guard has borrowed (E0502; acceptance D01). What no type can say is in
//! [`guide::limitations`](crate::guide::limitations).

/// Whoever looks at a notifier outside a read section can write no translation into it (E23).
///
/// ```compile_fail,E0596
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// mirror.inspect(|table| {
///     table.0.insert(0x1000, 42);
/// })?;
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// while let Ok(section) = mirror.read_begin() {
///     let frame = 42; // look the translation up
///     if let Ok(mut table) = section.commit() {
///         table.0.insert(0x1000, frame);
///         break;
///     }
/// }
/// mirror.inspect(|table| {
///     assert_eq!(table.0.get(&0x1000), Some(&42));
/// })?;
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
pub mod no_translation_without_a_read_section {}

/// A read section ends with its first commit, whatever that says; the next try needs a new one
/// (E03).
///
/// ```compile_fail,E0382
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// let collided = section.commit().is_err();
/// let collided_still = section.commit().is_err();
/// # let _ = (collided, collided_still);
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// let collided = section.commit().is_err();
/// let section = mirror.read_begin()?;
/// let collided_still = section.commit().is_err();
/// # let _ = (collided, collided_still);
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
pub mod a_read_section_is_concluded_once {}

/// A read section gives no access to the notifier; its commit does, which takes the notifier's lock
/// and then checks, so that the check without the lock has no spelling (E02).
///
/// ```compile_fail,E0609
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// if !section.check_retry() {
///     section.0.insert(0x1000, 42);
/// }
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// if let Ok(mut table) = section.commit() {
///     table.0.insert(0x1000, 42);
/// }
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
pub mod an_update_needs_the_lock {}

/// What a commit gave access to is out of reach once the lock is given up.
///
/// ```compile_fail,E0505
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// let mut update = section.commit()?;
/// let table = &mut update.0;
/// drop(update);
/// table.insert(0x1000, 42);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// let mut update = section.commit()?;
/// let table = &mut update.0;
/// table.insert(0x1000, 42);
/// drop(update);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub mod an_update_ends_with_its_lock {}

/// A notifier's lock is given up by the thread that took it, which is how a thread that waits for
/// itself is recognised.
///
/// ```compile_fail,E0277
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let update = mirror.read_begin()?.commit()?;
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(update));
/// });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(section.commit()));
/// });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub mod an_update_stays_on_its_thread {}

/// Once a subscription has been ended, its owner cannot ask anything of it (B05, C03).
///
/// ```compile_fail,E0382
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let table = mirror.unsubscribe();
/// let section = mirror.read_begin();
/// # let _ = (table, section);
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin();
/// # drop(section);
/// let table = mirror.unsubscribe();
/// # let _ = table;
/// ```
pub mod a_subscription_is_not_used_after_unsubscribe {}

/// A subscription cannot be ended while a read section of it is open.
///
/// ```compile_fail,E0505
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// let table = mirror.unsubscribe();
/// drop(section.commit());
/// # drop(table);
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let section = mirror.read_begin()?;
/// drop(section.commit());
/// let table = mirror.unsubscribe();
/// # drop(table);
/// # Ok::<(), mmu_notifier::Released>(())
/// ```
pub mod a_read_section_does_not_outlive_its_subscription {}

/// A subscription cannot be ended under an update of it, where it would wait for its own lock.
///
/// ```compile_fail,E0505
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let mut update = mirror.read_begin()?.commit()?;
/// let table = mirror.unsubscribe();
/// update.0.insert(0x1000, 42);
/// # drop(table);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let mut update = mirror.read_begin()?.commit()?;
/// update.0.insert(0x1000, 42);
/// drop(update);
/// let table = mirror.unsubscribe();
/// # drop(table);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub mod an_update_does_not_outlive_its_subscription {}

/// Who holds a handle, but not the subscription, cannot move the subscription under its owner.
///
/// ```compile_fail,E0599
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mut mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let mut handle = mirror.clone();
/// handle.set_range(VaRange::new(0x1000, 0x1000)?)?;
/// # drop(mirror);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mut mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// mirror.set_range(VaRange::new(0x1000, 0x1000)?)?;
/// let handle = mirror.clone();
/// assert_eq!(handle.range().start(), 0x1000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub mod only_the_owner_changes_the_range {}

/// Who holds a handle, but not the subscription, cannot end it.
///
/// ```compile_fail,E0599
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let handle = space.find::<Table>(0x1000).expect("the mirror covers everything");
/// let table = handle.unsubscribe();
/// # let _ = (table, mirror);
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{Event, Notifier, Subscriptions, VaRange};
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// # let mirror = space.subscribe(VaRange::ALL, Table::default()).expect("the space lives");
/// let handle = space.find::<Table>(0x1000).expect("the mirror covers everything");
/// let table = mirror.unsubscribe();
/// assert!(handle.read_begin().is_err());
/// # let _ = table;
/// ```
pub mod only_the_owner_unsubscribes {}

/// The thread that announced a change ends it, so that a reader that made the announcement itself
/// is told so instead of waiting for itself.
///
/// ```compile_fail,E0277
/// # use mmu_notifier::{Event, EventKind, Subscriptions, VaRange};
/// # let space = Subscriptions::new();
/// # let event = Event::new(EventKind::Unmap, VaRange::ALL);
/// let change = space.invalidate_range_start(event);
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(change));
/// });
/// ```
///
/// ```
/// # use mmu_notifier::{Event, EventKind, Subscriptions, VaRange};
/// # let space = Subscriptions::new();
/// # let event = Event::new(EventKind::Unmap, VaRange::ALL);
/// std::thread::scope(|scope| {
///     scope.spawn(|| {
///         let change = space.invalidate_range_start(event);
///         drop(change);
///     });
/// });
/// ```
pub mod an_announcement_stays_on_its_thread {}

/// An address space's subscriptions cannot be freed while a change to it is under way.
///
/// ```compile_fail,E0505
/// # use mmu_notifier::{Event, EventKind, Subscriptions, VaRange};
/// # let space = Subscriptions::new();
/// # let event = Event::new(EventKind::Unmap, VaRange::ALL);
/// let change = space.invalidate_range_start(event);
/// drop(space);
/// drop(change);
/// ```
///
/// ```
/// # use mmu_notifier::{Event, EventKind, Subscriptions, VaRange};
/// # let space = Subscriptions::new();
/// # let event = Event::new(EventKind::Unmap, VaRange::ALL);
/// let change = space.invalidate_range_start(event);
/// drop(change);
/// drop(space);
/// ```
pub mod an_announcement_does_not_outlive_its_space {}

/// A non-blockable announcement has to be asked whether it was refused before there is a change to
/// make (E13).
///
/// ```compile_fail,E0308
/// # use mmu_notifier::{Event, EventKind, Subscriptions, VaRange};
/// # let space = Subscriptions::new();
/// # let event = Event::new(EventKind::Unmap, VaRange::ALL);
/// # use mmu_notifier::RangeInvalidation;
/// # fn unmap(_: RangeInvalidation<'_>) {}
/// unmap(space.try_invalidate_range_start(event));
/// ```
///
/// ```
/// # use mmu_notifier::{Event, EventKind, Subscriptions, VaRange};
/// # let space = Subscriptions::new();
/// # let event = Event::new(EventKind::Unmap, VaRange::ALL);
/// # use mmu_notifier::RangeInvalidation;
/// # fn unmap(_: RangeInvalidation<'_>) {}
/// if let Ok(change) = space.try_invalidate_range_start(event) {
///     unmap(change);
/// }
/// ```
pub mod a_refusal_is_not_an_announcement {}

/// An invalidation that may sleep has no way to say no, so the case that the kernel warns about and
/// then ignores does not exist (E12).
///
/// ```compile_fail,E0053
/// # use mmu_notifier::{Event, Notifier, WouldBlock};
/// # struct Device;
/// impl Notifier for Device {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) -> Result<(), WouldBlock> {
///         Err(WouldBlock)
///     }
/// }
/// ```
///
/// ```
/// # use mmu_notifier::{Event, Notifier, WouldBlock};
/// # struct Device;
/// impl Notifier for Device {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {}
///     fn try_invalidate(&mut self, event: &Event) -> Result<(), WouldBlock> {
///         Err(WouldBlock)
///     }
/// }
/// ```
pub mod a_blockable_invalidation_cannot_refuse {}

/// Nothing can be called on a notifier after its release, because nobody has it any more (B08,
/// B12).
///
/// ```compile_fail,E0053
/// # use mmu_notifier::{Event, Notifier};
/// # struct Device;
/// impl Notifier for Device {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {}
///     fn release(&mut self) {}
/// }
/// ```
///
/// ```
/// # use mmu_notifier::{Event, Notifier};
/// # struct Device;
/// impl Notifier for Device {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {}
///     fn release(self) {}
/// }
/// ```
pub mod release_takes_the_notifier_by_value {}

/// A notifier must be `Send`, because whichever thread changes the address space calls it.
///
/// ```compile_fail,E0277
/// # use mmu_notifier::{Event, Notifier};
/// struct Device(std::rc::Rc<u64>);
///
/// impl Notifier for Device {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {}
/// }
/// ```
///
/// ```
/// # use mmu_notifier::{Event, Notifier};
/// struct Device(std::sync::Arc<u64>);
///
/// impl Notifier for Device {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {}
/// }
/// ```
pub mod a_notifier_can_go_to_any_thread {}

/// A notifier owns what it uses, because it lives until its subscription ends and not as long as
/// some scope.
///
/// ```compile_fail,E0478
/// # use mmu_notifier::{Event, Notifier};
/// struct Device<'a>(&'a [u64]);
///
/// impl<'a> Notifier for Device<'a> {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {}
/// }
/// ```
///
/// ```
/// # use mmu_notifier::{Event, Notifier};
/// struct Device(Vec<u64>);
///
/// impl Notifier for Device {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {}
/// }
/// ```
pub mod a_notifier_borrows_nothing {}

/// Only a notifier that says what it does at the end of a change can subscribe to ends.
///
/// ```compile_fail,E0277
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{
/// #     Event, Notifier, PairedNotifier, SubscribeOptions, Subscriptions, VaRange,
/// # };
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// let mirror = space.subscribe_paired(VaRange::ALL, Table::default(), SubscribeOptions::new());
/// # drop(mirror);
/// ```
///
/// ```
/// # use std::collections::BTreeMap;
/// # use mmu_notifier::{
/// #     Event, Notifier, PairedNotifier, SubscribeOptions, Subscriptions, VaRange,
/// # };
/// # #[derive(Default)]
/// # struct Table(BTreeMap<u64, u64>);
/// # impl Notifier for Table {
/// #     type Fence = ();
/// #     fn invalidate(&mut self, event: &Event) {
/// #         self.0.retain(|&address, _| !event.range().contains(address));
/// #     }
/// # }
/// # let space = Subscriptions::new();
/// impl PairedNotifier for Table {
///     fn invalidate_range_end(&mut self, event: &Event) {}
/// }
/// let mirror = space.subscribe_paired(VaRange::ALL, Table::default(), SubscribeOptions::new());
/// # drop(mirror);
/// ```
pub mod who_hears_of_ends_can_hear_them {}

/// No reference to a device can be made once it has been unregistered (B09, B12).
///
/// ```compile_fail,E0382
/// # use mmu_notifier::DeviceHandle;
/// let registered = DeviceHandle::register("gpu0");
/// let device = registered.unregister();
/// let reference = registered.reference();
/// # let _ = (device, reference);
/// ```
///
/// ```
/// # use mmu_notifier::DeviceHandle;
/// let registered = DeviceHandle::register("gpu0");
/// let reference = registered.reference();
/// # drop(reference);
/// let device = registered.unregister();
/// # let _ = device;
/// ```
pub mod a_device_is_not_used_after_unregister {}

/// There is no range that is empty or wraps, because only its constructors make one (E21).
///
/// ```compile_fail,E0451
/// # use mmu_notifier::VaRange;
/// let range = VaRange { start: 0x2000, last: 0x1000 };
/// # let _ = range;
/// ```
///
/// ```
/// # use mmu_notifier::VaRange;
/// let range = VaRange::from_bounds(0x2000, 0x1000);
/// assert!(range.is_none());
/// ```
pub mod a_range_was_checked {}
