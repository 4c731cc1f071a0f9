//! Rust sources as tokens: enough to know which paths they name.

use std::collections::BTreeSet;

/// One token.
#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Colons,
    Mark(char),
}

/// The tokens of a source without comments, literals and lifetimes, with the line each stands on.
fn tokens(text: &str) -> Vec<(Token, usize)> {
    let characters: Vec<char> = text.chars().collect();
    let (mut at, mut line) = (0, 1);
    let mut found = Vec::new();
    while let Some(character) = characters.get(at).copied() {
        let rest = &characters[at..];
        let length = match character {
            '/' if rest.starts_with(&['/', '/']) => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            '/' if rest.starts_with(&['/', '*']) => comment_length(rest),
            '"' => string_length(rest, 0),
            'r' | 'b' | 'c' if literal_length(rest).is_some() => literal_length(rest).unwrap_or(1),
            '\'' => character_length(rest),
            c if c.is_alphabetic() || c == '_' => {
                let length = rest.iter().position(|c| !c.is_alphanumeric() && *c != '_').unwrap_or(rest.len());
                found.push((Token::Word(rest[..length].iter().collect()), line));
                length
            }
            c if c.is_ascii_digit() => {
                rest.iter().position(|c| !c.is_alphanumeric() && *c != '_').unwrap_or(rest.len())
            }
            ':' if rest.starts_with(&[':', ':']) => {
                found.push((Token::Colons, line));
                2
            }
            c => {
                if !c.is_whitespace() {
                    found.push((Token::Mark(c), line));
                }
                1
            }
        };
        line += rest[..length].iter().filter(|c| **c == '\n').count();
        at += length;
    }
    found
}

fn comment_length(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with(&['/', '*']) {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(&['*', '/']) {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// Length of a string that begins after `start` characters of prefix.
fn string_length(rest: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < rest.len() && rest[at] != '"' {
        at += if rest[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

/// Length of a literal with a prefix: `b"…"`, `r#"…"#`, `br"…"`, `b'…'`; `None` for words.
fn literal_length(rest: &[char]) -> Option<usize> {
    let prefix = rest.iter().take(2).take_while(|c| matches!(c, 'r' | 'b' | 'c')).count();
    match rest.get(prefix)? {
        '\'' if rest[0] == 'b' && prefix == 1 => Some(1 + character_length(&rest[1..])),
        '"' if rest[prefix - 1] != 'r' => Some(string_length(rest, prefix)),
        '"' | '#' if rest[prefix - 1] == 'r' => {
            let hashes = rest[prefix..].iter().take_while(|c| **c == '#').count();
            if rest.get(prefix + hashes) != Some(&'"') {
                return None;
            }
            let mut end = vec!['"'];
            end.extend(std::iter::repeat_n('#', hashes));
            let body = prefix + hashes + 1;
            let close = rest[body..].windows(end.len()).position(|window| window == end)?;
            Some(body + close + end.len())
        }
        _ => None,
    }
}

/// Length of a character literal, or of the quote of a lifetime.
fn character_length(rest: &[char]) -> usize {
    match rest.get(1) {
        Some('\\') => rest
            .iter()
            .skip(2)
            .position(|c| *c == '\'')
            .map_or(1, |at| at + 3)
            .max(if rest.get(2) == Some(&'\'') { 4 } else { 0 }),
        Some(_) if rest.get(2) == Some(&'\'') => 3,
        _ => 1,
    }
}

/// Removes items that are compiled for tests only.
fn without_tests(all: &[(Token, usize)]) -> Vec<(Token, usize)> {
    let word = |at: usize, text: &str| matches!(all.get(at), Some((Token::Word(word), _)) if word == text);
    let mark = |at: usize, c: char| matches!(all.get(at), Some((Token::Mark(found), _)) if *found == c);
    let mut kept = Vec::new();
    let mut at = 0;
    while at < all.len() {
        let for_tests = mark(at, '#')
            && mark(at + 1, '[')
            && (word(at + 2, "test")
                || (word(at + 2, "cfg") && mark(at + 3, '(') && word(at + 4, "test") && mark(at + 5, ')')));
        if !for_tests {
            kept.push(all[at].clone());
            at += 1;
            continue;
        }
        let mut depth = 0;
        while at < all.len() {
            match &all[at].0 {
                Token::Mark('{' | '(' | '[') => depth += 1,
                Token::Mark('}' | ')' | ']') => {
                    depth -= 1;
                    if depth == 0 && all[at].0 == Token::Mark('}') {
                        break;
                    }
                }
                Token::Mark(';') if depth == 0 => break,
                _ => {}
            }
            at += 1;
        }
        at += 1;
    }
    kept
}

/// Every path that a source names: `a::b` where it stands, and each leaf of a `use` tree in full.
pub fn paths(text: &str) -> BTreeSet<String> {
    let all: Vec<Token> = without_tests(&tokens(text)).into_iter().map(|(token, _)| token).collect();
    let mut found = BTreeSet::new();
    let mut at = 0;
    while at < all.len() {
        match &all[at] {
            Token::Word(word) if word == "use" => {
                at += 1;
                use_tree(&all, &mut at, "", &mut found);
            }
            Token::Word(_) => {
                let path = plain_path(&all, &mut at);
                // A single word is a name of the place, or was imported.
                if path.contains("::") {
                    found.insert(path);
                }
            }
            _ => at += 1,
        }
    }
    found
}

/// Reads `a::b::c` and moves on behind it.
fn plain_path(all: &[Token], at: &mut usize) -> String {
    let mut path = String::new();
    while let Some(Token::Word(word)) = all.get(*at) {
        path.push_str(word);
        *at += 1;
        if !matches!((all.get(*at), all.get(*at + 1)), (Some(Token::Colons), Some(Token::Word(_)))) {
            break;
        }
        path.push_str("::");
        *at += 1;
    }
    path
}

fn use_tree(all: &[Token], at: &mut usize, prefix: &str, found: &mut BTreeSet<String>) {
    if all.get(*at) == Some(&Token::Colons) {
        *at += 1;
    }
    let join = |path: &str| match (prefix, path) {
        ("", path) => path.to_owned(),
        (prefix, "" | "self") => prefix.to_owned(),
        (prefix, path) => format!("{prefix}::{path}"),
    };
    let path = join(&plain_path(all, at));
    if all.get(*at) == Some(&Token::Colons) {
        *at += 1;
    }
    match all.get(*at) {
        Some(Token::Mark('{')) => {
            *at += 1;
            while !matches!(all.get(*at), None | Some(Token::Mark('}'))) {
                use_tree(all, at, &path, found);
                if all.get(*at) == Some(&Token::Mark(',')) {
                    *at += 1;
                }
            }
            *at += 1;
        }
        Some(Token::Mark('*')) => {
            *at += 1;
            found.insert(path);
        }
        Some(Token::Word(word)) if word == "as" => {
            *at += 2;
            found.insert(path);
        }
        Some(Token::Mark(',' | '}' | ';')) | None => {
            found.insert(path);
        }
        // Not a use tree after all: never stand still.
        Some(_) => {
            found.insert(path);
            *at += 1;
        }
    }
}

/// Whether a source contains `unsafe` code.
pub fn is_unsafe(text: &str) -> bool {
    tokens(text).iter().any(|(token, _)| *token == Token::Word("unsafe".to_owned()))
}

/// Lines that hold code, those for tests left out.
pub fn code_lines(text: &str) -> usize {
    without_tests(&tokens(text)).into_iter().map(|(_, line)| line).collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(text: &str, path: &str) -> bool {
        paths(text).contains(path)
    }

    #[test]
    fn groups_aliases_and_globs_of_a_use_are_spelled_out() {
        let text = "use kube::{api::{Api, self}, Client as C, runtime::*};\nuse ::tokio;";
        for path in ["kube::api::Api", "kube::api", "kube::Client", "kube::runtime", "tokio"] {
            assert!(has(text, path), "{path} in {:?}", paths(text));
        }
    }

    #[test]
    fn paths_in_code_count_and_comments_and_strings_do_not() {
        let text = r##"
            // kube::Client
            /* kube::Client /* nested */ kube::Client */
            fn f<'a>(x: &'a str) -> candle_core::Result<()> {
                let s = "kube::Client \" kube::Client"; let r = r#"kube::Client"#; let c = '"'; let d = '\'';
                let e = b"tonic::Code"; let n = 1_000u64;
                tokio::spawn(async {});
            }
        "##;
        assert!(has(text, "candle_core::Result") && has(text, "tokio::spawn"));
        assert!(!has(text, "kube::Client") && !has(text, "tonic::Code"), "{:?}", paths(text));
    }

    #[test]
    fn code_for_tests_is_left_out() {
        let text = "use a::b;\n#[cfg(test)]\nmod tests {\n use kube::Client;\n fn f() { x::y(); }\n}\nuse c::d;\n\
            #[cfg(test)]\nuse e::f;\n#[test]\nfn t() { g::h() }\nfn last() { i::j() }";
        let found = paths(text);
        for path in ["a::b", "c::d", "i::j"] {
            assert!(found.contains(path), "{path}");
        }
        for path in ["kube::Client", "x::y", "e::f", "g::h"] {
            assert!(!found.contains(path), "{path}");
        }
        assert_eq!(code_lines(text), 3);
    }

    #[test]
    fn unsafe_is_found_in_code_only() {
        assert!(is_unsafe("fn f() { unsafe { g() } }"));
        assert!(!is_unsafe("// unsafe\nlet s = \"unsafe\"; #![forbid(unsafe_code)]"));
    }
}
