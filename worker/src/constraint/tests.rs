use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::engine::Next;
use crate::sampling::Mask;

mod size;

const GOLDEN: &str = "tests/golden/tokenizer";
const DEMO: &str = "../models/austen-2.6m";
const END: u32 = 2;

fn tokenizer(folder: &str) -> Arc<Tokenizer> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    Arc::new(Tokenizer::load(&folder, 1 << 20).expect("a tokenizer"))
}

fn grammars(folder: &str) -> Grammars {
    let tokenizer = tokenizer(folder);
    let vocab = tokenizer.len() + 3;
    Grammars::new(tokenizer, vocab, [END].into(), Arc::new(()))
}

/// Those of the demo's tokenizer, made once.
fn shared() -> &'static Grammars {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    GRAMMARS.get_or_init(|| grammars(DEMO))
}

fn choice(options: &[&str]) -> Constraint {
    Constraint::Choice(options.iter().map(|&option| option.to_owned()).collect())
}

fn refused(constraint: Constraint) -> String {
    match shared().compile(&constraint) {
        Ok(_) => panic!("{constraint:?} was compiled"),
        Err(error) => error.to_string(),
    }
}

/// The ids that may come, or `None` when nothing but the end may.
fn allowed(guide: &mut dyn Guide) -> Option<Vec<u32>> {
    match guide.next().expect("known") {
        Next::Free(_) => panic!("it is not free"),
        Next::Within(mask) => Some((0..1 << 17).filter(|&id| mask.allows(id)).collect()),
        Next::Over(ends) => {
            assert_eq!(*ends, Mask::of([END], shared().vocab), "only the end");
            None
        }
    }
}

/// The tokens of a text, and the text that they stand for, which may begin with a space of the tokenizer's own.
fn spelt(tokenizer: &Tokenizer, text: &str) -> (Vec<u32>, String) {
    let ids = tokenizer.encode(text).expect("encodes");
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.visible_bytes(id)).copied().collect();
    (ids, String::from_utf8(bytes).expect("text"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_text_may_be_spelt_with_every_token_that_it_goes_on_with_and_no_other(text in "[a-zA-Z ,.é好😀\n\"<>|/\\\\]{1,24}") {
        let grammars = shared();
        let (ids, text) = spelt(&grammars.tokenizer, &text);
        prop_assume!(!text.is_empty());
        let grammar = grammars.compile(&choice(&[&text])).expect("compiles");
        let mut guide = grammar.start(false, &[]).expect("starts");
        let mut rest = text.as_bytes();
        for id in ids {
            let goes_on = |&id: &u32| {
                let bytes = grammars.tokenizer.visible_bytes(id);
                id != END && !bytes.is_empty() && rest.starts_with(bytes)
            };
            let expected: Vec<u32> = (0..grammars.vocab as u32).filter(goes_on).collect();
            prop_assert_eq!(allowed(&mut *guide), Some(expected), "before {:?}", String::from_utf8_lossy(rest));
            rest = &rest[grammars.tokenizer.visible_bytes(id).len()..];
            guide.advance(id);
        }
        prop_assert_eq!((rest.len(), allowed(&mut *guide)), (0, None));
    }

    #[test]
    fn an_answer_that_goes_on_after_any_token_allows_what_an_uncut_one_does(text in "[a-z ]{1,20}", cut in 0usize..20) {
        let grammars = shared();
        let ids = spelt(&grammars.tokenizer, &text).0;
        let grammar = grammars.compile(&Constraint::Regex(r" ?[a-z ]{1,30}\.?".to_owned())).expect("compiles");
        let mut whole = grammar.start(false, &[]).expect("starts");
        for (at, &id) in ids.iter().enumerate() {
            if at == cut {
                let mut resumed = grammar.start(false, &ids[..at]).expect("starts");
                prop_assert_eq!(allowed(&mut *resumed), allowed(&mut *whole));
            }
            whole.next().expect("known");
            whole.advance(id);
        }
    }
}

#[test]
fn bytes_spell_characters_that_have_no_piece() {
    let grammars = grammars(GOLDEN);
    let (ids, text) = spelt(&grammars.tokenizer, "x𓀀");
    let grammar = grammars.compile(&choice(&[&text])).expect("compiles");
    let mut guide = grammar.start(false, &[]).expect("starts");
    assert!(ids.len() >= 4, "the character is spelt with bytes: {ids:?}");
    for id in ids {
        let Next::Within(mask) = guide.next().expect("known") else { panic!("it goes on") };
        assert!(mask.allows(id) && !mask.allows(END));
        guide.advance(id);
    }
    assert!(matches!(guide.next(), Ok(Next::Over(_))));
}

#[test]
fn an_answer_may_end_where_its_grammar_may_and_only_there() {
    let grammar = shared().compile(&Constraint::Regex("a{1,2}".to_owned())).expect("compiles");
    let a = shared().tokenizer.encode("xa").expect("encodes");
    let a = *a.last().expect("a token");
    assert_eq!(shared().tokenizer.visible_bytes(a), b"a");
    let mut guide = grammar.start(false, &[]).expect("starts");
    assert!(!allowed(&mut *guide).expect("goes on").contains(&END));
    guide.advance(a);
    assert!(allowed(&mut *guide).expect("goes on").contains(&END));
    guide.advance(a);
    assert_eq!(allowed(&mut *guide), None);
}

#[test]
fn an_answer_that_thinks_is_free_until_its_reasoning_ends() {
    let grammars = shared();
    let thought = spelt(&grammars.tokenizer, "so < it </ is </think>").0;
    let grammar = grammars.compile(&choice(&["yes", "no"])).expect("compiles");
    let mut guide = grammar.start(true, &[]).expect("starts");
    for &id in &thought {
        assert!(matches!(guide.next(), Ok(Next::Free(_))));
        guide.advance(id);
    }
    let after = allowed(&mut *guide);
    assert_eq!(after, allowed(&mut *grammar.start(false, &[]).expect("starts")));
    for cut in 0..=thought.len() {
        let mut resumed = grammar.start(true, &thought[..cut]).expect("starts");
        assert_eq!(matches!(resumed.next(), Ok(Next::Free(_))), cut < thought.len(), "{cut}");
    }
    let said = [&thought[..], &after.expect("goes on")[..1]].concat();
    let mut resumed = grammar.start(true, &said).expect("starts");
    assert!(matches!(resumed.next(), Ok(Next::Within(_) | Next::Over(_))));
}

#[test]
fn answers_to_one_grammar_do_not_disturb_each_other() {
    let grammar = shared().compile(&Constraint::Regex("(ab|ba){8}".to_owned())).expect("compiles");
    let mut alone: Vec<Box<dyn Guide>> = (0..2).map(|_| grammar.start(false, &[]).expect("starts")).collect();
    let mut beside: Vec<Box<dyn Guide>> = (0..2).map(|_| grammar.start(false, &[]).expect("starts")).collect();
    let pick = |guide: &mut dyn Guide, turn: usize| {
        let ids = allowed(guide)?;
        let id = ids[turn * 7 % ids.len()];
        guide.advance(id);
        Some(id)
    };
    let walk =
        |guide: &mut dyn Guide, first: usize| (first..first + 6).map(|turn| pick(guide, turn)).collect::<Vec<_>>();
    let expected: Vec<Vec<_>> = alone.iter_mut().enumerate().map(|(index, guide)| walk(&mut **guide, index)).collect();
    let mut mixed = vec![Vec::new(), Vec::new()];
    for turn in 0..6 {
        for (index, guide) in beside.iter_mut().enumerate() {
            mixed[index].push(pick(&mut **guide, index + turn));
        }
    }
    assert_eq!(mixed, expected);
}

/// Counts what the engine is said to have waited for.
#[derive(Default)]
struct Waits(AtomicUsize);

impl Observer for Waits {
    fn compiled(&self, _: Duration) {}
    fn masked(&self, _: Duration) {}
    fn waited(&self, _: Duration) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_guide_waits_no_longer_than_it_may_and_tells_of_each_mask_once() {
    let waits = Arc::new(Waits::default());
    let tokenizer = tokenizer(DEMO);
    let grammars = Grammars::new(Arc::clone(&tokenizer), tokenizer.len(), [END].into(), waits.clone());
    let grammar = grammars.compile(&Constraint::Regex("a{20}".to_owned())).expect("compiles");
    let a = *tokenizer.encode("xa").expect("encodes").last().expect("a token");
    let mut guide = grammar.start(false, &[]).expect("starts");
    assert!(guide.wait(Instant::now()), "the beginning is known");
    for place in 1..20 {
        guide.advance(a);
        while !guide.wait(Instant::now()) {
            assert_eq!(waits.0.load(Ordering::SeqCst), place - 1);
            std::thread::yield_now();
        }
        assert!(guide.wait(Instant::now()) && matches!(guide.next(), Ok(Next::Within(mask)) if mask.allows(a)));
        assert_eq!(waits.0.load(Ordering::SeqCst), place);
    }
    guide.advance(a);
    assert!(guide.wait(Instant::now() + Duration::from_secs(60)) && matches!(guide.next(), Ok(Next::Over(_))));
}

#[test]
fn what_was_compiled_is_remembered_until_enough_else_was() {
    let grammars = grammars(DEMO);
    let regex = |index: usize| Constraint::Regex(format!("a{{{index},99}}"));
    let first = grammars.compile(&regex(1)).expect("compiles");
    for index in 2..REMEMBERED + 1 {
        grammars.compile(&regex(index)).expect("compiles");
        assert!(Arc::ptr_eq(&first, &grammars.compile(&regex(1)).expect("remembered")));
    }
    for index in 100..100 + REMEMBERED {
        grammars.compile(&Constraint::Regex(format!("b{{{index}}}"))).expect("compiles");
    }
    assert!(!Arc::ptr_eq(&first, &grammars.compile(&regex(1)).expect("compiles")));
}

#[test]
fn tokens_that_do_not_fit_are_no_beginning() {
    let grammar = shared().compile(&choice(&["abc"])).expect("compiles");
    let ids = shared().tokenizer.encode("xabx").expect("encodes");
    let error = grammar.start(false, &ids).err().expect("refused").to_string();
    assert_eq!(error, format!("has at 0 the token {}, which the constraint does not allow", ids[0]));
}

#[test]
fn a_long_answer_is_gone_on_with_as_far_as_it_came() {
    let words: Vec<String> = (0..300u32).map(|word| format!("w{}x", word.wrapping_mul(2_654_435_761))).collect();
    let grammar = shared().compile(&Constraint::Regex(format!("(({}) ){{1,200}}", words.join("|")))).expect("compiles");
    let mut whole = grammar.start(false, &[]).expect("starts");
    let mut said = Vec::new();
    while said.len() < 700 {
        let Some(ids) = allowed(&mut *whole) else { break };
        let id = ids.iter().filter(|&&id| id != END).nth(said.len() * 7 % ids.len().saturating_sub(1).max(1));
        let id = *id.unwrap_or(&ids[0]);
        whole.advance(id);
        said.push(id);
    }
    assert!(said.len() > 300, "{}", said.len());
    let mut resumed = grammar.start(false, &said).expect("goes on");
    assert_eq!(allowed(&mut *resumed), allowed(&mut *whole));
    let wrong = [&said[..], &[END + 1, said[0]]].concat();
    let error = grammar.start(false, &wrong).err().expect("refused").to_string();
    assert!(error.starts_with(&format!("has at {} the token {}", said.len(), END + 1)), "{error}");
}

#[test]
fn what_is_known_does_not_wait_for_what_is_compiled() {
    let grammars = grammars(DEMO);
    let known = choice(&["known"]);
    let first = grammars.compile(&known).expect("compiles");
    let _turns = [(); 2].map(|()| grammars.turns.take().expect("a turn"));
    assert!(Arc::ptr_eq(&first, &grammars.compile(&known).expect("remembered")));
}

#[test]
fn what_failed_is_tried_again() {
    let place = Mutex::default();
    let failed = built::<u32>(&place, || Err(unexpected("the system gave no thread"))).expect_err("fails");
    assert!(matches!(failed, ConstraintError::Failed(_)));
    assert_eq!(built(&place, || Ok(1)).as_deref(), Ok(&1));
    assert_eq!(built(&place, || Ok(2)).as_deref(), Ok(&1));
}

#[test]
fn a_model_without_an_end_takes_no_constraint() {
    let grammars = Grammars::new(tokenizer(DEMO), 100, [].into(), Arc::new(()));
    let error = grammars.compile(&Constraint::JsonObject).err().expect("refused").to_string();
    assert!(error.contains("no end-of-sequence token"), "{error}");
}

#[test]
fn constraints_that_cannot_be_followed_are_refused_with_the_reason_and_a_remedy() {
    let (schema, regex) =
        (|text: &str| Constraint::JsonSchema(text.into()), |text: &str| Constraint::Regex(text.into()));
    let grammar = |text: &str| Constraint::Grammar(text.into());
    let nothing = "no token of this model may come next";
    let cases = [
        (schema("{"), "is no JSON: EOF while parsing an object"),
        (schema(&"{\"a\":".repeat(1000)), "recursion limit exceeded"),
        (schema("[1]"), "is an array; send a JSON Schema, which is an object"),
        (schema("false"), "is false, which no answer fits"),
        (schema(r#"{"type": "objekt"}"#), "Invalid type: objekt"),
        (schema(r#"{"not": {}}"#), "Unimplemented keys: [\"not\"]"),
        (schema(r#"{"type": "integer", "minimum": 5, "maximum": 1}"#), "minimum (5) is greater than maximum (1)"),
        (schema(r#"{"$ref": "http://example.com/a"}"#), "ref 'http://example.com/a'"),
        (schema(r##"{"$ref": "#"}"##), nothing),
        (regex("(a"), "unclosed group"),
        (regex("(?=a)b"), "look-ahead"),
        (regex("(){3}"), "only the empty answer is left"),
        (regex(&format!("{}a{}", "(".repeat(2000), ")".repeat(2000))), "invalid regex"),
        (grammar("a: \"b\""), "no start rule found"),
        (grammar("start: start \"a\""), nothing),
        (grammar("start: <[3]>"), nothing),
        (grammar("start: <s>"), "special token"),
        (grammar(&format!("start: {}", "(".repeat(60_000))), "too deeply nested"),
    ];
    for (constraint, words) in cases {
        let what = format!("{constraint:?}");
        let said = refused(constraint);
        assert!(said.contains(words) && said.contains("; send ") && said.len() < 500, "{:.80}: {said}", what);
        assert!(!said.contains('\n'), "{said:?}");
    }
}

#[test]
fn large_constraints_are_compiled_or_refused_and_never_end_the_process() {
    let chain = |names: &str, count: usize| {
        (0..count).map(|rule| format!("{names}{rule}: {names}{}\n", rule + 1)).collect::<String>()
    };
    let properties: Vec<String> = (0..1000).map(|index| format!(r#""p{index}": {{"type": "string"}}"#)).collect();
    let constraints = [
        Constraint::Grammar(format!("start: a0\n{}a5000: \"x\"", chain("a", 5000))),
        Constraint::Grammar(format!("start: A0\n{}A5000: \"x\"", chain("A", 5000))),
        Constraint::Grammar(format!("start: \"{}\"", "a".repeat(60_000))),
        Constraint::Grammar("start: (\"a\"{1,100000}){1,100000}".to_owned()),
        Constraint::Regex("ab".repeat(4000)),
        Constraint::Regex("((a|b){1,500}c){1,500}".to_owned()),
        Constraint::Choice(vec!["é".repeat(30_000)]),
        Constraint::Choice((0..1024u32).map(|option| option.wrapping_mul(2_654_435_761).to_string()).collect()),
        Constraint::JsonSchema(format!(r#"{{"const": "{}"}}"#, "a".repeat(60_000))),
        Constraint::JsonSchema(format!(r#"{{"type": "object", "properties": {{{}}}}}"#, properties.join(","))),
        Constraint::JsonSchema(r#"{"type": "string", "minLength": 100000, "maxLength": 1000000}"#.to_owned()),
        Constraint::JsonSchema(r#"{"type": "array", "minItems": 100000, "items": {"type": "object"}}"#.to_owned()),
    ];
    for constraint in constraints {
        let grammar = shared().compile(&constraint).expect("compiles");
        let mut guide = grammar.start(false, &[]).expect("starts");
        for _ in 0..20 {
            let Ok(Next::Within(mask)) = guide.next() else { break };
            let id = (0..1024).rev().find(|&id| id != END && mask.allows(id));
            let Some(id) = id else { break };
            guide.advance(id);
        }
    }
}

#[test]
fn a_grammar_that_grows_beyond_its_limits_ends_its_answer_with_a_sentence() {
    // A deterministic automaton of this has two to the power of thirty states.
    let regex = Constraint::Regex("(a|b)*a(a|b){30}".to_owned());
    let grammar = shared().compile(&regex).expect("compiles");
    let mut guide = grammar.start(false, &[]).expect("starts");
    let letters = ["xa", "xb"].map(|text| *shared().tokenizer.encode(text).expect("encodes").last().expect("a token"));
    let mut word = 1u32;
    let failure = (0..100_000).find_map(|_| {
        let failed = guide.next().err();
        word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        guide.advance(letters[(word >> 31) as usize]);
        failed
    });
    let failure = failure.expect("it ends").to_string();
    assert!(failure.starts_with("sampling.constraint cannot be followed any further: "), "{failure}");
}
