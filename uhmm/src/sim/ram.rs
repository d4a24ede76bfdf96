//! System memory: frames with contents, whose numbers are never used twice.
//!
//! A device that uses a translation after its page has left the frame uses a number that is free, in
//! transit, or another device's. Since no number is ever given out again, and every access names its
//! frame here, each such access is detected, however unlucky its timing. Memory that comes home from
//! a device without being copied gets a new number for that reason. What is not known here is which
//! frames may be stored to: a store through a translation that has become read-only goes through.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::backend::SystemMemory;
use crate::entry::Frame;
use crate::injector::Injector;
use crate::page::{Order, PAGE_SIZE};
use crate::primitive::{Mutex, lock};

/// What a read of a frame that is no more gives, where violations are only counted.
const POISON: u8 = 0xdb;

/// The frame of zeroes that all never-written memory shares for reading.
pub(super) const ZERO: Frame = Frame(0);

/// All frames of a machine.
///
/// Its lock is the last in the machine's order: it is held for one access, and nobody is called
/// under it but the `update` of a [`SystemMemory::fetch_update`].
pub(super) struct Ram {
    inner: Mutex<Inner>,
    limit: Option<u64>,
    injector: Injector,
    count_violations: bool,
}

struct Inner {
    frames: BTreeMap<u64, FrameState>,
    next: u64,
    violations: Vec<String>,
}

#[derive(Default)]
struct FrameState {
    /// `None` while the frame holds zeroes and nobody has written to it.
    bytes: Option<Box<[u8]>>,
    holder: Holder,
}

/// Who has a frame, and who may reach it for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Holder {
    /// A page, or a pin: CPUs, and devices through translations.
    #[default]
    Page,
    /// An isolation: copy engines.
    Isolation,
    /// An isolation, and a block of host memory has adopted it: nobody.
    Adopted,
    /// A block of host memory: its device.
    Block,
    /// A block of host memory whose contents have gone home, under another number: nobody.
    Left,
}

/// Who reaches for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// A device, through a translation.
    Device,
    /// A copy engine, on behalf of an isolation.
    CopyEngine,
    /// A device whose own memory it is.
    Host,
    /// A CPU, whose translation was looked up under the machine's lock.
    Cpu,
}

/// The memory as one kind of user sees it.
pub(super) struct View {
    ram: Arc<Ram>,
    who: Who,
}

impl Ram {
    pub(super) fn new(limit: Option<u64>, injector: Injector, count_violations: bool) -> Ram {
        // The first number is that of the zero frame.
        let inner = Inner { frames: BTreeMap::new(), next: 1, violations: Vec::new() };
        Ram { inner: Mutex::new(inner), limit, injector, count_violations }
    }

    /// Allocates a block of zeroes; `None` if there is no room, or the injector says so.
    pub(super) fn allocate(&self, order: Order) -> Option<Frame> {
        self.allocate_for(Holder::Page, order)
    }

    /// Allocates a block of host memory.
    pub(super) fn allocate_host(&self, order: Order) -> Option<Frame> {
        self.allocate_for(Holder::Block, order)
    }

    fn allocate_for(&self, holder: Holder, order: Order) -> Option<Frame> {
        if self.injector.fails("frame") {
            return None;
        }
        let mut inner = lock(&self.inner);
        let pages = order.pages();
        if self.limit.is_some_and(|limit| inner.frames.len() as u64 + pages > limit) {
            return None;
        }
        let first = inner.reserve(order);
        let frames = first.0..first.0 + pages;
        inner.frames.extend(frames.map(|frame| (frame, FrameState { bytes: None, holder })));
        Some(first)
    }

    pub(super) fn free(&self, frame: Frame) {
        let freed = lock(&self.inner).frames.remove(&frame.0);
        assert!(freed.is_some(), "{frame:?} is freed twice");
    }

    /// Says whether the block is on its way: then copy engines reach it, and devices do not. What a
    /// block of host memory has adopted on the way is that block's at its end.
    pub(super) fn set_transit(&self, first: Frame, order: Order, transit: bool) {
        self.pass_on(first, order, |holder| match (transit, holder) {
            (true, Holder::Page) => Some(Holder::Isolation),
            (false, Holder::Isolation) => Some(Holder::Page),
            (false, Holder::Adopted) => Some(Holder::Block),
            _ => None,
        });
    }

    /// Makes what an isolation has a block of host memory from the end of the isolation on.
    pub(super) fn adopt(&self, first: Frame, order: Order) {
        self.pass_on(first, order, |holder| {
            (holder == Holder::Isolation).then_some(Holder::Adopted)
        });
    }

    /// Takes a block of host memory back. What is adopted stays the isolation's.
    pub(super) fn free_host(&self, first: Frame, order: Order) {
        let mut inner = lock(&self.inner);
        for number in first.0..first.0 + order.pages() {
            match inner.frames.get_mut(&number).map(|frame| &mut frame.holder) {
                Some(holder @ Holder::Adopted) => *holder = Holder::Isolation,
                Some(Holder::Block | Holder::Left) => _ = inner.frames.remove(&number),
                holder => panic!("frame {number} of host memory is freed, and is of {holder:?}"),
            }
        }
    }

    /// Takes the contents of a block of host memory that is about to be freed, on behalf of an
    /// isolation, and returns where they are now.
    pub(super) fn take_over(&self, first: Frame, order: Order) -> Frame {
        self.pass_on(first, order, |holder| (holder == Holder::Block).then_some(Holder::Left));
        let mut inner = lock(&self.inner);
        let to = inner.reserve(order);
        for index in 0..order.pages() {
            let left = inner.frames.get_mut(&(first.0 + index)).expect("passed on just now");
            let bytes = left.bytes.take();
            inner.frames.insert(to.0 + index, FrameState { bytes, holder: Holder::Isolation });
        }
        to
    }

    /// Says who has a block from now on, frame by frame. `None` is for who cannot have had it.
    fn pass_on(&self, first: Frame, order: Order, to: impl Fn(Holder) -> Option<Holder>) {
        let mut inner = lock(&self.inner);
        for number in first.0..first.0 + order.pages() {
            let frame = inner.frames.get_mut(&number);
            let holder = &mut frame.expect("what is passed on is allocated").holder;
            let next = to(*holder);
            *holder = next.unwrap_or_else(|| panic!("frame {number} is not to be had: {holder:?}"));
        }
    }

    /// Copies the contents of a block to another of the same order.
    pub(super) fn copy(&self, from: Frame, to: Frame, order: Order) {
        let mut inner = lock(&self.inner);
        for index in 0..order.pages() {
            let bytes = match from {
                ZERO => None,
                Frame(from) => inner.frames[&(from + index)].bytes.clone(),
            };
            let to = inner.frames.get_mut(&(to.0 + index));
            to.expect("the destination of a copy is allocated").bytes = bytes;
        }
    }

    /// Takes the contents of one frame, for a swap slot; `None` is zeroes.
    pub(super) fn contents(&self, frame: Frame) -> Option<Box<[u8]>> {
        if frame == ZERO {
            return None;
        }
        let inner = lock(&self.inner);
        inner.frames[&frame.0].bytes.clone().filter(|bytes| bytes.iter().any(|&byte| byte != 0))
    }

    /// Fills one frame from a swap slot.
    pub(super) fn fill(&self, frame: Frame, bytes: Option<Box<[u8]>>) {
        let mut inner = lock(&self.inner);
        inner.frames.get_mut(&frame.0).expect("a filled frame is allocated").bytes = bytes;
    }

    /// Reads as a CPU does.
    pub(super) fn load(&self, frame: Frame, offset: usize, bytes: &mut [u8]) {
        self.read_as(Who::Cpu, frame, offset, bytes);
    }

    /// Writes as a CPU does.
    pub(super) fn store(&self, frame: Frame, offset: usize, bytes: &[u8]) {
        self.write_as(Who::Cpu, frame, offset, bytes);
    }

    /// Updates a word as a CPU does.
    pub(super) fn update(
        &self,
        frame: Frame,
        offset: usize,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> u64 {
        self.update_as(Who::Cpu, frame, offset, update)
    }

    /// Returns how many frames are allocated. The zero frame does not count.
    pub(super) fn used(&self) -> u64 {
        lock(&self.inner).frames.len() as u64
    }

    /// Lists the frames that are allocated, each with who has it.
    pub(super) fn list(&self) -> BTreeMap<u64, Holder> {
        lock(&self.inner).frames.iter().map(|(&frame, state)| (frame, state.holder)).collect()
    }

    pub(super) fn violations(&self) -> Vec<String> {
        lock(&self.inner).violations.clone()
    }

    /// Says why an access is a misuse, if it is.
    fn misuse(inner: &Inner, who: Who, frame: u64, write: bool) -> Option<String> {
        let access = if write { "write to" } else { "read of" };
        if Frame(frame) == ZERO {
            return (write || who == Who::CopyEngine).then(|| {
                format!("a {who:?}'s {access} the shared frame of zeroes, which is for reading")
            });
        }
        match (inner.frames.get(&frame).map(|state| state.holder), who) {
            (None, _) => Some(format!(
                "a {who:?}'s {access} frame {frame}, which is free: a translation was used after \
                 the announcement that ended it"
            )),
            (Some(Holder::Page), Who::Device | Who::Cpu)
            | (Some(Holder::Isolation), Who::CopyEngine)
            | (Some(Holder::Block), Who::Host) => None,
            (Some(Holder::Isolation), Who::Device) => Some(format!(
                "a Device's {access} frame {frame}, which is in transit: a translation was used \
                 after the announcement that ended it"
            )),
            (Some(Holder::Page), Who::CopyEngine) => Some(format!(
                "a CopyEngine's {access} frame {frame}, which is not in transit: a copy was made \
                 outside the time of its isolation"
            )),
            (Some(holder), _) => {
                Some(format!("a {who:?}'s {access} frame {frame} of a {holder:?}"))
            }
        }
    }

    /// Does one access to `bytes` of one frame, unless it is a misuse.
    fn access(&self, who: Who, frame: u64, write: bool, f: impl FnOnce(&mut FrameState)) -> bool {
        let mut inner = lock(&self.inner);
        let Some(message) = Ram::misuse(&inner, who, frame, write) else {
            match inner.frames.get_mut(&frame) {
                Some(state) => f(state),
                // The zero frame.
                None => f(&mut FrameState::default()),
            }
            return true;
        };
        inner.violations.push(message.clone());
        drop(inner);
        assert!(self.count_violations && who != Who::Cpu, "violation: {message}");
        false
    }

    fn read_as(&self, who: Who, first: Frame, offset: usize, bytes: &mut [u8]) {
        for piece in pieces(first, offset, bytes.len()) {
            let target = &mut bytes[piece.at..piece.at + piece.length];
            let read = |state: &mut FrameState| match &state.bytes {
                Some(source) => {
                    target.copy_from_slice(&source[piece.offset..piece.offset + piece.length]);
                }
                None => target.fill(0),
            };
            if !self.access(who, piece.frame, false, read) {
                bytes[piece.at..piece.at + piece.length].fill(POISON);
            }
        }
    }

    fn write_as(&self, who: Who, first: Frame, offset: usize, bytes: &[u8]) {
        for piece in pieces(first, offset, bytes.len()) {
            let source = &bytes[piece.at..piece.at + piece.length];
            self.access(who, piece.frame, true, |state| {
                let target = state.bytes_mut();
                target[piece.offset..piece.offset + piece.length].copy_from_slice(source);
            });
        }
    }

    fn update_as(
        &self,
        who: Who,
        first: Frame,
        offset: usize,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> u64 {
        assert!(offset.is_multiple_of(8), "the word at offset {offset:#x} is not aligned");
        let frame = first.0 + (offset / PAGE_SIZE) as u64;
        let offset = offset % PAGE_SIZE;
        let mut before = u64::from_ne_bytes([POISON; 8]);
        self.access(who, frame, true, |state| {
            let word = &mut state.bytes_mut()[offset..offset + 8];
            before = u64::from_ne_bytes((&*word).try_into().expect("a word has eight bytes"));
            word.copy_from_slice(&update(before).to_ne_bytes());
        });
        before
    }
}

impl Inner {
    /// Takes numbers for a block.
    fn reserve(&mut self, order: Order) -> Frame {
        let first = self.next.next_multiple_of(order.pages());
        self.next = first + order.pages();
        Frame(first)
    }
}

impl FrameState {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.get_or_insert_with(|| vec![0; PAGE_SIZE].into_boxed_slice())
    }
}

/// The part of an access that lies in one frame.
struct Piece {
    frame: u64,
    offset: usize,
    /// Where it is in the caller's bytes.
    at: usize,
    length: usize,
}

fn pieces(first: Frame, offset: usize, length: usize) -> impl Iterator<Item = Piece> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == length {
            return None;
        }
        let position = offset + at;
        let inside = position % PAGE_SIZE;
        let piece = Piece {
            frame: first.0 + (position / PAGE_SIZE) as u64,
            offset: inside,
            at,
            length: (PAGE_SIZE - inside).min(length - at),
        };
        at += piece.length;
        Some(piece)
    })
}

impl View {
    /// Makes the memory that devices see: pages in transit are not theirs.
    pub(super) fn of_devices(ram: &Arc<Ram>) -> View {
        View { ram: Arc::clone(ram), who: Who::Device }
    }

    /// Makes the memory that copy engines see: pages in transit, and no others.
    pub(super) fn of_copy_engines(ram: &Arc<Ram>) -> View {
        View { ram: Arc::clone(ram), who: Who::CopyEngine }
    }

    /// Makes the memory that a device has in system memory: its own blocks, and no others.
    pub(super) fn of_hosts(ram: &Arc<Ram>) -> View {
        View { ram: Arc::clone(ram), who: Who::Host }
    }
}

impl SystemMemory for View {
    fn read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) {
        self.ram.read_as(self.who, frame, offset, bytes);
    }

    fn write(&self, frame: Frame, offset: usize, bytes: &[u8]) {
        self.ram.write_as(self.who, frame, offset, bytes);
    }

    fn fetch_update(&self, frame: Frame, offset: usize, update: &mut dyn FnMut(u64) -> u64) -> u64 {
        self.ram.update_as(self.who, frame, offset, update)
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the system memory of a {:?}", self.who)
    }
}
