//! What the broker waits for.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use rustix::io::Errno;

use crate::dmirror::{Command, Counts};
use crate::node::wire::{EVICTION, REQUEST};

/// Something that agents have been told to do, and have not done.
#[derive(Debug)]
struct Job {
    deadline: Instant,
    what: What,
}

#[derive(Debug)]
enum What {
    /// A request of this caller, at this agent.
    Execute { caller: u64, agent: u64, command: Command },
    /// An eviction that these agents have not made yet.
    Evict { agents: HashSet<u64> },
}

/// A caller who waits for evictions, and whether one of them was given up.
#[derive(Debug)]
struct Waiting {
    jobs: HashSet<u64>,
    result: Result<Counts, Errno>,
}

/// What is answered to whom.
type Answers = Vec<(u64, Result<Counts, Errno>)>;

/// All that is under way.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    last: u64,
    jobs: HashMap<u64, Job>,
    waiting: HashMap<u64, Waiting>,
}

/// What the kernel's driver says when the address space of the opener is no more.
pub(super) fn without_opener(command: Command) -> Result<Counts, Errno> {
    match command {
        Command::Read | Command::Write => Err(Errno::FAULT),
        Command::MigrateToDev | Command::MigrateToSys | Command::Snapshot | Command::Exclusive => {
            Err(Errno::INVAL)
        }
        Command::CheckExclusive | Command::Release | Command::Flags => Ok(Counts::default()),
    }
}

impl Jobs {
    fn add(&mut self, deadline: Instant, what: What) -> u64 {
        self.last += 1;
        self.jobs.insert(self.last, Job { deadline, what });
        self.last
    }

    /// An agent is to do something for a caller.
    pub(super) fn execute(&mut self, caller: u64, agent: u64, command: Command) -> u64 {
        self.add(Instant::now() + REQUEST, What::Execute { caller, agent, command })
    }

    /// These agents, of which there is one at least, are to evict a unit.
    pub(super) fn evict(&mut self, agents: HashSet<u64>) -> u64 {
        self.add(Instant::now() + EVICTION, What::Evict { agents })
    }

    /// The evictions under way.
    pub(super) fn evictions(&self) -> Vec<u64> {
        let evictions = self.jobs.iter().filter(|(_, job)| matches!(job.what, What::Evict { .. }));
        evictions.map(|(&id, _)| id).collect()
    }

    /// A caller is to be answered when these evictions are over.
    pub(super) fn wait(&mut self, caller: u64, jobs: Vec<u64>) {
        let jobs = jobs.into_iter().filter(|job| self.jobs.contains_key(job)).collect();
        self.waiting.insert(caller, Waiting { jobs, result: Ok(Counts::default()) });
    }

    /// An agent has answered: returns who is to know, if it was a request that this agent had.
    pub(super) fn executed(&mut self, agent: u64, job: u64) -> Option<u64> {
        match self.jobs.get(&job)?.what {
            What::Execute { caller, agent: of, .. } if of == agent => {
                self.jobs.remove(&job);
                Some(caller)
            }
            _ => None,
        }
    }

    /// An agent has evicted.
    pub(super) fn evicted(&mut self, agent: u64, job: u64) {
        if let Some(Job { what: What::Evict { agents }, .. }) = self.jobs.get_mut(&job) {
            agents.remove(&agent);
            if agents.is_empty() {
                self.over(job, Ok(Counts::default()));
            }
        }
    }

    /// A job is over.
    fn over(&mut self, job: u64, result: Result<Counts, Errno>) {
        self.jobs.remove(&job);
        for waiting in self.waiting.values_mut() {
            if waiting.jobs.remove(&job) && result.is_err() {
                waiting.result = result;
            }
        }
    }

    /// Who has nothing to wait for any more.
    pub(super) fn take_ready(&mut self) -> Answers {
        let ready: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.jobs.is_empty())
            .map(|(&caller, _)| caller)
            .collect();
        let take = |caller| self.waiting.remove(&caller).map(|waiting| (caller, waiting.result));
        ready.into_iter().filter_map(take).collect()
    }

    /// Nobody is to be answered any more who has gone.
    pub(super) fn forget_caller(&mut self, caller: u64) {
        self.waiting.remove(&caller);
        self.jobs
            .retain(|_, job| !matches!(job.what, What::Execute { caller: of, .. } if of == caller));
    }

    /// An agent has gone: what it had to evict went with it, and whoever asked it for something gets
    /// the answer for an address space that has ended.
    pub(super) fn forget_agent(&mut self, agent: u64) -> Answers {
        let mut answers = Vec::new();
        let mut done = Vec::new();
        self.jobs.retain(|&id, job| match &mut job.what {
            What::Execute { caller, agent: of, command } if *of == agent => {
                answers.push((*caller, without_opener(*command)));
                false
            }
            What::Execute { .. } => true,
            What::Evict { agents } => {
                agents.remove(&agent);
                if agents.is_empty() {
                    done.push(id);
                }
                true
            }
        });
        done.into_iter().for_each(|job| self.over(job, Ok(Counts::default())));
        answers
    }

    /// Gives up what was to be done by now, and returns who asked for it. `EBUSY`: as for a request
    /// that the kernel's driver has tried for too long.
    pub(super) fn give_up(&mut self, now: Instant) -> Answers {
        let mut answers = Vec::new();
        let late = self.jobs.iter().filter(|(_, job)| job.deadline <= now);
        for job in late.map(|(&id, _)| id).collect::<Vec<u64>>() {
            if let Some(Job { what: What::Execute { caller, .. }, .. }) = self.jobs.get(&job) {
                answers.push((*caller, Err(Errno::BUSY)));
            }
            self.over(job, Err(Errno::BUSY));
        }
        answers
    }

    /// When something is to be given up next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.jobs.values().map(|job| job.deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DONE: Result<Counts, Errno> = Ok(Counts { cpages: 0, faults: 0 });

    #[test]
    fn who_waits_is_answered_when_the_last_agent_is_done() {
        let mut jobs = Jobs::default();
        let job = jobs.evict(HashSet::from([1, 2]));
        jobs.wait(9, vec![job]);
        assert_eq!(jobs.take_ready(), []);
        jobs.evicted(1, job);
        jobs.evicted(1, job);
        jobs.evicted(3, job);
        assert_eq!(jobs.take_ready(), []);
        jobs.evicted(2, job);
        assert_eq!(jobs.take_ready(), [(9, DONE)]);
        assert_eq!(jobs.next_deadline(), None);
    }

    #[test]
    fn who_waits_for_nothing_is_answered_at_once() {
        let mut jobs = Jobs::default();
        jobs.wait(9, vec![]);
        jobs.wait(10, vec![77]);
        let mut ready = jobs.take_ready();
        ready.sort_by_key(|&(caller, _)| caller);
        assert_eq!(ready, [(9, DONE), (10, DONE)]);
    }

    #[test]
    fn an_agent_that_has_gone_keeps_nobody_waiting() {
        let mut jobs = Jobs::default();
        let job = jobs.evict(HashSet::from([1]));
        jobs.wait(9, vec![job]);
        jobs.execute(10, 1, Command::Read);
        jobs.execute(11, 2, Command::Read);
        assert_eq!(jobs.forget_agent(1), [(10, Err(Errno::FAULT))]);
        assert_eq!(jobs.take_ready(), [(9, DONE)]);
        assert!(jobs.next_deadline().is_some(), "the other agent's");
    }

    #[test]
    fn what_takes_too_long_is_given_up() {
        let mut jobs = Jobs::default();
        let eviction = jobs.evict(HashSet::from([1]));
        jobs.wait(9, vec![eviction]);
        let request = jobs.execute(10, 1, Command::Snapshot);
        let now = Instant::now();
        assert_eq!(jobs.give_up(now), []);
        assert_eq!(jobs.give_up(now + EVICTION), []);
        assert_eq!(jobs.take_ready(), [(9, Err(Errno::BUSY))]);
        assert_eq!(jobs.give_up(now + REQUEST), [(10, Err(Errno::BUSY))]);
        assert_eq!(jobs.executed(1, request), None, "it comes too late");
    }

    #[test]
    fn an_agent_answers_for_itself_alone() {
        let mut jobs = Jobs::default();
        let job = jobs.execute(10, 1, Command::Read);
        assert_eq!(jobs.executed(2, job), None);
        assert_eq!(jobs.executed(1, job + 1), None);
        assert_eq!(jobs.executed(1, job), Some(10));
        assert_eq!(jobs.executed(1, job), None);
    }

    #[test]
    fn who_has_gone_is_not_answered() {
        let mut jobs = Jobs::default();
        let job = jobs.execute(10, 1, Command::Read);
        let eviction = jobs.evict(HashSet::from([1]));
        jobs.wait(9, vec![eviction]);
        jobs.forget_caller(9);
        jobs.forget_caller(10);
        assert_eq!(jobs.executed(1, job), None);
        jobs.evicted(1, eviction);
        assert_eq!(jobs.take_ready(), []);
    }

    #[test]
    fn without_the_opener_it_is_as_in_the_kernel() {
        let answers = Command::ALL.map(|command| without_opener(command).err());
        let (fault, invalid) = (Some(Errno::FAULT), Some(Errno::INVAL));
        let expected = [fault, fault, invalid, invalid, invalid, invalid, None, None, None];
        assert_eq!(answers, expected);
    }
}
