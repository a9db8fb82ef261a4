//! A UDP socket with QUIC on it, tuned for the paths between nodes. Both planes use it.

use crate::congestion::{BbrFactory, Congestion};
use crate::handshake::CloseCode;
use crate::identity::{Identity, SERVER_NAME};
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, ClientConfig, Connecting, Connection, Endpoint, EndpointConfig,
    IdleTimeout, Incoming, MtuDiscoveryConfig, Runtime, ServerConfig, TokioRuntime, TransportConfig,
    UdpPoller, VarInt,
};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// How QUIC is tuned. The defaults are those measured to be best between processes of one host and between
/// hosts of one data centre.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// The largest UDP payload on the way to other hosts. Up to this size is probed for, unless the path is
    /// known. 1452 suits every Ethernet; 8952 suits jumbo frames.
    pub mtu: u16,
    /// Whether every path carries `mtu`: then it is used from the first packet on, and never doubted. Bulk
    /// loss otherwise looks to QUIC as if the path had shrunk, and it falls back to 1200 bytes.
    pub mtu_is_known: bool,
    /// How connections find out how much their path carries.
    pub congestion: Congestion,
    /// The largest UDP payload between processes of one host, where size is all that matters.
    pub loopback_mtu: u16,
    /// Silence after which a peer is dead.
    pub dead_after: Duration,
    /// How often to say something when there is nothing to say.
    pub keep_alive: Duration,
    /// Bytes under way on one connection, at most, where the round trip is short. All connections of a socket
    /// share its kernel buffer, of 4 MiB as a rule: more at once than that is loss. Over a longer round trip it is
    /// what [`Tuning::connection_rate`] sends in one: most of that is on the wire and not in the buffer.
    pub connection_window: u32,
    /// Bytes a second that one connection is to be able to reach: about what one thread carries.
    pub connection_rate: u32,
    /// What to ask of the kernel for each direction of the socket.
    pub socket_buffer: usize,
    /// Packets that a peer may leave unacknowledged, at most.
    pub ack_every: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            mtu: 1452,
            mtu_is_known: false,
            congestion: Congestion::Bbr,
            loopback_mtu: 16_000,
            dead_after: Duration::from_millis(900),
            keep_alive: Duration::from_millis(150),
            connection_window: 2 << 20,
            connection_rate: 500_000_000,
            socket_buffer: 4 << 20,
            ack_every: 16,
        }
    }
}

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be had.
    #[error("cannot listen on UDP {addr}: {source}")]
    Bind {
        /// Which address.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be set up with this identity.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// A setting is out of bounds.
    #[error("transport setting {name} is {value}, must be {allowed}")]
    Setting {
        /// Which setting.
        name: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// RDMA that was asked for, by its devices' names or as the only path, cannot be had.
    #[cfg(feature = "rdma")]
    #[error("RDMA was asked for and cannot be used: {0}")]
    Rdma(String),
    /// NCCL was asked for as the only path, and cannot be had.
    #[cfg(feature = "cuda")]
    #[error("NCCL was asked for and cannot be used: {0}")]
    Nccl(String),
    /// A thread cannot be started.
    #[error("cannot start a transport thread: {0}")]
    Thread(#[source] io::Error),
}

/// What differs between the planes.
#[derive(Clone, Copy)]
pub(crate) struct Streams {
    pub(crate) protocol: &'static [u8],
    pub(crate) bidirectional: u32,
    pub(crate) unidirectional: u32,
    /// How many streams must find room beside one another, however long one of them is stuck.
    pub(crate) independent: u32,
}

/// A bound endpoint, and what connections on it are to be like.
#[derive(Clone)]
pub(crate) struct Bound {
    pub(crate) endpoint: Endpoint,
    tls: Arc<QuicClientConfig>,
    server: ServerConfig,
    local: Arc<TransportConfig>,
    remote: Arc<TransportConfig>,
    pub(crate) silence: Silence,
}

/// How long a peer may say nothing.
///
/// QUIC has a clock for that too, but bears three of its probe timeouts at least: those double with each probe that is
/// not answered, and follow a round trip that a full receiver makes long. Here so many looks at what has come in show
/// nothing new. Looks are counted, not time: a thread that had no core has not looked, and what came meanwhile waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Silence {
    look_every: Duration,
    looks: u32,
}

impl Silence {
    /// Waits until the connection is over, for whatever reason, and returns it.
    pub(crate) async fn until_ended(self, connection: &Connection) -> String {
        let mut seen = connection.stats().udp_rx.datagrams;
        let mut silent = 0;
        while silent < self.looks {
            tokio::select! {
                reason = connection.closed() => return reason.to_string(),
                () = tokio::time::sleep(self.look_every) => {}
            }
            let datagrams = connection.stats().udp_rx.datagrams;
            silent = if datagrams == seen { silent + 1 } else { 0 };
            seen = datagrams;
        }
        connection.close(CloseCode::Goodbye.into(), b"silent");
        format!("silent for {:?}", self.look_every * self.looks)
    }
}

/// Bytes under way on one connection, at most, however long its round trip: those of 130 ms at the default rate.
const MAX_WINDOW: u32 = 64 << 20;

const MTU_RANGE: &str = "from 1200 to 16383";

impl Tuning {
    /// The defaults, with silence borne for this long: an idle peer says something six times as often.
    #[must_use]
    pub fn dead_after(silence: Duration) -> Tuning {
        Tuning { dead_after: silence, keep_alive: silence / 6, ..Tuning::default() }
    }

    /// Bytes that a peer may have under way on one connection, over a round trip of this length.
    pub(crate) fn window(&self, round_trip: Duration) -> VarInt {
        let product = f64::from(self.connection_rate) * round_trip.as_secs_f64();
        // Saturates.
        VarInt::from_u32((product as u32).min(MAX_WINDOW).max(self.connection_window))
    }

    fn check(&self) -> Result<(), BindError> {
        for (name, value) in [("mtu", self.mtu), ("loopback_mtu", self.loopback_mtu)] {
            if !(1200..16_384).contains(&value) {
                return Err(BindError::Setting { name, value: value.to_string(), allowed: MTU_RANGE });
            }
        }
        if self.keep_alive.is_zero() || self.dead_after < 3 * self.keep_alive {
            return Err(BindError::Setting {
                name: "dead_after",
                value: format!("{:?}", self.dead_after),
                allowed: "at least three times keep_alive, which must not be 0",
            });
        }
        Ok(())
    }

    pub(crate) fn silence(&self) -> Silence {
        // A look later than the last packet at worst.
        let look_every = self.keep_alive / 2;
        let looks = self.dead_after.as_nanos() / look_every.as_nanos().max(1);
        Silence { look_every, looks: u32::try_from(looks).unwrap_or(u32::MAX).saturating_sub(1).max(1) }
    }

    fn transport(&self, streams: Streams, local: bool) -> TransportConfig {
        let mut config = TransportConfig::default();
        // QUIC's clock of silence starts anew with the first packet sent after the last one received, which
        // is a keep-alive's time late at worst.
        let idle = self.dead_after.saturating_sub(self.keep_alive);
        // A stream that need not leave room to others is held by the connection's window alone, which may grow.
        let stream_window =
            if streams.independent > 1 { self.connection_window / streams.independent } else { MAX_WINDOW };
        config
            .max_idle_timeout(IdleTimeout::try_from(idle).ok())
            .keep_alive_interval(Some(self.keep_alive))
            .max_concurrent_bidi_streams(streams.bidirectional.into())
            .max_concurrent_uni_streams(streams.unidirectional.into())
            .stream_receive_window(stream_window.into())
            .receive_window(self.connection_window.into())
            .send_window(MAX_WINDOW.into())
            .send_fairness(false)
            .datagram_receive_buffer_size(None)
            .initial_rtt(Duration::from_millis(20));
        match self.congestion {
            Congestion::Bbr => {
                config.congestion_controller_factory(Arc::new(BbrFactory { ack_every: self.ack_every }));
            }
            Congestion::Cubic => {
                let mut cubic = CubicConfig::default();
                // Paths here are short and fast: what starts slowly only starts late.
                cubic.initial_window(u64::from(self.connection_window) / 4);
                config.congestion_controller_factory(Arc::new(cubic));
            }
        }
        if self.ack_every > 1 {
            let mut acks = AckFrequencyConfig::default();
            acks.ack_eliciting_threshold(VarInt::from_u32(self.ack_every));
            config.ack_frequency_config(Some(acks));
        }
        if local || self.mtu_is_known {
            let mtu = if local { self.loopback_mtu } else { self.mtu };
            config.initial_mtu(mtu).min_mtu(mtu).mtu_discovery_config(None);
        } else {
            let mut discovery = MtuDiscoveryConfig::default();
            discovery.upper_bound(self.mtu);
            config.mtu_discovery_config(Some(discovery));
        }
        config
    }
}

/// Dials from a [`bare_endpoint`].
type Dial = Box<dyn Fn(SocketAddr) -> Result<Connecting, quinn::ConnectError> + Send>;

/// An endpoint as the data plane has it, and how to dial from it, without anything of the transport on top: for
/// measuring what that costs. Call inside a tokio runtime.
///
/// # Errors
/// When the address cannot be had, or a setting is out of bounds.
#[doc(hidden)]
pub fn bare_endpoint(
    addr: SocketAddr,
    identity: &Identity,
    tuning: &Tuning,
) -> Result<(Endpoint, Dial), BindError> {
    let bound = Bound::new(addr, identity, tuning, crate::quic::STREAMS)?;
    Ok((bound.endpoint.clone(), Box::new(move |to| bound.connect(to))))
}

impl Bound {
    /// Binds within the caller's tokio runtime, which then drives the endpoint.
    pub(crate) fn new(
        addr: SocketAddr,
        identity: &Identity,
        tuning: &Tuning,
        streams: Streams,
    ) -> Result<Bound, BindError> {
        tuning.check()?;
        let tls = |e: &dyn std::fmt::Display| BindError::Tls(e.to_string());
        let client = identity.client_config(streams.protocol).map_err(|e| tls(&e))?;
        let client = Arc::new(QuicClientConfig::try_from(client).map_err(|e| tls(&e))?);
        let server = identity.server_config(streams.protocol).map_err(|e| tls(&e))?;
        let server = Arc::new(QuicServerConfig::try_from(server).map_err(|e| tls(&e))?);
        let mut server = ServerConfig::with_crypto(server);
        server.migration(false).max_incoming(1024);
        let remote = Arc::new(tuning.transport(streams, false));
        let local = Arc::new(tuning.transport(streams, true));

        let largest = tuning.mtu.max(tuning.loopback_mtu);
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(largest).map_err(|_| BindError::Setting {
            name: "mtu",
            value: largest.to_string(),
            allowed: MTU_RANGE,
        })?;
        let bind = |source| BindError::Bind { addr, source };
        let socket = open_socket(addr, tuning.socket_buffer).map_err(bind)?;
        let inner = TokioRuntime.wrap_udp_socket(socket).map_err(bind)?;
        let socket = Arc::new(CappedSocket { inner, largest: usize::from(largest) });
        let endpoint =
            Endpoint::new_with_abstract_socket(config, Some(server.clone()), socket, Arc::new(TokioRuntime))
                .map_err(bind)?;
        Ok(Bound { endpoint, tls: client, server, local, remote, silence: tuning.silence() })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    fn transport_to(&self, ip: IpAddr) -> Arc<TransportConfig> {
        Arc::clone(if ip.is_loopback() { &self.local } else { &self.remote })
    }

    pub(crate) fn connect(&self, addr: SocketAddr) -> Result<Connecting, quinn::ConnectError> {
        let mut config = ClientConfig::new(Arc::clone(&self.tls) as _);
        config.transport_config(self.transport_to(addr.ip()));
        self.endpoint.connect_with(config, addr, SERVER_NAME)
    }

    pub(crate) fn accept(&self, incoming: Incoming) -> Result<Connecting, quinn::ConnectionError> {
        let mut config = self.server.clone();
        config.transport_config(self.transport_to(incoming.remote_address().ip()));
        incoming.accept_with(Arc::new(config))
    }
}

fn open_socket(addr: SocketAddr, buffer: usize) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    // The kernel caps these silently; less than asked for costs speed and nothing else.
    let _ = socket.set_recv_buffer_size(buffer);
    let _ = socket.set_send_buffer_size(buffer);
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Keeps batches within what one send can carry: ten segments (quinn's batch) of a large MTU exceed 64 KiB,
/// and the failed send would look like loss.
#[derive(Debug)]
struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    largest: usize,
}

/// The longest UDP payload over IPv4.
const MAX_DATAGRAM: usize = 65_507;

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(MAX_DATAGRAM / self.largest).max(1)
    }

    /// Sizes the receive buffer, as segments of the largest payload: all that the kernel merges fits in
    /// 64 KiB, however many segments that is.
    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments().min((64usize << 10).div_ceil(self.largest)).max(1)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
