//! The bench of the transport, as its users run it, for moments.

use serde_json::Value;
use std::process::Command;

/// Runs it; returns how it ended, what it said, and the figures.
fn run(name: &str, args: &str) -> (bool, String, Value, String) {
    let file = |end: &str| std::env::temp_dir().join(format!("tandem-{name}-{}.{end}", std::process::id()));
    let (json, svg) = (file("json"), file("svg"));
    let output = Command::new(env!("CARGO_BIN_EXE_transport"))
        .args(args.split_whitespace())
        .arg("--json")
        .arg(&json)
        .arg("--svg")
        .arg(&svg)
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let read = |file: std::path::PathBuf| {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let _ = std::fs::remove_file(file);
        text
    };
    (output.status.success(), said, serde_json::from_str(&read(json)).unwrap_or_default(), read(svg))
}

const QUICK: &str = "--rounds 1 --seconds 0.02 --pings 5 --sizes 4KiB,64KiB --under-way 256KiB";

/// Each way at each point, all bytes checked by the bench itself.
fn check(name: &str, args: &str, ways: &[&str], points: usize) -> Vec<Value> {
    let (well, said, found, svg) = run(name, &format!("{QUICK} --ways {} {args}", ways.join(",")));
    assert!(well, "{said}");
    let figures = found["figures"].as_array().unwrap();
    assert_eq!(figures.len(), ways.len() * points, "{said}");
    for figure in figures {
        assert!(figure["gb_per_s"].as_f64().unwrap() > 0.0, "{figure}");
    }
    assert_eq!(svg.matches("<circle").count(), figures.len());
    figures.clone()
}

const WAYS: [&str; 8] = ["memcpy", "cma", "shm", "tcp:2", "tls", "quic-8952", "quinn-8952", "aes-128-gcm"];

#[test]
fn extents() {
    for figure in check("extents", "--extents 1,64", &WAYS, 4) {
        let way = figure["way"].as_str().unwrap();
        assert!(figure["reported"]["p99_us"].as_f64().unwrap() > 0.0, "{figure}");
        let tells = !["memcpy", "cma", "aes-128-gcm"].contains(&way);
        assert_eq!(figure["landed"]["p50_us"].as_f64().is_some_and(|us| us > 0.0), tells, "{figure}");
    }
}

#[test]
fn several_peers() {
    for figure in check("peers", "--peers 1,3", &WAYS[1..7], 4) {
        assert_eq!(figure["reported"].is_null(), figure["peers"] == 3, "{figure}");
    }
}

#[test]
fn both_ways() {
    check("both", "--both-ways", &WAYS[..7], 2);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let check = |args: &str, reason: &str| {
        let (well, said, ..) = run("refused", args);
        assert!(!well && said.contains(reason), "{args}: {said}");
    };
    check("--both-ways --peers 2", "--both-ways is between two processes");
    check("--both-ways --ways aes-128-gcm", "it has no direction");
    check("--ways shm:2", "others have one");
    check("--ways shm,shm", "is there twice");
    check("--ways nixl", "--peer PYTHON");
    check("--sizes 4KiB --extents 4096", "nothing is left to measure");
    check("--sizes 2GiB", "64 B to 1 GiB");
}
