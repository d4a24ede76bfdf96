//! Reading Rust and Markdown, as far as is needed to see that something is there.

/// A line `## heading`, of a text or of a Rust file's documentation.
pub(crate) fn check_heading(text: &str, heading: &str) -> Result<(), String> {
    let is_heading = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("//!").or(line.strip_prefix("///")).unwrap_or(line).trim();
        line.starts_with('#') && line.trim_start_matches('#').trim() == heading
    };
    let found = !heading.is_empty() && text.lines().any(is_heading);
    if found { Ok(()) } else { Err("there is no such heading".to_owned()) }
}

/// A test function that is run.
pub(crate) fn check_test(text: &str, name: &str) -> Result<(), String> {
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
pub(crate) fn check_guarantee(text: &str, name: &str) -> Result<(), String> {
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

pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands in `text` as a whole word.
pub(crate) fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        !text[..at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word)
    })
}

/// `text` without comments and without what stands in quotes, so that braces and names in those
/// are not taken for code.
pub(crate) fn code_only(text: &str) -> String {
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
    use super::code_only;

    #[test]
    fn comments_and_quotes_are_not_code() {
        let text = r#"a /* { /* } */ { */ b // {
            "\"{" 'c' '\'' b'{' c"#;
        let code: String = code_only(text).split_whitespace().collect();
        assert_eq!(code, "abbc");
    }
}
