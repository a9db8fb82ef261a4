//! How connections come to belong to a life: the dialler of the life dials them too, and shows the secret that
//! the answerer told it on the session.

#[cfg(feature = "cuda")]
use super::channel::Channel;
use super::frame::{Frame, Hello};
use super::handshake::{Deadline, Secured, Tls};
use super::incoming::Incoming;
use super::lane::TlsLane;
use super::outgoing::Outgoing;
use super::{MAX_CONNECTIONS, TlsError};
use crate::identity::Identity;
#[cfg(feature = "cuda")]
use crate::nccl;
use crate::net::handshakes::Handshakes;
use crate::net::lane::{Lane, Path};
use crate::net::life::Life;
use crate::net::node::Node;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const BACKLOG: i32 = 128;
/// How long the system is left alone when it has no more sockets.
const REST: Duration = Duration::from_millis(50);

/// How a lane can be made to a node: told over the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    pub(crate) port: u16,
    /// How many connections the answerer wants, at most.
    pub(crate) connections: u16,
}

impl Offer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [self.port.to_le_bytes(), self.connections.to_le_bytes()].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Offer> {
        let [a, b, c, d] = *bytes else { return None };
        let (port, connections) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let sensible = port > 0 && (1..=MAX_CONNECTIONS).contains(&usize::from(connections));
        sensible.then_some(Offer { port, connections })
    }
}

/// What is decoded is what would be encoded.
pub(super) fn fuzz(bytes: &[u8]) {
    if let Some(offer) = Offer::decode(bytes) {
        assert_eq!(offer.encode(), bytes);
    }
}

/// A connection whose peer has a certificate of the cluster.
pub(super) struct Joined {
    pub(super) socket: TcpStream,
    pub(super) incoming: Incoming,
    pub(super) outgoing: Outgoing,
}

impl Joined {
    pub(super) fn new(Secured { socket, sealer, opener }: Secured) -> Joined {
        Joined { socket, incoming: Incoming::new(opener), outgoing: Outgoing::new(sealer) }
    }

    /// Waits for one frame, which must be the one that `take` wants.
    pub(super) fn hear<T>(
        &mut self,
        deadline: Deadline,
        take: impl FnOnce(Frame<'_>) -> Option<T>,
    ) -> Result<T, TlsError> {
        loop {
            self.socket.set_read_timeout(Some(deadline.left("waiting for the peer's introduction")?))?;
            if let Some(content) = self.incoming.hear(&self.socket)? {
                let frame = Frame::decode(content).and_then(take);
                return frame.ok_or(TlsError::Rule("its first words are not those of this protocol"));
            }
        }
    }
}

pub(super) fn say(
    socket: &TcpStream,
    outgoing: &mut Outgoing,
    frame: &Frame<'_>,
    deadline: Deadline,
) -> Result<(), TlsError> {
    socket.set_write_timeout(Some(deadline.left("introducing this node")?))?;
    outgoing.say(socket, frame)
}

/// Adds one connection to a life that was dialled here. Takes half the time that connecting may, so that there
/// is time for another path.
pub(crate) fn dial(node: &Node, life: &Life, addr: SocketAddr, secret: &[u8; 32]) -> Result<(), TlsError> {
    let Some(listener) = node.tls() else { return Err(TlsError::NotHere) };
    let deadline = Deadline::after(node.config.connect_timeout / 2);
    let mut joined = Joined::new(listener.tls.dial(addr, deadline)?);
    let hello = Hello { node: node.local(), life: life.number, secret: *secret };
    say(&joined.socket, &mut joined.outgoing, &Frame::Hello(hello), deadline)?;
    joined.hear(deadline, |frame| matches!(frame, Frame::Welcome).then_some(()))?;
    let lane = TlsLane::new(life.new_lane_id(secret).ok_or(TlsError::Gone)?, joined)?;
    if life.attach_lane(lane) { Ok(()) } else { Err(TlsError::Gone) }
}

/// Takes TLS connections.
pub(crate) struct Listener {
    socket: TcpListener,
    port: u16,
    pub(super) tls: Tls,
    handshakes: Arc<Handshakes>,
}

impl Listener {
    /// Listens on the port that `addr` names, where it is free, and else on any.
    pub(crate) fn new(addr: SocketAddr, identity: &Identity) -> Result<Listener, TlsError> {
        let tls = Tls::new(identity)?;
        let socket = match listen(addr) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => listen(SocketAddr::new(addr.ip(), 0)),
            socket => socket,
        }
        .map_err(|source| TlsError::Listen { addr, source })?;
        let port = socket.local_addr()?.port();
        Ok(Listener { socket, port, tls, handshakes: Arc::default() })
    }

    pub(crate) fn offer(&self, connections: usize) -> Offer {
        Offer { port: self.port, connections: connections.min(MAX_CONNECTIONS) as u16 }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn stop(&self) {
        // Ends the blocking accept.
        let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
    }
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // A restarted node finds its port again while old connections linger.
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Takes connections until the listener is stopped.
pub(crate) fn accept(node: &Arc<Node>) {
    let Some(listener) = node.tls() else { return };
    loop {
        let place = Handshakes::place(&listener.handshakes, node.config.connect_timeout);
        let (socket, from) = match listener.socket.accept() {
            Ok(accepted) => accepted,
            // What `stop` makes of a listener.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) => {
                tracing::warn!(%error, "cannot take TLS connections");
                thread::sleep(REST);
                continue;
            }
        };
        let (node, tls) = (Arc::clone(node), listener.tls.clone());
        // Not one of the node's threads, which stopping waits for: a stranger may be slow.
        let admitting = thread::Builder::new().name("tls-join".into()).spawn(move || {
            let _place = place;
            if let Err(error) = admit(&node, &tls, socket) {
                tracing::warn!(%from, %error, "TLS connection refused");
            }
        });
        if let Err(error) = admitting {
            tracing::warn!(%from, %error, "refused: no thread for a TLS connection");
        }
    }
}

fn admit(node: &Node, tls: &Tls, socket: TcpStream) -> Result<(), TlsError> {
    let deadline = Deadline::after(node.config.connect_timeout);
    let mut joined = Joined::new(tls.answer(socket, deadline)?);
    let (hello, is_channel) = joined.hear(deadline, |frame| match frame {
        Frame::Hello(hello) => Some((hello, false)),
        Frame::Channel(hello) => Some((hello, true)),
        _ => None,
    })?;
    let (life, id) = node.life_of_lane(hello.node, hello.life, &hello.secret).ok_or(TlsError::Gone)?;
    if is_channel {
        #[cfg(feature = "cuda")]
        nccl::admit(node, &life, id, Channel::new(joined));
        #[cfg(feature = "cuda")]
        return Ok(());
        #[cfg(not(feature = "cuda"))]
        return Err(TlsError::Rule("it wants a lane that is not in this build (feature cuda)"));
    }
    if life.lanes_being_made(Path::Tls) >= MAX_CONNECTIONS {
        return Err(TlsError::Rule("it makes more connections than there may be"));
    }
    let lane = TlsLane::new(id, joined)?;
    if !life.attach_lane(Arc::clone(&lane) as Arc<dyn Lane>) {
        return Err(TlsError::Gone);
    }
    // Only now, so that the dialler never counts on a lane that is not in its place.
    let welcomed = lane.before_start(|socket, outgoing| say(socket, outgoing, &Frame::Welcome, deadline));
    if welcomed.is_err() {
        lane.close("its dialler is gone");
    }
    welcomed
}
