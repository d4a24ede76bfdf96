//! `docs/acceptance.md` against the tree: every row is there, and what it names exists.
//!
//! The list has one table row for each requirement:
//!
//! ```text
//! | ID | requirement | how it is met | shown by |
//! | --- | --- | --- | --- |
//! | A01 | a few words | a few words | `protocol.rs::a01_name_of_a_test` |
//! ```
//!
//! The last column holds one or more entries, each in backticks, separated by commas or spaces:
//!
//! * `file.rs::name`: a test in `tests/` or `src/` of this crate that is not ignored;
//! * `guarantees.rs::name`: an item of `src/guarantees.rs` whose documentation holds an example
//!   that the compiler must refuse with an error code;
//! * `doc:path#heading`: a heading in a file, whose path begins at the repository root.
//!
//! Or it says `later: uhmm` or `later: uhmm-linux`: the row is the business of a layer that is
//! not there yet. Tables whose first column is not called `ID` are not looked at.

#![cfg(not(any(loom, shuttle)))]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const LIST: &str = "docs/acceptance.md";
const HEADER: [&str; 4] = ["ID", "requirement", "how it is met", "shown by"];
const LATER: [&str; 2] = ["later: uhmm", "later: uhmm-linux"];
/// The groups of requirements, with the number of the last one in each.
const GROUPS: [(char, u32); 6] = [('A', 17), ('B', 17), ('C', 9), ('D', 12), ('E', 23), ('X', 12)];

#[test]
fn every_requirement_is_met_where_the_list_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let list = read(LIST).unwrap_or_else(|| panic!("cannot read {LIST}"));
    let errors = check(&list, &read);
    assert!(errors.is_empty(), "{} errors in {LIST}:\n{}", errors.len(), errors.join("\n"));
}

/// Reads a file of the repository, if it is there.
type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A row of the list.
struct Row<'a> {
    line: usize,
    id: &'a str,
    shown_by: String,
}

/// What is wrong with the list, one sentence an error.
fn check(list: &str, read: Read<'_>) -> Vec<String> {
    let mut errors = Vec::new();
    let rows = parse(list, &mut errors);
    let mut lines = BTreeMap::new();
    for row in &rows {
        if let Some(first) = lines.insert(row.id, row.line) {
            errors.push(format!("line {}: {}: is on line {first} already", row.line, row.id));
        }
        if let Err(error) = check_shown_by(&row.shown_by, read) {
            errors.push(format!("line {}: {}: {error}", row.line, row.id));
        }
    }
    for id in required() {
        if !lines.contains_key(id.as_str()) {
            errors.push(format!("{id}: has no row"));
        }
    }
    errors
}

/// Every ID that must have a row.
fn required() -> impl Iterator<Item = String> {
    GROUPS.into_iter().flat_map(|(group, last)| (1..=last).map(move |n| format!("{group}{n:02}")))
}

// The table.

/// The rows of all tables that begin with the column `ID`.
fn parse<'a>(list: &'a str, errors: &mut Vec<String>) -> Vec<Row<'a>> {
    /// Where in a table the line above was.
    enum Place {
        Outside,
        Header,
        Rows,
        OtherTable,
    }
    let mut place = Place::Outside;
    let mut rows = Vec::new();
    for (line, text) in (1..).zip(list.lines()) {
        let Some(cells) = cells(text) else {
            place = Place::Outside;
            continue;
        };
        place = match place {
            Place::Outside if cells[0] == "ID" => {
                if cells != HEADER {
                    errors.push(format!("line {line}: ID: the columns are not {HEADER:?}"));
                }
                Place::Header
            }
            Place::Outside | Place::OtherTable => Place::OtherTable,
            Place::Header if cells.iter().all(|cell| is_rule(cell)) => Place::Rows,
            Place::Header | Place::Rows => {
                match parse_row(line, &cells) {
                    Ok(row) => rows.push(row),
                    Err(error) => errors.push(format!("line {line}: {}: {error}", cells[0])),
                }
                Place::Rows
            }
        };
    }
    rows
}

fn parse_row<'a>(line: usize, cells: &[&'a str]) -> Result<Row<'a>, String> {
    let &[id, requirement, how, shown_by] = cells else {
        return Err(format!("{} columns instead of {}", cells.len(), HEADER.len()));
    };
    if !required().any(|known| known == id) {
        return Err("no such ID".to_owned());
    }
    for (cell, name) in [requirement, how, shown_by].into_iter().zip(&HEADER[1..]) {
        if cell.is_empty() {
            return Err(format!("the column `{name}` is empty"));
        }
    }
    Ok(Row { line, id, shown_by: shown_by.replace(r"\|", "|") })
}

/// The cells of a line of a table. A `|` within a cell is written `\|`.
fn cells(line: &str) -> Option<Vec<&str>> {
    let line = line.trim();
    let inner = line.strip_prefix('|')?;
    let inner = inner.strip_suffix('|').unwrap_or(inner);
    let mut cells = Vec::new();
    let mut start = 0;
    for (at, _) in inner.match_indices('|') {
        if !inner[..at].ends_with('\\') {
            cells.push(inner[start..at].trim());
            start = at + 1;
        }
    }
    cells.push(inner[start..].trim());
    Some(cells)
}

fn is_rule(cell: &str) -> bool {
    cell.contains('-') && cell.chars().all(|c| c == '-' || c == ':')
}

// The column `shown by`.

fn check_shown_by(cell: &str, read: Read<'_>) -> Result<(), String> {
    if LATER.contains(&cell.trim_matches('`')) {
        return Ok(());
    }
    let parts: Vec<&str> = cell.split('`').collect();
    // Outside of backticks are the even parts. An even number of parts means an odd backtick.
    if parts.len().is_multiple_of(2) {
        return Err("a backtick is not closed".to_owned());
    }
    if parts.len() == 1 {
        return Err(format!("no entry in backticks, nor one of {LATER:?}: {cell}"));
    }
    for (index, part) in parts.into_iter().enumerate() {
        if !index.is_multiple_of(2) {
            check_entry(part, read).map_err(|error| format!("`{part}`: {error}"))?;
        } else if !part.chars().all(|c| c == ',' || c.is_whitespace()) {
            return Err(format!("`{}` stands outside of backticks", part.trim()));
        }
    }
    Ok(())
}

fn check_entry(entry: &str, read: Read<'_>) -> Result<(), String> {
    if let Some(target) = entry.strip_prefix("doc:") {
        let (path, heading) = target.split_once('#').ok_or("want `doc:path#heading`")?;
        let text = read(path).ok_or_else(|| format!("there is no file {path}"))?;
        return check_heading(&text, heading);
    }
    let (file, name) = entry.split_once("::").ok_or("want `file.rs::name` or `doc:...`")?;
    if !file.ends_with(".rs") || name.is_empty() || !name.chars().all(is_word) {
        return Err("want `file.rs::name`".to_owned());
    }
    if file == "guarantees.rs" {
        let path = "mmu-notifier/src/guarantees.rs";
        let text = read(path).ok_or_else(|| format!("there is no file {path}"))?;
        return check_guarantee(&text, name);
    }
    let folders = ["mmu-notifier/tests", "mmu-notifier/src"];
    let texts: Vec<String> =
        folders.iter().filter_map(|folder| read(&format!("{folder}/{file}"))).collect();
    if texts.is_empty() {
        return Err(format!("there is no such file in {}", folders.join(" or ")));
    }
    let results: Vec<_> = texts.iter().map(|text| check_test(text, name)).collect();
    results.iter().find(|result| result.is_ok()).unwrap_or(&results[0]).clone()
}

/// A line `## heading`, of a text or of a Rust file's documentation.
fn check_heading(text: &str, heading: &str) -> Result<(), String> {
    let is_heading = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("//!").or(line.strip_prefix("///")).unwrap_or(line).trim();
        line.starts_with('#') && line.trim_start_matches('#').trim() == heading
    };
    let found = !heading.is_empty() && text.lines().any(is_heading);
    if found { Ok(()) } else { Err("there is no such heading".to_owned()) }
}

/// A test function that is run.
fn check_test(text: &str, name: &str) -> Result<(), String> {
    let code = code_only(text);
    let mut found = false;
    for at in words(&code, name) {
        let before = code[..at].trim_end();
        let Some(before) = before.strip_suffix("fn").filter(|rest| !rest.ends_with(is_word)) else {
            continue;
        };
        found = true;
        // What stands between the item before and this one: attributes and qualifiers.
        let attributes = before.rfind(['{', '}', ';']).map_or(before, |end| &before[end + 1..]);
        if attributes.contains("#[ignore") {
            return Err("the test is ignored".to_owned());
        }
        if attributes.contains("#[test]") || in_proptest(&code, at) {
            return Ok(());
        }
    }
    Err(if found { "the function is no test" } else { "there is no such function" }.to_owned())
}

/// Whether the position lies inside the braces of a `proptest!`.
fn in_proptest(code: &str, at: usize) -> bool {
    words(code, "proptest").any(|start| {
        let Some(rest) = code[start..].strip_prefix("proptest!") else {
            return false;
        };
        let Some(body) = rest.trim_start().strip_prefix('{') else {
            return false;
        };
        let open = code.len() - body.len();
        open <= at && closing_brace(body).is_some_and(|length| at < open + length)
    })
}

/// Where the block ends whose inside `body` begins with.
fn closing_brace(body: &str) -> Option<usize> {
    let mut depth = 0_u32;
    for (at, c) in body.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// An item with a documented example that must not compile.
fn check_guarantee(text: &str, name: &str) -> Result<(), String> {
    const KINDS: [&str; 9] =
        ["const", "enum", "fn", "mod", "static", "struct", "trait", "type", "union"];
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_item = |line: &str| {
        !line.starts_with("//")
            && words(line, name).any(|at| {
                let last = line[..at].split_whitespace().last();
                line[..at].ends_with(' ') && last.is_some_and(|word| KINDS.contains(&word))
            })
    };
    let item = lines.iter().position(|line| is_item(line)).ok_or("there is no such item")?;
    let above = lines[..item].iter().rev();
    let mut docs = above.take_while(|line| line.starts_with("///") || line.starts_with("#["));
    let has_code = |line: &str| {
        let fence = line.trim_start_matches('/').trim().strip_prefix("```compile_fail,E");
        fence.is_some_and(|digits| digits.len() == 4 && digits.chars().all(|c| c.is_ascii_digit()))
    };
    if docs.any(|line| has_code(line)) {
        return Ok(());
    }
    Err("its documentation has no ```compile_fail,E....".to_owned())
}

// Reading Rust, as far as is needed.

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands in `text` as a whole word.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        !text[..at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word)
    })
}

/// `text` without comments and without what stands in quotes, so that braces and names in those
/// are not taken for code.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest).filter(|_| !code.ends_with(is_word)) {
            length
        } else if c == '"' {
            quoted(rest, '"')
        } else if c == '\'' && is_character(rest) {
            quoted(rest, '\'')
        } else {
            code.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        code.push(' ');
        rest = &rest[length..];
    }
    code
}

/// The length of the block comment that `text` begins with. Such comments nest.
fn block_comment(text: &str) -> usize {
    let mut depth = 0_u32;
    let mut at = 0;
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// The length of the raw string that `text` begins with, if it does.
fn raw_string(text: &str) -> Option<usize> {
    let after_r = text.strip_prefix("br").or(text.strip_prefix('r'))?;
    let body = after_r.trim_start_matches('#');
    let hashes = &after_r[..after_r.len() - body.len()];
    let body = body.strip_prefix('"')?;
    let end = format!("\"{hashes}");
    let length = body.find(&end).map_or(body.len(), |at| at + end.len());
    Some(text.len() - body.len() + length)
}

/// The length of what `text` begins with: a quote, and all up to the next that is not escaped.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Whether the `'` that `text` begins with opens a character and not a lifetime.
fn is_character(text: &str) -> bool {
    let mut after = text.chars().skip(1);
    after.next() == Some('\\') || after.next() == Some('\'')
}

mod of_this_file {
    use super::{check, check_shown_by, code_only, required};

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

    fn read(path: &str) -> Option<String> {
        let text = match path {
            "mmu-notifier/tests/t.rs" | "mmu-notifier/src/sub/t.rs" => TEST,
            "mmu-notifier/src/guarantees.rs" => GUARANTEES,
            "docs/page.md" => "# Title\n\nText.\n\n## Lock order, and why\n",
            "mmu-notifier/src/lib.rs" => "//! Words.\n//!\n//! # The protocol\n",
            _ => return None,
        };
        Some(text.to_owned())
    }

    /// A list with every row, in which `change` may change the lines.
    fn list(change: impl Fn(&str, String) -> String) -> String {
        let mut list = "# A list\n\n| ID | requirement | how it is met | shown by |\n\
                        | --- | --- | --- | :-- |\n"
            .to_owned();
        for id in required() {
            list += &change(&id, format!("| {id} | what \\| that | how | `t.rs::a_test` |\n"));
        }
        list + "\n| other | table |\n| --- | --- |\n| A01 | x |\n"
    }

    #[test]
    fn there_are_ninety_requirements() {
        assert_eq!(required().count(), 90);
    }

    #[test]
    fn a_whole_list_is_accepted() {
        assert_eq!(check(&list(|_, row| row), &read), Vec::<String>::new());
    }

    #[test]
    fn a_bad_list_is_refused_with_id_and_line() {
        // The row of A02 is on line 6.
        for (row, error) in [
            ("", "A02: has no row"),
            (
                "| A02 | w | h | later: uhmm |\n| A02 | w | h | later: uhmm |\n",
                "line 7: A02: is on line 6",
            ),
            ("| A02 | w | h |\n", "line 6: A02: 3 columns instead of 4"),
            ("| A02 | w | | later: uhmm |\n", "line 6: A02: the column `how it is met` is empty"),
            ("| A02 | w | h | |\n", "line 6: A02: the column `shown by` is empty"),
            ("| A18 | w | h | later: uhmm |\n", "line 6: A18: no such ID"),
            ("| A02 | w | h | later: nobody |\n", "line 6: A02: no entry in backticks"),
            ("| A02 | w | h | `t.rs::no_test` |\n", "line 6: A02: `t.rs::no_test`: there is no"),
        ] {
            let list = list(|id, text| if id == "A02" { row.to_owned() } else { text });
            let errors = check(&list, &read);
            assert!(errors.iter().any(|found| found.starts_with(error)), "{error}: {errors:#?}");
        }
        let bad_header = list(|_, row| row).replacen("how it is met", "how", 1);
        assert!(check(&bad_header, &read)[0].starts_with("line 3: ID: the columns"));
    }

    #[test]
    fn what_shows_a_requirement_must_exist() {
        for good in [
            "`t.rs::a_test`",
            "`t.rs::a_test`, `sub/t.rs::a_test` `guarantees.rs::Refused`",
            "`t.rs::a_property`",
            "`doc:docs/page.md#Lock order, and why`",
            "`doc:mmu-notifier/src/lib.rs#The protocol`",
            "later: uhmm",
            "`later: uhmm-linux`",
        ] {
            assert_eq!(check_shown_by(good, &read), Ok(()), "{good}");
        }
        for (bad, error) in [
            ("`t.rs::helper`", "the function is no test"),
            ("`t.rs::an_ignored_test`", "the test is ignored"),
            ("`t.rs::after_proptest`", "the function is no test"),
            ("`t.rs::only_mentioned`", "there is no such function"),
            ("`t.rs::quoted`", "there is no such function"),
            ("`t.rs::a_tes`", "there is no such function"),
            ("`t.rs::`", "want `file.rs::name`"),
            ("`none.rs::a_test`", "there is no such file"),
            ("`t.rs`", "want `file.rs::name`"),
            ("`t.rs::a_test` and more", "`and more` stands outside of backticks"),
            ("`t.rs::a_test", "a backtick is not closed"),
            ("`t.rs::a_test`, `later: uhmm`", "want `file.rs::name`"),
            ("`guarantees.rs::WithoutCode`", "its documentation has no"),
            ("`guarantees.rs::Undocumented`", "its documentation has no"),
            ("`guarantees.rs::Mentioned`", "there is no such item"),
            ("`doc:docs/page.md#Lock order`", "there is no such heading"),
            ("`doc:docs/page.md#`", "there is no such heading"),
            ("`doc:docs/none.md#Title`", "there is no file docs/none.md"),
            ("`doc:docs/page.md`", "want `doc:path#heading`"),
        ] {
            let found = check_shown_by(bad, &read).expect_err(bad);
            assert!(found.contains(error), "{bad}: {found}");
        }
    }

    #[test]
    fn comments_and_quotes_are_not_code() {
        let text = r#"a /* { /* } */ { */ b // {
            "\"{" 'c' '\'' b'{' c"#;
        let code: String = code_only(text).split_whitespace().collect();
        assert_eq!(code, "abbc");
    }
}
