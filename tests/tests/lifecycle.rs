//! Processes that die, drain, or cannot start: what a client sees, and that nothing is held afterwards.

use serde_json::{Value, json};
use std::io::BufRead;
use std::process::Command;
use std::time::{Duration, Instant};
use tandem_tests::processes::{Cluster, ClusterOptions, binary, model};

fn tiny() -> ClusterOptions {
    let mut options = ClusterOptions::new(&model("tiny").expect("the project's own model"));
    options.router_flags = vec!["--served-model-name".into(), "tiny".into()];
    options
}

fn long_stream() -> String {
    json!({"model": "tiny", "prompt": "Once", "max_tokens": 8000, "ignore_eos": true, "stream": true})
        .to_string()
}

fn wait_until_idle(cluster: &mut Cluster) {
    cluster.wait("a request is held", |cluster| {
        (cluster.metric("tandem_router_requests_running")? == 0.0).then_some(())
    });
}

#[test]
fn a_killed_decode_node_ends_its_streams_with_an_error() {
    let mut cluster = Cluster::start(&tiny());
    let (status, mut stream) = cluster.post_stream("/v1/completions", &long_stream());
    assert_eq!(status, 200);
    let mut line = String::new();
    for _ in 0..20 {
        line.clear();
        stream.read_line(&mut line).expect("the stream goes on");
    }
    cluster.process("decode-0").kill();
    let killed = Instant::now();
    let rest: Vec<String> = stream.lines().map_while(Result::ok).collect();
    assert!(killed.elapsed() < Duration::from_secs(10), "noticed after {:?}", killed.elapsed());
    assert!(
        rest.iter().any(|line| line.starts_with("data: {\"error\"")),
        "no error frame: {:?}",
        rest.last()
    );
    let until = Instant::now() + Duration::from_secs(10);
    while cluster.metric("tandem_router_requests_running") != Some(0.0) {
        assert!(Instant::now() < until, "the request is held");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (status, _) = cluster.get("/ready").expect("the router answers");
    assert_eq!(status, 503, "no decode node is left");
}

#[test]
fn a_client_that_goes_away_frees_everything() {
    let mut cluster = Cluster::start(&tiny());
    let answered = cluster.post("/v1/completions", &json!({"model": "tiny", "prompt": "Once"}).to_string());
    assert_eq!(answered.0, 200);
    let (status, mut stream) = cluster.post_stream("/v1/completions", &long_stream());
    assert_eq!(status, 200);
    let mut line = String::new();
    stream.read_line(&mut line).expect("a first line");
    drop(stream);
    wait_until_idle(&mut cluster);
    let (_, status) = cluster.node_page("decode-0", "/status");
    let status: Value = serde_json::from_str(&status).expect("it is JSON");
    let pages = status["kv_pages"]["all"].as_f64().expect("a number of pages");
    cluster.wait("the decode node holds pages", |cluster| {
        (cluster.node_metric("tandem_router_node_free_pages", "decode-0")? == pages).then_some(())
    });
}

#[test]
fn asked_to_finish_a_node_finishes_what_it_has() {
    let mut cluster = Cluster::start(&tiny());
    let body = json!({"model": "tiny", "prompt": "Once", "max_tokens": 64, "ignore_eos": true}).to_string();
    assert_eq!(cluster.post("/v1/completions", &body).0, 200);
    for name in ["prefill-0", "decode-0", "router"] {
        assert!(cluster.process(name).terminate(Duration::from_secs(15)), "{name} did not end well");
    }
}

#[test]
fn a_model_that_cannot_run_is_refused_with_the_reason() {
    let dir = std::env::temp_dir().join(format!("tandem-refused-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    std::fs::write(
        dir.join("config.json"),
        r#"{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}"#,
    )
    .expect("a file");
    let output =
        Command::new(binary("prefill-node")).arg("--model").arg(&dir).arg("--tls-dir").arg(&dir).output();
    let output = output.expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    std::fs::remove_dir_all(&dir).expect("its own folder");
    assert!(!output.status.success());
    assert!(said.contains("MambaForCausalLM"), "{said}");
}
