//! What does the storage-mode cache save? One cluster computes every prompt, with its cache off; others keep KV in host
//! memory, on disk or in a remote store. All have so few pages that a prompt's KV has left them soon, and each prompt is
//! asked of all of them in turns, so that a noisy machine disturbs them alike. Workloads are named as LMCache names them.
//!
//! Every answer is compared with the one that was computed, text and log probabilities, and what a cluster says it reused
//! with what had been asked before: one difference fails the run.

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tandem_benches::one_process::{Load, OneProcess};
use tandem_benches::plot::{self, Line, Picture};
use tandem_benches::{cpu_model, median};
use tandem_engine::LoadFormat;
use tandem_node::Device;
use tandem_proto::ids::TokenId;
use tandem_proto::keys::{ChunkKey, Fingerprint, chunk_keys};
use tandem_tests::processes::{Cluster, ClusterOptions};

/// Measures what the storage-mode cache saves, on CPUs. Build the nodes first:
/// cargo build --release -p router -p prefill-node -p decode-node
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Model folder.
    #[arg(long, default_value = "models/tiny")]
    model: PathBuf,
    /// What is asked.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "long-doc-qa,multi-round-chat,rag,random"
    )]
    workloads: Vec<Workload>,
    /// Where KV is kept, each beside a cluster with its cache off.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "dram,disk,remote")]
    places: Vec<Place>,
    /// Users of a chat; documents, of long-doc-qa and in rag's library.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u16).range(4..=1000))]
    users: u16,
    /// Rounds of each chat; how often each document is asked about; rag and random ask users × rounds prompts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Tokens that a chat begins with, of a document of long-doc-qa, of all of a rag prompt's documents, and of a random
    /// prompt.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(256..=1_000_000))]
    history: u32,
    /// Where chunks on disk are made, and removed: on the disk that is to be measured.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// An empty store for --places remote, as --cache-remote of prefill nodes. Without it, a folder in --dir. What is put
    /// there stays.
    #[arg(long, value_name = "URL")]
    remote: Option<String>,
    /// Where to write the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to draw the time to the first token by the chats' rounds, as SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Workload {
    /// Long documents, each asked about several times, in shuffled order.
    LongDocQa,
    /// Users take turns, and each comes back with all that was said.
    MultiRoundChat,
    /// Four shuffled documents of a library behind a system prompt. Only what is a prefix is reused: the system prompt,
    /// and a document if the same ones stood before it.
    Rag,
    /// Prompts that nobody asked before: what caching costs.
    Random,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Place {
    /// Host memory with room for all users.
    Dram,
    /// Disk, behind host memory for two prompts.
    Disk,
    /// A store that nodes share, behind host memory for two prompts.
    Remote,
}

const ANSWER_TOKENS: u32 = 16;
const QUESTION_TOKENS: usize = 32;
/// As LMCache's: not a multiple of a chunk, as real ones are not.
const SYSTEM_TOKENS: usize = 300;
const RAG_DOCUMENTS: usize = 4;
/// Prompts that pages have room for, and host memory before a slower tier: one, and what is stored of the one before.
const PROMPTS_HELD: usize = 2;
/// Until a cluster has stored what it computed.
const QUIET: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    ensure!(
        options.svg.is_none() || options.workloads.contains(&Workload::MultiRoundChat),
        "--svg draws multi-round-chat, which is not among --workloads"
    );
    let mut draw = OneProcess::load(&Load {
        model: &options.model,
        format: LoadFormat::Files,
        device: Device::Cpu,
        threads: 0,
        // It draws prompts and says what KV is like, and computes nothing.
        kv_memory: 16 << 20,
        step_tokens: 512,
    })?;
    let (longest, most) = (options.longest(), draw.info().max_positions);
    ensure!(longest <= most, "prompts of {longest} tokens are too long for the model, which takes {most}");
    let folder = Folder::new(&options.dir)?;
    println!("{}; {}, one prompt at a time", cpu_model(), options.model.display());
    let mut all = Vec::new();
    for &workload in &options.workloads {
        let mut run = Run::start(workload, &options, &draw, &folder)?;
        workload.play(&options, &mut draw, &mut run)?;
        run.report()?;
        all.push((workload, run.asked));
    }
    if let Some(file) = &options.json {
        let command: Vec<_> = std::env::args().collect();
        let measured: Vec<_> =
            all.iter().map(|(workload, asked)| figures(*workload, asked, &options)).collect();
        let all = json!({"cpu": cpu_model(), "command": command.join(" "), "measured": measured});
        std::fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("{}", file.display()))?;
    }
    if let Some(file) = &options.svg {
        let chats = all.iter().filter(|(workload, _)| *workload == Workload::MultiRoundChat);
        for (_, asked) in chats {
            std::fs::write(file, draw_rounds(asked, &options))
                .with_context(|| format!("{}", file.display()))?;
        }
    }
    Ok(())
}

impl Options {
    /// Tokens of the longest prompt with its answer.
    fn longest(&self) -> u32 {
        let round = QUESTION_TOKENS as u32 + ANSWER_TOKENS;
        // An answer's text may have more tokens than the answer.
        SYSTEM_TOKENS as u32 + self.history + u32::from(self.rounds) * (round + ANSWER_TOKENS)
    }

    fn requests(&self) -> usize {
        usize::from(self.users) * usize::from(self.rounds)
    }
}

impl Workload {
    fn name(self) -> &'static str {
        match self {
            Workload::LongDocQa => "long-doc-qa",
            Workload::MultiRoundChat => "multi-round-chat",
            Workload::Rag => "rag",
            Workload::Random => "random",
        }
    }

    fn play(self, options: &Options, draw: &mut OneProcess, run: &mut Run) -> anyhow::Result<()> {
        let (users, rounds) = (usize::from(options.users), usize::from(options.rounds));
        let history = options.history as usize;
        let documents = |draw: &mut OneProcess, tokens| -> Vec<Vec<TokenId>> {
            (0..users).map(|_| draw.prompt(tokens)).collect()
        };
        match self {
            Workload::LongDocQa => {
                let documents = documents(draw, history);
                let mut order: Vec<_> = (0..rounds).flat_map(|_| 0..users).collect();
                shuffle(draw, &mut order);
                for document in order {
                    let prompt = [&documents[document][..], &draw.prompt(QUESTION_TOKENS)].concat();
                    run.ask(&prompt, 0)?;
                }
            }
            Workload::MultiRoundChat => {
                let mut chats = documents(draw, history);
                for round in 0..rounds {
                    for chat in &mut chats {
                        chat.extend(draw.prompt(QUESTION_TOKENS));
                        chat.extend(run.ask(chat, round)?);
                    }
                }
            }
            Workload::Rag => {
                let system = draw.prompt(SYSTEM_TOKENS);
                let mut library = documents(draw, history / RAG_DOCUMENTS);
                for _ in 0..options.requests() {
                    shuffle(draw, &mut library);
                    let found = library[..RAG_DOCUMENTS].concat();
                    run.ask(&[&system[..], &found, &draw.prompt(QUESTION_TOKENS)].concat(), 0)?;
                }
            }
            Workload::Random => {
                for _ in 0..options.requests() {
                    run.ask(&draw.prompt(history + QUESTION_TOKENS), 0)?;
                }
            }
        }
        Ok(())
    }
}

fn shuffle<T>(draw: &mut OneProcess, items: &mut Vec<T>) {
    let mut keyed: Vec<_> = draw.prompt(items.len()).into_iter().zip(items.drain(..)).collect();
    keyed.sort_by_key(|(key, _)| key.0);
    items.extend(keyed.into_iter().map(|(_, item)| item));
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Place::Dram => "dram",
            Place::Disk => "disk",
            Place::Remote => "remote",
        }
    }

    /// Its place in [`TIERS`].
    fn tier(self) -> usize {
        match self {
            Place::Dram => 1,
            Place::Disk => 2,
            Place::Remote => 3,
        }
    }
}

/// As usage names them.
const TIERS: [&str; 4] = ["pages", "host", "disk", "remote"];

/// What one cluster said to a prompt, and when.
struct Answer {
    ttft_ms: f64,
    whole_ms: f64,
    /// Tokens that were not computed, by [`TIERS`].
    reused: [u64; 4],
    text: String,
    logprobs: Vec<Value>,
}

impl Answer {
    fn reused(&self) -> u64 {
        self.reused.iter().sum()
    }
}

/// One prompt, asked of every cluster.
struct Asked {
    round: usize,
    tokens: usize,
    /// Tokens that were asked before, as whole chunks of a prefix.
    reusable: u64,
    computed: Answer,
    /// In the order of --places.
    kept: Vec<Answer>,
}

impl Asked {
    /// All that could be reused was, most of it from this place, and without a cache all was computed.
    fn is_hit(&self, at: usize, place: Place) -> bool {
        let kept = &self.kept[at];
        let all = kept.reused() == self.reusable && self.computed.reused() == 0;
        all && kept.reused[place.tier()] * 2 > self.reusable
    }
}

/// A workload's clusters, and what they answered.
struct Run<'a> {
    workload: Workload,
    options: &'a Options,
    fingerprint: Fingerprint,
    chunk_tokens: u32,
    off: Cluster,
    places: Vec<Cluster>,
    /// Whole chunks that prompts began with.
    seen: HashSet<ChunkKey>,
    asked: Vec<Asked>,
}

impl<'a> Run<'a> {
    fn start(
        workload: Workload,
        options: &'a Options,
        model: &OneProcess,
        folder: &Folder,
    ) -> anyhow::Result<Run<'a>> {
        let kv = model.info().kv;
        let longest = options.longest();
        let chunks = longest.div_ceil(kv.chunk_tokens) as usize;
        let pages = chunks * (kv.chunk_tokens / kv.page_tokens) as usize;
        let kv_memory = PROMPTS_HELD * pages * kv.layer_page_bytes() * kv.layers as usize;
        let prompt_bytes = chunks * kv.packed_bytes(kv.chunk_tokens);
        let users_bytes = (usize::from(options.users) + PROMPTS_HELD) * prompt_bytes;
        let start = |flags: &[&str]| {
            let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
            let mut cluster = ClusterOptions::new(&options.model);
            cluster.node_flags = words(&["--kv-memory", &kv_memory.to_string(), "--peer-timeout", "10s"]);
            cluster.prefill_on.node_flags = words(flags);
            cluster.router_flags = words(&["--served-model-name", "bench", "--peer-timeout", "10s"]);
            Cluster::start(&cluster)
        };
        let small = (PROMPTS_HELD * prompt_bytes).to_string();
        let place = |place: &Place| {
            let folder = folder.0.join(format!("{}-{}", workload.name(), place.name()));
            let folder = folder.display().to_string();
            match place {
                Place::Dram => start(&["--cache-memory", &users_bytes.to_string()]),
                Place::Disk => {
                    // Its files have more in them than chunks.
                    let size = (2 * users_bytes + (64 << 20)).to_string();
                    start(&["--cache-memory", &small, "--cache-disk", &folder, "--cache-disk-size", &size])
                }
                Place::Remote => {
                    let url = options.remote.clone().unwrap_or_else(|| format!("fs://{folder}"));
                    start(&["--cache-memory", &small, "--cache-remote", &url])
                }
            }
        };
        let (off, places) = (start(&["--cache-memory", "0"]), options.places.iter().map(place).collect());
        let run = Run {
            workload,
            options,
            fingerprint: model.info().fingerprint,
            chunk_tokens: kv.chunk_tokens,
            off,
            places,
            seen: HashSet::new(),
            asked: Vec::new(),
        };
        // Whatever is set up when it is first used is set up now.
        let short = vec![TokenId(7); QUESTION_TOKENS];
        for cluster in run.places.iter().chain([&run.off]) {
            ask(cluster, &short)?;
        }
        Ok(run)
    }

    /// Asks all clusters in turns, another one first each time; returns the tokens of the answer's text.
    fn ask(&mut self, prompt: &[TokenId], round: usize) -> anyhow::Result<Vec<TokenId>> {
        let reusable = self.reusable(prompt);
        let clusters: Vec<_> = self.places.iter().chain([&self.off]).collect();
        let mut answers: Vec<Option<Answer>> = clusters.iter().map(|_| None).collect();
        for turn in 0..clusters.len() {
            let at = (turn + self.asked.len()) % clusters.len();
            answers[at] = Some(ask(clusters[at], prompt)?);
            wait_until_quiet(clusters[at])?;
        }
        let mut kept: Vec<_> = answers.into_iter().flatten().collect();
        let computed = kept.pop().context("the cache that is off answered")?;
        let which =
            || format!("{}, prompt {} of {} tokens", self.workload.name(), self.asked.len(), prompt.len());
        for (answer, place) in
            kept.iter().zip(&self.options.places).map(|(answer, place)| (answer, place.name()))
        {
            ensure!(
                answer.text == computed.text && answer.logprobs == computed.logprobs,
                "{}: {place} answered {:?}, log probabilities {:?}; computed, it is {:?}, {:?}",
                which(),
                answer.text,
                answer.logprobs,
                computed.text,
                computed.logprobs
            );
            ensure!(
                answer.reused() <= reusable,
                "{}: {place} says that it reused {} tokens, where {reusable} had been asked before: what an earlier run \
                 left in --remote is found too",
                which(),
                answer.reused()
            );
        }
        let said = tokens_of(&self.off, &computed.text)?;
        self.asked.push(Asked { round, tokens: prompt.len(), reusable, computed, kept });
        Ok(said)
    }

    /// Tokens of the whole chunks that an earlier prompt began with too. The last token is always computed.
    fn reusable(&mut self, prompt: &[TokenId]) -> u64 {
        let keys = chunk_keys(self.fingerprint, &[], self.chunk_tokens, prompt);
        let most = (prompt.len() - 1) / self.chunk_tokens as usize;
        let known = keys.iter().take(most).take_while(|key| self.seen.contains(*key)).count();
        self.seen.extend(keys);
        known as u64 * u64::from(self.chunk_tokens)
    }

    fn report(&self) -> anyhow::Result<()> {
        let asked = &self.asked;
        let lengths = || asked.iter().map(|asked| asked.tokens);
        println!(
            "\n{}: {} prompts of {} to {} tokens; every answer as computed",
            self.workload.name(),
            asked.len(),
            lengths().min().unwrap_or(0),
            lengths().max().unwrap_or(0)
        );
        if self.workload == Workload::Rag {
            println!(
                "only a prefix is reused: the system prompt, and documents that stood there in that order"
            );
        }
        println!(
            "{:<7} {:<6} {:>7} | {:>9} {:>9} | {:>9} {:>9} | {:>8}",
            "place", "which", "prompts", "off, ms", "p99", "TTFT, ms", "p99", "of off's"
        );
        for (at, &place) in self.options.places.iter().enumerate() {
            for which in Which::ALL {
                let Times { prompts, off, here, ratio } = times(asked, at, place, which);
                if prompts == 0 {
                    println!("{:<7} {:<6} {prompts:>7} |", place.name(), which.name());
                    continue;
                }
                println!(
                    "{:<7} {:<6} {prompts:>7} | {:>9.1} {:>9.1} | {:>9.1} {:>9.1} | {ratio:>8.3}",
                    place.name(),
                    which.name(),
                    off[0],
                    off[1],
                    here[0],
                    here[1]
                );
            }
        }
        let reusable: u64 = asked.iter().map(|asked| asked.reusable).sum();
        println!(
            "{:<7} {:>9} {:>10}   tokens reused, of {reusable} asked before",
            "place", "prompts/s", "not stored"
        );
        let names = ["off"].into_iter().chain(self.options.places.iter().map(|place| place.name()));
        for ((at, name), cluster) in names.enumerate().zip([&self.off].into_iter().chain(&self.places)) {
            let Totals { prompts_per_s, reused } = totals(asked, at.checked_sub(1));
            let reused: Vec<_> =
                TIERS.iter().zip(reused).map(|(tier, tokens)| format!("{tier} {tokens}")).collect();
            let lost = not_stored(cluster)?;
            println!("{name:<7} {prompts_per_s:>9.2} {lost:>10}   {}", reused.join(", "));
        }
        Ok(())
    }
}

/// Which prompts are compared.
#[derive(Clone, Copy)]
enum Which {
    /// Those that begin as none before them.
    First,
    /// See [`Asked::is_hit`].
    Hits,
    All,
}

impl Which {
    const ALL: [Which; 3] = [Which::First, Which::Hits, Which::All];

    fn name(self) -> &'static str {
        match self {
            Which::First => "first",
            Which::Hits => "hits",
            Which::All => "all",
        }
    }
}

/// Times to the first token: medians and 99th percentiles, in milliseconds.
struct Times {
    prompts: usize,
    off: [f64; 2],
    here: [f64; 2],
    /// The median of each prompt's.
    ratio: f64,
}

fn times(asked: &[Asked], at: usize, place: Place, which: Which) -> Times {
    let chosen: Vec<_> = (asked.iter())
        .filter(|asked| match which {
            Which::First => asked.reusable == 0,
            Which::Hits => asked.is_hit(at, place),
            Which::All => true,
        })
        .map(|asked| (asked.computed.ttft_ms, asked.kept[at].ttft_ms))
        .collect();
    let both = |values: Vec<f64>| [median(values.clone()), p99(values)];
    Times {
        prompts: chosen.len(),
        off: both(chosen.iter().map(|(off, _)| *off).collect()),
        here: both(chosen.iter().map(|(_, here)| *here).collect()),
        ratio: median(chosen.iter().map(|(off, here)| here / off).collect()),
    }
}

fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * 99).div_ceil(100);
    rank.checked_sub(1).map_or(f64::NAN, |at| values[at])
}

struct Totals {
    prompts_per_s: f64,
    reused: [u64; 4],
}

/// Of a place, or of the cluster whose cache is off.
fn totals(asked: &[Asked], place: Option<usize>) -> Totals {
    let answers = || asked.iter().map(|asked| place.map_or(&asked.computed, |at| &asked.kept[at]));
    let seconds: f64 = answers().map(|answer| answer.whole_ms / 1e3).sum();
    let reused = [0, 1, 2, 3].map(|tier| answers().map(|answer| answer.reused[tier]).sum());
    Totals { prompts_per_s: asked.len() as f64 / seconds, reused }
}

fn figures(workload: Workload, asked: &[Asked], options: &Options) -> Value {
    let answer =
        |answer: &Answer| json!({"ttft_ms": answer.ttft_ms, "ms": answer.whole_ms, "reused": answer.reused});
    let places = options.places.iter().enumerate().map(|(at, &place)| {
        let which = Which::ALL.map(|which| {
            let Times { prompts, off, here, ratio } = times(asked, at, place, which);
            let of = |[median, p99]: [f64; 2]| json!({"median": median, "p99": p99});
            let times =
                json!({"prompts": prompts, "off_ttft_ms": of(off), "ttft_ms": of(here), "ratio": ratio});
            (which.name().to_owned(), times)
        });
        let mut place_figures = Value::Object(which.into_iter().collect());
        place_figures["prompts_per_s"] = totals(asked, Some(at)).prompts_per_s.into();
        (place.name().to_owned(), place_figures)
    });
    let prompts = asked.iter().map(|asked| {
        let kept = options.places.iter().zip(&asked.kept);
        let mut prompt: Value = kept.map(|(place, kept)| (place.name().to_owned(), answer(kept))).collect();
        prompt["off"] = answer(&asked.computed);
        prompt["tokens"] = asked.tokens.into();
        prompt["reusable"] = asked.reusable.into();
        prompt["round"] = asked.round.into();
        prompt
    });
    json!({
        "workload": workload.name(), "tiers": TIERS, "places": places.collect::<Value>(),
        "off": {"prompts_per_s": totals(asked, None).prompts_per_s}, "prompts": prompts.collect::<Vec<_>>(),
    })
}

fn draw_rounds(asked: &[Asked], options: &Options) -> String {
    let line = |name: &str, dashed, of: &dyn Fn(&Asked) -> f64| {
        let round = |round: usize| {
            let values = asked.iter().filter(|asked| asked.round == round).map(of);
            (round + 1, median(values.collect()))
        };
        Line { name: name.into(), dashed, points: (0..usize::from(options.rounds)).map(round).collect() }
    };
    let mut lines = vec![line("cache off", plot::DASHED, &|asked| asked.computed.ttft_ms)];
    for (at, place) in options.places.iter().enumerate() {
        lines.push(line(place.name(), "", &|asked| asked.kept[at].ttft_ms));
    }
    plot::svg(&Picture {
        title: "Multi-round chat: milliseconds to the first token".into(),
        under: format!("{}; {} users, {} tokens of history", cpu_model(), options.users, options.history),
        across: "round",
        label: &|round| round.to_string(),
        lines,
    })
}

fn ask(cluster: &Cluster, prompt: &[TokenId]) -> anyhow::Result<Answer> {
    let tokens: Vec<_> = prompt.iter().map(|token| token.0).collect();
    let body = json!({
        "model": "bench", "prompt": tokens, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": true,
        "logprobs": 1, "stream": true, "stream_options": {"include_usage": true},
    });
    let body = body.to_string();
    let begun = Instant::now();
    let (status, stream) = cluster.post_stream("/v1/completions", &body);
    let (mut first, mut last) = (None, begun);
    let (mut text, mut logprobs, mut usage) = (String::new(), Vec::new(), Value::Null);
    for line in stream.lines() {
        let line = line?;
        ensure!(status == 200, "status {status}: {line}");
        let Some(data) = line.strip_prefix("data: {") else { continue };
        let came = Instant::now();
        let chunk: Value = serde_json::from_str(&format!("{{{data}"))?;
        ensure!(chunk["error"].is_null(), "{line}");
        if chunk["usage"].is_object() {
            usage = chunk["usage"].clone();
        }
        let choice = &chunk["choices"][0];
        text += choice["text"].as_str().unwrap_or_default();
        let more = choice["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default();
        if !more.is_empty() {
            (first, last) = (first.or(Some(came)), came);
            logprobs.extend(more);
        }
    }
    ensure!(status == 200, "status {status}");
    ensure!(logprobs.len() == ANSWER_TOKENS as usize, "{} tokens came", logprobs.len());
    let split = &usage["prompt_tokens_details"]["tandem"];
    let tokens =
        |tier: &str| split[tier].as_u64().with_context(|| format!("usage without tokens by tier: {usage}"));
    let mut reused = [0; 4];
    for (reused, tier) in reused.iter_mut().zip(TIERS) {
        *reused = tokens(tier)?;
    }
    let ms = |at: Instant| (at - begun).as_secs_f64() * 1e3;
    let first = first.context("the stream has tokens")?;
    Ok(Answer { ttft_ms: ms(first), whole_ms: ms(last), reused, text, logprobs })
}

/// What a prefill node shows of its cache.
fn cache(cluster: &Cluster) -> anyhow::Result<Value> {
    let (_, status) = cluster.node_page("prefill-0", "/status");
    Ok(serde_json::from_str::<Value>(&status)?["cache"].take())
}

/// The sum of a number of each tier behind host memory.
fn of_tiers(cache: &Value, number: &str) -> u64 {
    cache["tiers"].as_array().into_iter().flatten().filter_map(|tier| tier[number].as_u64()).sum()
}

/// Waits until what was computed is stored, so that it takes no time from the next cluster's turn.
fn wait_until_quiet(cluster: &Cluster) -> anyhow::Result<()> {
    let until = Instant::now() + QUIET;
    loop {
        let cache = cache(cluster)?;
        if cache["saving_chunks"].as_u64().unwrap_or(0) + of_tiers(&cache, "queued") == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "chunks are not stored within {QUIET:?}: {cache}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Chunks that some tier has not, for want of room or since it failed.
fn not_stored(cluster: &Cluster) -> anyhow::Result<u64> {
    let cache = cache(cluster)?;
    let host: u64 =
        cache["host"]["not_saved"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
    Ok(host + of_tiers(&cache, "dropped") + of_tiers(&cache, "store_failed"))
}

fn tokens_of(cluster: &Cluster, text: &str) -> anyhow::Result<Vec<TokenId>> {
    let body = json!({"model": "bench", "prompt": text, "add_special_tokens": false});
    let (status, answer) = cluster.post("/tokenize", &body.to_string());
    ensure!(status == 200, "status {status}: {answer}");
    let answer: Value = serde_json::from_str(&answer)?;
    let tokens = answer["tokens"].as_array().context("/tokenize answers with tokens")?;
    Ok(tokens.iter().filter_map(Value::as_u64).map(|token| TokenId(token as u32)).collect())
}

/// Removed with all that is in it when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(dir: &Path) -> anyhow::Result<Folder> {
        let dir = std::path::absolute(dir)?.join(format!("tandem-reuse-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Folder(dir))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Left behind at worst.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
