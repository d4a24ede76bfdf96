//! The relay, with real threads and real time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::relay::{LATE, QUIET, Relay};
use crate::space::lock;

/// Executors that take calls from a queue; a call waits until it is told to go on. Returns where
/// calls go, and how many have been made.
fn executors(count: usize) -> (Sender<Receiver<()>>, Arc<AtomicUsize>) {
    let (send, calls) = channel::<Receiver<()>>();
    let (calls, made) = (Arc::new(Mutex::new(calls)), Arc::new(AtomicUsize::new(0)));
    let relay = Arc::new(Relay::default());
    for _ in 0..count {
        let (relay, calls, made) = (Arc::clone(&relay), Arc::clone(&calls), Arc::clone(&made));
        std::thread::spawn(move || {
            loop {
                let lead = relay.wait_for_lead();
                loop {
                    let received = lock(&calls).recv();
                    let Ok(call) = received else { return };
                    let number = relay.begin(lead);
                    let _ = call.recv();
                    made.fetch_add(1, Ordering::SeqCst);
                    if !relay.end(number, lead) {
                        break;
                    }
                }
            }
        });
    }
    (send, made)
}

fn eventually(done: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "it does not come about");
        std::thread::yield_now();
    }
}

#[test]
fn calls_that_block_hold_up_no_others_while_there_is_a_reserve() {
    let (send, made) = executors(4);
    for round in 0..20 {
        let blocked: Vec<_> = (0..3)
            .map(|_| {
                let (go_on, waits) = channel();
                send.send(waits).expect("they listen");
                go_on
            })
            .collect();
        // The fourth is for those that do not block.
        for _ in 0..50 {
            let (go_on, waits) = channel();
            drop(go_on);
            send.send(waits).expect("they listen");
        }
        let before = round * 53;
        eventually(|| made.load(Ordering::SeqCst) == before + 50);
        drop(blocked);
        eventually(|| made.load(Ordering::SeqCst) == before + 53);
        if round % 4 == 0 {
            // Long enough for the watchman to fall asleep: it must be woken then.
            std::thread::sleep(LATE * (QUIET + 5));
        }
    }
}
