//! What a cluster tells those who watch it: metrics and status of each process, and one request in the logs of all.

use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tandem_tests::processes::{Cluster, ClusterOptions, metric, model};

fn logged(transport: &str) -> ClusterOptions {
    let mut options = ClusterOptions::new(&model("tiny").expect("the project's own model"));
    let debug = ["--log-level", "debug"].map(String::from);
    options.router_flags = [&debug[..], &["--served-model-name".into(), "tiny".into()]].concat();
    options.node_flags = debug.into();
    options.node_flags.extend(["--transport", transport].map(String::from));
    options
}

/// A prompt of more than a chunk.
fn prompt() -> String {
    "Once upon a time there was a lamp. ".repeat(60)
}

/// What a process logged of something, once it has logged `last` of it.
fn logged_until(cluster: &mut Cluster, process: &str, last: &str, of: impl Fn(&Value) -> bool) -> Vec<Value> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let lines: Vec<Value> = cluster.process(process).log_lines().into_iter().filter(&of).collect();
        if lines.iter().any(|line| line["message"] == last) {
            return lines;
        }
        assert!(Instant::now() < until, "{process} does not say {last:?}: {lines:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn every_node_tells_what_moved_and_how() {
    for (transport, path) in [("auto", "shm"), ("quic", "quic")] {
        let mut cluster = Cluster::start(&logged(transport));
        let body = json!({"model": "tiny", "prompt": prompt(), "max_tokens": 8, "ignore_eos": true});
        assert_eq!(cluster.post("/v1/completions", &body.to_string()).0, 200);
        let nodes = ["prefill-0", "decode-0"];
        let [prefill, decode] = nodes.map(|node| cluster.node_page(node, "/metrics").1);

        let by_path = format!("path=\"{path}\"");
        let sent = metric(&prefill, "tandem_transport_bytes_sent_total", &by_path);
        assert!(sent.is_some_and(|bytes| bytes > 100_000.0), "{prefill}");
        assert_eq!(metric(&decode, "tandem_transport_bytes_landed_total", &by_path), sent);
        let writes = metric(&prefill, "tandem_transport_writes_sent_total", &by_path);
        assert_eq!(metric(&decode, "tandem_transport_writes_landed_total", &by_path), writes);
        assert_eq!(metric(&prefill, "tandem_transport_write_seconds_count", &by_path), writes);
        assert_eq!(metric(&prefill, "tandem_transport_queued_writes", &by_path), Some(0.0));
        assert!(metric(&decode, "tandem_node_chunks_verified_total", "").is_some_and(|chunks| chunks >= 2.0));
        assert_eq!(metric(&decode, "tandem_node_checksum_mismatches_total", ""), Some(0.0));
        for metrics in [&prefill, &decode] {
            assert_eq!(metric(metrics, "tandem_transport_path_info", &by_path), Some(1.0), "{metrics}");
            assert_eq!(metric(metrics, "tandem_node_ready", ""), Some(1.0));
        }

        for (node, role) in nodes.into_iter().zip(["prefill", "decode"]) {
            assert_eq!(cluster.node_page(node, "/health").0, 200);
            assert_eq!(cluster.node_page(node, "/ready"), (200, r#"{"status":"ready"}"#.into()));
            assert_eq!(cluster.node_page(node, "/nothing").0, 404);
            let status: Value = serde_json::from_str(&cluster.node_page(node, "/status").1).expect("JSON");
            assert_eq!(status["role"], role);
            assert_eq!(status["cache"].is_object(), role == "prefill", "{status}");
            assert_eq!(status["model"]["name"], "tiny", "{status}");
            assert_eq!(status["peers"][0]["path"], path, "{status}");
            assert!(status["peers"][0]["paths"][path]["lanes_opened"].as_u64() > Some(0), "{status}");
        }
        cluster.process("router").kill();
        let until = Instant::now() + Duration::from_secs(10);
        while cluster.node_page(nodes[0], "/ready").0 != 503 {
            assert!(Instant::now() < until, "the node still counts on its router");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_request_is_followed_through_all_logs() {
    let mut cluster = Cluster::start(&logged("auto"));
    let body = json!({"model": "tiny", "prompt": prompt(), "max_tokens": 8, "ignore_eos": true}).to_string();
    let answer = ureq::post(format!("{}/v1/completions", cluster.url))
        .content_type("application/json")
        .header("x-request-id", "lamp-7")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .send(&body)
        .expect("it answers");
    assert_eq!(answer.headers()["x-request-id"], "lamp-7");

    let of_client =
        logged_until(&mut cluster, "router", "answered", |line| line["span"]["request_id"] == "lamp-7");
    let submitted = of_client.iter().find(|line| line["message"] == "submitted").expect("it was");
    assert_eq!(submitted["span"]["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    let request = submitted["request"].as_str().expect("its id").to_owned();

    let prefill = [
        "prompt submitted",
        "KV offered",
        "KV granted",
        "first layer written",
        "last layer written",
        "KV done",
    ];
    let decode = [
        "KV expected",
        "KV offered",
        "KV granted",
        "first layer landed",
        "KV verified",
        "first token decoded",
        "generated",
    ];
    for (node, expected) in [("prefill-0", &prefill[..]), ("decode-0", &decode[..])] {
        let last = expected[expected.len() - 1];
        let of_request: Vec<String> =
            logged_until(&mut cluster, node, last, |line| line["request"] == request.as_str())
                .iter()
                .map(|line| line["message"].as_str().unwrap_or_default().to_owned())
                .collect();
        let mut rest = of_request.iter();
        for message in expected {
            // What crosses on the way may come in either order.
            let crosses = *message == "KV offered" && node == "decode-0";
            let found =
                if crosses { of_request.iter().any(|m| m == message) } else { rest.any(|m| m == message) };
            assert!(found, "{node} does not say {message:?} in its turn: {of_request:?}");
        }
    }
}
