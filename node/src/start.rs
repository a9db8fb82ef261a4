//! From options to a running node.

use crate::device::Device;
use crate::load::{self, Loaded};
use crate::status::{Running, Status, StatusAddr};
use crate::{Board, Clock, Cluster, Inbox, Member, NodeEvent, Unpark, inbox};
use anyhow::Context;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tandem_engine::{Engine, LoadFormat};
use tandem_kernels::{Kernels, Paged};
use tandem_kv_store::tier::Wake;
use tandem_process::{ProcessOptions, Shutdown, TlsOptions, units};
use tandem_proto::layout::KvDtype;
use tandem_proto::wire::{Hello, Role};
use tandem_transport::control::{Control, Limits};
use tandem_transport::{Congestion, Identity, Transport, Tuning};
use tandem_transport::{NetConfig, NetTransport, Path};
use tokio::runtime::Runtime;
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
    /// What computes: cpu, or cuda:N for the NVIDIA GPU with number N, as CUDA_VISIBLE_DEVICES shows them.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", help_heading = "Memory and speed")]
    pub device: Device,
    /// Memory for pages of KV. On a CPU 1GiB by default, taken from the system soon after the start, in the background; on
    /// a GPU what --gpu-memory-utilization leaves.
    #[arg(long, value_name = "SIZE", value_parser = units::bytes, help_heading = "Memory and speed")]
    pub kv_memory: Option<usize>,
    /// The part of a GPU's memory that this node uses in all, 0.9 by default: pages of KV take what the model and packed
    /// KV leave of it. The rest is for the largest steps. Nodes that share a GPU share it by this.
    #[arg(long, value_name = "PART", value_parser = part, conflicts_with = "kv_memory", help_heading = "Memory and speed")]
    pub gpu_memory_utilization: Option<f64>,
    /// How keys and values are stored: f32 loses nothing; f16 and bf16 take half the room and half the link. auto is f32
    /// on a CPU, and on a GPU what the model's weights are. A GPU computes in it too.
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = kv_dtype, help_heading = "Memory and speed")]
    pub kv_dtype: KvType,
    /// Where weights come from: auto reads the model's files; dummy makes them up, from config.json alone, to measure
    /// speed.
    #[arg(long, value_name = "FORMAT", default_value = "auto", value_parser = load_format, help_heading = "Memory and speed")]
    pub load_format: LoadFormat,
    /// Threads that compute. 0 takes as many as there are cores.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Memory and speed")]
    pub threads: usize,
    /// The way KV takes: auto picks the best that both nodes have, in the order cuda_ipc, shm, nccl, rdma, tls, quic,
    /// and falls back when it fails; a name allows that one alone. cuda_ipc is between GPUs, or within one, of
    /// one user and host; shm is memory shared between processes of one user and host; nccl is between two GPUs
    /// with libnccl.so.2 at both ends, and is not encrypted, so auto takes it over RDMA networks only; rdma is
    /// there in builds with that feature, and not encrypted either; tls and nccl need the data port open for
    /// TCP too. From and to GPUs all but cuda_ipc and nccl go by way of the hosts' memory.
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

/// How KV is stored; none is as the device likes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvType(pub Option<KvDtype>);

fn kv_dtype(text: &str) -> Result<KvType, String> {
    match text {
        "auto" => Ok(KvType(None)),
        "f32" => Ok(KvType(Some(KvDtype::F32))),
        "f16" => Ok(KvType(Some(KvDtype::F16))),
        "bf16" => Ok(KvType(Some(KvDtype::Bf16))),
        _ => Err("expected auto, f32, f16 or bf16".into()),
    }
}

fn load_format(text: &str) -> Result<LoadFormat, String> {
    match text {
        "auto" => Ok(LoadFormat::Files),
        "dummy" => Ok(LoadFormat::Dummy),
        _ => Err("expected auto or dummy".into()),
    }
}

fn part(text: &str) -> Result<f64, String> {
    let part = text.parse().ok().filter(|part| *part > 0.0 && *part <= 1.0);
    part.ok_or_else(|| "expected a number above 0, and at most 1".into())
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
    /// Wakes the loop, from any thread.
    pub wake: Wake,
    /// Has the node join the cluster, which sends it requests from then on: to be called once the loop has its memory.
    pub join: Box<dyn FnOnce() + Send>,
}

/// What a node does once it has its parts.
pub trait NodeLoop: Send + 'static {
    /// Memory that it takes for packed KV, beside its pages.
    fn packed_memory(&self) -> usize;

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
    let started = Started { options, role, shutdown, identity, runtime, status };
    match started.options.device {
        Device::Cpu => {
            let loaded = load::on_cpu(&started.options)?;
            started.serve(loaded, node_loop)
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => {
            let loaded = load::on_gpu(&started.options, ordinal, node_loop.packed_memory())?;
            started.serve(loaded, node_loop)
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => {
            anyhow::bail!("this build has no CUDA: build it with --features cuda, or use --device cpu")
        }
    }
}

/// What a node has before its model.
struct Started {
    options: NodeOptions,
    role: Role,
    shutdown: Shutdown,
    identity: Identity,
    runtime: Runtime,
    status: Arc<Status>,
}

impl Started {
    fn serve<E: Engine + 'static, K: Kernels<Pages = E::Pages> + 'static>(
        self,
        loaded: Loaded<E, K>,
        node_loop: impl NodeLoop,
    ) -> anyhow::Result<()> {
        let Started { options, role, shutdown, identity, runtime, status } = self;
        let Loaded {
            engine,
            kv,
            kernels,
            device,
            #[cfg(feature = "cuda")]
            gpu,
        } = loaded;
        runtime.block_on(async move {
        let node = identity.node();
        let tuning = Tuning {
            mtu: options.mtu,
            mtu_is_known: options.mtu_is_known,
            congestion: options.congestion,
            ..Tuning::dead_after(options.peer_timeout)
        };
        let limits = Limits { tuning: tuning.clone(), ..Limits::default() };
        let (control, events) = Control::bind(options.control, &identity, limits)?;
        let net = NetConfig {
            paths: options.transport.0.clone(),
            #[cfg(feature = "rdma")]
            rdma_devices: options.rdma_devices.clone(),
            #[cfg(feature = "cuda")]
            gpu,
            threads: options.data_threads,
            tls_connections: options.data_threads,
            tuning,
            ..NetConfig::default()
        };
        let mut transport = NetTransport::bind(options.data, &identity, net)?;
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
            device,
            paths: options.transport.0.clone(),
            transport: transport.observer(),
        });
        let member = Member::new(control, events, sender, unpark.clone());
        let waking = unpark.clone();
        let (joining, router) = (member.clone(), options.router.clone());
        let parts = Parts {
            clock: Clock::start(),
            cluster: Box::new(member.clone()),
            inbox,
            transport: Box::new(transport),
            engine,
            kv,
            kernels,
            board: Arc::clone(&status.board),
            wake: Arc::new(move || waking.unpark()),
            join: Box::new(move || joining.join(router, hello)),
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
