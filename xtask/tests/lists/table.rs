//! Tables: which rows there are, and which there must be.

use std::collections::BTreeMap;

use crate::evidence::{Otherwise, check_shown_by};
use crate::source::words;
use crate::tree::Tree;

/// What a cell says that is still to be filled in.
const UNFILLED: &str = "TBD";

/// What a list must hold.
pub(crate) struct List {
    /// The columns. The first holds the ID, the last what shows the row.
    pub(crate) header: [&'static str; 4],
    /// Every ID that must have a row.
    pub(crate) ids: Vec<String>,
    /// What the last column may say instead.
    pub(crate) otherwise: &'static [Otherwise],
}

/// A row of a list.
struct Row<'a> {
    line: usize,
    id: &'a str,
    shown_by: String,
}

impl List {
    /// Returns what is wrong with `text`, one sentence an error.
    pub(crate) fn check(&self, text: &str, tree: &Tree) -> Vec<String> {
        let mut errors = Vec::new();
        let rows = self.parse(text, &mut errors);
        let mut lines = BTreeMap::new();
        for row in &rows {
            if let Some(first) = lines.insert(row.id, row.line) {
                errors.push(format!("line {}: {}: is on line {first} already", row.line, row.id));
            }
            if let Err(error) = check_shown_by(&row.shown_by, self.otherwise, tree) {
                errors.push(format!("line {}: {}: {error}", row.line, row.id));
            }
        }
        for id in &self.ids {
            // A row with an error in it is there, and has been complained of.
            let complained = |error: &String| error.contains(&format!(": {id}: "));
            if !lines.contains_key(id.as_str()) && !errors.iter().any(complained) {
                errors.push(format!("{id}: has no row"));
            }
        }
        errors
    }

    /// The rows of all tables that begin with the list's first column.
    fn parse<'a>(&self, text: &'a str, errors: &mut Vec<String>) -> Vec<Row<'a>> {
        /// Where in a table the line above was.
        enum Place {
            Outside,
            Header,
            Rows,
            OtherTable,
        }
        let id = self.header[0];
        let mut place = Place::Outside;
        let mut rows = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let Some(cells) = cells(text) else {
                place = Place::Outside;
                continue;
            };
            place = match place {
                Place::Outside if cells[0] == id => {
                    if cells != self.header {
                        errors.push(format!(
                            "line {line}: {id}: the columns are not {:?}",
                            self.header
                        ));
                    }
                    Place::Header
                }
                Place::Outside | Place::OtherTable => Place::OtherTable,
                Place::Header if cells.iter().all(|cell| is_rule(cell)) => Place::Rows,
                Place::Header | Place::Rows => {
                    match self.parse_row(line, &cells) {
                        Ok(row) => rows.push(row),
                        Err(error) => errors.push(format!("line {line}: {}: {error}", cells[0])),
                    }
                    Place::Rows
                }
            };
        }
        rows
    }

    fn parse_row<'a>(&self, line: usize, cells: &[&'a str]) -> Result<Row<'a>, String> {
        let &[id, _, _, shown_by] = cells else {
            return Err(format!("{} columns instead of {}", cells.len(), self.header.len()));
        };
        if !self.ids.iter().any(|known| known == id) {
            return Err("no such ID".to_owned());
        }
        for (cell, name) in cells.iter().zip(&self.header).skip(1) {
            if cell.is_empty() {
                return Err(format!("the column `{name}` is empty"));
            }
            if words(cell, UNFILLED).next().is_some() {
                return Err(format!("the column `{name}` is not filled in: {UNFILLED}"));
            }
        }
        Ok(Row { line, id, shown_by: shown_by.replace(r"\|", "|") })
    }
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

mod of_this_file {
    use super::List;
    use crate::tree::Tree;
    use crate::{acceptance, live_acceptance, live_regressions, peers, regressions};

    fn tree() -> Tree {
        Tree::of(&[("mmu-notifier/tests/t.rs", "#[test]\nfn a_test() {}\n")])
    }

    /// A list with every row, in which `change` may change the lines. The first row is on line 5.
    fn text(list: &List, change: impl Fn(&str, String) -> String) -> String {
        let [id, what, how, by] = list.header;
        let mut text =
            format!("# A list\n\n| {id} | {what} | {how} | {by} |\n| --- | --- | --- | :-- |\n");
        for id in &list.ids {
            text += &change(id, format!("| {id} | what \\| that | how | `t.rs::a_test` |\n"));
        }
        text + "\n| other | table |\n| --- | --- |\n| A01 | x |\n"
    }

    /// Checks that with the row of `id` replaced by `row` the errors are these, each cut to the
    /// length of what is expected.
    fn refused(list: &List, id: &str, row: &str, expected: &str) {
        let text = text(list, |other, text| if other == id { row.to_owned() } else { text });
        let errors = list.check(&text, &tree());
        assert!(
            errors.len() == 1 && errors[0].starts_with(expected),
            "{row:?}: want {expected}, got {errors:#?}"
        );
    }

    #[test]
    fn whole_lists_are_accepted() {
        for list in [acceptance(), regressions(), live_acceptance(), live_regressions(), peers()] {
            assert_eq!(list.check(&text(&list, |_, row| row), &tree()), Vec::<String>::new());
        }
    }

    #[test]
    fn a_bad_list_of_requirements_is_refused_with_id_and_line() {
        let list = acceptance();
        for (row, error) in [
            ("", "A02: has no row"),
            (
                "| A02 | w | h | `t.rs::a_test` |\n| A02 | w | h | later: uhmm-linux |\n",
                "line 7: A02: is on line 6",
            ),
            ("| A02 | w | h |\n", "line 6: A02: 3 columns instead of 4"),
            ("| A02 | w | | later: uhmm-linux |\n", "line 6: A02: the column `how it is met` is "),
            ("| A02 | w | h | |\n", "line 6: A02: the column `shown by` is empty"),
            ("| A02 | w | TBD | `t.rs::a_test` |\n", "line 6: A02: the column `how it is met` is "),
            ("| A02 | w | h | later: uhmm |\n", "line 6: A02: no entry in backticks"),
            ("| A02 | w | h | cannot happen: why |\n", "line 6: A02: no entry in backticks"),
            ("| A02 | w | h | `t.rs::no_test` |\n", "line 6: A02: `t.rs::no_test`: there is no"),
        ] {
            refused(&list, "A02", row, error);
        }
        refused(
            &list,
            "A17",
            "| A17 | w | h | `t.rs::a_test` |\n| A18 | w | h | `t.rs::a_test` |\n",
            "line 22: A18: no such ID",
        );
        let bad_header = text(&list, |_, row| row).replacen("how it is met", "how", 1);
        assert!(list.check(&bad_header, &tree())[0].starts_with("line 3: ID: the columns"));
    }

    #[test]
    fn a_bad_list_of_what_holds_on_a_live_process_is_refused() {
        let list = live_acceptance();
        for (row, error) in [
            ("", "A06: has no row"),
            ("| A06 | w | h | later: uhmm-linux |\n", "line 6: A06: no entry in backticks"),
            (
                "| A06 | w | h | needs changes that are announced |\n",
                "line 6: A06: `needs changes that are announced` has no reason",
            ),
        ] {
            refused(&list, "A06", row, error);
        }
        let row = "| A06 | w | h | needs changes that are announced: it is told late |\n";
        let text = text(&list, |id, text| if id == "A06" { row.to_owned() } else { text });
        assert_eq!(list.check(&text, &tree()), Vec::<String>::new());
    }

    #[test]
    fn a_bad_list_of_regressions_is_refused_with_number_and_line() {
        let list = regressions();
        for (row, error) in [
            ("", "2: has no row"),
            ("| 2 | w | h | TBD |\n", "line 6: 2: the column `shown by` is not filled in"),
            ("| 2 | w | TBD | `t.rs::a_test` |\n", "line 6: 2: the column `here` is not filled in"),
            ("| 2 | w | h | `t.rs::a_test`, TBD |\n", "line 6: 2: the column `shown by` is not "),
            ("| 2 | w | h | `t.rs::no_test` |\n", "line 6: 2: `t.rs::no_test`: there is no"),
            ("| 2 | w | h | cannot happen: |\n", "line 6: 2: `cannot happen` has no reason"),
            ("| 2 | w | h | cannot happen |\n", "line 6: 2: `cannot happen` has no reason"),
            ("| 2 | w | h | cannot happen: TBD |\n", "line 6: 2: the column `shown by` is not "),
            (
                "| 2 | w | h | later: uhmm-linux: |\n",
                "line 6: 2: `later: uhmm-linux` has no reason",
            ),
            ("| 2 | w | h | later: uhmm-linux |\n", "line 6: 2: `later: uhmm-linux` has no reason"),
            ("| 2 | w | h | later: uhmm: soon |\n", "line 6: 2: no entry in backticks"),
            ("| 2 | w | | `t.rs::a_test` |\n", "line 6: 2: the column `here` is empty"),
        ] {
            refused(&list, "2", row, error);
        }
        for row in [
            "| 2 | w | h | cannot happen: it has no copy |\n",
            "| 2 | w | h | later: uhmm-linux: it has the pages |\n",
        ] {
            let text = text(&list, |id, text| if id == "2" { row.to_owned() } else { text });
            assert_eq!(list.check(&text, &tree()), Vec::<String>::new());
        }
    }
}
