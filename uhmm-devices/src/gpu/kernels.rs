//! Kernels to begin with. Each is a function of a [`DeviceMemoryView`] and addresses of the process.

use uhmm::Access;

use super::fault::{FaultReason, KernelFault};
use super::view::DeviceMemoryView;

/// Returns the address of one of the elements from `base` on; past the top of the address space there
/// is none.
fn element(base: u64, index: u64, size: usize, access: Access) -> Result<u64, KernelFault> {
    let address = index.checked_mul(size as u64).and_then(|offset| base.checked_add(offset));
    address.ok_or(KernelFault { reason: FaultReason::Operation, address: base, access })
}

/// Computes `y[i] += a * x[i]` for `count` numbers each, in place.
///
/// # Errors
///
/// [`KernelFault`]: the numbers before the one that failed are done.
pub fn saxpy(
    view: &DeviceMemoryView<'_>,
    count: u64,
    a: f32,
    x: u64,
    y: u64,
) -> Result<(), KernelFault> {
    for index in 0..count {
        let x = element(x, index, size_of::<f32>(), Access::Read)?;
        let product = a * view.load::<f32>(x)?;
        let y = element(y, index, size_of::<f32>(), Access::Read)?;
        view.store(y, view.load::<f32>(y)? + product)?;
    }
    Ok(())
}

/// Counts bytes by value, into `bins` words at `histogram`: a byte `b` counts in bin `b % bins`.
///
/// Counts are added by atomic operations, so several contexts, and CPUs, may count into the same
/// bins.
///
/// # Errors
///
/// [`KernelFault`]: the bytes before the one that failed are counted.
///
/// # Panics
///
/// If there are no bins.
pub fn histogram(
    view: &DeviceMemoryView<'_>,
    data: u64,
    length: u64,
    histogram: u64,
    bins: u64,
) -> Result<(), KernelFault> {
    assert!(bins > 0, "a histogram has a bin");
    for offset in 0..length {
        let byte = view.load::<u8>(element(data, offset, 1, Access::Read)?)?;
        let bin = u64::from(byte) % bins;
        view.fetch_add_u64(element(histogram, bin, size_of::<u64>(), Access::Atomic)?, 1)?;
    }
    Ok(())
}

/// A node of a linked list, as [`chase`] expects it in memory: two words in the byte order of the
/// machine, at a multiple of eight.
///
/// | offset | what |
/// | --- | --- |
/// | 0 | the address of the next node, zero in the last one |
/// | 8 | the node's value |
///
/// In a live process a `Box<ListNode>` is such a node, and its address is what `next` holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ListNode {
    /// The address of the next node, or zero.
    pub next: u64,
    /// What the node holds.
    pub value: u64,
}

/// What [`chase`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chased {
    /// How many nodes were visited.
    pub nodes: u64,
    /// The sum of their values, which wraps.
    pub sum: u64,
    /// Where the next node would have been: zero if the list came to its end.
    pub rest: u64,
}

impl ListNode {
    /// The bytes of a node.
    pub const SIZE: usize = size_of::<ListNode>();

    /// Returns the node as it is in memory.
    pub fn to_bytes(self) -> [u8; ListNode::SIZE] {
        let mut bytes = [0; ListNode::SIZE];
        bytes[..8].copy_from_slice(&self.next.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.value.to_ne_bytes());
        bytes
    }
}

/// Follows a linked list of [`ListNode`]s from the one at `head`, and adds up its values. Ends after
/// `limit` nodes, since the list may be a ring.
///
/// # Errors
///
/// [`KernelFault`].
pub fn chase(view: &DeviceMemoryView<'_>, head: u64, limit: u64) -> Result<Chased, KernelFault> {
    let mut found = Chased { nodes: 0, sum: 0, rest: head };
    while found.rest != 0 && found.nodes < limit {
        let value = view.load::<u64>(element(found.rest, 1, size_of::<u64>(), Access::Read)?)?;
        found.rest = view.load::<u64>(found.rest)?;
        found.sum = found.sum.wrapping_add(value);
        found.nodes += 1;
    }
    Ok(found)
}
