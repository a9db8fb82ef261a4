//! The bench of the transport, as its users run it, for moments.

use serde_json::Value;
use std::process::Command;

/// Runs it; returns how it ended, what it said, the figures and the picture.
fn run(name: &str, args: &str, hosts: &[String]) -> (bool, String, Value, String) {
    let file = |end: &str| std::env::temp_dir().join(format!("tandem-{name}-{}.{end}", std::process::id()));
    let (json, svg) = (file("json"), file("svg"));
    let output = Command::new(env!("CARGO_BIN_EXE_transport"))
        .args(args.split_whitespace())
        .arg("--json")
        .arg(&json)
        .arg("--svg")
        .arg(&svg)
        .args(hosts)
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
    check_on(&[], name, args, ways, points)
}

fn check_on(hosts: &[String], name: &str, args: &str, ways: &[&str], points: usize) -> Vec<Value> {
    let (well, said, found, svg) = run(name, &format!("{QUICK} --ways {} {args}", ways.join(",")), hosts);
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

/// The command may be any that starts the program in a folder, and the identity lies in that.
#[test]
fn ends_are_started_by_any_command() {
    let dir = std::env::temp_dir().join(format!("tandem-places-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let place = format!("127.0.0.1 env -C {} {}", dir.display(), env!("CARGO_BIN_EXE_transport"));
    let figures =
        check_on(&["--hosts".into(), place.clone(), place], "places", "--peers 1,2", &WAYS[2..7], 4);
    assert!(dir.join("tls/ca.pem").exists());
    std::fs::remove_dir_all(dir).unwrap();
    for figure in figures {
        assert_eq!(figure["landed"].is_null(), figure["peers"] == 2, "one clock: {figure}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let check = |args: &str, reason: &str| {
        let (well, said, ..) = run("refused", args, &[]);
        assert!(!well && said.contains(reason), "{args}: {said}");
    };
    check("--both-ways --peers 2", "--both-ways is between two processes");
    check("--both-ways --ways aes-128-gcm", "it has no direction");
    check("--ways shm:2", "others have one");
    check("--ways shm,shm", "is there twice");
    check("--ways nixl", "--peer PYTHON");
    check("--sizes 4KiB --extents 4096", "nothing is left to measure");
    check("--sizes 2GiB", "64 B to 1 GiB");
    check("--hosts 10.0.0.1 10.0.0.2", "a command that starts this program");
}
