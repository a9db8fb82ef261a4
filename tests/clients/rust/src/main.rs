//! async-openai against real Tandem processes that serve models/tiny.
//!
//! ```text
//! OPENAI_BASE_URL=http://127.0.0.1:8000/v1 cargo run --release    # scripts/check-clients does all of it
//! ```
//!
//! Prints one line a test and `N passed, N failed`.
#![forbid(unsafe_code)]

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{CreateChatCompletionRequest, FinishReason};
use async_openai::types::completions::CreateCompletionRequest;
use futures::future::{FutureExt, LocalBoxFuture, join_all};
use futures::stream::StreamExt;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::time::{Duration, Instant};

/// The version in Cargo.toml.
const CLIENT: &str = "async-openai 0.43.0";
/// What models/tiny says to "Hello", greedily: the first case of its golden.json.
const ANSWER: &str = "Hello! Give me some documents and ask me a question about them.";
const HELLO_IDS: [u32; 6] = [0, 3, 45, 3081, 1, 4];

type Outcome = Result<(), String>;
type Test = for<'a> fn(&'a Server) -> LocalBoxFuture<'a, Outcome>;

struct Server {
    client: Client<OpenAIConfig>,
    base: String,
    model: String,
}

/// Typed requests, written as the JSON that they stand for.
impl Server {
    fn chat(&self, over: Value) -> CreateChatCompletionRequest {
        let base = json!({"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.0});
        serde_json::from_value(merged(base, over)).expect("a request that async-openai knows")
    }

    fn completion(&self, over: Value) -> CreateCompletionRequest {
        let base = json!({"model": self.model, "prompt": HELLO_IDS, "temperature": 0.0});
        serde_json::from_value(merged(base, over)).expect("a request that async-openai knows")
    }

    async fn say(&self, over: Value) -> Result<String, String> {
        let mut answer = self.client.chat().create(self.chat(over)).await.map_err(text)?;
        answer.choices.remove(0).message.content.ok_or_else(|| "no content".to_owned())
    }

    /// Requests that the router has in progress, from its metrics.
    async fn running(&self) -> Result<f64, String> {
        const NAME: &str = "tandem_router_requests_running";
        let url = format!("{}/metrics", self.base.trim_end_matches("/v1"));
        let body = reqwest::get(url).await.map_err(text)?.text().await.map_err(text)?;
        let lines = body.lines().filter(|line| line.starts_with(NAME));
        let values: Vec<f64> = lines.filter_map(|line| line.rsplit_once(' ')?.1.parse().ok()).collect();
        if values.is_empty() {
            Err(format!("{NAME} is not among the metrics"))
        } else {
            Ok(values.iter().sum())
        }
    }

    async fn settles(&self, expected: f64, within: Duration) -> Outcome {
        let deadline = Instant::now() + within;
        loop {
            let now = self.running().await?;
            if now == expected {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("{now} requests run after {within:?}, expected {expected}"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn merged(mut base: Value, over: Value) -> Value {
    for (key, value) in over.as_object().expect("an object") {
        base[key] = value.clone();
    }
    base
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn equal<T: PartialEq + Debug>(found: T, expected: T) -> Outcome {
    if found == expected { Ok(()) } else { Err(format!("{found:?}, expected {expected:?}")) }
}

/// The call failed with this status, code and param.
fn refused<T>(result: Result<T, OpenAIError>, status: u16, code: Option<&str>, param: &str) -> Outcome {
    match result {
        Err(OpenAIError::ApiError(error)) => {
            equal(error.status_code.as_u16(), status)?;
            if code.is_some() {
                equal(error.api_error.code.as_deref(), code)?;
            }
            equal(error.api_error.param.as_deref(), Some(param))
        }
        Err(other) => Err(format!("{other:?}, expected an API error")),
        Ok(_) => Err(format!("was accepted; status {status} expected")),
    }
}

async fn models_are_listed_and_retrieved(server: &Server) -> Outcome {
    let models = server.client.models();
    let list = models.list().await.map_err(text)?;
    equal(list.data.iter().map(|model| model.id.clone()).collect(), vec![server.model.clone()])?;
    equal(models.retrieve(&server.model).await.map_err(text)?.id, server.model.clone())?;
    match models.retrieve("nope").await {
        Err(OpenAIError::ApiError(error)) => equal(error.api_error.code.as_deref(), Some("model_not_found")),
        other => Err(format!("{other:?}, expected model_not_found")),
    }
}

async fn chat_answers_and_counts(server: &Server) -> Outcome {
    let answer = server.client.chat().create(server.chat(json!({}))).await.map_err(text)?;
    equal(answer.choices[0].message.content.as_deref(), Some(ANSWER))?;
    equal(answer.choices[0].finish_reason, Some(FinishReason::Stop))?;
    let usage = answer.usage.ok_or("no usage")?;
    equal(usage.prompt_tokens as usize, HELLO_IDS.len())?;
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)?;
    usage
        .prompt_tokens_details
        .and_then(|details| details.cached_tokens)
        .map(drop)
        .ok_or("no cached_tokens".into())
}

async fn chat_streams_with_usage(server: &Server) -> Outcome {
    let request = server.chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let mut stream = server.client.chat().create_stream(request).await.map_err(text)?;
    let (mut said, mut chunks, mut usage) = (String::new(), 0, None);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(text)?;
        chunks += 1;
        for choice in &chunk.choices {
            said.push_str(choice.delta.content.as_deref().unwrap_or_default());
        }
        usage = chunk.usage;
    }
    equal(said.as_str(), ANSWER)?;
    equal(usage.ok_or("no usage in the last chunk")?.prompt_tokens as usize, HELLO_IDS.len())?;
    if chunks > 5 { Ok(()) } else { Err(format!("only {chunks} chunks: that is no stream")) }
}

async fn completions_of_text_texts_ids_and_lists(server: &Server) -> Outcome {
    let create = async |over| server.client.completions().create(server.completion(over)).await.map_err(text);
    let ids = create(json!({})).await?;
    equal(ids.choices[0].text.as_str(), ANSWER)?;
    equal(ids.usage.ok_or("no usage")?.prompt_tokens as usize, HELLO_IDS.len())?;
    let one = create(json!({"prompt": "The capital", "max_tokens": 8})).await?;
    let two = create(json!({"prompt": ["The capital", "Once upon a time"], "max_tokens": 8})).await?;
    equal(two.choices.len(), 2)?;
    equal(two.choices[0].text.as_str(), one.choices[0].text.as_str())?;
    let lists = create(json!({"prompt": [HELLO_IDS, HELLO_IDS], "max_tokens": 32})).await?;
    equal(lists.choices.iter().map(|choice| choice.text.as_str()).collect(), vec![ANSWER, ANSWER])
}

async fn completion_streams(server: &Server) -> Outcome {
    let request = server.completion(json!({"stream": true}));
    let mut stream = server.client.completions().create_stream(request).await.map_err(text)?;
    let mut said = String::new();
    while let Some(chunk) = stream.next().await {
        for choice in chunk.map_err(text)?.choices {
            said.push_str(&choice.text);
        }
    }
    equal(said.as_str(), ANSWER)
}

async fn stop_length_n_seed_and_logprobs(server: &Server) -> Outcome {
    equal(server.say(json!({"stop": [" documents"]})).await?.as_str(), "Hello! Give me some")?;
    let over = json!({"max_completion_tokens": 3, "n": 2, "logprobs": true, "top_logprobs": 2});
    let short = server.client.chat().create(server.chat(over)).await.map_err(text)?;
    equal(short.choices.len(), 2)?;
    for choice in short.choices {
        equal(choice.finish_reason, Some(FinishReason::Length))?;
        let content = choice.logprobs.and_then(|logprobs| logprobs.content).ok_or("no logprobs")?;
        equal(content.len(), 3)?;
        equal(content.iter().all(|token| token.top_logprobs.len() == 2 && token.logprob <= 0.0), true)?;
    }
    let seeded = json!({"temperature": 2.0, "seed": 5, "max_completion_tokens": 12});
    equal(server.say(seeded.clone()).await?, server.say(seeded).await?)
}

async fn bad_requests_are_refused(server: &Server) -> Outcome {
    let (chat, completions) = (server.client.chat(), server.client.completions());
    refused(chat.create(server.chat(json!({"model": "nope"}))).await, 404, Some("model_not_found"), "model")?;
    refused(chat.create(server.chat(json!({"temperature": 2.5}))).await, 400, None, "temperature")?;
    refused(chat.create(server.chat(json!({"messages": []}))).await, 400, None, "messages")?;
    let long = server.completion(json!({"prompt": vec![45; 100_000]}));
    refused(completions.create(long).await, 400, Some("context_length_exceeded"), "prompt")?;
    let hot = json!({"model": server.model, "messages": [{"role": "user", "content": "Hello"}], "temperature": "hot"});
    refused(chat.create_byot::<Value, Value>(hot).await, 400, None, "temperature")
}

async fn many_at_once(server: &Server) -> Outcome {
    for said in join_all((0..16).map(|_| server.say(json!({})))).await {
        equal(said?.as_str(), ANSWER)?;
    }
    Ok(())
}

async fn dropping_the_stream_cancels(server: &Server) -> Outcome {
    server.settles(0.0, Duration::from_secs(5)).await?;
    // `ignore_eos` is no OpenAI field: the untyped call carries it.
    let request = json!({"model": server.model, "prompt": HELLO_IDS, "temperature": 0.0, "stream": true,
                         "max_tokens": 4000, "ignore_eos": true});
    let completions = server.client.completions();
    let mut stream = completions.create_stream_byot::<Value, Value>(request).await.map_err(text)?;
    for _ in 0..3 {
        stream.next().await.ok_or("the stream ended early")?.map_err(text)?;
    }
    equal(server.running().await?, 1.0)?;
    drop(stream);
    server.settles(0.0, Duration::from_secs(5)).await?;
    equal(server.say(json!({})).await?.as_str(), ANSWER)
}

macro_rules! tests {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), (|server| $name(server).boxed_local()) as Test)),*] };
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    let base = std::env::var("OPENAI_BASE_URL").expect("OPENAI_BASE_URL says where the endpoint is");
    let base = base.trim_end_matches('/').to_owned();
    let client = Client::with_config(OpenAIConfig::new().with_api_base(&base).with_api_key("none"));
    let model = client.models().list().await.expect("a list of models").data.remove(0).id;
    let server = Server { client, base, model };
    let tests = tests![
        models_are_listed_and_retrieved,
        chat_answers_and_counts,
        chat_streams_with_usage,
        completions_of_text_texts_ids_and_lists,
        completion_streams,
        stop_length_n_seed_and_logprobs,
        bad_requests_are_refused,
        many_at_once,
        dropping_the_stream_cancels,
    ];
    let mut failed = 0;
    for (name, test) in tests {
        let began = Instant::now();
        let verdict = match test(&server).await {
            Ok(()) => "ok",
            Err(reason) => {
                eprintln!("{name}: {reason}");
                failed += 1;
                "FAILED"
            }
        };
        println!("{verdict:6} {:6.2}s {name}", began.elapsed().as_secs_f64());
    }
    println!("{CLIENT}: {} passed, {failed} failed", tests.len() - failed);
    if failed == 0 { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}
