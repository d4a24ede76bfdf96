//! The filter, made from the [table](super::table).
//!
//! What is not in the table is told from its number alone, so the kernel knows without running the
//! filter that it passes (its cache of constant actions, Linux 5.11).

use super::table::{COMPAT, Row, STOPS, When, X32};
use crate::sys::seccomp::{Instruction, NATIVE};

/// Where in `struct seccomp_data` things are, in bytes. Only the lower half of a word has what is
/// asked for here, except of addresses.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const PLACE: u32 = 8;
const ARGUMENTS: u32 = 16;

/// Makes the filter that lets calls from `gate` pass.
pub(super) fn build(gate: u64) -> Vec<Instruction> {
    let mut filter = vec![load(ARCHITECTURE)];
    // A conditional jump reaches 255 instructions; the other kind reaches further.
    filter.extend([if_equal(NATIVE, 1, 0), jump(1), jump(compat().len() as u32)]);
    filter.extend(compat());
    filter.extend(native(gate));
    filter
}

fn native(gate: u64) -> Vec<Instruction> {
    let mut filter = vec![load(NUMBER), if_at_least(X32, 0, 1), ret(libc::SECCOMP_RET_USER_NOTIF)];
    for row in STOPS {
        let block = block(row, gate);
        filter.push(if_equal(row.number as u32, 0, block.len() as u8));
        filter.extend(block);
    }
    filter.push(ret(libc::SECCOMP_RET_ALLOW));
    filter
}

/// What decides about one call.
fn block(row: &Row, gate: u64) -> Vec<Instruction> {
    let mut block = vec![
        load(PLACE),
        if_equal(gate as u32, 0, 3),
        load(PLACE + 4),
        if_equal((gate >> 32) as u32, 0, 1),
        ret(libc::SECCOMP_RET_ALLOW),
    ];
    let argument = |index: usize| ARGUMENTS + 8 * index as u32;
    match row.when {
        When::Always => {}
        When::Any(index, bits) => {
            block.extend([load(argument(index)), if_any(bits, 1, 0)]);
            block.push(ret(libc::SECCOMP_RET_ALLOW));
        }
        When::OneOf(index, values) => {
            block.push(load(argument(index)));
            for (left, &value) in (0..values.len() as u8).rev().zip(values) {
                block.push(if_equal(value, left + 1, 0));
            }
            block.push(ret(libc::SECCOMP_RET_ALLOW));
        }
        When::NotZero(index) => {
            block.extend([load(argument(index)), if_equal(0, 0, 3)]);
            block.extend([load(argument(index) + 4), if_equal(0, 0, 1)]);
            block.push(ret(libc::SECCOMP_RET_ALLOW));
        }
    }
    block.push(ret(libc::SECCOMP_RET_USER_NOTIF));
    block
}

/// What decides about calls that are not of the system's own kind.
fn compat() -> Vec<Instruction> {
    let mut filter = vec![load(NUMBER)];
    for (left, &number) in (0..COMPAT.len() as u8).rev().zip(COMPAT) {
        filter.push(if_equal(number, left + 1, 0));
    }
    filter.extend([ret(libc::SECCOMP_RET_ALLOW), ret(libc::SECCOMP_RET_USER_NOTIF)]);
    filter
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> Instruction {
    Instruction { code: code as u16, jt, jf, k }
}

fn load(offset: u32) -> Instruction {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn if_equal(k: u32, jt: u8, jf: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, k)
}

fn if_at_least(k: u32, jt: u8, jf: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, jt, jf, k)
}

fn if_any(k: u32, jt: u8, jf: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, jt, jf, k)
}

fn jump(by: u32) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, by)
}

fn ret(action: u32) -> Instruction {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::table::DESTRUCTIVE;

    const GATE: u64 = 0x7fff_1234_5678;

    /// Runs a filter as the kernel does.
    fn run(filter: &[Instruction], arch: u32, number: u32, place: u64, arguments: [u64; 6]) -> u32 {
        let mut data = [number, arch, place as u32, (place >> 32) as u32].to_vec();
        data.extend(arguments.iter().flat_map(|&word| [word as u32, (word >> 32) as u32]));
        let (mut accumulator, mut at) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = filter[at];
            at += 1;
            let code = u32::from(code);
            let test = |holds: bool| usize::from(if holds { jt } else { jf });
            match code & 0x07 {
                libc::BPF_LD => accumulator = data[k as usize / 4],
                libc::BPF_RET => return k,
                libc::BPF_JMP => {
                    at += match code & 0xf0 {
                        libc::BPF_JA => k as usize,
                        libc::BPF_JEQ => test(accumulator == k),
                        libc::BPF_JGE => test(accumulator >= k),
                        libc::BPF_JSET => test(accumulator & k != 0),
                        other => panic!("{other:#x}"),
                    }
                }
                other => panic!("{other:#x}"),
            }
        }
    }

    fn stops(number: i64, arguments: [u64; 6]) -> bool {
        let filter = build(GATE);
        // From the gate everything passes.
        let allowed = run(&filter, NATIVE, number as u32, GATE, arguments);
        assert_eq!(allowed, libc::SECCOMP_RET_ALLOW);
        // An address that shares one half with it is not it.
        let near = run(&filter, NATIVE, number as u32, GATE ^ (1 << 40), arguments);
        let verdict = run(&filter, NATIVE, number as u32, 0x1000, arguments);
        assert_eq!(near, verdict);
        assert!([libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF].contains(&verdict));
        verdict == libc::SECCOMP_RET_USER_NOTIF
    }

    #[test]
    fn what_changes_mappings_stops_and_what_does_not_passes() {
        assert!(stops(libc::SYS_munmap, [0x1000, 4096, 0, 0, 0, 0]));
        assert!(stops(libc::SYS_mprotect, [0x1000, 4096, 1, 0, 0, 0]));
        assert!(stops(libc::SYS_mremap, [0x1000, 4096, 8192, 1, 0, 0]));
        assert!(stops(libc::SYS_mmap, [0x1000, 4096, 3, 0x32, u64::MAX, 0]));
        assert!(!stops(libc::SYS_mmap, [0, 4096, 3, 0x22, u64::MAX, 0]));
        assert!(!stops(libc::SYS_mmap, [0x1000, 4096, 3, 0x10_0022, u64::MAX, 0]));
        for advice in 0..256 {
            let destructive = DESTRUCTIVE.contains(&(advice as u32));
            assert_eq!(stops(libc::SYS_madvise, [0, 0, advice, 0, 0, 0]), destructive, "{advice}");
        }
        assert!(!stops(libc::SYS_brk, [0; 6]));
        assert!(stops(libc::SYS_brk, [1 << 32, 0, 0, 0, 0, 0]));
        assert!(stops(libc::SYS_brk, [4096, 0, 0, 0, 0, 0]));
        assert!(!stops(libc::SYS_shmat, [1, 0, 0, 0, 0, 0]));
        assert!(stops(libc::SYS_shmat, [1, 4096, 0o40000, 0, 0, 0]));
        assert!(!stops(libc::SYS_fallocate, [1, 0, 0, 4096, 0, 0]));
        assert!(stops(libc::SYS_fallocate, [1, 3, 0, 4096, 0, 0]));
        for call in [libc::SYS_read, libc::SYS_futex, libc::SYS_clone, libc::SYS_execve] {
            assert!(!stops(call, [u64::MAX; 6]));
        }
    }

    #[test]
    fn calls_of_other_kinds_stop_if_they_are_the_same_calls() {
        let filter = build(GATE);
        let i386 = 0x4000_0003;
        for number in 0..600 {
            let stops = run(&filter, i386, number, 0, [0; 6]) == libc::SECCOMP_RET_USER_NOTIF;
            assert_eq!(stops, COMPAT.contains(&number), "{number}");
        }
        let verdict = run(&filter, NATIVE, X32 | 11, 0, [0; 6]);
        assert_eq!(verdict, libc::SECCOMP_RET_USER_NOTIF);
    }
}
