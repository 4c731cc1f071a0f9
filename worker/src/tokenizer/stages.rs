//! Normalizers, pre-tokenizers and decoders of a `tokenizer.json`, as far as they decide whether the `tokenizers` crate can
//! be let run them: it trusts them, and would panic on some, and take any amount of memory or time for others.

use serde::Deserialize;

use super::TokenizerError;

/// The most stages of one file, nested ones counted.
const STAGE_LIMIT: usize = 64;
/// The most that all normalizers, or all decoders, may lengthen a text. NFKC takes 11, the usual mark for spaces 3.
const GROWTH_LIMIT: usize = 64;
/// The longest text that a normalizer puts before another, in bytes.
const PREPEND_LIMIT: usize = 64;
/// The longest regular expression in bytes, and the most of them. Published tokenizers have up to 700 bytes, and three.
const PATTERN_LIMIT: usize = 1024;
const PATTERNS_LIMIT: usize = 8;
/// The most copies that the counted repetitions of all regular expressions may make of what they repeat.
const COPIES_LIMIT: usize = 256;

/// A normalizer, pre-tokenizer or decoder, or a sequence of them.
#[derive(Deserialize)]
pub(super) struct Stage {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) decoders: Vec<Stage>,
    #[serde(default)]
    normalizers: Vec<Stage>,
    #[serde(default)]
    pretokenizers: Vec<Stage>,
    #[serde(default)]
    pub(super) pattern: Option<Pattern>,
    #[serde(default)]
    pub(super) content: Option<String>,
    #[serde(default)]
    pub(super) replacement: Option<String>,
    #[serde(default)]
    pub(super) prepend_scheme: Option<String>,
    #[serde(default)]
    prepend: Option<String>,
    #[serde(default)]
    length: Option<usize>,
    #[serde(default)]
    pub(super) start: usize,
    #[serde(default)]
    pub(super) stop: usize,
}

/// What a stage looks for.
#[derive(Deserialize)]
pub(super) enum Pattern {
    String(String),
    Regex(String),
}

/// What was seen of one file.
struct Seen {
    stages: usize,
    patterns: usize,
    copies: usize,
}

/// Refuses stages that cannot be let run.
pub(super) fn check(stages: [Option<&Stage>; 3]) -> Result<(), TokenizerError> {
    let mut seen = Seen { stages: 0, patterns: 0, copies: 1 };
    for stage in stages.into_iter().flatten() {
        let growth = seen.add(stage)?;
        if growth > GROWTH_LIMIT {
            return Err(unsupported(format!(
                "{:?} makes a text up to {growth} times as long; more than {GROWTH_LIMIT} is not implemented",
                stage.kind
            )));
        }
    }
    Ok(())
}

impl Seen {
    /// Looks at a stage and those in it; how many bytes it makes of one, at most.
    fn add(&mut self, stage: &Stage) -> Result<usize, TokenizerError> {
        self.stages += 1;
        if self.stages > STAGE_LIMIT {
            return Err(unsupported(format!("more than {STAGE_LIMIT} normalizers, pre-tokenizers and decoders")));
        }
        if let Some(Pattern::Regex(pattern)) = &stage.pattern {
            self.add_pattern(pattern)?;
        }
        match stage.kind.as_str() {
            // the character maps that SentencePiece compiles are read unchecked
            "Precompiled" => return Err(unsupported("the normalizer \"Precompiled\" is not implemented".into())),
            "FixedLength" if stage.length == Some(0) => {
                return Err(TokenizerError::Corrupt("tokenizer.json: FixedLength has the length 0".into()));
            }
            "Prepend" if stage.prepend.as_ref().is_some_and(|text| text.len() > PREPEND_LIMIT) => {
                return Err(unsupported(format!("Prepend puts more than {PREPEND_LIMIT} bytes before a text")));
            }
            _ => {}
        }
        let mut growth = stage.growth();
        for inner in stage.normalizers.iter().chain(&stage.pretokenizers).chain(&stage.decoders) {
            growth = growth.saturating_mul(self.add(inner)?);
        }
        Ok(growth)
    }

    fn add_pattern(&mut self, pattern: &str) -> Result<(), TokenizerError> {
        self.patterns += 1;
        self.copies = self.copies.saturating_mul(copies(pattern));
        if self.patterns > PATTERNS_LIMIT || pattern.len() > PATTERN_LIMIT || self.copies > COPIES_LIMIT {
            return Err(unsupported(format!(
                "its regular expressions take too much: at most {PATTERNS_LIMIT} of {PATTERN_LIMIT} bytes each, and counts \
                 as in {{1,3}} with a product of {COPIES_LIMIT}"
            )));
        }
        Ok(())
    }
}

impl Stage {
    fn growth(&self) -> usize {
        match self.kind.as_str() {
            "Replace" => {
                let content = self.content.as_deref().unwrap_or_default().len();
                match &self.pattern {
                    Some(Pattern::String(from)) if !from.is_empty() => content.div_ceil(from.len()).max(1),
                    // something may be put between any two bytes
                    _ => content + 1,
                }
            }
            "Metaspace" => self.replacement.as_ref().map_or(3, String::len).max(1),
            "NFKC" | "NFKD" => 11,
            "NFC" | "NFD" | "BertNormalizer" => 3,
            "ByteLevel" | "Lowercase" => 2,
            _ => 1,
        }
    }
}

/// The product of the counts in a regular expression, as in `a{2,3}`; what only looks like one is counted as well.
fn copies(pattern: &str) -> usize {
    let mut product: usize = 1;
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('{') {
        rest = after;
        let named = [r"\x", r"\u", r"\U", r"\p", r"\P"].iter().any(|escape| before.ends_with(escape));
        if let Some((inside, _)) = after.split_once('}').filter(|_| !named) {
            let largest = inside.split(',').map(|number| match number.trim() {
                "" => 1,
                digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().unwrap_or(usize::MAX),
                _ => 1,
            });
            product = product.saturating_mul(largest.max().unwrap_or(1).max(1));
        }
    }
    product
}

fn unsupported(what: String) -> TokenizerError {
    TokenizerError::Unsupported(format!("tokenizer.json: {what}"))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::tokenizer::Tokenizer;

    fn load(more: &str) -> Result<Tokenizer, TokenizerError> {
        let source = format!(r#"{{"model": {{"type": "BPE", "vocab": {{"a": 0}}, "merges": []}}, {more}}}"#);
        Tokenizer::from_json(source.as_bytes(), 640)
    }

    fn refused(more: &str, word: &str) {
        let error = load(more).expect_err(more).to_string();
        assert!(error.contains(word), "{error}");
    }

    /// A sequence of `count` equal stages.
    fn sequence(list: &str, stage: &str, count: usize) -> String {
        format!(r#"{{"type": "Sequence", "{list}": [{}]}}"#, vec![stage; count].join(","))
    }

    #[test]
    fn counts_are_multiplied_and_other_braces_are_none() {
        for (pattern, expected) in [
            (r"\p{N}{1,3}|\x{20}+|\u{5}", 3),
            (r"(a{2}){ 3 , }", 6),
            (r"[a{4}]{99999999999999999999999}", usize::MAX),
            (r"a{,5}{b}{", 5),
            ("", 1),
        ] {
            assert_eq!(copies(pattern), expected, "{pattern}");
        }
    }

    #[test]
    fn normalizers_and_decoders_that_blow_texts_up_are_refused() {
        let double = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}"#;
        load(&format!(r#""normalizer": {}"#, sequence("normalizers", double, 6))).expect("64 times");
        refused(&format!(r#""normalizer": {}"#, sequence("normalizers", double, 7)), "128 times");
        refused(&format!(r#""decoder": {}"#, sequence("decoders", double, 40)), "times as long");
        let between = r#"{"type": "Replace", "pattern": {"Regex": "x*"}, "content": "123456789"}"#;
        refused(&format!(r#""normalizer": {}"#, sequence("normalizers", between, 2)), "100 times");
        let prepend = format!(r#""normalizer": {{"type": "Prepend", "prepend": "{}"}}"#, "x".repeat(65));
        refused(&prepend, "Prepend");
        refused(&format!(r#""normalizer": {}"#, sequence("normalizers", r#"{"type": "NFC"}"#, 64)), "more than 64");
    }

    #[test]
    fn regular_expressions_that_take_too_much_are_refused() {
        let split = |pattern: &str| {
            format!(
                r#"{{"type": "Split", "pattern": {{"Regex": "{pattern}"}}, "behavior": "Isolated", "invert": false}}"#
            )
        };
        load(&format!(r#""pre_tokenizer": {}"#, sequence("pretokenizers", &split(r"\\p{N}{1,3}"), 3))).expect("usual");
        for stages in [
            sequence("pretokenizers", &split("a"), 9),
            sequence("pretokenizers", &split(r"\\w{17}"), 2),
            split(r"(\\p{L}{100}){100}"),
            split(&"a".repeat(1025)),
        ] {
            refused(&format!(r#""pre_tokenizer": {stages}"#), "regular expressions");
        }
    }

    #[test]
    fn pieces_of_no_length_are_refused() {
        refused(r#""pre_tokenizer": {"type": "FixedLength", "length": 0}"#, "length 0");
        load(r#""pre_tokenizer": {"type": "FixedLength", "length": 1}"#)
            .expect("of one")
            .encode("aa")
            .expect("encoded");
    }

    #[test]
    fn values_of_a_decoder_that_cannot_be_read_are_refused_wherever_they_are() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for value in [r#""\ud800""#, "1e999", deep.as_str(), "\"\u{fffd}\""] {
            let source = format!(
                r#"{{"model": {{"type": "BPE", "vocab": {{"a": 0}}, "merges": []}}, "decoder": {{"type": "Fuse", "x": {value}}}}}"#
            );
            // a byte that is no text in place of the character that stands for one
            let mut bytes = source.into_bytes();
            if let Some(place) = bytes.windows(3).position(|bytes| bytes == "\u{fffd}".as_bytes()) {
                bytes.splice(place..place + 3, [0xff]);
            }
            let error = Tokenizer::from_json(&bytes, 640).expect_err(value).to_string();
            assert!(error.starts_with("tokenizer.json: "), "{error}");
        }
    }

    #[test]
    fn a_post_processor_adds_nothing() {
        let twice = r#""post_processor": {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {}, "single": [AGAIN]}"#;
        let mut again = String::from(r#"{"Sequence": {"id": "A", "type_id": 0}}"#);
        for _ in 0..5 {
            let one = again.clone();
            write!(again, ", {one}").expect("written");
        }
        let tokenizer = load(&twice.replace("AGAIN", &again)).expect("loads");
        assert_eq!(tokenizer.encode("aa").expect("encoded"), [0, 0]);
    }
}
