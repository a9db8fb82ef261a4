//! From options to a running node.

use crate::status::{Running, Status, StatusAddr};
use crate::{Board, Clock, Cluster, Inbox, Member, NodeEvent, Unpark, inbox, random_node_id};
use anyhow::Context;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_engine::{CpuEngine, Engine, LoadOptions};
use tandem_kernels::{CpuKernels, Kernels, KvPages};
use tandem_process::{ProcessOptions, Shutdown, TlsOptions, units};
use tandem_proto::layout::KvDtype;
use tandem_proto::wire::{Hello, Role};
use tandem_transport::control::{Control, Limits};
use tandem_transport::{Congestion, Transport, Tuning};
use tandem_transport::{NetConfig, NetTransport, Path};
use tokio::sync::oneshot;

/// Events from the network that the node's loop has not looked at. Beyond it, peers wait.
const INBOX_EVENTS: usize = 4096;

/// The flags that prefill and decode nodes share.
#[derive(clap::Args, Clone, Debug)]
pub struct NodeOptions {
    /// Model folder in Hugging Face format: config.json, safetensors, generation_config.json.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The router's control address. The node joins as soon as it is reached, and again whenever it was lost.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7000")]
    pub router: String,
    /// What people call this node, in logs and metrics.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub name: String,
    /// Where the control channel listens (UDP). Port 0 takes a free one: nobody needs to know it beforehand.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub control: SocketAddr,
    /// Where the transport listens (UDP).
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub data: SocketAddr,
    /// The address that other nodes reach this one at. Needed when it listens on 0.0.0.0 or every IPv6 address.
    #[arg(long, value_name = "IP")]
    pub advertise: Option<IpAddr>,
    /// Where this node's status is served over HTTP: /metrics for Prometheus, /status, /health, /ready. Port 0 takes a
    /// free one and logs it; off serves none. There is no authentication: anybody who reaches it can read it, so the
    /// default keeps it to this machine.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub status: StatusAddr,
    /// Memory for pages of KV. All of it is taken from the system soon after the start, in the background.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = units::bytes, help_heading = "Memory and speed")]
    pub kv_memory: usize,
    /// How keys and values are stored: f32 loses nothing; f16 and bf16 take half the room and half the link.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = kv_dtype, help_heading = "Memory and speed")]
    pub kv_dtype: KvDtype,
    /// Threads that compute. 0 takes as many as there are cores.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Memory and speed")]
    pub threads: usize,
    /// The way KV takes: auto picks the best that both nodes have, in the order shm, rdma, tls, quic, and falls back
    /// when it fails; a name allows that one alone. shm is memory shared between processes of one user and host; rdma
    /// is there in builds with that feature; tls needs the data port open for TCP too.
    #[arg(long, value_name = "PATH", default_value = "auto", value_parser = paths, help_heading = "Memory and speed")]
    pub transport: Paths,
    /// RDMA devices for KV, by name and separated by commas: each must be there, and have a port that is up and has an
    /// address. Without it every such device is used. A lane to a peer is spread over all ports; the address of a RoCE
    /// port is its first IPv4 one of RoCE v2, else its first routable IPv6 one.
    #[cfg(feature = "rdma")]
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "Memory and speed")]
    pub rdma_devices: Vec<String>,
    /// Threads that move KV over QUIC, each with a socket of its own, and connections over TLS. One carries about half
    /// a gigabyte a second over QUIC at Ethernet's packet size, two over TLS; more help where there are idle cores.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Memory and speed")]
    pub data_threads: usize,
    /// The largest UDP payload between hosts: 1452 suits every Ethernet, 8952 suits jumbo frames. QUIC finds out whether
    /// a path carries it, and goes down to 1200 where it does not.
    #[arg(long, value_name = "BYTES", default_value_t = 1452, help_heading = "Memory and speed")]
    pub mtu: u16,
    /// Every path between nodes carries --mtu: used from the first packet on and never doubted. Without it, packets lost
    /// in bulk look as if the path had shrunk, which costs speed for a minute.
    #[arg(long, help_heading = "Memory and speed")]
    pub mtu_is_known: bool,
    /// How QUIC finds out what a path carries. bbr measures it, fills links that lose packets, and keeps queues short.
    /// cubic takes every loss for a full queue: it gives way to other traffic, and where one packet in a thousand is lost
    /// over 20 ms, to nothing at all.
    #[arg(long, value_name = "NAME", default_value = "bbr", help_heading = "Memory and speed")]
    pub congestion: Congestion,
    /// Silence after which a peer counts as dead, and what it took part in is given up.
    ///
    /// The default notices a killed process in under a second. Raise it where machines are overloaded.
    #[arg(long, value_name = "DURATION", default_value = "900ms", value_parser = units::duration, help_heading = "Memory and speed")]
    pub peer_timeout: Duration,
    /// Who this node is to its peers.
    #[command(flatten)]
    pub tls: TlsOptions,
    /// Logs and signals.
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// Ways that KV may take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Paths(pub Vec<Path>);

fn paths(text: &str) -> Result<Paths, String> {
    match text {
        "auto" => Ok(Paths(Path::ALL.to_vec())),
        "rdma" if cfg!(not(feature = "rdma")) => {
            Err("this build has no RDMA: build it with --features rdma".into())
        }
        name => Ok(Paths(vec![name.parse().map_err(|error| format!("{error}, or auto"))?])),
    }
}

fn kv_dtype(text: &str) -> Result<KvDtype, String> {
    match text {
        "f32" => Ok(KvDtype::F32),
        "f16" => Ok(KvDtype::F16),
        "bf16" => Ok(KvDtype::Bf16),
        _ => Err("expected f32, f16 or bf16".into()),
    }
}

/// What a node's loop is made of.
pub struct Parts<E: Engine, K> {
    /// The machine's clock.
    pub clock: Clock,
    /// The way to router and peers.
    pub cluster: Box<dyn Cluster>,
    /// What comes from there.
    pub inbox: Inbox,
    /// What moves KV.
    pub transport: Box<dyn Transport>,
    /// The model.
    pub engine: E,
    /// Its pages.
    pub kv: E::Pages,
    /// What moves KV between pages and the memory that the transport reads and writes.
    pub kernels: K,
    /// Where the loop shows its state.
    pub board: Arc<Board>,
}

/// What a node does once it has its parts.
pub trait NodeLoop: Send + 'static {
    /// Runs until the node is told to stop.
    ///
    /// # Errors
    /// When it cannot go on.
    fn run<E: Engine, K: Kernels<Pages = E::Pages>>(self, parts: Parts<E, K>) -> anyhow::Result<()>;
}

/// Starts a node and keeps it running until it is told to stop. Its loop has a thread of its own.
///
/// # Errors
/// When something it needs cannot be had.
pub fn start(options: NodeOptions, role: Role, node_loop: impl NodeLoop) -> anyhow::Result<()> {
    options.process.start_logs()?;
    let shutdown = Shutdown::on_signals()?;
    #[cfg(feature = "rdma")]
    if !options.rdma_devices.is_empty() && !options.transport.0.contains(&Path::Rdma) {
        anyhow::bail!("--rdma-devices names devices, but --transport leaves RDMA out: drop one of them");
    }
    let identity = options.tls.identity()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let status = Status::new(role);
    if let Some(addr) = options.status.0 {
        // Before the model, which may take minutes: whoever watches sees a process that lives.
        let listener = runtime.block_on(tokio::net::TcpListener::bind(addr));
        let listener = listener.with_context(|| format!("cannot serve status on --status {addr}"))?;
        tracing::info!(http = %listener.local_addr()?, "serving status");
        runtime.spawn(Arc::clone(&status).serve(listener));
    }
    let (engine, kv) = load(&options)?;
    warm(&kv)?;
    runtime.block_on(async move {
        let node = random_node_id().context("no randomness for the node's id")?;
        let tuning = Tuning {
            mtu: options.mtu,
            mtu_is_known: options.mtu_is_known,
            congestion: options.congestion,
            ..Tuning::dead_after(options.peer_timeout)
        };
        let limits = Limits { tuning: tuning.clone(), ..Limits::default() };
        let (control, events) = Control::bind(options.control, &identity, node, limits)?;
        let net = NetConfig {
            paths: options.transport.0.clone(),
            #[cfg(feature = "rdma")]
            rdma_devices: options.rdma_devices.clone(),
            threads: options.data_threads,
            tls_connections: options.data_threads,
            tuning,
            ..NetConfig::default()
        };
        let mut transport = NetTransport::bind(options.data, &identity, node, net)?;
        let info = engine.info();
        let pool_tokens = u64::from(kv.pages()) * u64::from(info.kv.page_tokens);
        let hello = Hello {
            node,
            name: if options.name.is_empty() { format!("{role}-{node}") } else { options.name.clone() },
            role,
            control: reachable(control.local_addr(), &options)?,
            data: reachable(transport.local_addr(), &options)?,
            fingerprint: info.fingerprint,
            kv: info.kv,
            max_sequence_tokens: info.max_positions.min(pool_tokens.min(u64::from(u32::MAX)) as u32),
        };
        tracing::info!(name = hello.name, %node, control = %hello.control, data = %hello.data, "listening");

        let (sender, inbox) = inbox(INBOX_EVENTS);
        let unpark = Unpark::default();
        transport.set_waker(unpark.waker());
        status.is_running(Running {
            hello: hello.clone(),
            model: info.name.clone(),
            paths: options.transport.0.clone(),
            transport: transport.observer(),
        });
        let member = Member::new(control, events, sender, unpark.clone());
        member.join(options.router.clone(), hello);
        let parts = Parts {
            clock: Clock::start(),
            cluster: Box::new(member.clone()),
            inbox,
            transport: Box::new(transport),
            engine,
            kv,
            kernels: CpuKernels::default(),
            board: Arc::clone(&status.board),
        };
        let (done, mut finished) = oneshot::channel();
        std::thread::Builder::new().name(format!("{role}-loop")).spawn(move || {
            unpark.bind_current_thread();
            // Nobody listens only if the process is ending anyway.
            let _ = done.send(node_loop.run(parts));
        })?;
        let result = tokio::select! {
            result = &mut finished => result,
            () = shutdown.requested() => {
                member.tell(NodeEvent::Drain).await;
                match tokio::time::timeout(options.process.drain_timeout, &mut finished).await {
                    Ok(result) => result,
                    Err(_) => {
                        tracing::warn!("not drained in time; cutting off what is left");
                        member.tell(NodeEvent::Stop).await;
                        finished.await
                    }
                }
            }
        };
        member.leave().await;
        result.context("the node's loop ended in a panic; its message is above")?
    })
}

fn load(options: &NodeOptions) -> anyhow::Result<(CpuEngine, KvPages)> {
    let begun = Instant::now();
    let mut load = LoadOptions { kv_dtype: options.kv_dtype, ..LoadOptions::default() };
    if options.threads > 0 {
        load.threads = options.threads;
    }
    let engine = CpuEngine::load(&options.model, load)
        .with_context(|| format!("model {}", options.model.display()))?;
    let info = engine.info();
    let page_bytes = info.kv.layers as usize * info.kv.layer_page_bytes();
    let pages = u32::try_from(options.kv_memory / page_bytes).unwrap_or(u32::MAX);
    let kv = KvPages::new(info.kv, pages).with_context(|| {
        format!("--kv-memory {} bytes for pages of {page_bytes} bytes", options.kv_memory)
    })?;
    tracing::info!(
        model = info.name,
        architecture = info.architecture,
        parameters = info.parameters,
        kv_pages = pages,
        kv_tokens = u64::from(pages) * u64::from(info.kv.page_tokens),
        threads = load.threads,
        seconds = begun.elapsed().as_secs_f32(),
        "model loaded"
    );
    Ok((engine, kv))
}

/// Has the system provide the pages' memory before prompts need it, without disturbing those that do already.
fn warm(kv: &KvPages) -> anyhow::Result<()> {
    let (pieces, begun) = (kv.pieces(), Instant::now());
    let warm = move || {
        // Of this thread alone. At the usual priority it would merely be done sooner.
        let _ = rustix::process::setpriority_process(None, 19);
        for piece in pieces {
            if let Err(error) = piece.populate() {
                tracing::warn!(%error, "KV memory is taken as it is used: not all of it can be had beforehand");
                return;
            }
        }
        tracing::info!(seconds = begun.elapsed().as_secs_f32(), "KV memory is warm");
    };
    std::thread::Builder::new().name("kv-warm".into()).spawn(warm).context("a thread to warm KV memory")?;
    Ok(())
}

fn reachable(bound: SocketAddr, options: &NodeOptions) -> anyhow::Result<SocketAddr> {
    match options.advertise {
        Some(ip) => Ok(SocketAddr::new(ip, bound.port())),
        None if bound.ip().is_unspecified() => {
            anyhow::bail!("listening on {bound}: say with --advertise at which IP other nodes reach this one")
        }
        None => Ok(bound),
    }
}
