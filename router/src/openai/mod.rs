//! The OpenAI API's requests and responses as types, and every rule about what a request may hold.
//!
//! Pure: JSON in, types out. Fields that would change the output and are not supported are refused by name;
//! fields that only matter to OpenAI's own service, and unknown ones, are ignored, as other servers do.

pub mod chat;
pub mod completions;
pub mod error;
mod fields;
pub mod logprobs;
pub mod params;
pub mod tokenize;
pub mod usage;

pub use error::ApiError;

#[cfg(test)]
mod tests {
    use super::{ApiError, chat, completions, tokenize};
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    const FIELDS: [&str; 20] = [
        "model",
        "messages",
        "prompt",
        "n",
        "stop",
        "logit_bias",
        "stream",
        "stream_options",
        "max_tokens",
        "seed",
        "top_logprobs",
        "logprobs",
        "tools",
        "tool_choice",
        "response_format",
        "role",
        "content",
        "type",
        "text",
        "tokens",
    ];

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            prop_oneof![Just("user"), Just("text"), Just("auto"), Just("5"), Just("")].prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            let key = prop::sample::select(FIELDS.to_vec()).prop_map(str::to_owned);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key, inner), 0..6)
                    .prop_map(|entries| Value::Object(Map::from_iter(entries))),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever the body holds, it is read or refused by the client's fault.
        #[test]
        fn any_json_is_read_or_refused(mut body in json_value(), named in any::<bool>()) {
            if let (Some(object), true) = (body.as_object_mut(), named) {
                object.insert("model".into(), json!("tiny"));
            }
            let check = |error: Option<ApiError>| {
                prop_assert!(error.is_none_or(|error| error.status == 400 && !error.message.is_empty()));
                Ok(())
            };
            check(chat::ChatRequest::read(&body, 4096).err())?;
            check(completions::CompletionRequest::read(&body, 4096).err())?;
            check(tokenize::TokenizeRequest::read(&body).err())?;
            check(tokenize::DetokenizeRequest::read(&body, 4096).err())?;
        }
    }
}
