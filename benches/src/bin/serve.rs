//! How fast is serving, and what does disaggregation cost? One run measures, in turns so that a noisy machine
//! disturbs all alike:
//! - the engine in this process: prefill of 512 and 2,000 tokens, decode of one stream and of eight;
//! - the peer, Hugging Face transformers, with the same threads and arithmetic, if `--peer` says where;
//! - through router, prefill node and decode node, beside the same engine in this process: time to the first token of
//!   2,000-token prompts, and decode of as many streams.

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tandem_benches::one_process::{Load, OneProcess};
use tandem_benches::plot::{self, Line, Picture};
use tandem_benches::{ask, cpu_model, median, running_cluster};
use tandem_engine::LoadFormat;
use tandem_node::Device;
use tandem_tests::processes::{Cluster, ClusterOptions};

/// Measures serving on this machine, beside a peer. Build the nodes first:
/// cargo build --release -p router -p prefill-node -p decode-node
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Model folder.
    #[arg(long, default_value = "models/tiny")]
    model: PathBuf,
    /// Make the model's weights up, from its config.json alone.
    #[arg(long)]
    dummy: bool,
    /// Where each engine computes: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Threads of each engine on a CPU, and of the peer.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Memory for KV of each process.
    #[arg(long, default_value = "1GiB", value_parser = tandem_process::units::bytes)]
    kv_memory: usize,
    /// Tokens of a step, of all.
    #[arg(long, default_value_t = 512)]
    step_tokens: usize,
    /// Streams that are decoded at once.
    #[arg(long, value_delimiter = ',', default_value = "1,8", value_parser = clap::value_parser!(u16).range(1..=256))]
    streams: Vec<u16>,
    /// How often everything is measured. Medians are reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// A Python with torch and transformers (benches/peers/requirements.txt). Without it there is no peer.
    #[arg(long, value_name = "PYTHON")]
    peer: Option<PathBuf>,
    /// Leave the cluster out.
    #[arg(long)]
    no_cluster: bool,
    /// A running cluster to measure, by the URL of its router, instead of starting one: of the same model, called
    /// `bench`, with nodes that have the flags which are to be measured.
    #[arg(long, value_name = "URL", conflicts_with = "no_cluster")]
    router: Option<String>,
    /// Where to write the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to draw decoding by streams, as SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

const PREFILL: [usize; 2] = [512, 2000];
/// Two whole chunks and a token: a cluster that has seen them computes one token.
const DECODE_CONTEXT: usize = 513;
const DECODE_TOKENS: u32 = 96;
const TTFT_PROMPT: usize = 2000;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut ours = OneProcess::load(&Load {
        model: &options.model,
        format: if options.dummy { LoadFormat::Dummy } else { LoadFormat::Files },
        device: options.device,
        threads: options.threads,
        kv_memory: options.kv_memory,
        step_tokens: options.step_tokens,
    })?;
    let cluster = match &options.router {
        Some(router) => Some(running_cluster(router)?),
        None if options.no_cluster => None,
        None => Some(start_cluster(&options)?),
    };
    let mut figures = Figures::default();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for tokens in PREFILL {
            figures.add(format!("prefill {tokens}, tokens/s"), prefill(&mut ours, tokens)?);
        }
        for &streams in &options.streams {
            figures.add(decode_name(streams), decode(&mut ours, streams)?);
            if let Some(cluster) = &cluster {
                figures.add(cluster_decode_name(streams), cluster_decode(cluster, &mut ours, streams)?);
            }
        }
        if let Some(python) = &options.peer {
            measure_peer(python, &options, &mut figures)?;
        }
        if let Some(cluster) = &cluster {
            for _ in 0..3 {
                let alone = TTFT_PROMPT as f64 / prefill(&mut ours, TTFT_PROMPT)? * 1e3;
                figures.add("TTFT 2000, one process, ms".into(), alone);
                let (begun, came) = ask(cluster, &ours.prompt(TTFT_PROMPT), 4)?;
                let first = came.first().context("the stream has tokens")?;
                figures.add("TTFT 2000, disaggregated, ms".into(), (*first - begun).as_secs_f64() * 1e3);
            }
        }
    }
    report(&options, &figures)
}

fn decode_name(streams: u16) -> String {
    format!("decode, {streams} stream{}, tokens/s", if streams == 1 { "" } else { "s" })
}

fn cluster_decode_name(streams: u16) -> String {
    decode_name(streams).replace(", tokens/s", ", disaggregated, tokens/s")
}

fn prefill(ours: &mut OneProcess, tokens: usize) -> anyhow::Result<f64> {
    let request = ours.request(tokens, 1);
    let begun = Instant::now();
    ours.generate(&[request], &mut |_| ())?;
    Ok(tokens as f64 / begun.elapsed().as_secs_f64())
}

fn decode(ours: &mut OneProcess, streams: u16) -> anyhow::Result<f64> {
    let requests: Vec<_> = (0..streams).map(|_| ours.request(DECODE_CONTEXT, DECODE_TOKENS)).collect();
    let mut came = vec![Vec::new(); requests.len()];
    ours.generate(&requests, &mut |request| came[request].push(Instant::now()))?;
    together(&came)
}

fn cluster_decode(cluster: &Cluster, ours: &mut OneProcess, streams: u16) -> anyhow::Result<f64> {
    let prompts: Vec<_> = (0..streams).map(|_| ours.prompt(DECODE_CONTEXT)).collect();
    // Their KV stays with the prefill node. Otherwise the first streams would be over before the last one begins.
    for prompt in &prompts {
        ask(cluster, prompt, 1)?;
    }
    let came = std::thread::scope(|scope| {
        let asking: Vec<_> = prompts
            .iter()
            .map(|prompt| scope.spawn(move || ask(cluster, prompt, DECODE_TOKENS).map(|(_, came)| came)))
            .collect();
        let all = asking.into_iter().map(|one| one.join().map_err(|_| anyhow::anyhow!("no answer"))?);
        all.collect::<anyhow::Result<Vec<_>>>()
    })?;
    together(&came)
}

/// Tokens a second of all streams together, from when the last of them has its first token.
fn together(came: &[Vec<Instant>]) -> anyhow::Result<f64> {
    let begun = came.iter().filter_map(|stream| stream.first()).max().context("streams have tokens")?;
    let after = || came.iter().flatten().filter(|at| *at > begun);
    let ended = after().max().context("there are tokens after the last stream's first one")?;
    Ok(after().count() as f64 / (*ended - *begun).as_secs_f64())
}

fn start_cluster(options: &Options) -> anyhow::Result<Cluster> {
    ensure!(
        options.model.join("tokenizer.json").exists(),
        "{} has no tokenizer.json",
        options.model.display()
    );
    let mut cluster = ClusterOptions::new(&options.model);
    let words = |text: String| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let (device, format) = (options.device, if options.dummy { "dummy" } else { "auto" });
    cluster.node_flags = words(format!(
        "--device {device} --load-format {format} --threads {} --kv-memory {} --peer-timeout 10s",
        options.threads, options.kv_memory
    ));
    cluster.prefill_on.node_flags = words(format!("--step-tokens {}", options.step_tokens));
    cluster.router_flags = words("--served-model-name bench --peer-timeout 10s".into());
    Ok(Cluster::start(&cluster))
}

fn measure_peer(python: &Path, options: &Options, figures: &mut Figures) -> anyhow::Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/hf_speed.py");
    let output = Command::new(python)
        .arg(script)
        .args(["--repeats", "3", "--threads", &options.threads.to_string(), "--model"])
        .arg(&options.model)
        .output()
        .with_context(|| format!("{}", python.display()))?;
    ensure!(output.status.success(), "the peer failed: {}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout)?;
    let speed =
        |value: &Value| value["tokens_per_s"].as_f64().context("the peer's figures have tokens_per_s");
    for tokens in PREFILL {
        figures.add(
            format!("transformers: prefill {tokens}, tokens/s"),
            speed(&found["prefill"][tokens.to_string()])?,
        );
    }
    figures.add("transformers: decode, 1 stream, tokens/s".into(), speed(&found["decode_best"])?);
    Ok(())
}

/// Every figure's measurements, in the order in which they first came.
#[derive(Default)]
struct Figures(Vec<(String, Vec<f64>)>);

impl Figures {
    fn add(&mut self, name: String, value: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name, vec![value])),
        }
    }

    fn median(&self, name: &str) -> Option<f64> {
        let (_, values) = self.0.iter().find(|(known, _)| known == name)?;
        Some(median(values.clone()))
    }
}

fn report(options: &Options, figures: &Figures) -> anyhow::Result<()> {
    println!("{:<46} {:>10} {:>10} {:>10}", "figure", "median", "least", "most");
    for (name, values) in &figures.0 {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        println!("{name:<46} {:>10.1} {least:>10.1} {most:>10.1}", figures.median(name).unwrap_or(0.0));
    }
    let one = "decode, 1 stream, tokens/s";
    let mut ratios: Vec<(String, f64)> = Vec::new();
    let mut ratio = |what: String, a: &str, b: &str| {
        if let (Some(a), Some(b)) = (figures.median(a), figures.median(b)) {
            ratios.push((what, a / b));
        }
    };
    for name in PREFILL.map(|tokens| format!("prefill {tokens}, tokens/s")).iter().chain([&one.to_owned()]) {
        ratio(format!("{name}: ours / transformers"), name, &format!("transformers: {name}"));
    }
    for streams in options.streams.iter().filter(|streams| **streams > 1) {
        ratio(format!("decode: {streams} streams / 1 stream"), &decode_name(*streams), one);
    }
    for &streams in &options.streams {
        let (split, alone) = (cluster_decode_name(streams), decode_name(streams));
        ratio(format!("decode, {streams}: disaggregated / one process"), &split, &alone);
    }
    ratio(
        "TTFT 2000: disaggregated / one process".into(),
        "TTFT 2000, disaggregated, ms",
        "TTFT 2000, one process, ms",
    );
    println!();
    for (what, value) in &ratios {
        println!("{what:<60} {value:.3}");
    }
    if let Some(file) = &options.json {
        let values: serde_json::Map<_, _> =
            figures.0.iter().map(|(name, values)| (name.clone(), json!(values))).collect();
        let ratios: serde_json::Map<_, _> =
            ratios.into_iter().map(|(what, value)| (what, json!(value))).collect();
        let command: Vec<_> = std::env::args().collect();
        let all = json!({"cpu": cpu_model(), "threads": options.threads, "model": options.model, "command": command.join(" "), "measured": values, "ratios": ratios});
        std::fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("{}", file.display()))?;
    }
    if let Some(file) = &options.svg {
        std::fs::write(file, draw(options, figures)).with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

fn draw(options: &Options, figures: &Figures) -> String {
    let line = |name: &str, dashed, figure: fn(u16) -> String| {
        let mut points: Vec<_> = (options.streams.iter())
            .filter_map(|&streams| Some((usize::from(streams), figures.median(&figure(streams))?)))
            .collect();
        points.sort_by_key(|point| point.0);
        Line { name: name.into(), dashed, points }
    };
    let lines =
        [line("disaggregated", "", cluster_decode_name), line("one process", plot::DASHED, decode_name)];
    plot::svg(&Picture {
        title: "Decoding, tokens a second of all streams".into(),
        under: format!("{}; {}, {} rounds", cpu_model(), options.device, options.rounds),
        across: "streams",
        label: &|streams| streams.to_string(),
        lines: lines.into_iter().filter(|line| !line.points.is_empty()).collect(),
    })
}
