//! Counters and histograms, in the text format that Prometheus reads.

use crate::membership::Member;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tandem_process::exposition::{head, histogram, sample};
use tandem_proto::wire::Role;

/// Seconds, from a token of a small model to a long answer.
const BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0,
];

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How long something took, in buckets.
#[derive(Debug, Default)]
pub struct Histogram {
    /// Observations of each bucket alone; the last is beyond all bounds.
    buckets: [AtomicU64; BUCKETS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Notes one observation.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(took.as_micros() as u64, Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let counts = self.buckets.each_ref().map(|bucket| bucket.load(Relaxed));
        histogram(out, name, &[], &BUCKETS, &counts, self.sum_us.load(Relaxed) as f64 / 1e6);
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// From the request's arrival to its first token.
    pub first_token: Histogram,
    /// Between tokens of one completion, as they arrive here.
    pub between_tokens: Histogram,
    /// From the request's arrival to its last token.
    pub whole: Histogram,
    /// Tokens of prompts.
    pub prompt_tokens: Counter,
    /// Tokens of completions.
    pub completion_tokens: Counter,
    /// Tokens of prompts that were not computed.
    pub cached_tokens: Counter,
    /// Attempts that were repeated on other nodes.
    pub retries: Counter,
    /// Attempts that the nodes were told to end.
    pub cancellations: Counter,
    /// Requests whose client went away.
    pub disconnects: Counter,
    /// Answers that failed after their status was sent.
    pub stream_failures: Counter,
    /// Nodes that were not taken in.
    pub refused_nodes: Counter,
}

/// What is true now, rather than counted.
#[derive(Clone, Copy, Debug)]
pub struct Gauges {
    /// Requests being answered.
    pub running: usize,
    /// Requests waiting for their turn.
    pub queued: usize,
}

impl Metrics {
    /// Counts a response of `endpoint`.
    pub fn count_response(&self, endpoint: &'static str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((endpoint, status)).or_default() += 1;
    }

    /// The exposition.
    #[must_use]
    pub fn render(&self, gauges: Gauges, members: &[Member]) -> String {
        let mut out = String::new();
        head(&mut out, "tandem_router_http_requests_total", "counter", "Responses by endpoint and status.");
        for ((endpoint, status), count) in self.requests.lock().unwrap_or_else(PoisonError::into_inner).iter()
        {
            let labels = [("endpoint", *endpoint), ("status", &status.to_string())];
            sample(&mut out, "tandem_router_http_requests_total", &labels, count);
        }
        for (name, kind, help, value) in [
            ("requests_running", "gauge", "Requests being answered.", gauges.running as u64),
            ("requests_queued", "gauge", "Requests waiting for their turn.", gauges.queued as u64),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens.get()),
            ("completion_tokens_total", "counter", "Tokens of completions.", self.completion_tokens.get()),
            (
                "cached_tokens_total",
                "counter",
                "Prompt tokens whose KV was reused.",
                self.cached_tokens.get(),
            ),
            ("retries_total", "counter", "Attempts repeated on other nodes.", self.retries.get()),
            ("cancellations_total", "counter", "Attempts nodes were told to end.", self.cancellations.get()),
            (
                "client_disconnects_total",
                "counter",
                "Requests whose client went away.",
                self.disconnects.get(),
            ),
            (
                "stream_failures_total",
                "counter",
                "Streams that ended in an error.",
                self.stream_failures.get(),
            ),
            ("refused_nodes_total", "counter", "Nodes that were not taken in.", self.refused_nodes.get()),
        ] {
            let name = format!("tandem_router_{name}");
            head(&mut out, &name, kind, help);
            sample(&mut out, &name, &[], value);
        }
        self.first_token.write(
            &mut out,
            "tandem_router_time_to_first_token_seconds",
            "Arrival to first token.",
        );
        self.between_tokens.write(
            &mut out,
            "tandem_router_inter_token_seconds",
            "Between tokens of a completion.",
        );
        self.whole.write(&mut out, "tandem_router_request_seconds", "Arrival to last token.");
        write_members(&mut out, members);
        out
    }
}

fn write_members(out: &mut String, members: &[Member]) {
    head(out, "tandem_router_nodes", "gauge", "Nodes that are up, by role and state.");
    for role in [Role::Prefill, Role::Decode] {
        for (state, draining) in [("available", false), ("draining", true)] {
            let is_counted = |member: &&Member| member.hello.role == role && member.draining == draining;
            let count = members.iter().filter(is_counted).count();
            let role = role.to_string();
            let labels = [("role", role.as_str()), ("state", state)];
            sample(out, "tandem_router_nodes", &labels, count);
        }
    }
    type Read = fn(&Member) -> u32;
    let loads: [(&str, &str, Read); 6] = [
        ("running", "Requests a node computes.", |member| member.load.running),
        ("waiting", "Requests waiting at a node.", |member| member.load.waiting),
        ("pages", "Pages of a node's pool.", |member| member.load.pages),
        ("free_pages", "Free pages of a node's pool.", |member| member.load.free_pages),
        ("slots", "Landing slots of a node.", |member| member.load.slots),
        ("free_slots", "Free landing slots of a node.", |member| member.load.free_slots),
    ];
    for (what, help, read) in loads {
        let name = format!("tandem_router_node_{what}");
        head(out, &name, "gauge", help);
        for member in members {
            let (node, role) = (member.hello.node.to_string(), member.hello.role.to_string());
            let labels = [("node", node.as_str()), ("name", &member.hello.name), ("role", &role)];
            sample(out, &name, &labels, read(member));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::tests::member;

    #[test]
    fn exposition() {
        let metrics = Metrics::default();
        metrics.count_response("/v1/models", 200);
        metrics.first_token.observe(Duration::from_millis(3));
        metrics.first_token.observe(Duration::from_secs(10_000));
        let mut node = member(1, Role::Decode);
        node.hello.name = "a\"b".into();
        let text = metrics.render(Gauges { running: 2, queued: 0 }, &[node]);
        for line in [
            "tandem_router_http_requests_total{endpoint=\"/v1/models\",status=\"200\"} 1",
            "tandem_router_requests_running 2",
            "tandem_router_time_to_first_token_seconds_bucket{le=\"0.0025\"} 0",
            "tandem_router_time_to_first_token_seconds_bucket{le=\"0.005\"} 1",
            "tandem_router_time_to_first_token_seconds_bucket{le=\"+Inf\"} 2",
            "tandem_router_time_to_first_token_seconds_count 2",
            "tandem_router_nodes{role=\"decode\",state=\"available\"} 1",
            "tandem_router_node_running{node=\"0000000000000001\",name=\"a\\\"b\",role=\"decode\"} 0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
    }
}
