//! What does disaggregation add to the time of a prompt's first tokens? In turns, so that a noisy machine disturbs both
//! alike: one process computes a prompt that nobody has seen, then router, prefill node and decode node do, with the same
//! engine on the same device. The first token comes from the prefill node, the second from the decode node, when it has
//! all of the KV.

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tandem_benches::one_process::{Load, OneProcess, made_up_model};
use tandem_benches::plot::{self, Line, Picture};
use tandem_benches::{ask, cpu_model, median, running_cluster};
use tandem_engine::LoadFormat;
use tandem_node::Device;
use tandem_tests::processes::{Cluster, ClusterOptions};

/// Measures what disaggregation adds to the first and the second token. Build the nodes first:
/// cargo build --release -p router -p prefill-node -p decode-node
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Where the one process and the prefill node compute: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Where the decode node computes. The same by default.
    #[arg(long)]
    decode_device: Option<Device>,
    /// Model folder. Without it, a model of 8 billion made-up numbers (Llama 3's shape), in bf16.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Make the model's weights up, from its config.json alone.
    #[arg(long, requires = "model")]
    dummy: bool,
    /// A running cluster to measure, by the URL of its router, instead of starting one: of the same model, called
    /// `bench`, with nodes that have the flags which are to be measured.
    #[arg(
        long,
        value_name = "URL",
        conflicts_with_all = ["decode_device", "transports", "prefill_flags", "decode_flags", "explain"]
    )]
    router: Option<String>,
    /// Whose tokenizer the made-up model has. It is given tokens, so any will do.
    #[arg(long, default_value = "models/tiny")]
    tokenizer: PathBuf,
    /// Lengths of prompts.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192,32768")]
    tokens: Vec<usize>,
    /// The ways that KV takes, as --transport of the nodes: each has a cluster of its own, one after the other.
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    transports: Vec<String>,
    /// How often everything is measured. Medians are reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Tokens of a step, of both.
    #[arg(long, default_value_t = 2048)]
    step_tokens: usize,
    /// Memory for KV of each process.
    #[arg(long, default_value = "6GiB", value_parser = tandem_process::units::bytes)]
    kv_memory: usize,
    /// More flags for the prefill node, as one word: --prefill-flags="--staging-memory 256MiB".
    #[arg(long, default_value = "")]
    prefill_flags: String,
    /// More flags for the decode node, as one word.
    #[arg(long, default_value = "")]
    decode_flags: String,
    /// Print what the nodes logged of the last prompt of each length.
    #[arg(long)]
    explain: bool,
    /// Where to write the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to draw the times, as SVG; of the last of --transports.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

const ANSWER_TOKENS: u32 = 4;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let made_up = options.model.is_none().then(|| made_up_model(&options.tokenizer)).transpose()?;
    let model = options.model.clone().or_else(|| made_up.clone()).context("one of both")?;
    let measured = measure(&model, &options);
    if let Some(made_up) = made_up {
        std::fs::remove_dir_all(made_up)?;
    }
    measured
}

impl Options {
    fn format(&self) -> LoadFormat {
        if self.dummy || self.model.is_none() { LoadFormat::Dummy } else { LoadFormat::Files }
    }
}

/// When the first two tokens came, in milliseconds.
type Times = [f64; 2];

fn measure(model: &Path, options: &Options) -> anyhow::Result<()> {
    let mut ours = OneProcess::load(&Load {
        model,
        format: options.format(),
        device: options.device,
        threads: 0,
        kv_memory: options.kv_memory,
        step_tokens: options.step_tokens,
    })?;
    let (mut all, mut medians) = (Vec::new(), Vec::new());
    // Of a running cluster nobody knows here what its nodes are held to.
    let transports: Vec<Option<&str>> = match options.router {
        Some(_) => vec![None],
        None => options.transports.iter().map(|transport| Some(transport.as_str())).collect(),
    };
    for transport in transports {
        let mut cluster = match (&options.router, transport) {
            (None, Some(transport)) => start_cluster(model, transport, options),
            (router, _) => running_cluster(router.as_deref().unwrap_or_default())?,
        };
        let what =
            transport.map_or("the running cluster".into(), |transport| format!("transport {transport}"));
        println!("\n{what}, steps of {} tokens", options.step_tokens);
        let times = compare(&mut ours, &mut cluster, options)?;
        medians = times.iter().map(|(tokens, rounds)| (*tokens, middle(rounds))).collect();
        all.extend(times.into_iter().map(|(tokens, rounds)| {
            let rounds: Vec<Value> =
                rounds.iter().map(|[alone, split]| json!({"alone": alone, "split": split})).collect();
            json!({"transport": transport, "tokens": tokens, "milliseconds": rounds})
        }));
        if options.router.is_none() {
            for (name, value) in landed(&cluster) {
                println!("{name} {value}");
            }
        }
    }
    if let Some(file) = &options.json {
        let command: Vec<_> = std::env::args().collect();
        let all = json!({"cpu": cpu_model(), "command": command.join(" "), "measured": all});
        std::fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("{}", file.display()))?;
    }
    if let Some(file) = &options.svg {
        std::fs::write(file, draw(&medians, options)).with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

/// Times alone and split, of each round at each length.
type Rounds = Vec<[Times; 2]>;

fn compare(
    ours: &mut OneProcess,
    cluster: &mut Cluster,
    options: &Options,
) -> anyhow::Result<Vec<(usize, Rounds)>> {
    let kv = ours.info().kv;
    println!(
        "{:>7} {:>9} {:>11} {:>11} {:>9} {:>11} {:>11} {:>9}",
        "tokens", "KV, MiB", "1st alone", "1st split", "added", "2nd alone", "2nd split", "added"
    );
    let mut all = Vec::new();
    for &tokens in &options.tokens {
        let mut rounds = Rounds::new();
        for round in 0..=options.rounds {
            let alone = times_alone(ours, tokens)?;
            let (begun, came) = ask(cluster, &ours.prompt(tokens), ANSWER_TOKENS)?;
            // Whatever is set up when it is first used is set up now.
            if round > 0 {
                rounds.push([alone, first_two(begun, &came)?]);
            }
        }
        let [alone, split] = middle(&rounds);
        let added =
            |token: usize| median(rounds.iter().map(|[alone, split]| split[token] - alone[token]).collect());
        println!(
            "{tokens:>7} {:>9.1} {:>8.2} ms {:>8.2} ms {:>6.2} ms {:>8.2} ms {:>8.2} ms {:>6.2} ms",
            kv.packed_bytes(tokens as u32) as f64 / f64::from(1 << 20),
            alone[0],
            split[0],
            added(0),
            alone[1],
            split[1],
            added(1),
        );
        if options.explain {
            explain(cluster);
        }
        all.push((tokens, rounds));
    }
    Ok(all)
}

/// The medians.
fn middle(rounds: &Rounds) -> [Times; 2] {
    let of = |side: usize, token: usize| median(rounds.iter().map(|round| round[side][token]).collect());
    [0, 1].map(|side| [0, 1].map(|token| of(side, token)))
}

fn draw(medians: &[(usize, [Times; 2])], options: &Options) -> String {
    let of = |name: &str, side: usize, token: usize| Line {
        name: name.into(),
        dashed: if side == 0 { plot::DASHED } else { "" },
        points: medians.iter().map(|(tokens, times)| (*tokens, times[side][token])).collect(),
    };
    plot::svg(&Picture {
        title: "Milliseconds to a token".into(),
        under: format!("{}; {}, {} rounds", cpu_model(), options.device, options.rounds),
        across: "tokens of the prompt",
        label: &|tokens| tokens.to_string(),
        lines: vec![
            of("2nd, disaggregated", 1, 1),
            of("2nd, one process", 0, 1),
            of("1st, disaggregated", 1, 0),
            of("1st, one process", 0, 0),
        ],
    })
}

fn times_alone(ours: &mut OneProcess, tokens: usize) -> anyhow::Result<Times> {
    let request = ours.request(tokens, ANSWER_TOKENS);
    let begun = Instant::now();
    let mut came = Vec::new();
    ours.generate(&[request], &mut |_| came.push(Instant::now()))?;
    first_two(begun, &came)
}

fn first_two(begun: Instant, came: &[Instant]) -> anyhow::Result<Times> {
    ensure!(came.len() >= 2, "{} tokens came", came.len());
    Ok([came[0], came[1]].map(|at| (at - begun).as_secs_f64() * 1e3))
}

fn start_cluster(model: &Path, transport: &str, options: &Options) -> Cluster {
    let mut cluster = ClusterOptions::new(model);
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let format = if options.format() == LoadFormat::Dummy { "dummy" } else { "auto" };
    cluster.node_flags = words(&format!(
        "--kv-memory {} --load-format {format} --transport {transport} --peer-timeout 10s",
        options.kv_memory
    ));
    if options.explain {
        cluster.node_flags.extend(words("--log-level debug"));
    }
    let (prefill, decode) = (options.device, options.decode_device.unwrap_or(options.device));
    cluster.prefill_on.node_flags =
        words(&format!("--device {prefill} --step-tokens {} {}", options.step_tokens, options.prefill_flags));
    cluster.decode_on.node_flags = words(&format!("--device {decode} {}", options.decode_flags));
    cluster.router_flags = words("--served-model-name bench --peer-timeout 10s");
    Cluster::start(&cluster)
}

/// What both nodes logged of the last prompt, in microseconds since it was begun there.
fn explain(cluster: &mut Cluster) {
    for node in ["prefill-0", "decode-0"] {
        let lines = cluster.process(node).log_lines();
        for line in lines.iter().filter(|line| !line["path"].is_null()) {
            println!("  {node}: {} {} {}", line["message"], line["path"], line["why_not"]);
        }
        let last = lines.iter().rev().find_map(|line| line["request"].as_str().map(str::to_owned));
        let Some(last) = last else { continue };
        let mut said = Vec::new();
        for line in lines.iter().filter(|line| line["request"] == last.as_str()) {
            let text = |name: &str| line[name].as_str().unwrap_or("?").to_owned();
            let us = line["us"].as_u64().map(|us| format!(" +{us} us")).unwrap_or_default();
            said.push(format!("{} {}{us}", text("timestamp"), text("message")));
        }
        said.truncate(40);
        println!("  {node}: {}", said.join("\n    "));
    }
}

fn landed(cluster: &Cluster) -> Vec<(String, String)> {
    let (_, metrics) = cluster.node_page("decode-0", "/metrics");
    let lines = metrics.lines().filter(|line| line.starts_with("tandem_transport_bytes_landed_total{"));
    lines.filter_map(|line| line.rsplit_once(' ')).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
}
