//! The column `shown by`.

use crate::source::{check_guarantee, check_heading, check_test, is_word};
use crate::tree::Tree;

/// The crate that entries speak of which name none.
const HOME: &str = "mmu-notifier";

/// What the column may say instead of naming something that shows the row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Otherwise {
    /// The words that it begins with.
    pub(crate) words: &'static str,
    /// Whether a colon and a reason follow. If not, the words stand alone.
    pub(crate) reason: bool,
}

/// Says what is wrong with a cell of the column.
pub(crate) fn check_shown_by(
    cell: &str,
    otherwise: &[Otherwise],
    tree: &Tree,
) -> Result<(), String> {
    for Otherwise { words, reason } in otherwise {
        if !reason && cell.trim_matches('`') == *words {
            return Ok(());
        }
        let after = cell.strip_prefix(words).and_then(|rest| rest.trim_start().strip_prefix(':'));
        match after.map(|reason| reason.chars().any(char::is_alphanumeric)) {
            Some(true) if *reason => return Ok(()),
            Some(false) if *reason => return Err(format!("`{words}` has no reason")),
            _ if *reason && cell == *words => return Err(format!("`{words}` has no reason")),
            _ => {}
        }
    }
    let parts: Vec<&str> = cell.split('`').collect();
    // Outside of backticks are the even parts. An even number of parts means an odd backtick.
    if parts.len().is_multiple_of(2) {
        return Err("a backtick is not closed".to_owned());
    }
    if parts.len() == 1 {
        let words: Vec<_> = otherwise.iter().map(|otherwise| otherwise.words).collect();
        return Err(format!("no entry in backticks, nor one of {words:?}: {cell}"));
    }
    for (index, part) in parts.into_iter().enumerate() {
        if !index.is_multiple_of(2) {
            check_entry(part, tree).map_err(|error| format!("`{part}`: {error}"))?;
        } else if !part.chars().all(|c| c == ',' || c.is_whitespace()) {
            return Err(format!("`{}` stands outside of backticks", part.trim()));
        }
    }
    Ok(())
}

fn check_entry(entry: &str, tree: &Tree) -> Result<(), String> {
    let text = |path: &str| tree.text(path).ok_or_else(|| format!("there is no file {path}"));
    if let Some(target) = entry.strip_prefix("doc:") {
        let (path, heading) = target.split_once('#').ok_or("want `doc:path#heading`")?;
        return check_heading(text(path)?, heading);
    }
    let (path, name) = entry.split_once("::").ok_or("want `file.rs::name` or `doc:...`")?;
    if !path.ends_with(".rs") || name.is_empty() || !name.chars().all(is_word) {
        return Err("want `file.rs::name`".to_owned());
    }
    let (member, file) = match path.split_once('/') {
        Some((first, rest)) if tree.is_crate(first) => (first, rest),
        _ => (HOME, path),
    };
    if file == "guarantees.rs" {
        return check_guarantee(text(&format!("{member}/src/{file}"))?, name);
    }
    check_tests(&[format!("{member}/tests"), format!("{member}/src")], file, name, tree)
}

/// A test of this name, in exactly one file of this name.
fn check_tests(folders: &[String], file: &str, name: &str, tree: &Tree) -> Result<(), String> {
    let files: Vec<_> = folders.iter().flat_map(|folder| tree.find(folder, file)).collect();
    let results: Vec<_> =
        files.iter().map(|&(path, text)| (path, check_test(text, name))).collect();
    let shown: Vec<_> =
        results.iter().filter(|(_, result)| result.is_ok()).map(|&(path, _)| path).collect();
    match (&*shown, results.first()) {
        ([_], _) => Ok(()),
        ([], Some((_, error))) => error.clone(),
        ([], None) => Err(format!("there is no such file in {}", folders.join(" or "))),
        (several, _) => Err(format!("it may be that of {}", several.join(" or "))),
    }
}

mod of_this_file {
    use super::{Otherwise, check_shown_by};
    use crate::tree::Tree;

    const TEST: &str = r##"
        //! fn only_mentioned() {} #[test]
        fn helper() { let _ = ("{", '{', r#"fn quoted() {"#); }
        /// Documented; with { punctuation }.
        #[test]
        #[should_panic(expected = "a; b }")]
        fn a_test<'a>() {}
        #[test]
        #[ignore = "slow"]
        fn an_ignored_test() {}
        proptest! {
            #![proptest_config(x)]
            fn a_property(n in 0..3) { if n == 0 { f() } }
        }
        fn after_proptest() {}
    "##;
    const OTHER_TEST: &str = "#[test] fn another_test() {}";
    const GUARANTEES: &str = "
        /// Says why.
        ///
        /// ```compile_fail,E0502
        /// f();
        /// ```
        #[derive(Debug)]
        pub struct Refused;
        /// ```compile_fail
        /// f();
        /// ```
        pub struct WithoutCode;
        /// Mentions struct Mentioned only.
        pub struct Undocumented;
    ";
    const OTHER_GUARANTEES: &str = "
        /// ```compile_fail,E0382
        /// f();
        /// ```
        pub mod refused_elsewhere {}
    ";
    const OTHERWISE: [Otherwise; 2] = [
        Otherwise { words: "later: layer", reason: false },
        Otherwise { words: "cannot happen", reason: true },
    ];

    fn tree() -> Tree {
        Tree::of(&[
            ("mmu-notifier/Cargo.toml", ""),
            ("mmu-notifier/tests/t.rs", TEST),
            ("mmu-notifier/src/guarantees.rs", GUARANTEES),
            ("mmu-notifier/src/lib.rs", "//! Words.\n//!\n//! # The protocol\n"),
            ("uhmm/Cargo.toml", ""),
            ("uhmm/tests/sim.rs", OTHER_TEST),
            ("uhmm/tests/faults.rs", "#[test] fn a_fault() {} #[test] fn twice() {}"),
            ("uhmm/src/sim.rs", "fn another_test() {}"),
            ("uhmm/src/sim/isolate.rs", "mod tests { #[test] fn a_deep_test() {} }"),
            ("uhmm/src/sim/faults.rs", "mod tests { #[test] fn twice() {} }"),
            ("uhmm/src/guarantees.rs", OTHER_GUARANTEES),
            ("uhmm-devices/Cargo.toml", ""),
            ("uhmm-devices/tests/sim.rs", "#[test] fn of_a_device() {}"),
            ("docs/page.md", "# Title\n\nText.\n\n## Lock order, and why\n"),
        ])
    }

    #[test]
    fn what_shows_a_row_may_be_any_of_these() {
        for good in [
            "`t.rs::a_test`",
            "`t.rs::a_test`, `mmu-notifier/t.rs::a_test` `guarantees.rs::Refused`",
            "`t.rs::a_property`",
            "`uhmm/sim.rs::another_test`",
            "`uhmm-devices/sim.rs::of_a_device`",
            "`uhmm/isolate.rs::a_deep_test`, `uhmm/sim/isolate.rs::a_deep_test`",
            "`uhmm/faults.rs::a_fault`, `uhmm/sim/faults.rs::twice`",
            "`mmu-notifier/guarantees.rs::Refused`, `uhmm/guarantees.rs::refused_elsewhere`",
            "`doc:docs/page.md#Lock order, and why`",
            "`doc:mmu-notifier/src/lib.rs#The protocol`",
            "later: layer",
            "`later: layer`",
            "cannot happen: `Owned` has no copy",
        ] {
            assert_eq!(check_shown_by(good, &OTHERWISE, &tree()), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_shows_a_row_must_exist() {
        for (bad, error) in [
            ("`t.rs::helper`", "the function is no test"),
            ("`t.rs::an_ignored_test`", "the test is ignored"),
            ("`t.rs::after_proptest`", "the function is no test"),
            ("`t.rs::only_mentioned`", "there is no such function"),
            ("`t.rs::quoted`", "there is no such function"),
            ("`t.rs::a_tes`", "there is no such function"),
            ("`t.rs::`", "want `file.rs::name`"),
            ("`none.rs::a_test`", "there is no such file in mmu-notifier/tests"),
            ("`uhmm/t.rs::a_test`", "there is no such file in uhmm/tests or uhmm/src"),
            ("`uhmm/im.rs::another_test`", "there is no such file"),
            ("`uhmm/other/isolate.rs::a_deep_test`", "there is no such file"),
            ("`uhmm/sim.rs::of_a_device`", "there is no such function"),
            ("`sim.rs::another_test`", "there is no such file in mmu-notifier/tests"),
            ("`nobody/t.rs::a_test`", "there is no such file"),
            (
                "`uhmm/faults.rs::twice`",
                "it may be that of uhmm/tests/faults.rs or uhmm/src/sim/faults.rs",
            ),
            ("`t.rs`", "want `file.rs::name`"),
            ("`t.rs::a_test` and more", "`and more` stands outside of backticks"),
            ("`t.rs::a_test", "a backtick is not closed"),
            ("`t.rs::a_test`, `later: layer`", "want `file.rs::name`"),
            ("`guarantees.rs::WithoutCode`", "its documentation has no"),
            ("`guarantees.rs::Undocumented`", "its documentation has no"),
            ("`guarantees.rs::Mentioned`", "there is no such item"),
            ("`uhmm/guarantees.rs::Refused`", "there is no such item"),
            ("`uhmm-devices/guarantees.rs::Refused`", "there is no file uhmm-devices/src"),
            ("`doc:docs/page.md#Lock order`", "there is no such heading"),
            ("`doc:docs/page.md#`", "there is no such heading"),
            ("`doc:docs/none.md#Title`", "there is no file docs/none.md"),
            ("`doc:docs/page.md`", "want `doc:path#heading`"),
            ("cannot happen", "`cannot happen` has no reason"),
            ("cannot happen:", "`cannot happen` has no reason"),
            ("cannot happen: ...", "`cannot happen` has no reason"),
            ("later: layer: why not", "no entry in backticks"),
            ("later: nobody", "no entry in backticks, nor one of [\"later: layer\""),
        ] {
            let found = check_shown_by(bad, &OTHERWISE, &tree()).expect_err(bad);
            assert!(found.contains(error), "{bad}: {found}");
        }
    }
}
