//! Text of a growing list of tokens, final as soon as it is handed out.

use super::{Tokenizer, pieces::lossy};

/// How a stop string ended a text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stopped {
    /// Index of the stop string in the list given.
    pub index: usize,
}

/// Decodes tokens one by one. What [`push`](TextStream::push) appends is never taken back: an incomplete character waits
/// for its last byte, and text that may begin a stop string waits until it does or does not.
///
/// The stop string that is *complete first* ends the text (of two that end together, the longer one), so the text does
/// not depend on how it was cut into tokens.
#[derive(Clone, Debug)]
pub struct TextStream {
    stops: Vec<String>,
    includes_stop: bool,
    /// Bytes of an incomplete character, at most three.
    partial: Vec<u8>,
    /// Text that may yet turn out to begin a stop string.
    held: String,
    /// How far `held` has been searched for stop strings.
    searched: usize,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends before the first of these strings. Empty strings are not looked for.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, includes_stop: false, partial: Vec::new(), held: String::new(), searched: 0, stopped: false }
    }

    /// The same, but the stop string that ends the text is its last word.
    pub fn including_stop(stops: Vec<String>) -> Self {
        Self { includes_stop: true, ..Self::new(stops) }
    }

    /// Takes the next token; appends the text that is final now to `out`.
    ///
    /// Returns the stop string that ended the text, once. After it nothing more comes out.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) -> Option<Stopped> {
        self.push_bytes(tokenizer.visible_bytes(id), out)
    }

    /// The same for raw bytes.
    pub fn push_bytes(&mut self, bytes: &[u8], out: &mut String) -> Option<Stopped> {
        if self.stopped {
            return None;
        }
        self.partial.extend_from_slice(bytes);
        let whole = complete(&self.partial);
        lossy(&self.partial[..whole], &mut self.held);
        self.partial.drain(..whole);
        if let Some((start, index)) = self.first_stop() {
            let end = if self.includes_stop { start + self.stops[index].len() } else { start };
            out.push_str(&self.held[..end]);
            self.held.clear();
            self.partial.clear();
            self.stopped = true;
            return Some(Stopped { index });
        }
        let keep = self.longest_beginning();
        let ready = self.held.len() - keep;
        out.push_str(&self.held[..ready]);
        self.held.drain(..ready);
        self.searched = self.held.len();
        None
    }

    /// The end of the tokens: appends what was held back. No stop string is complete in it.
    pub fn finish(&mut self, out: &mut String) {
        if !self.stopped {
            out.push_str(&std::mem::take(&mut self.held));
            lossy(&std::mem::take(&mut self.partial), out);
            self.stopped = true;
        }
    }

    /// Start and index of the stop string that is complete first in the text held.
    fn first_stop(&self) -> Option<(usize, usize)> {
        let ends = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty()).filter_map(|(index, stop)| {
            // Text searched before holds no whole stop string, so a new one ends after it.
            let from = self.held.floor_char_boundary((self.searched + 1).saturating_sub(stop.len()));
            self.held[from..].find(stop.as_str()).map(|at| (from + at + stop.len(), from + at, index))
        });
        ends.min().map(|(_, start, index)| (start, index))
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let held = self.held.as_bytes();
        self.stops
            .iter()
            .map(|stop| {
                let stop = stop.as_bytes();
                let most = stop.len().saturating_sub(1).min(held.len());
                (1..=most).rev().find(|&n| held.ends_with(&stop[..n])).unwrap_or(0)
            })
            .max()
            .unwrap_or(0)
    }
}

/// How many leading bytes are final as text: all but an incomplete character at the end.
fn complete(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(3);
    for start in (tail..bytes.len()).rev() {
        let need = match bytes[start] {
            0x80..=0xBF => continue,
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            _ => 1,
        };
        let rest = &bytes[start..];
        // `error_len() == None` says that more bytes could complete the character.
        let open = rest.len() < need && std::str::from_utf8(rest).is_err_and(|error| error.error_len().is_none());
        return if open { start } else { bytes.len() };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], chunks: &[&[u8]]) -> (String, Option<usize>) {
        let mut stream = TextStream::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut out = String::new();
        let mut stopped = None;
        for chunk in chunks {
            stopped = stopped.or(stream.push_bytes(chunk, &mut out).map(|stop| stop.index));
        }
        stream.finish(&mut out);
        (out, stopped)
    }

    /// The rule, stated once more without state: the stop string with the smallest end, then the smallest start.
    fn expected(stops: &[String], bytes: &[u8]) -> (String, Option<usize>) {
        let mut text = String::new();
        lossy(bytes, &mut text);
        let first = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(index, stop)| text.find(stop.as_str()).map(|at| (at + stop.len(), at, index)))
            .min();
        match first {
            Some((_, at, index)) => (text[..at].to_owned(), Some(index)),
            None => (text, None),
        }
    }

    #[test]
    fn a_character_is_never_split() {
        let mut stream = TextStream::new(Vec::new());
        let mut out = String::new();
        for &byte in "é好🙂".as_bytes() {
            stream.push_bytes(&[byte], &mut out);
            assert!("é好🙂".starts_with(&out) && !out.contains('\u{FFFD}'), "{out:?}");
        }
        assert_eq!(out, "é好🙂");
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters() {
        assert_eq!(run(&[], &[b"a\xE5", b"b"]).0, "a\u{FFFD}b");
        assert_eq!(run(&[], &[b"\xF0\x9F"]).0, "\u{FFFD}\u{FFFD}");
        assert_eq!(run(&[], &[b"\xFF", b"\x80"]).0, "\u{FFFD}\u{FFFD}");
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it() {
        assert_eq!(run(&["\n\n"], &[b"one\n", b"\ntwo"]), ("one".into(), Some(0)));
        assert_eq!(run(&["END", "E"], &[b"the END"]), ("the ".into(), Some(1)));
        assert_eq!(run(&["abcd", "bc"], &[b"abcd"]), ("a".into(), Some(1)));
    }

    #[test]
    fn a_stop_string_may_be_the_last_word() {
        let (mut stream, mut out) = (TextStream::including_stop(vec!["END".into()]), String::new());
        assert_eq!(stream.push_bytes(b"the EN", &mut out), None);
        assert_eq!(out, "the ");
        assert_eq!(stream.push_bytes(b"D of it", &mut out), Some(Stopped { index: 0 }));
        assert_eq!(out, "the END");
    }

    #[test]
    fn text_that_could_begin_a_stop_string_waits() {
        let mut stream = TextStream::new(vec!["</end>".into()]);
        let mut out = String::new();
        stream.push_bytes(b"x </e", &mut out);
        assert_eq!(out, "x ");
        stream.push_bytes(b"m>", &mut out);
        assert_eq!(out, "x </em>");
        stream.push_bytes(b"</en", &mut out);
        stream.finish(&mut out);
        assert_eq!(out, "x </em></en");
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_text_and_nothing_is_taken_back(
            bytes in prop::collection::vec(prop_oneof![8 => b'a'..=b'd', 1 => Just(0xC3u8), 1 => Just(0xA9u8), 1 => any::<u8>()], 0..60),
            stops in prop::collection::vec("[a-dé]{1,4}", 0..4),
            cuts in prop::collection::vec(1usize..6, 1..60),
        ) {
            let (want, want_stop) = expected(&stops, &bytes);
            let mut stream = TextStream::new(stops.clone());
            let (mut out, mut stopped, mut rest) = (String::new(), None, &bytes[..]);
            for &cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (chunk, later) = rest.split_at(cut.min(rest.len()));
                rest = later;
                stopped = stopped.or(stream.push_bytes(chunk, &mut out).map(|stop| stop.index));
                prop_assert!(want.starts_with(&out), "{:?} is not the beginning of {:?}", out, want);
            }
            stream.finish(&mut out);
            prop_assert_eq!(out, want);
            prop_assert_eq!(stopped, want_stop);
        }
    }
}
