//! What goes wrong: clients that leave or do not read, nodes that are lost, lie or say nothing, and a router
//! that has too much to do or is asked to end.

use crate::support::{Client, EOT, Options, Router, answering, ids, with_logprobs};
use serde_json::{Value, json};
use std::time::Duration;
use tandem_proto::ids::{ChoiceIdx, NodeId};
use tandem_proto::keys::Fingerprint;
use tandem_proto::wire::{Finish, Message, RequestError, Role, Tokens};

const PATH: &str = "/v1/completions";

fn ask(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": "Hello", "max_tokens": 50});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_client_that_leaves_frees_both_nodes() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    for streams in [true, false] {
        let mut client = Client::post(&router, PATH, ask(json!({"stream": streams}))).await;
        let request = decode.expect().await.request;
        prefill.submit().await;
        if streams {
            prefill.first(request, &ids("word")[..1]);
            client.until("data: ").await;
        }
        drop(client);
        decode.cancelled(request).await;
        prefill.cancelled(request).await;
        router.until(|router| router.dispatcher.attempts() == 0).await;
    }
    assert_eq!(router.metric("tandem_router_client_disconnects_total").await, 2);
    assert_eq!(router.metric("tandem_router_requests_running").await, 0);
    let gone = "tandem_router_http_requests_total{endpoint=\"/v1/completions\",status=\"499\"}";
    assert_eq!(router.metric(gone).await, 1);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_given_up() {
    let options = Options { client_timeout: Duration::from_millis(300), ..Options::default() };
    let (router, mut prefill, mut decode) = Router::with_pair(options).await;
    // Some 12 MB of alternatives: more than buffers hold.
    let body = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": true, "logprobs": true,
        "top_logprobs": 20, "max_tokens": 8000, "ignore_eos": true,
    });
    let client = Client::post(&router, "/v1/chat/completions", body).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let word = ids("word")[0];
    prefill.first(request, &[word]);
    for part in 0..399 {
        let tokens = with_logprobs(&[word; 20], 20);
        let start = 1 + part * 20;
        decode.send(Message::Tokens(Tokens { request, choice: ChoiceIdx(0), start, tokens, finish: None }));
    }
    decode.cancelled(request).await;
    prefill.cancelled(request).await;
    router.until(|router| router.dispatcher.attempts() == 0).await;
    drop(client);
}

#[tokio::test]
async fn a_stop_string_ends_the_nodes_work() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let client = Client::post(&router, PATH, ask(json!({"stop": ["two t", "x"]}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let answer = ids("one two three four");
    prefill.first(request, &answer[..1]);
    for (index, token) in answer.iter().enumerate().skip(1) {
        decode.tokens(request, 0, index as u32, &[*token], None);
    }
    let json = client.answer().await.json();
    assert_eq!(
        (&json["choices"][0]["text"], &json["choices"][0]["finish_reason"]),
        (&json!("one "), &json!("stop"))
    );
    decode.cancelled(request).await;
    prefill.cancelled(request).await;
}

#[tokio::test]
async fn an_answer_that_ends_at_once_ends_both() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let client = Client::post(&router, PATH, ask(json!({"n": 2}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    prefill.first(request, &[EOT, EOT]);
    let json = client.answer().await.json();
    assert_eq!(
        (&json["choices"][1]["text"], &json["choices"][1]["finish_reason"]),
        (&json!(""), &json!("stop"))
    );
    decode.cancelled(request).await;
    prefill.cancelled(request).await;
}

#[tokio::test]
async fn repeats_are_dropped_and_early_tokens_wait() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let client = Client::post(&router, PATH, ask(json!({}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let answer = [ids("one two three"), vec![EOT]].concat();
    decode.tokens(request, 0, 1, &answer[1..3], None);
    decode.tokens(request, 0, 1, &answer[1..], Some(Finish::Stop));
    router.get("/health").await;
    prefill.first(request, &answer[..1]);
    prefill.first(request, &answer[..1]);
    assert_eq!(client.answer().await.json()["choices"][0]["text"], "one two three");
}

#[tokio::test]
async fn a_gap_is_an_internal_error() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    for streams in [false, true] {
        let client = Client::post(&router, PATH, ask(json!({"stream": streams}))).await;
        let request = decode.expect().await.request;
        prefill.submit().await;
        prefill.first(request, &ids("word")[..1]);
        decode.tokens(request, 0, 2, &ids("word")[..1], None);
        let answer = client.answer().await;
        let error = if streams { answer.events().pop().unwrap() } else { answer.json() };
        assert_eq!(error["error"]["code"], "internal_error", "{error}");
        assert_eq!(answer.status, if streams { 200 } else { 500 });
        decode.cancelled(request).await;
        prefill.cancelled(request).await;
    }
    assert_eq!(router.metric("tandem_router_stream_failures_total").await, 1);
}

#[tokio::test]
async fn a_lost_node_is_replaced_before_anything_was_shown() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let client = Client::post(&router, PATH, ask(json!({"stream": true}))).await;
    let first = decode.expect().await.request;
    prefill.submit().await;
    let (spare_prefill, spare_decode) = (router.join(Role::Prefill).await, router.join(Role::Decode).await);
    prefill.crash().await;
    decode.cancelled(first).await;
    // The retry takes the prefill node that is left, and either decode node.
    let _nodes = answering(spare_prefill, spare_decode, "saved");
    let answered = tokio::spawn(client.answer());
    let retried = tokio::time::timeout(Duration::from_millis(500), decode.message()).await;
    if let Ok((_, Message::Expect(expect))) = retried {
        let answer = [ids("saved"), vec![EOT]].concat();
        decode.tokens(expect.request, 0, 0, &answer, Some(Finish::Stop));
    }
    let mut events = answered.await.unwrap().events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "saved");
    assert_eq!(router.metric("tandem_router_retries_total").await, 1);
}

#[tokio::test]
async fn a_whole_answer_begins_anew_when_its_decode_node_is_lost() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let client = Client::post(&router, PATH, ask(json!({}))).await;
    let first = decode.expect().await.request;
    prefill.submit().await;
    prefill.first(first, &ids("lost")[..1]);
    decode.tokens(first, 0, 1, &ids("more words")[..1], None);
    router.get("/health").await;
    let spare = router.join(Role::Decode).await;
    decode.crash().await;
    prefill.cancelled(first).await;
    let _nodes = answering(prefill, spare, "found");
    // The prefill node was asked again before it was set to answer by itself.
    let answer = client.answer().await;
    assert_eq!(answer.json()["choices"][0]["text"], "found", "{}", answer.body);
}

#[tokio::test]
async fn a_lost_node_ends_a_stream_that_was_shown_with_an_error() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let mut client = Client::post(&router, PATH, ask(json!({"stream": true}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let word = ids("word");
    prefill.first(request, &word[..1]);
    client.until("data: ").await;
    decode.crash().await;
    let events = client.answer().await.events();
    assert_eq!(events.last().unwrap()["error"]["code"], "node_lost");
    prefill.cancelled(request).await;
}

#[tokio::test]
async fn a_prefill_node_may_leave_once_its_work_is_done() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let mut client = Client::post(&router, PATH, ask(json!({"stream": true}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let answer = [ids("one two"), vec![EOT]].concat();
    prefill.first(request, &answer[..1]);
    client.until("data: ").await;
    prefill.crash().await;
    router.until(|router| router.dispatcher.available().0 == 0).await;
    decode.tokens(request, 0, 1, &answer[1..], Some(Finish::Stop));
    assert_eq!(client.answer().await.events().pop().unwrap(), "[DONE]");
}

#[tokio::test]
async fn a_nodes_reason_becomes_a_status() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    for (error, attempts, status, code) in [
        (RequestError::Busy("no pages".into()), 2, 503, json!("overloaded")),
        (RequestError::Invalid("too odd".into()), 1, 400, Value::Null),
        (RequestError::Deadline("handoff".into()), 1, 504, json!("deadline_exceeded")),
        (RequestError::Corrupt("chunk 3".into()), 2, 500, json!("internal_error")),
        (RequestError::Internal("bug".into()), 1, 500, json!("internal_error")),
    ] {
        let client = Client::post(&router, PATH, ask(json!({}))).await;
        for _ in 0..attempts {
            let request = decode.expect().await.request;
            prefill.submit().await;
            decode.send(Message::Failed { request, error: error.clone() });
            prefill.cancelled(request).await;
            decode.cancelled(request).await;
        }
        let answer = client.answer().await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &code), "{}", answer.body);
        assert_eq!(answer.header("retry-after").is_some(), status == 503);
    }
}

#[tokio::test]
async fn nothing_stays_open_beyond_its_deadline() {
    let options = Options { generation_timeout: Duration::from_millis(300), ..Options::default() };
    let (router, mut prefill, mut decode) = Router::with_pair(options).await;
    for streams in [false, true] {
        let client = Client::post(&router, PATH, ask(json!({"stream": streams}))).await;
        let request = decode.expect().await.request;
        assert_eq!(prefill.submit().await.request, request);
        if streams {
            prefill.first(request, &ids("word")[..1]);
        }
        let answer = client.answer().await;
        let error = if streams { answer.events().pop().unwrap() } else { answer.json() };
        assert_eq!(error["error"]["code"], "deadline_exceeded");
        assert_eq!(answer.status, if streams { 200 } else { 504 });
        decode.cancelled(request).await;
        prefill.cancelled(request).await;
    }
}

#[tokio::test]
async fn too_many_requests_wait_and_then_are_refused() {
    let options = Options {
        max_requests: 1,
        max_queue: 1,
        queue_timeout: Duration::from_millis(300),
        ..Options::default()
    };
    let (router, mut prefill, mut decode) = Router::with_pair(options).await;
    let running = Client::post(&router, PATH, ask(json!({}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let waiting = Client::post(&router, PATH, ask(json!({}))).await;
    while router.metric("tandem_router_requests_queued").await == 0 {}
    let refused = router.post(PATH, ask(json!({}))).await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    let waited = waiting.answer().await;
    assert_eq!(waited.status, 429, "{}", waited.body);
    let both = router.post(PATH, ask(json!({"prompt": ["a", "b"]}))).await;
    assert_eq!((both.status, &both.json()["error"]["param"]), (400, &json!("prompt")));
    // A place that becomes free is taken.
    let next = Client::post(&router, PATH, ask(json!({}))).await;
    while router.metric("tandem_router_requests_queued").await == 0 {}
    drop(running);
    decode.cancelled(request).await;
    decode.expect().await;
    drop(next);
}

#[tokio::test]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let mut running = Client::post(&router, PATH, ask(json!({"stream": true}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let answer = [ids("one two"), vec![EOT]].concat();
    prefill.first(request, &answer[..1]);
    running.until("data: ").await;
    router.shutdown.request();
    while router.get("/ready").await.status == 200 {}
    let refused = router.post(PATH, ask(json!({}))).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("shutting_down")));
    decode.tokens(request, 0, 1, &answer[1..], Some(Finish::Stop));
    assert_eq!(running.answer().await.events().pop().unwrap(), "[DONE]");
    tokio::time::timeout(crate::support::PATIENCE, router.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_does_not_finish_while_draining_is_cut_off() {
    let options = Options { drain_timeout: Duration::from_millis(200), ..Options::default() };
    let (router, mut prefill, mut decode) = Router::with_pair(options).await;
    let mut running = Client::post(&router, PATH, ask(json!({"stream": true}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    prefill.first(request, &ids("word")[..1]);
    running.until("data: ").await;
    router.shutdown.request();
    assert_eq!(running.answer().await.events().pop().unwrap()["error"]["code"], "shutting_down");
    decode.cancelled(request).await;
    tokio::time::timeout(crate::support::PATIENCE, router.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn nodes_that_differ_or_misbehave_stay_out() {
    let router = Router::start(Options::default()).await;
    let _first = router.join(Role::Prefill).await;
    router.introduce(Role::Decode, |hello| hello.fingerprint = Fingerprint([8; 32])).await.closed().await;
    router.introduce(Role::Decode, |hello| hello.kv.layers = 7).await.closed().await;
    router.introduce(Role::Decode, |hello| hello.node = NodeId(u64::MAX)).await.closed().await;
    let mut twice = router.join(Role::Decode).await;
    twice.send(Message::Cancel { request: tandem_proto::ids::RequestId(1) });
    twice.closed().await;
    router.until(|router| router.dispatcher.members().len() == 1).await;
    assert_eq!(router.metric("tandem_router_refused_nodes_total").await, 3);
}

#[tokio::test]
async fn a_node_cannot_speak_for_anothers_request() {
    let (router, mut prefill, mut decode) = Router::with_pair(Options::default()).await;
    let client = Client::post(&router, PATH, ask(json!({}))).await;
    let request = decode.expect().await.request;
    prefill.submit().await;
    let stranger = router.join(Role::Decode).await;
    stranger.send(Message::Failed { request, error: RequestError::Internal("not mine".into()) });
    stranger.tokens(request, 0, 0, &ids("wrong"), Some(Finish::Stop));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let answer = [ids("right"), vec![EOT]].concat();
    prefill.first(request, &answer[..1]);
    decode.tokens(request, 0, 1, &answer[1..], Some(Finish::Stop));
    assert_eq!(client.answer().await.json()["choices"][0]["text"], "right");
}
