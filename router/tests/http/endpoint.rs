//! The endpoint as clients see it, with nodes that answer as they should.

use crate::support::{EOT, Options, Router, answering, ids};
use serde_json::{Value, json};
use tandem_proto::wire::{Message, Role};

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn text(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": "Hello"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_chat_answer() {
    let (router, prefill, decode) = Router::with_pair(Options::default()).await;
    let _nodes = answering(prefill, decode, "The lamp is teal.");
    let answer =
        router.post("/v1/chat/completions", chat(json!({"user": "x", "store": true, "unknown": 1}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.header("x-request-id").unwrap().starts_with("req-"));
    let json = answer.json();
    assert!(json["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "tiny");
    assert_eq!(json["system_fingerprint"], "fp_070707070707");
    assert_eq!(
        json["choices"],
        json!([{"index": 0, "message": {"role": "assistant", "content": "The lamp is teal.", "refusal": null},
            "logprobs": null, "finish_reason": "stop"}])
    );
    let completion = ids("The lamp is teal.").len() + 1;
    assert_eq!(
        json["usage"],
        json!({"prompt_tokens": 6, "completion_tokens": completion, "total_tokens": 6 + completion,
            "prompt_tokens_details": {"cached_tokens": 2,
                "tandem": {"pages": 1, "host": 1, "disk": 0, "remote": 0}}})
    );
    router.until(|router| router.dispatcher.attempts() == 0).await;
    assert_eq!(router.metric("tandem_router_cancellations_total").await, 0);
    assert_eq!(router.metric("tandem_router_prompt_tokens_total").await, 6);
}

#[tokio::test]
async fn a_chat_stream() {
    let (router, prefill, decode) = Router::with_pair(Options::default()).await;
    let _nodes = answering(prefill, decode, "The lamp is teal.");
    for include_usage in [false, true] {
        let body = chat(json!({"stream": true, "stream_options": {"include_usage": include_usage}}));
        let answer = router.post("/v1/chat/completions", body).await;
        assert_eq!(answer.header("content-type").unwrap(), "text/event-stream; charset=utf-8");
        let mut events = answer.events();
        assert_eq!(events.pop().unwrap(), "[DONE]");
        if include_usage {
            let last = events.pop().unwrap();
            assert_eq!(last["choices"], json!([]));
            assert_eq!(last["usage"]["prompt_tokens"], 6);
            assert!(events.iter().all(|event| event.get("usage") == Some(&Value::Null)));
        } else {
            assert!(events.iter().all(|event| event.get("usage").is_none()));
        }
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        assert!(
            events
                .iter()
                .all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"])
        );
        let content = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!(content.collect::<String>(), "The lamp is teal.");
        let finishes: Vec<_> = events.iter().map(|event| &event["choices"][0]["finish_reason"]).collect();
        assert_eq!(finishes.iter().filter(|finish| !finish.is_null()).count(), 1);
        assert_eq!(**finishes.last().unwrap(), json!("stop"));
        assert!(events.len() > 4, "tokens come one by one");
    }
}

#[tokio::test]
async fn text_completions_in_every_form() {
    let (router, prefill, decode) = Router::with_pair(Options::default()).await;
    let _nodes = answering(prefill, decode, "one two");
    let check = async |extra: Value, texts: &[&str], prompt_tokens: usize| {
        let json = router.post("/v1/completions", text(extra.clone())).await.json();
        let got: Vec<_> = json["choices"].as_array().unwrap_or_else(|| panic!("{json}")).iter().collect();
        assert_eq!(
            got.iter().map(|choice| choice["text"].as_str().unwrap()).collect::<Vec<_>>(),
            texts,
            "{extra}"
        );
        assert!(got.iter().enumerate().all(|(index, choice)| choice["index"] == index), "{extra}");
        assert_eq!(
            (&json["object"], &json["usage"]["prompt_tokens"]),
            (&json!("text_completion"), &json!(prompt_tokens))
        );
    };
    let hello = ids("Hello").len();
    check(json!({}), &["one two"], hello).await;
    check(json!({"echo": true}), &["Helloone two"], hello).await;
    check(json!({"n": 2, "best_of": 2}), &["one two", "one two"], hello).await;
    check(json!({"prompt": ["Hello", "Hello"], "n": 2}), &["one two"; 4], 2 * hello).await;
    check(json!({"prompt": [5, 6, 7]}), &["one two"], 3).await;
    check(json!({"prompt": [[5, 2], [45, 3081]], "echo": true}), &["one two", "Helloone two"], 4).await;

    let body = text(json!({"prompt": ["Hello", "Bye"], "stream": true, "echo": true, "logprobs": null}));
    let mut events = router.post("/v1/completions", body).await.events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    for (index, expected) in ["Helloone two", "Byeone two"].iter().enumerate() {
        let pieces =
            events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
        assert_eq!(pieces.map(|choice| choice["text"].as_str().unwrap()).collect::<String>(), *expected);
    }

    let length = router.post("/v1/completions", text(json!({"max_tokens": 1}))).await.json();
    assert_eq!(length["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn log_probabilities_in_both_forms() {
    let (router, prefill, decode) = Router::with_pair(Options::default()).await;
    let _nodes = answering(prefill, decode, "one two");
    let body = chat(json!({"logprobs": true, "top_logprobs": 2}));
    let json = router.post("/v1/chat/completions", body.clone()).await.json();
    let content = json["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let tokens: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(tokens, "one two");
    assert_eq!(content[0]["bytes"], json!(content[0]["token"].as_str().unwrap().as_bytes()));
    assert_eq!(
        (&content[0]["logprob"], content[0]["top_logprobs"].as_array().unwrap().len()),
        (&json!(-0.5), 2)
    );

    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = router.post("/v1/chat/completions", streamed).await.events();
    let parts = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(&parts.flatten().cloned().collect::<Vec<_>>(), content);

    let json = router.post("/v1/completions", text(json!({"logprobs": 1}))).await.json();
    let logprobs = &json["choices"][0]["logprobs"];
    let offsets: Vec<u64> =
        logprobs["text_offset"].as_array().unwrap().iter().map(|o| o.as_u64().unwrap()).collect();
    assert_eq!((offsets[0], offsets.len()), (0, content.len()));
    assert!(offsets.is_sorted() && logprobs["top_logprobs"][0].as_object().unwrap().len() == 2);
}

#[tokio::test]
async fn nodes_are_told_what_was_asked_for() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let body = chat(json!({
        "max_completion_tokens": 9, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "seed": 42, "n": 3,
        "stop_token_ids": [77], "logit_bias": {"5": -100}, "logprobs": true, "top_logprobs": 4,
    }));
    let client = crate::support::Client::post(&router, "/v1/chat/completions", body).await;
    let expect = decode.expect().await;
    let submit = prefill.submit().await;
    let text = "<|bos|><|user|>Hello<|eot|><|assistant|>";
    assert_eq!(submit.prompt, ids(text));
    assert_eq!((&expect.prompt, &expect.generation), (&submit.prompt, &submit.generation));
    assert_eq!((expect.request, expect.prefill), (submit.request, prefill.id));
    assert_eq!(submit.decode.unwrap().node, decode.id);
    let generation = &submit.generation;
    assert_eq!((generation.max_tokens, generation.choices), (9, 3));
    assert_eq!(generation.stop_tokens, [EOT, tandem_proto::ids::TokenId(77)]);
    let sampling = &generation.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.9, 0, 0.1));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (1.0, -1.0));
    assert_eq!((sampling.repetition_penalty, sampling.seed, sampling.top_logprobs), (1.1, 42, Some(4)));
    assert_eq!(sampling.logit_bias, [(tandem_proto::ids::TokenId(5), -100.0)]);
    drop(client);

    // A single token needs no decode node; the model's own limit applies when the request has none.
    decode.cancelled(expect.request).await;
    prefill.cancelled(expect.request).await;
    let _client =
        crate::support::Client::post(&router, "/v1/chat/completions", chat(json!({"max_tokens": 1}))).await;
    assert_eq!(prefill.submit().await.decode, None);
    let _client = crate::support::Client::post(&router, "/v1/chat/completions", chat(json!({}))).await;
    let submit = prefill.submit().await;
    assert_eq!(submit.generation.max_tokens, 256);
    // The first thing that the decode node hears of is this one.
    match decode.message().await {
        (_, Message::Expect(expect)) => assert_eq!(expect.request, submit.request),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn small_endpoints() {
    let router = Router::start(Options::default()).await;
    assert_eq!(router.get("/health").await.json(), json!({"status": "ok"}));
    assert_eq!(router.get("/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
    let ready = router.get("/ready").await;
    assert_eq!(
        (ready.status, &ready.json()["reason"]),
        (503, &json!("no prefill and no decode node is available"))
    );
    let prefill = router.join(Role::Prefill).await;
    assert_eq!(router.get("/ready").await.json()["reason"], "no decode node is available");
    let _decode = router.join(Role::Decode).await;
    assert_eq!(router.get("/ready").await.json(), json!({"status": "ready", "prefill": 1, "decode": 1}));
    prefill.send(Message::Draining);
    router.until(|router| router.dispatcher.available().0 == 0).await;
    assert_eq!(router.get("/ready").await.json()["reason"], "no prefill node is available");

    let models = router.get("/v1/models").await.json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("tiny"), &json!(8192))
    );
    assert_eq!(router.get("/v1/models/org/alias").await.json()["id"], "org/alias");
    assert_eq!(router.get("/v1/models/other").await.json()["error"]["code"], "model_not_found");

    let tokens = router.post("/tokenize", json!({"prompt": "Hello", "return_token_strs": true})).await.json();
    assert_eq!(tokens["count"], 2);
    assert_eq!(
        tokens["token_strs"].as_array().unwrap().iter().filter_map(Value::as_str).collect::<String>(),
        "Hello"
    );
    let of_chat = json!({"messages": [{"role": "user", "content": "Hello"}]});
    let tokens = router.post("/tokenize", of_chat).await.json();
    assert_eq!(
        tokens,
        json!({"count": 6, "max_model_len": 8192, "tokens": [0, 3, 45, 3081, 1, 4], "token_strs": null})
    );
    let text = router.post("/detokenize", json!({"tokens": tokens["tokens"]})).await.json();
    assert_eq!(text, json!({"prompt": "<|bos|><|user|>Hello<|eot|><|assistant|>"}));

    let named = router.exchange("GET", "/health", &[("x-request-id", "mine-1")], b"").await;
    assert_eq!(named.header("x-request-id"), Some("mine-1"));
    let metrics = router.get("/metrics").await.body;
    assert!(
        metrics.contains("tandem_router_http_requests_total{endpoint=\"/ready\",status=\"503\"} 3"),
        "{metrics}"
    );
    assert!(metrics.contains("tandem_router_nodes{role=\"prefill\",state=\"draining\"} 1"), "{metrics}");
}

#[tokio::test]
async fn refusals_name_what_is_wrong() {
    let router = Router::start(Options { max_body: 4096, ..Options::default() }).await;
    let envelope = |answer: &crate::support::Answer, status: u16, param: &str, code: &str| {
        let json = answer.json();
        let error = &json["error"];
        let keys: Vec<_> = error.as_object().unwrap_or_else(|| panic!("{json}")).keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        let got =
            (answer.status, error["param"].as_str().unwrap_or(""), error["code"].as_str().unwrap_or(""));
        assert_eq!(got, (status, param, code), "{json}");
        assert!(error["message"].as_str().unwrap().len() > 10 && error["type"].is_string(), "{json}");
    };
    let fields = [
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1.5}), "top_k"),
        (json!({"min_p": 1.1}), "min_p"),
        (json!({"presence_penalty": -2.1}), "presence_penalty"),
        (json!({"frequency_penalty": 3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"seed": "x"}), "seed"),
        (json!({"stop": [""]}), "stop[0]"),
        (json!({"stop": ["a", 5]}), "stop[1]"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stop_token_ids": [1, 4096]}), "stop_token_ids[1]"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias.5"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"model": null}), "model"),
        (json!({"model": 5}), "model"),
    ];
    let of_chat = [
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": ["hi"]}), "messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "boss", "content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "messages[0].content[0].text",
        ),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": 3}), "logprobs"),
    ];
    let of_text = [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": [1, -1]}), "prompt[1]"),
        (json!({"prompt": [[1], [4096]]}), "prompt[1][0]"),
        (json!({"prompt": ["a", 5]}), "prompt[1]"),
        (json!({"prompt": vec!["a"; 20]}), "prompt"),
        (json!({"logprobs": 21}), "logprobs"),
    ];
    for (change, param) in fields.iter().chain(&of_chat) {
        let answer = router.post("/v1/chat/completions", chat(change.clone())).await;
        envelope(&answer, 400, param, "");
    }
    for (change, param) in fields.iter().chain(&of_text) {
        let answer = router.post("/v1/completions", text(change.clone())).await;
        envelope(&answer, 400, param, "");
    }
    let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
    for (change, param) in [
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"functions": [{}]}), "functions"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"messages": [{"role": "user", "content": image}]}), "messages[0].content[0]"),
    ] {
        let answer = router.post("/v1/chat/completions", chat(change)).await;
        envelope(&answer, 400, param, "unsupported_parameter");
    }
    for (change, param) in [
        (json!({"suffix": "x"}), "suffix"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"echo": true, "logprobs": 1}), "echo"),
        (json!({"use_beam_search": true}), "use_beam_search"),
    ] {
        let answer = router.post("/v1/completions", text(change)).await;
        envelope(&answer, 400, param, "unsupported_parameter");
    }

    let json = [("content-type", "application/json; charset=utf-8")];
    let exchange = async |method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]| {
        router.exchange(method, path, headers, body).await
    };
    let chat_path = "/v1/chat/completions";
    envelope(&exchange("POST", chat_path, &json, b"{\"model\": ").await, 400, "", "invalid_json");
    envelope(&exchange("POST", chat_path, &json, b"[1]").await, 400, "", "");
    envelope(&exchange("POST", chat_path, &json, b"\xff").await, 400, "", "invalid_json");
    envelope(&exchange("POST", chat_path, &json, &b"[".repeat(2000)).await, 400, "", "invalid_json");
    envelope(&exchange("POST", chat_path, &json, &b" ".repeat(5000)).await, 413, "", "body_too_large");
    let form = [("content-type", "application/x-www-form-urlencoded")];
    envelope(&exchange("POST", chat_path, &form, b"{}").await, 415, "", "unsupported_media_type");
    envelope(&exchange("GET", chat_path, &[], b"").await, 405, "", "method_not_allowed");
    envelope(&exchange("DELETE", "/health", &[], b"").await, 405, "", "method_not_allowed");
    envelope(&exchange("GET", "/v1/nothing", &[], b"").await, 404, "", "unknown_url");
    envelope(&router.post(chat_path, chat(json!({"model": "gpt"}))).await, 404, "model", "model_not_found");
    envelope(&router.post("/tokenize", json!({})).await, 400, "prompt", "");
    envelope(&router.post("/detokenize", json!({"tokens": "x"})).await, 400, "tokens", "");

    let long = router.post(chat_path, chat(json!({"max_tokens": 9000}))).await;
    envelope(&long, 400, "messages", "context_length_exceeded");
    assert!(
        long.body.contains("8192 tokens, but you asked for 9006 tokens (6 of the prompt"),
        "{}",
        long.body
    );

    let none = router.post(chat_path, chat(json!({}))).await;
    envelope(&none, 503, "", "no_nodes");
    assert_eq!(none.header("retry-after"), Some("1"));
}
