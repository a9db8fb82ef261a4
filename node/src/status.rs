//! What a node tells those who watch it, over HTTP: `/health`, `/ready`, `/metrics`, `/status`.

use crate::{Board, cache, device};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tandem_process::exposition;
use tandem_process::http::Connections;
use tandem_proto::wire::{Hello, Load, Role};
use tandem_transport::{NetObserver, Path, PathMetrics, PeerStatus, WRITE_TIME_BOUNDS_US};
use tokio::net::TcpListener;

/// Connections at once: a scraper or two, and people.
const MAX_CONNECTIONS: u32 = 32;

/// Where status is served, if it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusAddr(pub Option<SocketAddr>);

impl FromStr for StatusAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<StatusAddr, String> {
        match text {
            "off" => Ok(StatusAddr(None)),
            addr => addr.parse().map(|addr| StatusAddr(Some(addr))).map_err(|e| format!("{e}; or off")),
        }
    }
}

/// A node as it is seen from outside.
pub(crate) struct Status {
    role: Role,
    pub(crate) board: Arc<Board>,
    started: Instant,
    started_unix_s: u64,
    running: OnceLock<Running>,
}

/// What is known once the model is loaded.
pub(crate) struct Running {
    pub(crate) hello: Hello,
    pub(crate) model: String,
    pub(crate) device: device::Shown,
    pub(crate) paths: Vec<Path>,
    pub(crate) transport: NetObserver,
}

impl Status {
    pub(crate) fn new(role: Role) -> Arc<Status> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Arc::new(Status {
            role,
            board: Arc::default(),
            started: Instant::now(),
            started_unix_s: since.map_or(0, |since| since.as_secs()),
            running: OnceLock::new(),
        })
    }

    pub(crate) fn is_running(&self, running: Running) {
        // Started once.
        let _ = self.running.set(running);
    }

    /// Serves until the runtime ends.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let routes = Router::new()
            .route("/health", get(health))
            .route("/ready", get(ready))
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .with_state(self);
        Connections::new(MAX_CONNECTIONS).accept(&listener, &routes).await;
    }

    /// Why it takes no requests, if it takes none.
    fn not_ready(&self) -> Option<&'static str> {
        let shown = self.board.read();
        match (self.running.get(), shown.draining, shown.router) {
            (None, ..) => Some("the model is being loaded"),
            (_, true, _) => Some("this node is shutting down"),
            (_, _, None) => Some("the router is not reached"),
            _ => None,
        }
    }

    fn json(&self) -> Value {
        let shown = self.board.read();
        let Load { running, waiting, pages, free_pages, slots, free_slots } = shown.load;
        let state = self.not_ready().unwrap_or("ready");
        let mut status = json!({
            "role": self.role.to_string(),
            "version": env!("CARGO_PKG_VERSION"),
            "state": state,
            "up_seconds": self.started.elapsed().as_secs(),
            "router": shown.router.map(|router| router.to_string()),
            "requests": {"running": running, "waiting": waiting},
            "kv_pages": {"all": pages, "free": free_pages},
            "landing_slots": {"all": slots, "free": free_slots},
            "handoffs": shown.handoffs,
            "chunks_verified": shown.chunks_verified,
            "checksum_mismatches": shown.checksum_mismatches,
            "stale_writes": shown.stale_writes,
        });
        if self.role == Role::Prefill {
            status["cache"] = cache::json(&shown);
        }
        if let Some(Running { hello, model, device, paths, transport }) = self.running.get() {
            status["device"] = json!({"name": device.device.to_string(), "model": device.model});
            if let Some((free, all)) = (device.memory)() {
                status["device"]["memory_bytes"] = json!({"all": all, "free": free});
            }
            status["node"] = hello.node.to_string().into();
            status["name"] = hello.name.as_str().into();
            status["model"] = json!({
                "name": model,
                "fingerprint": hello.fingerprint.to_string(),
                "max_sequence_tokens": hello.max_sequence_tokens,
            });
            status["control"] = hello.control.to_string().into();
            status["data"] = hello.data.to_string().into();
            status["paths"] = paths.iter().map(|path| path.name()).collect();
            if let Some(memory) = transport.metrics().and_then(|metrics| metrics.rdma_memory) {
                status["rdma_memory_bytes"] = json!({
                    "host": memory.host, "dma_buf": memory.dma_buf, "peermem": memory.peermem,
                });
            }
            status["peers"] = transport.peers().iter().map(peer_json).collect();
        }
        status
    }

    fn exposition(&self) -> String {
        let shown = self.board.read();
        let mut out = String::new();
        let gauge =
            |out: &mut String, name: &str, help: &str, value: u64| single(out, name, "gauge", help, value);
        if let Some(running) = self.running.get() {
            let (node, role) = (running.hello.node.to_string(), self.role.to_string());
            let device = running.device.device.to_string();
            let labels = [
                ("node", node.as_str()),
                ("name", &running.hello.name),
                ("role", &role),
                ("model", &running.model),
                ("device", &device),
                ("version", env!("CARGO_PKG_VERSION")),
            ];
            exposition::head(&mut out, "tandem_node_info", "gauge", "Who this is.");
            exposition::sample(&mut out, "tandem_node_info", &labels, 1);
        }
        if let Some((free, all)) = self.running.get().and_then(|running| (running.device.memory)()) {
            gauge(&mut out, "tandem_node_gpu_memory_bytes", "Memory of the GPU.", all as u64);
            gauge(
                &mut out,
                "tandem_node_gpu_memory_free_bytes",
                "Memory of the GPU that nobody has.",
                free as u64,
            );
        }
        let is_ready = u64::from(self.not_ready().is_none());
        gauge(
            &mut out,
            "process_start_time_seconds",
            "Start of the process, in Unix time.",
            self.started_unix_s,
        );
        gauge(&mut out, "tandem_node_ready", "Whether it takes requests.", is_ready);
        gauge(&mut out, "tandem_node_draining", "Whether it finishes.", shown.draining.into());
        let Load { running, waiting, pages, free_pages, slots, free_slots } = shown.load;
        for (name, help, value) in [
            ("requests_running", "Requests that it computes.", running),
            ("requests_waiting", "Requests that wait.", waiting),
            ("kv_pages", "Pages of the pool.", pages),
            ("kv_pages_free", "Free pages of the pool.", free_pages),
            ("landing_slots", "Landing slots.", slots),
            ("landing_slots_free", "Free landing slots.", free_slots),
        ] {
            gauge(&mut out, &format!("tandem_node_{name}"), help, value.into());
        }
        gauge(&mut out, "tandem_node_handoffs", "Handoffs that are not over.", shown.handoffs as u64);
        for (name, help, value) in [
            ("chunks_verified", "Chunks of KV that landed as they were sent.", shown.chunks_verified),
            ("checksum_mismatches", "Chunks of KV that landed otherwise.", shown.checksum_mismatches),
            ("stale_writes", "Writes ignored because their lease was over.", shown.stale_writes),
        ] {
            single(&mut out, &format!("tandem_node_{name}_total"), "counter", help, value);
        }
        if self.role == Role::Prefill {
            cache::exposition(&mut out, &shown);
        }
        if let Some(running) = self.running.get() {
            transport_exposition(&mut out, &running.transport);
        }
        out
    }
}

pub(crate) fn single(out: &mut String, name: &str, kind: &str, help: &str, value: u64) {
    exposition::head(out, name, kind, help);
    exposition::sample(out, name, &[], value);
}

/// Paths that were never opened have nothing to tell.
fn opened(peer: &PeerStatus) -> impl Iterator<Item = &PathMetrics> {
    peer.paths.iter().filter(|metrics| metrics.opened > 0)
}

fn peer_json(peer: &PeerStatus) -> Value {
    let path = |m: &PathMetrics| {
        let counted = json!({
            "writes_sent": m.writes_sent, "bytes_sent": m.bytes_sent,
            "writes_landed": m.writes_landed, "bytes_landed": m.bytes_landed,
            "writes_refused": m.writes_refused, "writes_severed": m.writes_severed,
            "writes_repeated": m.writes_repeated, "landings_refused": m.landings_refused,
            "queued_writes": m.queued_writes, "queued_bytes": m.queued_bytes,
            "lanes_opened": m.opened, "lanes_failed": m.failed,
        });
        (m.path.name().to_owned(), counted)
    };
    json!({
        "node": peer.peer.to_string(),
        "state": if peer.path.is_some() { "connected" } else { "gone" },
        "path": peer.path.map(Path::name),
        "why": peer.why,
        "since_seconds": peer.since.as_secs(),
        "dialled_here": peer.dialled_here,
        "packets_sent": peer.packets_sent,
        "packets_lost": peer.packets_lost,
        "paths": opened(peer).map(path).collect::<serde_json::Map<_, _>>(),
    })
}

/// By path and peer. A peer that is gone is left out some minutes later, so the number of series stays bounded.
fn transport_exposition(out: &mut String, transport: &NetObserver) {
    let Some(metrics) = transport.metrics() else { return };
    let peers: Vec<(String, PeerStatus)> =
        transport.peers().into_iter().map(|peer| (peer.peer.to_string(), peer)).collect();
    let name = |what: &str| format!("tandem_transport_{what}");

    exposition::head(out, &name("path_info"), "gauge", "The path to a peer, and why not a better one.");
    for (id, peer) in &peers {
        if let Some(path) = peer.path {
            let labels = [("peer", id.as_str()), ("path", path.name()), ("why_not_better", &peer.why)];
            exposition::sample(out, &name("path_info"), &labels, 1);
        }
    }
    type Read = fn(&PathMetrics) -> u64;
    let by_path: [(&str, &str, &str, Read); 11] = [
        ("writes_sent_total", "counter", "Writes that landed at the peer.", |m| m.writes_sent),
        ("bytes_sent_total", "counter", "Bytes that landed at the peer.", |m| m.bytes_sent),
        ("writes_landed_total", "counter", "Writes of the peer that landed here.", |m| m.writes_landed),
        ("bytes_landed_total", "counter", "Bytes of the peer that landed here.", |m| m.bytes_landed),
        ("writes_repeated_total", "counter", "Writes sent again because the path failed.", |m| {
            m.writes_repeated
        }),
        ("landings_refused_total", "counter", "Writes of the peer refused here.", |m| m.landings_refused),
        ("lanes_opened_total", "counter", "Lanes that were opened.", |m| m.opened),
        ("lanes_failed_total", "counter", "Lanes that failed while their session went on.", |m| m.failed),
        ("queued_writes", "gauge", "Writes submitted and not reported.", |m| m.queued_writes),
        ("queued_bytes", "gauge", "Bytes submitted and not reported.", |m| m.queued_bytes),
        ("writes_failed_total", "counter", "Writes given up, by reason.", |m| m.writes_refused),
    ];
    for (what, kind, help, read) in by_path {
        exposition::head(out, &name(what), kind, help);
        for (id, peer) in &peers {
            for m in opened(peer) {
                let labels = [("peer", id.as_str()), ("path", m.path.name())];
                if what == "writes_failed_total" {
                    for (reason, count) in [("refused", read(m)), ("severed", m.writes_severed)] {
                        exposition::sample(
                            out,
                            &name(what),
                            &[&labels[..], &[("reason", reason)]].concat(),
                            count,
                        );
                    }
                } else {
                    exposition::sample(out, &name(what), &labels, read(m));
                }
            }
        }
    }
    exposition::head(
        out,
        &name("write_seconds"),
        "histogram",
        "From submission of a write until it has landed.",
    );
    let bounds = WRITE_TIME_BOUNDS_US.map(|us| us as f64 / 1e6);
    for (id, peer) in &peers {
        for m in opened(peer).filter(|m| m.writes_sent > 0) {
            let labels = [("peer", id.as_str()), ("path", m.path.name())];
            let sum = m.times.sum_us as f64 / 1e6;
            exposition::histogram(out, &name("write_seconds"), &labels, &bounds, &m.times.counts, sum);
        }
    }
    type OfPeer = fn(&PeerStatus) -> u64;
    let packets: [(&str, &str, OfPeer); 2] = [
        ("packets_sent_total", "QUIC packets sent.", |peer| peer.packets_sent),
        ("packets_lost_total", "QUIC packets that had to be sent again.", |peer| peer.packets_lost),
    ];
    for (what, help, read) in packets {
        exposition::head(out, &name(what), "counter", help);
        for (id, peer) in &peers {
            exposition::sample(out, &name(what), &[("peer", id)], read(peer));
        }
    }
    if let Some(memory) = metrics.rdma_memory {
        let what = name("rdma_memory_bytes");
        exposition::head(out, &what, "gauge", "Memory registered for RDMA, by how devices come to it.");
        let ways = [("host", memory.host), ("dma_buf", memory.dma_buf), ("peermem", memory.peermem)];
        for (by, bytes) in ways {
            exposition::sample(out, &what, &[("by", by)], bytes);
        }
    }
    single(out, &name("sessions_total"), "counter", "Sessions with peers.", metrics.connected);
    let ended = name("sessions_ended_total");
    exposition::head(out, &ended, "counter", "Sessions that ended, and peers not reached, by reason.");
    for (reason, count) in [
        ("asked", metrics.severed_asked),
        ("lost", metrics.severed_lost),
        ("unreachable", metrics.unreachable),
    ] {
        exposition::sample(out, &ended, &[("reason", reason)], count);
    }
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn ready(State(status): State<Arc<Status>>) -> Response {
    match status.not_ready() {
        None => Json(json!({"status": "ready"})).into_response(),
        Some(reason) => {
            let body = json!({"status": "not_ready", "reason": reason});
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

async fn metrics(State(status): State<Arc<Status>>) -> Response {
    ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], status.exposition()).into_response()
}

async fn status(State(status): State<Arc<Status>>) -> Json<Value> {
    Json(status.json())
}
