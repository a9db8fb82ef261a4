//! A router in this process with nodes that do as a test says, over the real control channel, and a plain
//! HTTP client that sees every byte.

use router::dispatch::{self, Dispatcher};
use router::http::{App, ServeOptions, Settings, serve};
use router::metrics::Metrics;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tandem_process::Shutdown;
use tandem_proto::ids::{ChoiceIdx, NodeId, RequestId, TokenId};
use tandem_proto::keys::Fingerprint;
use tandem_proto::layout::{KvDtype, KvShape};
use tandem_proto::wire::{
    self, CachedTokens, Expect, Finish, FirstTokens, Hello, Logprobs, Message, Role, Sampled, Submit, Tokens,
};
use tandem_text::TextModel;
use tandem_transport::Identity;
use tandem_transport::control::{Control, ControlEvent, ControlEvents, Lane, Limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Beyond this, something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
pub(crate) const EOT: TokenId = TokenId(1);
/// What prefill nodes say that they had of a prompt.
const CACHED: CachedTokens = CachedTokens { pages: 1, host: 1, disk: 0, remote: 0 };

pub(crate) static MODEL: LazyLock<Arc<TextModel>> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
    Arc::new(TextModel::load(&dir).unwrap())
});

static IDENTITY: LazyLock<Identity> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("tandem-router-tests-{}", std::process::id()));
    let identity = Identity::load_or_create(&dir).unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    identity
});

fn bind() -> (Control, ControlEvents, NodeId) {
    let identity = IDENTITY.another().unwrap();
    let (control, events) =
        Control::bind("127.0.0.1:0".parse().unwrap(), &identity, Limits::default()).unwrap();
    (control, events, identity.node())
}

/// What differs between tests.
pub(crate) struct Options {
    pub(crate) generation_timeout: Duration,
    pub(crate) client_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) max_requests: usize,
    pub(crate) max_queue: usize,
    pub(crate) queue_timeout: Duration,
    pub(crate) max_body: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            generation_timeout: Duration::from_secs(20),
            client_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(5),
            max_requests: 8,
            max_queue: 4,
            queue_timeout: Duration::from_secs(5),
            max_body: 1 << 20,
        }
    }
}

pub(crate) struct Router {
    pub(crate) http: SocketAddr,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) shutdown: Shutdown,
    pub(crate) served: JoinHandle<()>,
    control: Control,
}

impl Router {
    pub(crate) async fn start(options: Options) -> Router {
        let (control, events, _) = bind();
        let metrics = Arc::new(Metrics::default());
        let limits = dispatch::Limits {
            handoff_timeout: Duration::from_secs(5),
            generation_timeout: options.generation_timeout,
            max_waiting: 8,
        };
        let dispatcher = Dispatcher::new(control.clone(), limits, metrics.clone());
        tokio::spawn(dispatcher.clone().listen(events));
        let settings = Settings {
            served: vec!["tiny".into(), "org/alias".into()],
            max_requests: options.max_requests,
            max_queue: options.max_queue,
            queue_timeout: options.queue_timeout,
            max_body_bytes: options.max_body,
            body_timeout: options.client_timeout,
            client_timeout: options.client_timeout,
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = listener.local_addr().unwrap();
        let app = App::new(MODEL.clone(), dispatcher.clone(), metrics, settings);
        let shutdown = Shutdown::manual();
        let options = ServeOptions { max_connections: 64, drain_timeout: options.drain_timeout };
        let served = tokio::spawn(serve(listener, app, options, shutdown.clone()));
        Router { http, dispatcher, shutdown, served, control }
    }

    /// A router with one prefill and one decode node.
    pub(crate) async fn with_pair(options: Options) -> (Router, Node, Node) {
        let router = Router::start(options).await;
        let prefill = router.join(Role::Prefill).await;
        let decode = router.join(Role::Decode).await;
        (router, prefill, decode)
    }

    /// A node that the router has taken in.
    pub(crate) async fn join(&self, role: Role) -> Node {
        let before = self.dispatcher.members().len();
        let node = self.introduce(role, |_| ()).await;
        self.until(|router| router.dispatcher.members().len() > before).await;
        node
    }

    /// A node that said hello, with whatever `change` makes of that.
    pub(crate) async fn introduce(&self, role: Role, change: impl FnOnce(&mut Hello)) -> Node {
        let (control, events, id) = bind();
        let mut hello = Hello {
            node: id,
            name: format!("{role}-{id}"),
            role,
            control: control.local_addr(),
            data: "127.0.0.1:9".parse().unwrap(),
            fingerprint: Fingerprint([7; 32]),
            kv: KvShape {
                layers: 6,
                kv_heads: 2,
                head_dim: 64,
                page_tokens: 16,
                chunk_tokens: 256,
                dtype: KvDtype::F32,
            },
            max_sequence_tokens: 8192,
        };
        change(&mut hello);
        let router = timeout(PATIENCE, control.connect(self.control.local_addr())).await.unwrap().unwrap();
        let node = Node { control, events, router, id };
        node.send(Message::Hello(hello));
        node
    }

    /// Waits until `test` holds.
    pub(crate) async fn until(&self, test: impl Fn(&Router) -> bool) {
        let wait = async {
            while !test(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, wait).await.expect("it did not come true in time");
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.exchange("GET", path, &[], b"").await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.exchange("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
            .await
    }

    pub(crate) async fn exchange(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        Client::send(self.http, method, path, headers, body).await.answer().await
    }

    /// The value of an unlabelled metric.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").await.body;
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name} ")))
            .unwrap_or_else(|| panic!("{name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// A node that does what the test says.
pub(crate) struct Node {
    control: Control,
    events: ControlEvents,
    router: NodeId,
    pub(crate) id: NodeId,
}

impl Node {
    pub(crate) fn send(&self, message: Message) {
        self.control.send(self.router, Lane::Main, wire::encode(&message).unwrap()).unwrap();
    }

    async fn event(&mut self) -> ControlEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("nothing came from the router").unwrap()
    }

    pub(crate) async fn message(&mut self) -> (Lane, Message) {
        loop {
            match self.event().await {
                ControlEvent::Frame { lane, bytes, .. } => return (lane, wire::decode(&bytes).unwrap()),
                ControlEvent::Up { .. } => {}
                ControlEvent::Down { reason, .. } => panic!("the router closed: {reason}"),
            }
        }
    }

    pub(crate) async fn submit(&mut self) -> Submit {
        match self.message().await {
            (Lane::Main, Message::Submit(submit)) => submit,
            other => panic!("{other:?} is not Submit"),
        }
    }

    pub(crate) async fn expect(&mut self) -> Expect {
        match self.message().await {
            (Lane::Main, Message::Expect(expect)) => expect,
            other => panic!("{other:?} is not Expect"),
        }
    }

    /// Waits for the two cancels of `request`, one on each lane.
    pub(crate) async fn cancelled(&mut self, request: RequestId) {
        let mut lanes = Vec::new();
        while lanes.len() < 2 {
            match self.message().await {
                (lane, Message::Cancel { request: cancelled }) if cancelled == request => lanes.push(lane),
                other => panic!("{other:?} is not Cancel of {request}"),
            }
        }
        lanes.sort();
        assert_eq!(lanes, Lane::ALL);
    }

    /// Waits until the router hangs up.
    pub(crate) async fn closed(&mut self) {
        while !matches!(self.event().await, ControlEvent::Down { .. }) {}
    }

    /// Leaves as a crashed process does: without a word to requests.
    pub(crate) async fn crash(self) {
        self.control.close(self.router);
        self.control.shutdown().await;
    }

    pub(crate) fn first(&self, request: RequestId, tokens: &[TokenId]) {
        let tokens = sampled(tokens);
        self.send(Message::FirstTokens(FirstTokens { request, tokens, cached: CACHED }));
    }

    pub(crate) fn tokens(
        &self,
        request: RequestId,
        choice: u32,
        start: u32,
        tokens: &[TokenId],
        finish: Option<Finish>,
    ) {
        let choice = ChoiceIdx(choice);
        self.send(Message::Tokens(Tokens { request, choice, start, tokens: sampled(tokens), finish }));
    }
}

pub(crate) fn sampled(tokens: &[TokenId]) -> Vec<Sampled> {
    tokens.iter().map(|token| Sampled { token: *token, logprobs: None }).collect()
}

pub(crate) fn with_logprobs(tokens: &[TokenId], top: u32) -> Vec<Sampled> {
    let logprobs =
        Logprobs { chosen: -0.5, top: (0..top).map(|id| (TokenId(100 + id), -1.0 - id as f32)).collect() };
    tokens.iter().map(|token| Sampled { token: *token, logprobs: Some(logprobs.clone()) }).collect()
}

pub(crate) fn ids(text: &str) -> Vec<TokenId> {
    MODEL.tokenizer.encode(text, false).unwrap()
}

/// A pair that gives the same answer to every request, for as long as the returned tasks live.
pub(crate) fn answering(prefill: Node, decode: Node, text: &str) -> (JoinHandle<()>, JoinHandle<()>) {
    let answer = [ids(text), vec![EOT]].concat();
    let first = answer[0];
    let prefilling = tokio::spawn(async move {
        let mut prefill = prefill;
        loop {
            if let (_, Message::Submit(submit)) = prefill.idle_message().await {
                let choices = submit.generation.choices as usize;
                let logprobs = submit.generation.sampling.top_logprobs;
                let tokens = match logprobs {
                    Some(top) => with_logprobs(&vec![first; choices], top.into()),
                    None => sampled(&vec![first; choices]),
                };
                let request = submit.request;
                prefill.send(Message::FirstTokens(FirstTokens { request, tokens, cached: CACHED }));
            }
        }
    });
    let decoding = tokio::spawn(async move {
        let mut decode = decode;
        loop {
            if let (_, Message::Expect(expect)) = decode.idle_message().await {
                let max = expect.generation.max_tokens as usize;
                let count = answer.len().min(max);
                for choice in 0..expect.generation.choices {
                    for (index, token) in answer.iter().enumerate().take(count).skip(1) {
                        let last = index + 1 == count;
                        let stopped = if *token == EOT { Finish::Stop } else { Finish::Length };
                        let tokens = match expect.generation.sampling.top_logprobs {
                            Some(top) => with_logprobs(&[*token], top.into()),
                            None => sampled(&[*token]),
                        };
                        decode.send(Message::Tokens(Tokens {
                            request: expect.request,
                            choice: ChoiceIdx(choice),
                            start: index as u32,
                            tokens,
                            finish: last.then_some(stopped),
                        }));
                    }
                }
            }
        }
    });
    (prefilling, decoding)
}

impl Node {
    /// The next message, however long it takes.
    async fn idle_message(&mut self) -> (Lane, Message) {
        loop {
            match self.events.recv().await {
                Some(ControlEvent::Frame { lane, bytes, .. }) => {
                    return (lane, wire::decode(&bytes).unwrap());
                }
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    }
}

/// A connection with one request on it.
pub(crate) struct Client {
    stream: TcpStream,
    pub(crate) received: Vec<u8>,
}

/// A response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Client {
    pub(crate) async fn send(
        http: SocketAddr,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        // Small, so that a test need not send much until a client that does not read is felt.
        socket.set_recv_buffer_size(16 << 10).unwrap();
        let mut stream = socket.connect(http).await.unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !headers.iter().any(|(name, _)| *name == "content-length") {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).await.unwrap();
        // A server that refuses early may not take all of it.
        let _ = stream.write_all(body).await;
        Client { stream, received: Vec::new() }
    }

    pub(crate) async fn post(router: &Router, path: &str, body: Value) -> Client {
        let headers = [("content-type", "application/json")];
        Client::send(router.http, "POST", path, &headers, body.to_string().as_bytes()).await
    }

    /// Reads until what came holds `text`.
    pub(crate) async fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.received).contains(text) {
            let mut part = [0; 4096];
            let read =
                timeout(PATIENCE, self.stream.read(&mut part)).await.expect("nothing more came").unwrap();
            assert!(read > 0, "ended without {text:?}: {}", String::from_utf8_lossy(&self.received));
            self.received.extend_from_slice(&part[..read]);
        }
    }

    pub(crate) async fn answer(mut self) -> Answer {
        timeout(PATIENCE, self.stream.read_to_end(&mut self.received)).await.expect("no end came").unwrap();
        let end = self.received.windows(4).position(|w| w == b"\r\n\r\n").expect("no head came");
        let head = String::from_utf8(self.received[..end].to_vec()).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_lowercase(), value.trim().to_owned())
        };
        let headers: Vec<_> = lines.map(header).collect();
        let mut rest = &self.received[end + 4..];
        let body = if headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked") {
            let mut body = Vec::new();
            loop {
                let at = rest.windows(2).position(|w| w == b"\r\n").expect("no chunk");
                let len = usize::from_str_radix(std::str::from_utf8(&rest[..at]).unwrap(), 16).unwrap();
                if len == 0 {
                    break body;
                }
                body.extend_from_slice(&rest[at + 2..at + 2 + len]);
                rest = &rest[at + 4 + len..];
            }
        } else {
            rest.to_vec()
        };
        Answer { status, headers, body: String::from_utf8(body).unwrap() }
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    /// The events of a stream; the last one is `[DONE]` or an error.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let events = self.body.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
        events
            .map(|data| if data == "[DONE]" { json!("[DONE]") } else { serde_json::from_str(data).unwrap() })
            .collect()
    }
}
