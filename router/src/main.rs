//! The router binary: options in, an endpoint and a control channel out.
#![forbid(unsafe_code)]

use anyhow::Context;
use clap::Parser;
use router::dispatch::{self, Dispatcher};
use router::http::{App, ServeOptions, Settings, serve};
use router::metrics::Metrics;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tandem_process::{ProcessOptions, Shutdown, TlsOptions, units};
use tandem_text::TextModel;
use tandem_transport::control::{Control, Limits};
use tandem_transport::{Identity, Tuning};

/// Serves an OpenAI-compatible endpoint in front of prefill and decode nodes.
///
/// The router tokenizes each request, pairs it with a prefill and a decode node, and streams their tokens to
/// the client. Nodes find it: start them with --router set to this process's --control address, in any order.
/// It needs a model's text files (tokenizer, chat template, configs) and never its weights.
#[derive(Parser, Debug)]
#[command(name = "router", version, after_long_help = EXAMPLES)]
struct Config {
    /// Where clients connect. The default keeps it to this machine: there is no authentication here, so
    /// put a gateway in front before opening it to others.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000", help_heading = "Endpoint")]
    listen: SocketAddr,
    /// Where nodes connect (UDP). Mutual TLS decides who may.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7000", help_heading = "Endpoint")]
    control: SocketAddr,
    /// Model folder in Hugging Face format; the same as the nodes'.
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    model: PathBuf,
    /// The names that requests may call the model by; the folder's name when none is given. May be repeated.
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "Model")]
    served_model_name: Vec<String>,

    /// Prompts computed at once. The default keeps a pair of nodes busy many times over: nodes queue too,
    /// and know better what fits.
    #[arg(long, value_name = "COUNT", default_value = "256", value_parser = count, help_heading = "Limits")]
    max_requests: usize,
    /// Requests that wait when so many are running; further ones get status 429. The default is the same
    /// number: whoever waits behind more would wait longer than most clients do.
    #[arg(long, value_name = "COUNT", default_value = "256", help_heading = "Limits")]
    max_queue: usize,
    /// How long a request waits for its turn before status 429. The default is below what clients and
    /// proxies usually wait for a first byte.
    #[arg(long, value_name = "DURATION", default_value = "20s", value_parser = units::duration, help_heading = "Limits")]
    queue_timeout: Duration,
    /// The longest request body. The default holds about a million tokens of text.
    #[arg(long, value_name = "SIZE", default_value = "8MiB", value_parser = units::bytes, help_heading = "Limits")]
    max_body: usize,
    /// Client connections at once; further ones wait to be accepted. The default stays below the usual
    /// limit of open files.
    #[arg(long, value_name = "COUNT", default_value = "900", value_parser = count, help_heading = "Limits")]
    max_connections: usize,
    /// Requests that may wait at a node before other nodes are preferred. The default is one step's worth
    /// of a small batch.
    #[arg(long, value_name = "COUNT", default_value = "8", help_heading = "Limits")]
    max_node_waiting: u32,

    /// From submission until the whole KV is at the decode node, time in the prefill node's queue included.
    /// The default leaves room for a queue of long prompts on a slow CPU; dead nodes are noticed otherwise.
    #[arg(long, value_name = "DURATION", default_value = "300s", value_parser = units::duration, help_heading = "Deadlines")]
    handoff_timeout: Duration,
    /// From submission until the last token. The default is what OpenAI's own clients wait.
    #[arg(long, value_name = "DURATION", default_value = "600s", value_parser = units::duration, help_heading = "Deadlines")]
    generation_timeout: Duration,
    /// How long a client may send its body, or not read its stream, before it is given up. The default is
    /// more than a mobile network's usual gap.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = units::duration, help_heading = "Deadlines")]
    client_timeout: Duration,
    /// Silence after which a node counts as dead. Between two processes the smaller of their values holds.
    ///
    /// The default notices a killed process in under a second. Raise it where machines are overloaded.
    #[arg(long, value_name = "DURATION", default_value = "900ms", value_parser = units::duration, help_heading = "Deadlines")]
    peer_timeout: Duration,

    #[command(flatten)]
    tls: TlsOptions,
    #[command(flatten)]
    process: ProcessOptions,
}

const EXAMPLES: &str = "\
Examples:
  A router for nodes on this machine:
    router --model models/tiny --tls-dir /tmp/tandem-tls
  Nodes on other machines, and certificates of your own:
    router --model /models/llama --listen 0.0.0.0:8000 --control 10.0.0.1:7000 \\
      --tls-ca ca.pem --tls-cert router.pem --tls-key router.key
  The same from a file, with one option changed:
    router --config router.toml --log-format json

Endpoints:
  POST /v1/chat/completions, /v1/completions, /tokenize, /detokenize
  GET  /v1/models, /v1/models/{id}, /health, /ready, /metrics, /version

Signals:
  SIGTERM or SIGINT drains: /ready says 503, running requests finish. A second one ends it at once.";

fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        // Permits of a semaphore are counted in 32 bits.
        Ok(count @ 1..=1_000_000) => Ok(count),
        _ => Err("must be a whole number from 1 to 1000000".into()),
    }
}

fn main() -> ExitCode {
    match start(tandem_process::parse("TANDEM_ROUTER")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config) -> anyhow::Result<()> {
    config.process.start_logs()?;
    let shutdown = Shutdown::on_signals().context("cannot listen for signals")?;
    let identity = config.tls.identity()?;
    let model = TextModel::load(&config.model).context("cannot use the model")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(config, identity, model, shutdown))
}

async fn run(config: Config, identity: Identity, model: TextModel, shutdown: Shutdown) -> anyhow::Result<()> {
    let tuning = Tuning::dead_after(config.peer_timeout);
    let limits = Limits { tuning, ..Limits::default() };
    let (control, events) = Control::bind(config.control, &identity, limits)
        .with_context(|| format!("cannot listen for nodes on {}", config.control))?;
    let listener = tokio::net::TcpListener::bind(config.listen).await;
    let listener = listener.with_context(|| format!("cannot listen for clients on {}", config.listen))?;

    let metrics = Arc::new(Metrics::default());
    let limits = dispatch::Limits {
        handoff_timeout: config.handoff_timeout,
        generation_timeout: config.generation_timeout,
        max_waiting: config.max_node_waiting,
    };
    let dispatcher = Dispatcher::new(control.clone(), limits, metrics.clone());
    let settings = Settings {
        served: served_names(&config)?,
        max_requests: config.max_requests,
        max_queue: config.max_queue,
        queue_timeout: config.queue_timeout,
        max_body_bytes: config.max_body,
        body_timeout: config.client_timeout,
        client_timeout: config.client_timeout,
    };
    tracing::info!(
        http = %listener.local_addr()?,
        control = %control.local_addr(),
        model = settings.served[0],
        vocabulary = model.vocab_size,
        max_positions = model.max_positions,
        chat_template = model.template.is_some(),
        "listening"
    );
    let listening = tokio::spawn(dispatcher.clone().listen(events));
    let app = App::new(Arc::new(model), dispatcher, metrics, settings);
    let options =
        ServeOptions { max_connections: config.max_connections, drain_timeout: config.process.drain_timeout };
    serve(listener, app, options, shutdown).await;
    // Nodes that hang up from here on are not lost: it is this process that leaves.
    listening.abort();
    control.shutdown().await;
    tracing::info!("ended");
    Ok(())
}

/// The names that clients may use.
fn served_names(config: &Config) -> anyhow::Result<Vec<String>> {
    if !config.served_model_name.is_empty() {
        return Ok(config.served_model_name.clone());
    }
    // `--model .` has a name too.
    let dir =
        config.model.canonicalize().with_context(|| format!("cannot find {}", config.model.display()))?;
    let name = dir.file_name().context("the model folder has no name; give --served-model-name")?;
    Ok(vec![name.to_string_lossy().into_owned()])
}
