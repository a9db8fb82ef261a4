//! The main job over RDMA: a prefill node and a decode node on the two devices of a virtual machine, each on a host of
//! its own there.
//!
//! Each test runs itself again inside the machine, and compares the answers that come out with what one process
//! computes outside, where that is fast. They take a minute each, or many where the machine is emulated slowly, and
//! nodes with feature `rdma`: `scripts/check rdma`
//! builds those and runs them. Where no such machine is to be had they say so and pass.

use serde_json::Value;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tandem_proto::ids::TokenId;
use tandem_tests::one_process::{ask, assert_computes_the_same, prompts};
use tandem_tests::processes::{Cluster, ClusterOptions, Host, metric, model};

/// The status of `scripts/rdma-vm` where it cannot make a machine.
const NO_MACHINE: i32 = 125;
/// Before the line that holds the answers.
const ANSWERS: &str = "answers: ";
/// Bytes of KV of a token of models/tiny: 6 layers, keys and values, 2 heads of 64 numbers of 4 bytes.
const TOKEN_BYTES: usize = 6 * 2 * 2 * 64 * 4;

/// A cluster on the two hosts, each with its own device.
fn two_hosts() -> ClusterOptions {
    let host = |n: usize| {
        let of_host = |what: &str| std::env::var(format!("RDMA_VM_{what}{n}")).expect("the machine says so");
        Host {
            ip: of_host("NETIP").parse().expect("an address"),
            enter: ["ip", "netns", "exec", &format!("host{n}")].map(String::from).into(),
            node_flags: vec!["--rdma-devices".into(), of_host("DEV")],
        }
    };
    let mut options = ClusterOptions::new(&model("tiny").expect("the project's own model"));
    (options.prefill_on, options.decode_on) = (host(0), host(1));
    options.node_flags = ["--kv-memory", "64MiB"].map(String::from).into();
    options.decode_on.node_flags.extend(["--landing-memory", "32MiB"].map(String::from));
    options.router_flags = ["--served-model-name", "tiny"].map(String::from).into();
    options
}

/// Has `inside` answer the prompts in a machine, on its first host, and compares what it says. `test` is the caller's
/// name.
fn in_a_machine(test: &str, prompts: &[Vec<TokenId>], inside: impl FnOnce(ClusterOptions) -> Vec<Value>) {
    if std::env::var_os("RDMA_VM").is_some() {
        let namespace = File::open("/run/netns/host0").expect("the first host is there");
        rustix::thread::move_into_link_name_space(namespace.as_fd(), None).expect("we are root there");
        println!("\n{ANSWERS}{}", Value::from(inside(two_hosts())));
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/rdma-vm");
    let output = Command::new(&script)
        .args(["--hosts", "2", "--timeout", "1800", "--"])
        .arg(std::env::current_exe().expect("a running program has a path"))
        .args(["--exact", test, "--ignored", "--nocapture"])
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(NO_MACHINE) {
        println!("skipped: {complained}");
        return;
    }
    assert!(output.status.success(), "in the machine: {said}{complained}");
    eprint!("{complained}");
    let answers = said.lines().find_map(|line| line.strip_prefix(ANSWERS)).expect("the answers are told");
    let answers: Vec<Value> = serde_json::from_str(answers).expect("the answers are JSON");
    assert_computes_the_same(&model("tiny").expect("the project's own model"), prompts, &answers);
}

fn kv_bytes(prompts: &[Vec<TokenId>]) -> u64 {
    prompts.iter().map(|prompt| (prompt.len() * TOKEN_BYTES) as u64).sum()
}

/// Bytes of KV that landed at the decode node by a path, which are those that the prefill node sent by it.
fn moved(cluster: &Cluster, path: &str) -> u64 {
    let by_path = format!("path=\"{path}\"");
    let count = |node: &str, name: &str| {
        metric(&cluster.node_page(node, "/metrics").1, name, &by_path).unwrap_or(0.0) as u64
    };
    let landed = count("decode-0", "tandem_transport_bytes_landed_total");
    assert_eq!(count("prefill-0", "tandem_transport_bytes_sent_total"), landed, "by {path}");
    landed
}

#[test]
#[ignore = "boots a virtual machine with RDMA devices, for a minute: scripts/check rdma"]
fn what_came_over_rdma_is_what_one_process_computes() {
    let prompts = prompts(10, 400);
    in_a_machine("what_came_over_rdma_is_what_one_process_computes", &prompts, |mut options| {
        options.node_flags.extend(["--transport", "rdma"].map(String::from));
        let cluster = Cluster::start(&options);
        let answers = ask(&cluster, &prompts, 3);
        assert_eq!(
            ["shm", "rdma", "tls", "quic"].map(|path| moved(&cluster, path)),
            [0, kv_bytes(&prompts), 0, 0]
        );
        answers
    });
}

/// Lets nothing pass between the devices, or everything again. Neighbours that did not answer meanwhile are asked anew.
fn link_between_the_devices(up: bool) {
    let change = if up {
        "for link in eth0 eth1; do tc qdisc del dev $link root; done; ip neighbour flush all; \
         ip neighbour replace 10.77.0.2 dev eth0 use; ip neighbour replace 10.77.0.1 dev eth1 use"
    } else {
        "for link in eth0 eth1; do tc qdisc add dev $link root netem loss 100%; done"
    };
    // The devices' wire belongs to neither host.
    let done = Command::new("nsenter").args(["--net=/proc/1/ns/net", "sh", "-c", change]).status();
    assert!(done.is_ok_and(|status| status.success()), "{change}");
}

#[test]
#[ignore = "boots a virtual machine with RDMA devices, for a minute: scripts/check rdma"]
fn what_began_over_rdma_and_went_on_without_is_the_same() {
    let prompts = prompts(3, 520);
    in_a_machine("what_began_over_rdma_and_went_on_without_is_the_same", &prompts, |options| {
        let mut cluster = Cluster::start(&options);
        // The longest one, from its second layer on.
        let (last, first) = prompts.split_last().expect("there are some");
        let mut answers = ask(&cluster, first, 3);
        let before = moved(&cluster, "rdma");
        assert_eq!(before, kv_bytes(first));
        let rest = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(&cluster, std::slice::from_ref(last), 1));
            let landed = || {
                let (_, metrics) = cluster.node_page("decode-0", "/metrics");
                metric(&metrics, "tandem_transport_bytes_landed_total", "path=\"rdma\"").unwrap_or(0.0)
            };
            while landed() as u64 == before && !asked.is_finished() {
                std::thread::sleep(Duration::from_millis(10));
            }
            link_between_the_devices(false);
            asked.join().expect("it is answered")
        });
        answers.extend(rest);
        let [rdma, tls, quic] = ["rdma", "tls", "quic"].map(|path| moved(&cluster, path));
        eprintln!("{rdma} bytes over RDMA, {tls} over TLS, {quic} over QUIC");
        assert!(rdma > before && tls + quic > 0, "the link was cut before or after the last prompt");
        assert_eq!(rdma + tls + quic, kv_bytes(&prompts));
        link_between_the_devices(true);
        cluster.wait("RDMA is not taken again", |cluster| {
            let (_, metrics) = cluster.node_page("prefill-0", "/metrics");
            metric(&metrics, "tandem_transport_path_info", "path=\"rdma\"")
        });
        assert_eq!(ask(&cluster, &prompts[1..2], 1)[0]["choices"], answers[1]["choices"]);
        assert_eq!(moved(&cluster, "rdma"), rdma + kv_bytes(&prompts[1..2]));
        answers
    });
}
