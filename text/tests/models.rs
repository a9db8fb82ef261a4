//! Tokenizers and templates of the test models against what transformers made of the same input.

use proptest::prelude::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tandem_proto::ids::TokenId;
use tandem_text::{ChatInput, Detokenizer, TextModel, Tokenizer};

static TINY: LazyLock<TextModel> = LazyLock::new(|| TextModel::load(&dir()).unwrap());

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tiny")
}

fn tokens(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap().iter().map(|id| TokenId(id.as_u64().unwrap() as u32)).collect()
}

/// The text of `tokens`, made token by token.
fn stream(tokenizer: &Tokenizer, tokens: &[TokenId], skip: bool) -> String {
    let mut detokenizer = Detokenizer::new(skip);
    let mut text: String = tokens.iter().map(|token| detokenizer.push(tokenizer, *token).unwrap()).collect();
    text.push_str(&detokenizer.finish(tokenizer).unwrap());
    text
}

fn check_golden(model: &TextModel, dir: &Path) {
    let golden: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let prompt = case["prompt_text"].as_str().unwrap();
        if let Some(messages) = case["messages"].as_array() {
            let input =
                ChatInput { messages: messages.clone(), add_generation_prompt: true, ..Default::default() };
            assert_eq!(model.template.as_ref().unwrap().render(&input).unwrap(), prompt, "{name}");
        }
        assert_eq!(model.tokenizer.encode(prompt, false).unwrap(), tokens(&case["input_ids"]), "{name}");
        let answer = stream(&model.tokenizer, &tokens(&case["greedy_ids"]), true);
        assert_eq!(answer, case["greedy_text"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn golden_prompts_and_answers() {
    check_golden(&TINY, &dir());
}

#[test]
fn golden_prompts_and_answers_of_the_small_model() {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/models");
    let dir = std::env::var_os("TANDEM_MODELS_DIR").map_or(beside, PathBuf::from).join("small");
    if !dir.join("golden.json").exists() {
        println!("skipped: {} is not there; set TANDEM_MODELS_DIR", dir.display());
        return;
    }
    check_golden(&TextModel::load(&dir).unwrap(), &dir);
}

#[test]
fn settings_come_from_the_files() {
    assert_eq!((TINY.max_positions, TINY.vocab_size), (8192, 4096));
    assert_eq!(TINY.defaults.max_new_tokens, Some(256));
    assert_eq!(TINY.defaults.end_tokens, [TokenId(1)]);
    assert_eq!(TINY.defaults.temperature, None);
}

#[test]
fn special_tokens_in_text_are_special_and_can_be_shown() {
    let ids = TINY.tokenizer.encode("a<|eot|>b", false).unwrap();
    assert_eq!(ids[1], TokenId(1));
    assert_eq!(stream(&TINY.tokenizer, &ids, true), "ab");
    assert_eq!(stream(&TINY.tokenizer, &ids, false), "a<|eot|>b");
    assert_eq!(TINY.tokenizer.token_bytes(TokenId(1)), b"<|eot|>");
}

#[test]
fn a_character_never_comes_in_halves() {
    let text = "naïve 🦀🚀 漢字 – e\u{301} \u{fffd} end";
    let ids = TINY.tokenizer.encode(text, false).unwrap();
    let mut detokenizer = Detokenizer::new(true);
    let mut pieces: Vec<String> =
        ids.iter().map(|token| detokenizer.push(&TINY.tokenizer, *token).unwrap()).collect();
    assert!(pieces.iter().filter(|piece| piece.contains('\u{fffd}')).count() <= 1, "{pieces:?}");
    pieces.push(detokenizer.finish(&TINY.tokenizer).unwrap());
    assert_eq!(pieces.concat(), text);
}

#[test]
fn bytes_that_are_no_text_do_not_pile_up() {
    // The byte 0xff, over and over: never a character, and never the start of one.
    let byte = TINY.tokenizer.token_id("ÿ").unwrap();
    assert_eq!(TINY.tokenizer.token_bytes(byte), [0xff]);
    let mut detokenizer = Detokenizer::new(true);
    let mut count = 0;
    for _ in 0..1000 {
        count += detokenizer.push(&TINY.tokenizer, byte).unwrap().chars().count();
    }
    assert!(count >= 900, "{count}");
    assert_eq!(count + detokenizer.finish(&TINY.tokenizer).unwrap().chars().count(), 1000);
}

#[test]
fn a_text_that_is_far_too_long_is_known_without_tokenizing() {
    let spaces = " ".repeat(1 << 20);
    let least = TINY.tokenizer.least_tokens(&spaces);
    assert!(least > 1000 && least <= TINY.tokenizer.encode(&spaces, false).unwrap().len(), "{least}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn text_survives_the_round_trip(text in "\\PC{0,80}") {
        prop_assume!(!text.contains("<|"));
        let ids = TINY.tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(&stream(&TINY.tokenizer, &ids, true), &text);
        let bytes: Vec<u8> = ids.iter().flat_map(|id| TINY.tokenizer.token_bytes(*id)).collect();
        prop_assert_eq!(bytes, text.as_bytes());
        prop_assert!(TINY.tokenizer.least_tokens(&text) <= ids.len());
    }

    #[test]
    fn any_tokens_stream_to_the_text_of_all(ids in prop::collection::vec(0u32..4096, 0..60)) {
        let ids: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
        let whole = TINY.tokenizer.decode(&ids, true).unwrap();
        prop_assert_eq!(stream(&TINY.tokenizer, &ids, true), whole);
    }
}
