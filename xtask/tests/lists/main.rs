//! The lists in `docs/` against the tree: every row is there, and what it names exists.
//!
//! `docs/acceptance.md` says what meets each requirement, and `docs/regressions.md` what became of
//! each bug that others have made. Both have one table row for each:
//!
//! ```text
//! | ID | requirement | how it is met | shown by |
//! | --- | --- | --- | --- |
//! | A01 | a few words | a few words | `protocol.rs::a01_name_of_a_test` |
//! ```
//!
//! The last column holds one or more entries, each in backticks, separated by commas or spaces:
//!
//! * `file.rs::name`: a test of `mmu-notifier` that is not ignored, in a file of this name at any
//!   depth of its `tests/` or `src/`; folders may stand before the name;
//! * `crate/file.rs::name`: the same of another crate, by the name of its folder;
//! * `guarantees.rs::name` and `crate/guarantees.rs::name`: an item of the crate's
//!   `src/guarantees.rs` whose documentation holds an example that the compiler must refuse with an
//!   error code;
//! * `doc:path#heading`: a heading in a Rust or Markdown file, whose path begins at the repository
//!   root.
//!
//! Instead, a requirement may be `later: uhmm-linux`: the business of a layer that is not there yet.
//! A regression may be `later: uhmm-linux: reason` or `cannot happen: reason`.
//!
//! Both have a second table, of the rows that mean something more on a live process, whose first
//! column is called `row`. There a row may be `needs changes that are announced: reason`.
//! `docs/regressions.md` has a third one, of what others do wrong in a live process, whose first
//! column is called `peer`. Tables whose first column is called otherwise are not looked at.

mod evidence;
mod source;
mod table;
mod tree;

use evidence::Otherwise;
use table::List;
use tree::Tree;

/// The groups of requirements, with the number of the last one in each.
const GROUPS: [(char, u32); 6] = [('A', 17), ('B', 17), ('C', 9), ('D', 12), ('E', 23), ('X', 12)];
/// The number of the last regression.
const REGRESSIONS: u32 = 62;
/// The requirements that mean something more on a live process.
const LIVE_REQUIREMENTS: [&str; 36] = [
    "A01", "A06", "A07", "A08", "A15", "A16", "A17", "B01", "B02", "B03", "B05", "B06", "B07",
    "B08", "B16", "B17", "C02", "C03", "C04", "C07", "D02", "D07", "D10", "D12", "E01", "E02",
    "E09", "E10", "E11", "E14", "E15", "E22", "E23", "X10", "X11", "X12",
];
/// The regressions that do.
const LIVE_REGRESSIONS: [u32; 33] = [
    6, 7, 8, 9, 10, 11, 14, 16, 17, 18, 19, 21, 22, 25, 28, 29, 30, 31, 35, 38, 39, 40, 41, 43, 46,
    47, 48, 49, 52, 55, 56, 57, 59,
];
/// The number of the last failure of others.
const PEERS: u32 = 16;

#[test]
fn every_requirement_is_met_where_the_list_says() {
    check("docs/acceptance.md", &acceptance());
}

#[test]
fn every_regression_is_shown_where_the_list_says() {
    check("docs/regressions.md", &regressions());
}

#[test]
fn what_holds_on_a_live_process_is_shown_where_the_lists_say() {
    check("docs/acceptance.md", &live_acceptance());
    check("docs/regressions.md", &live_regressions());
    check("docs/regressions.md", &peers());
}

fn check(path: &str, list: &List) {
    let tree = Tree::of_the_repository();
    let text = tree.text(path).unwrap_or_else(|| panic!("there is no {path}"));
    let errors = list.check(text, &tree);
    assert!(errors.is_empty(), "{} errors in {path}:\n{}", errors.len(), errors.join("\n"));
}

fn acceptance() -> List {
    List {
        header: ["ID", "requirement", "how it is met", "shown by"],
        ids: GROUPS
            .into_iter()
            .flat_map(|(group, last)| (1..=last).map(move |n| format!("{group}{n:02}")))
            .collect(),
        otherwise: &[Otherwise { words: "later: uhmm-linux", reason: false }],
    }
}

fn regressions() -> List {
    List {
        header: ["#", "regression", "here", "shown by"],
        ids: (1..=REGRESSIONS).map(|n| n.to_string()).collect(),
        otherwise: &[
            Otherwise { words: "cannot happen", reason: true },
            Otherwise { words: "later: uhmm-linux", reason: true },
        ],
    }
}

fn live_acceptance() -> List {
    List {
        header: ["row", "requirement", "on a live process", "shown by"],
        ids: LIVE_REQUIREMENTS.map(str::to_owned).to_vec(),
        otherwise: &[ANNOUNCED],
    }
}

fn live_regressions() -> List {
    List {
        header: ["row", "regression", "on a live process", "shown by"],
        ids: LIVE_REGRESSIONS.map(|n| n.to_string()).to_vec(),
        otherwise: &[ANNOUNCED],
    }
}

/// What is told of only after it was made does not do.
const ANNOUNCED: Otherwise = Otherwise { words: "needs changes that are announced", reason: true };

fn peers() -> List {
    List {
        header: ["peer", "known failure", "here", "shown by"],
        ids: (1..=PEERS).map(|n| format!("P{n:02}")).collect(),
        otherwise: &[Otherwise { words: "cannot happen", reason: true }, ANNOUNCED],
    }
}

#[test]
fn there_are_ninety_requirements_and_sixty_two_regressions() {
    assert_eq!(acceptance().ids.len(), 90);
    let regressions = regressions().ids;
    assert_eq!(regressions.len(), 62);
    assert_eq!((regressions[0].as_str(), regressions[61].as_str()), ("1", "62"));
}
