//! Tests of the bookkeeping, with blocks in transit alone: they take no memory.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// The first page of what the tests use, at the edge of a chunk.
const BASE: u64 = 1 << 20;

/// How many pages they use.
const PAGES: u64 = 4 * 512;

fn page(number: u64) -> Page {
    Page::new(BASE + number).expect("no address is that large")
}

fn range(first: u64, pages: u64) -> PageRange {
    PageRange::from_pages(page(first), pages).expect("at least one page")
}

/// Enters a block of an isolation under a new name.
fn enter(state: &mut State, isolation: IsolationId, first: Page, order: Order) -> Token {
    let token = state.token();
    state.insert(first, Extent::new(order, Place::Transit { isolation, token, offset: 0 }));
    token
}

/// Finds what [`State::of_token`] finds, by looking at everything.
fn looked_for(state: &State, of: Token) -> Vec<(Page, Order, u64)> {
    let part = |(first, extent): (Page, &Extent)| match extent.place {
        Place::Transit { token, offset, .. } if token == of => Some((first, extent.order, offset)),
        _ => None,
    };
    let mut parts: Vec<_> = state.extents().filter_map(part).collect();
    parts.sort_by_key(|&(_, _, offset)| offset);
    parts
}

/// Something that happens to the mappings.
#[derive(Clone, Debug)]
enum Change {
    Take { at: u64, order: u8 },
    Cut { first: u64, pages: u64 },
    Unmap { first: u64, pages: u64 },
    Discard { first: u64, pages: u64 },
    Move { first: u64, pages: u64, to: u64 },
    Return { which: usize },
}

fn change() -> impl Strategy<Value = Change> {
    let some = || (0..PAGES, 1..600_u64).prop_map(|(first, n)| (first, n.min(PAGES - first)));
    prop_oneof![
        3 => (0..PAGES, 0..10_u8).prop_map(|(at, order)| Change::Take { at, order }),
        1 => some().prop_map(|(first, pages)| Change::Cut { first, pages }),
        1 => some().prop_map(|(first, pages)| Change::Unmap { first, pages }),
        1 => some().prop_map(|(first, pages)| Change::Discard { first, pages }),
        2 => (some(), PAGES..3 * PAGES)
            .prop_map(|((first, pages), to)| Change::Move { first, pages, to }),
        1 => any::<usize>().prop_map(|which| Change::Return { which }),
    ]
}

fn apply(state: &mut State, isolation: IsolationId, tokens: &mut Vec<Token>, change: Change) {
    match change {
        Change::Take { at, order } => {
            let order = Order::new(order).expect("at most that of a huge page");
            let first = page(at).align_down(order);
            if state.overlapping(first.block(order)).next().is_none() {
                tokens.push(enter(state, isolation, first, order));
            }
        }
        Change::Cut { first, pages } => state.carve(range(first, pages)),
        Change::Unmap { first, pages } => {
            state.apply(Message::Unmap(range(first, pages)));
        }
        Change::Discard { first, pages } => {
            state.apply(Message::Remove(range(first, pages)));
        }
        Change::Move { first, pages, to } => {
            state.apply(Message::Remap { from: range(first, pages), to: page(to) });
        }
        Change::Return { which } if !tokens.is_empty() => {
            let token = tokens[which % tokens.len()];
            for (first, ..) in state.of_token(token) {
                state.remove(first);
            }
        }
        Change::Return { .. } => {}
    }
}

proptest! {
    #[test]
    fn a_name_leads_to_all_parts_wherever_they_have_come_to(
        changes in prop::collection::vec(change(), 1..40),
    ) {
        let mut state = State::new();
        let isolation = state.begin_isolation();
        let mut tokens = Vec::new();
        for change in changes {
            apply(&mut state, isolation, &mut tokens, change);
            for &token in &tokens {
                let parts = state.of_token(token);
                prop_assert_eq!(&parts[..], &looked_for(&state, token)[..]);
                for from in [1, 7, 300] {
                    let rest: Vec<_> = state.of_token_from(token, from).collect();
                    let cut = parts.iter().copied().filter(|&(_, _, offset)| offset >= from);
                    prop_assert_eq!(rest, cut.collect::<Vec<_>>());
                }
            }
        }
        for token in tokens {
            for (first, ..) in state.of_token(token) {
                state.remove(first);
            }
        }
        prop_assert!(state.parts.is_empty(), "nothing is noted of what is not out");
    }
}

/// To look through all that is out, for each block of an isolation that was disturbed, would take
/// minutes here.
#[test]
fn what_is_in_transit_is_found_at_once_however_much_is_out() {
    const BLOCKS: u64 = 100_000;
    let mut state = State::new();
    let isolation = state.begin_isolation();
    let tokens: Vec<_> =
        (0..BLOCKS).map(|at| enter(&mut state, isolation, page(at), Order::PAGE)).collect();
    let began = Instant::now();
    for (at, &token) in (0..).zip(&tokens) {
        assert_eq!(state.of_token(token)[..], [(page(at), Order::PAGE, 0)]);
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Who unmaps says so afterwards, and somebody else may have moved something there by then.
#[test]
fn what_is_unmapped_late_is_not_what_was_moved_there() {
    let mut state = State::new();
    let isolation = state.begin_isolation();
    let token = enter(&mut state, isolation, page(0), Order::PAGE);
    state.apply(Message::Remap { from: range(0, 1), to: page(512) });
    state.apply(Message::Unmap(range(512, 1)));
    assert_eq!(&*state.of_token(token), [(page(512), Order::PAGE, 0)]);
    assert_eq!(state.disputed, [range(512, 1)], "the kernel has to decide");
    // Elsewhere it is as it is said to be.
    let other = enter(&mut state, isolation, page(100), Order::PAGE);
    state.apply(Message::Unmap(range(100, 1)));
    assert!(state.of_token(other).is_empty());
}
