//! On which processor the servers run: that of the threads that fault.
//!
//! To wake a thread on another processor that has gone to sleep takes many times as long as a fault
//! (on the machine of `docs/performance.md` 35 µs of 45), and it happens twice: for the server, and
//! for the thread that faulted. The kernel likes to do just that, since it wakes a thread where
//! nobody runs. Where both are on one processor nobody has to be woken from afar, and while one
//! works the other waits anyway. So the servers follow. A server that watched for faults on a
//! processor of its own would be as fast, at the price of that processor.
//!
//! Whoever faults says so with its number, and `/proc` says where it runs. To ask takes a few
//! microseconds, so it is done after a fault has been served, now and then, and only of faults that
//! the leader had to sleep for: in a stream of faults on its own processor it finds each when it has
//! served the one before. While all answers agree the servers are confined to that processor; where
//! they do not, several processors fault, none of them is likely to be asleep, and the servers may
//! run anywhere.
//!
//! Servers stay within the processors of the thread that attached: whoever wants to keep them off
//! some attaches from a thread that is.

use rustix::thread::CpuSet;

use crate::sys::thread;

/// How many answers must agree.
const LOOKS: usize = 4;

/// How many faults go by between two looks while the servers may run anywhere, and while they are
/// where the faults are.
const OFTEN: u32 = 8;
const SELDOM: u32 = 64;

/// Where the servers are.
#[derive(Debug)]
pub(super) struct Placement {
    /// Where they may be, if it is known.
    allowed: Option<CpuSet>,
    /// The threads.
    servers: Vec<u32>,
    follower: Follower,
    /// How many faults go by before the next look.
    faults: u32,
}

/// What follows from the looks so far.
#[derive(Debug, Default)]
struct Follower {
    /// What was seen last, the oldest first.
    seen: Vec<u32>,
    /// The processor that the servers are confined to.
    at: Option<u32>,
}

/// Where servers are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Go {
    To(u32),
    Anywhere,
}

impl Placement {
    /// Notes where the calling thread may run.
    pub(super) fn new() -> Placement {
        let allowed = rustix::thread::sched_getaffinity(None).ok();
        Placement { allowed, servers: Vec::new(), follower: Follower::default(), faults: 0 }
    }

    /// Places one more thread.
    pub(super) fn add(&mut self, server: u32) {
        self.servers.push(server);
    }

    /// Hears of a fault of `thread` that the calling server has slept for.
    pub(super) fn note(&mut self, thread: u32) {
        if self.faults > 0 {
            self.faults -= 1;
            return;
        }
        let Some(allowed) = &self.allowed else { return };
        // Where it cannot be said it is a thread of another process, which is not followed.
        let processor = thread::processor_of(thread).ok();
        let processor = processor.filter(|&processor| is_in(allowed, processor));
        let go = processor.and_then(|processor| self.follower.note(processor));
        self.faults = if self.follower.is_settled() { SELDOM } else { OFTEN };
        if let Some(go) = go {
            self.confine(go);
        }
    }

    /// Lets the servers run where they are to go. Where that cannot be, they stay: it is slower.
    fn confine(&self, go: Go) {
        let Some(allowed) = &self.allowed else { return };
        let processors: Vec<u32> = match go {
            Go::To(processor) => vec![processor],
            Go::Anywhere => (0..CpuSet::MAX_CPU as u32).filter(|&n| is_in(allowed, n)).collect(),
        };
        for &server in &self.servers {
            let _ = thread::set_affinity(server, &processors);
        }
    }
}

impl Follower {
    /// Takes in where a thread has faulted, and says whether that changes where servers are to be.
    fn note(&mut self, processor: u32) -> Option<Go> {
        if self.seen.len() == LOOKS {
            self.seen.remove(0);
        }
        self.seen.push(processor);
        let agree = self.seen.iter().filter(|&&seen| seen == processor).count();
        match self.at {
            at if at == Some(processor) => None,
            _ if agree == LOOKS => {
                self.at = Some(processor);
                Some(Go::To(processor))
            }
            // One may have been on its way.
            Some(at) if self.seen.iter().filter(|&&seen| seen != at).count() > 1 => {
                self.at = None;
                Some(Go::Anywhere)
            }
            _ => None,
        }
    }

    /// Tells whether the servers are where all faults are.
    fn is_settled(&self) -> bool {
        self.at.is_some() && self.seen.iter().all(|&seen| Some(seen) == self.at)
    }
}

fn is_in(set: &CpuSet, processor: u32) -> bool {
    (processor as usize) < CpuSet::MAX_CPU && set.is_set(processor as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(follower: &mut Follower, processors: &[u32]) -> Vec<Go> {
        processors.iter().filter_map(|&processor| follower.note(processor)).collect()
    }

    #[test]
    fn servers_follow_a_thread_that_faults_in_one_place() {
        let mut follower = Follower::default();
        assert_eq!(all(&mut follower, &[3, 3, 3]), []);
        assert_eq!(all(&mut follower, &[3]), [Go::To(3)]);
        assert!(follower.is_settled());
        assert_eq!(all(&mut follower, &[3; 20]), []);
        // To another place it is followed by way of anywhere.
        assert_eq!(all(&mut follower, &[5]), []);
        assert_eq!(all(&mut follower, &[5, 5, 5]), [Go::Anywhere, Go::To(5)]);
    }

    #[test]
    fn a_thread_that_was_elsewhere_once_is_not_followed() {
        let mut follower = Follower::default();
        assert_eq!(all(&mut follower, &[1, 1, 1, 1, 0, 1, 1, 1, 0, 1]), [Go::To(1)]);
    }

    #[test]
    fn several_threads_in_several_places_are_not_followed() {
        let mut follower = Follower::default();
        assert_eq!(all(&mut follower, &[0, 0, 0, 0]), [Go::To(0)]);
        assert_eq!(all(&mut follower, &[1, 0, 1]), [Go::Anywhere]);
        assert_eq!(all(&mut follower, &[0, 1, 1, 0, 1, 0, 0, 1, 0]), []);
        assert!(!follower.is_settled());
    }

    proptest! {
        #[test]
        fn servers_are_only_ever_where_the_last_looks_agreed(
            looks in prop::collection::vec(0_u32..3, 1..200)
        ) {
            let mut follower = Follower::default();
            for (index, &processor) in looks.iter().enumerate() {
                let last = &looks[(index + 1).saturating_sub(LOOKS)..=index];
                match follower.note(processor) {
                    Some(Go::To(to)) => prop_assert_eq!(last, [to; LOOKS]),
                    Some(Go::Anywhere) => prop_assert!(last.windows(2).any(|two| two[0] != two[1])
                        || last.len() < LOOKS),
                    None => {}
                }
                if let Some(at) = follower.at {
                    let dissent = last.iter().filter(|&&seen| seen != at).count();
                    prop_assert!(dissent <= 1, "{:?}", last);
                }
            }
        }
    }
}
