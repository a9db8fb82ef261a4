//! What does disaggregation add to the time of a prompt's first tokens? In turns, so that a noisy machine disturbs both
//! alike: one process computes a prompt that nobody has seen, then router, prefill node and decode node do, with the same
//! engine on the same device. The first token comes from the prefill node, the second from the decode node, when it has
//! all of the KV.

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::{Value, json};
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tandem_engine::single::{GenRequest, SingleProcess};
use tandem_engine::{Engine, LoadFormat};
use tandem_node::Device;
use tandem_proto::ids::{ChoiceIdx, TokenId};
use tandem_proto::wire::SamplingParams;
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
}

/// Every token of the answers, so that each leaves text: the made-up model's own mean nothing to a tokenizer.
const ANSWER: u32 = 300;
const ANSWER_TOKENS: u32 = 4;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let made_up = options.model.is_none().then(|| made_up_model(&options.tokenizer)).transpose()?;
    let model = options.model.clone().or_else(|| made_up.clone()).context("one of both")?;
    let format = if made_up.is_some() { LoadFormat::Dummy } else { LoadFormat::Files };
    let measured = match options.device {
        Device::Cpu => measure(on_cpu(&model, format, &options)?, &model, &options),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => measure(on_gpu(&model, format, ordinal, &options)?, &model, &options),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => anyhow::bail!("this build has no CUDA: build it with --features cuda"),
    };
    if let Some(made_up) = made_up {
        std::fs::remove_dir_all(made_up)?;
    }
    measured
}

fn on_cpu(
    model: &Path,
    format: LoadFormat,
    options: &Options,
) -> anyhow::Result<SingleProcess<tandem_engine::CpuEngine>> {
    let load = tandem_engine::LoadOptions { format, ..Default::default() };
    let engine = tandem_engine::CpuEngine::load(model, load)?;
    let shape = engine.info().kv;
    let kv = tandem_kernels::KvPages::new(shape, pages(&engine, options))?;
    Ok(SingleProcess::new(engine, kv, options.step_tokens))
}

#[cfg(feature = "cuda")]
fn on_gpu(
    model: &Path,
    format: LoadFormat,
    ordinal: usize,
    options: &Options,
) -> anyhow::Result<SingleProcess<tandem_engine::CudaEngine>> {
    let gpu = tandem_memory::cuda::Device::open(ordinal)?;
    println!("{}", gpu.name());
    let load = tandem_engine::CudaOptions { format, ..Default::default() };
    let engine = tandem_engine::CudaEngine::load(model, load, &gpu)?;
    let shape = engine.info().kv;
    let kv = tandem_kernels::cuda::KvDevicePages::new(&gpu, shape, pages(&engine, options))?;
    Ok(SingleProcess::new(engine, kv, options.step_tokens))
}

fn pages(engine: &impl Engine, options: &Options) -> u32 {
    let kv = engine.info().kv;
    (options.kv_memory / (kv.layer_page_bytes() * kv.layers as usize)) as u32
}

/// A folder with Llama 3's shape of 8 billion parameters, and a tokenizer.
fn made_up_model(tokenizer: &Path) -> anyhow::Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("tandem-handoff-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(tokenizer.join(file), dir.join(file))
            .with_context(|| format!("{} of --tokenizer {}", file, tokenizer.display()))?;
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096,
        "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40_960, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "rope_scaling": null, "tie_word_embeddings": false, "attention_bias": false,
        "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    });
    std::fs::write(dir.join("config.json"), config.to_string())?;
    Ok(dir)
}

/// When the first two tokens came, in milliseconds.
type Times = [f64; 2];

fn measure<E: Engine>(single: SingleProcess<E>, model: &Path, options: &Options) -> anyhow::Result<()> {
    let mut ours = OneProcess { single, prompts: 0 };
    let kv = ours.single.engine().info().kv;
    let mut all = Vec::new();
    for transport in &options.transports {
        let mut cluster = start_cluster(model, transport, options);
        println!("\ntransport {transport}, steps of {} tokens", options.step_tokens);
        println!(
            "{:>7} {:>9} {:>11} {:>11} {:>9} {:>11} {:>11} {:>9}",
            "tokens", "KV, MiB", "1st alone", "1st split", "added", "2nd alone", "2nd split", "added"
        );
        for tokens in &options.tokens {
            let mut rounds: Vec<[Times; 2]> = Vec::new();
            for round in 0..=options.rounds {
                let prompt = ours.prompt(*tokens);
                let alone = ours.times(prompt)?;
                let split = cluster_times(&cluster, &ours.prompt(*tokens))?;
                // Whatever is set up when it is first used is set up now.
                if round > 0 {
                    rounds.push([alone, split]);
                }
            }
            let of = |figure: fn(&[Times; 2]) -> f64| median(rounds.iter().map(figure).collect());
            println!(
                "{tokens:>7} {:>9.1} {:>8.2} ms {:>8.2} ms {:>6.2} ms {:>8.2} ms {:>8.2} ms {:>6.2} ms",
                kv.packed_bytes(*tokens as u32) as f64 / f64::from(1 << 20),
                of(|[alone, _]| alone[0]),
                of(|[_, split]| split[0]),
                of(|[alone, split]| split[0] - alone[0]),
                of(|[alone, _]| alone[1]),
                of(|[_, split]| split[1]),
                of(|[alone, split]| split[1] - alone[1]),
            );
            if options.explain {
                explain(&mut cluster);
            }
            let rounds: Vec<Value> =
                rounds.iter().map(|[alone, split]| json!({"alone": alone, "split": split})).collect();
            all.push(json!({"transport": transport, "tokens": tokens, "milliseconds": rounds}));
        }
        for (name, value) in landed(&cluster) {
            println!("{name} {value}");
        }
    }
    if let Some(file) = &options.json {
        let command: Vec<_> = std::env::args().collect();
        let all = json!({"cpu": tandem_benches::cpu_model(), "command": command.join(" "), "measured": all});
        std::fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

struct OneProcess<E: Engine> {
    single: SingleProcess<E>,
    prompts: u64,
}

impl<E: Engine> OneProcess<E> {
    /// A prompt that nobody has seen, of tokens that any tokenizer has.
    fn prompt(&mut self, len: usize) -> Vec<TokenId> {
        self.prompts += 1;
        let mut state = self.prompts.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            TokenId(((state >> 33) % 4000) as u32 + 6)
        };
        (0..len).map(|_| draw()).collect()
    }

    fn times(&mut self, prompt: Vec<TokenId>) -> anyhow::Result<Times> {
        let request = GenRequest {
            prompt,
            sampling: SamplingParams {
                temperature: 0.0,
                logit_bias: vec![(TokenId(ANSWER), 100.0)],
                ..SamplingParams::default()
            },
            choice: ChoiceIdx(0),
            max_tokens: ANSWER_TOKENS,
            stop_tokens: Vec::new(),
        };
        let begun = Instant::now();
        let mut came = Vec::new();
        self.single.generate_with(&[request], &mut |_, _| came.push(begun.elapsed()))?;
        first_two(&came)
    }
}

fn first_two(came: &[std::time::Duration]) -> anyhow::Result<Times> {
    ensure!(came.len() >= 2, "{} tokens came", came.len());
    Ok([came[0].as_secs_f64() * 1e3, came[1].as_secs_f64() * 1e3])
}

fn start_cluster(model: &Path, transport: &str, options: &Options) -> Cluster {
    let mut cluster = ClusterOptions::new(model);
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let format = if options.model.is_none() { "dummy" } else { "auto" };
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

fn cluster_times(cluster: &Cluster, prompt: &[TokenId]) -> anyhow::Result<Times> {
    let tokens: Vec<_> = prompt.iter().map(|token| token.0).collect();
    let body = json!({
        "model": "bench", "prompt": tokens, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": true,
        "stream": true, "logit_bias": {ANSWER.to_string(): 100},
    });
    let body = body.to_string();
    let begun = Instant::now();
    let (status, stream) = cluster.post_stream("/v1/completions", &body);
    ensure!(status == 200, "status {status}");
    let mut came = Vec::new();
    for line in stream.lines() {
        if line?.starts_with("data: {") {
            came.push(begun.elapsed());
        }
    }
    first_two(&came)
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
