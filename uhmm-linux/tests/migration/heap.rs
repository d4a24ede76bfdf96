//! What serves needs nothing of the program's heap, which may be away.

use crate::common::in_own_process;
use crate::common::memory::Mapping;
use crate::common::rig::{Gpu, attach, is_out};

/// A server that finds subscribers for the first time when everything that may move is away, the
/// heap of the C library among it. It has to bring that home.
#[test]
fn the_first_announcement_of_a_server_needs_no_heap() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(1 << 16);
        let mapping = Mapping::anonymous(16);
        mapping.fill(|index| index + 1);
        let mirror = gpu.mirror(&process, mapping.range());
        let mut resident = Vec::new();
        for range in process.movable() {
            process.resident(range, &mut resident);
        }
        for run in resident {
            process.migrate(run, &gpu.pagemap).run();
        }
        assert!(is_out(&process, mapping.page(0)));
        for index in 0..16 {
            assert_eq!(mapping.peek(index), index + 1);
        }
        drop(mirror);
    });
}
