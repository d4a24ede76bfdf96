//! A program whose memory comes from mimalloc, and is on devices while it is allocated and freed.

#[path = "allocators/churn.rs"]
mod churn;
#[path = "common/own_process.rs"]
#[allow(dead_code, reason = "each test file uses a part of this")]
mod own_process;
#[path = "common/stacks.rs"]
#[allow(dead_code, reason = "each test file uses a part of this")]
mod stacks;

use own_process::in_own_process;

#[global_allocator]
static ALLOCATOR: uhmm_linux::Allocator<mimalloc::MiMalloc> =
    uhmm_linux::Allocator::wrapping(mimalloc::MiMalloc);

#[test]
fn mimalloc() {
    // The closure's name tells which test it is.
    #[expect(clippy::redundant_closure, reason = "its name is that of this test")]
    in_own_process(|| churn::churn());
}
