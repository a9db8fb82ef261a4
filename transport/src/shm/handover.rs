//! The Unix socket of a lane: how it is made, how memory is handed over, how a sleeper is woken, and how the
//! end of the peer's process is noticed.
//!
//! The socket has an abstract name: nothing of it is left in any file system, however a process ends.

use super::{Error, VERSION};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind,
    connect, listen, recvmsg, sendmsg, shutdown, socket_with,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use tandem_proto::ids::NodeId;

/// How long the other side may take to answer while a lane is made.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// Lanes that wait to be accepted, at most.
const BACKLOG: i32 = 64;
const MAX_NAME: usize = 64;
const MAX_MESSAGE: usize = 128;

/// How a lane can be made to a node: told over the authenticated connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    /// Names the host as long as it runs.
    pub(crate) host: [u8; 16],
    /// The socket's abstract name.
    pub(crate) name: Vec<u8>,
}

impl Offer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [&self.host[..], &self.name].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Offer> {
        let (host, name) = bytes.split_first_chunk()?;
        (1..=MAX_NAME).contains(&name.len()).then(|| Offer { host: *host, name: name.to_vec() })
    }
}

/// How a lane between GPUs can be made to a node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct GpuOffer {
    pub(crate) socket: Offer,
    /// Names the GPU that the node's memory is on.
    pub(crate) gpu: [u8; 16],
}

impl GpuOffer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [&self.gpu[..], &self.socket.encode()].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<GpuOffer> {
        let (gpu, socket) = bytes.split_first_chunk()?;
        Some(GpuOffer { socket: Offer::decode(socket)?, gpu: *gpu })
    }
}

/// What goes over the socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Message {
    /// The dialler's first; the queues' memory comes with it. For a lane between GPUs it names its own.
    Join { node: NodeId, life: u64, secret: [u8; 32], gpu: Option<[u8; 16]> },
    /// The answer to it.
    Welcome,
    /// Memory that writes will be read from comes with it.
    Region { serial: u32, len: u64 },
    /// Something is in the queues.
    Wake,
    /// As `Region`, of a GPU: what opens it.
    GpuRegion { serial: u32, len: u64, handle: [u8; 64] },
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![match self {
            Message::Join { .. } => 1,
            Message::Welcome => 2,
            Message::Region { .. } => 3,
            Message::Wake => 4,
            Message::GpuRegion { .. } => 5,
        }];
        match self {
            Message::Join { node, life, secret, gpu } => {
                out.extend_from_slice(&VERSION.to_le_bytes());
                out.extend_from_slice(&node.0.to_le_bytes());
                out.extend_from_slice(&life.to_le_bytes());
                out.extend_from_slice(secret);
                out.extend_from_slice(gpu.as_ref().map_or(&[], |gpu| gpu));
            }
            Message::Region { serial, len } => {
                out.extend_from_slice(&serial.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
            }
            Message::GpuRegion { serial, len, handle } => {
                out.extend_from_slice(&serial.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(handle);
            }
            Message::Welcome | Message::Wake => {}
        }
        out
    }

    /// None if it is no message of this version.
    pub(super) fn decode(bytes: &[u8]) -> Option<Message> {
        let (kind, rest) = bytes.split_first()?;
        match kind {
            1 => {
                let (version, rest) = rest.split_first_chunk()?;
                let (node, rest) = rest.split_first_chunk()?;
                let (life, rest) = rest.split_first_chunk()?;
                let (secret, rest) = rest.split_first_chunk()?;
                let gpu = if rest.is_empty() { None } else { Some(rest.try_into().ok()?) };
                (u16::from_le_bytes(*version) == VERSION).then(|| Message::Join {
                    node: NodeId(u64::from_le_bytes(*node)),
                    life: u64::from_le_bytes(*life),
                    secret: *secret,
                    gpu,
                })
            }
            3 => {
                let (serial, rest) = rest.split_first_chunk()?;
                let len = rest.try_into().ok()?;
                Some(Message::Region { serial: u32::from_le_bytes(*serial), len: u64::from_le_bytes(len) })
            }
            5 => {
                let (serial, rest) = rest.split_first_chunk()?;
                let (len, rest) = rest.split_first_chunk()?;
                let (serial, len) = (u32::from_le_bytes(*serial), u64::from_le_bytes(*len));
                Some(Message::GpuRegion { serial, len, handle: rest.try_into().ok()? })
            }
            2 if rest.is_empty() => Some(Message::Welcome),
            4 if rest.is_empty() => Some(Message::Wake),
            _ => None,
        }
    }
}

/// What is decoded is what would be encoded.
pub(super) fn fuzz(bytes: &[u8]) {
    if let Some(message) = Message::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
    if let Some(offer) = Offer::decode(bytes) {
        assert_eq!(offer.encode(), bytes);
    }
    if let Some(offer) = GpuOffer::decode(bytes) {
        assert_eq!(offer.encode(), bytes);
    }
}

/// Of each, one to be damaged by fuzzing.
pub(super) fn samples() -> Vec<Vec<u8>> {
    let messages = [
        Message::Join { node: NodeId(5), life: 6, secret: [9; 32], gpu: None },
        Message::Join { node: NodeId(5), life: 6, secret: [9; 32], gpu: Some([8; 16]) },
        Message::GpuRegion { serial: 3, len: 1 << 30, handle: [7; 64] },
        Message::Welcome,
        Message::Region { serial: 3, len: 1 << 30 },
        Message::Wake,
    ];
    let offer = Offer { host: [7; 16], name: b"tandem-1".to_vec() };
    let gpu = GpuOffer { socket: offer.clone(), gpu: [6; 16] };
    messages.iter().map(Message::encode).chain([offer.encode(), gpu.encode()]).collect()
}

/// Takes lanes of other processes of this host.
pub(crate) struct Listener {
    socket: OwnedFd,
    offer: Offer,
}

impl Listener {
    /// Listens under a name that nobody else has.
    pub(crate) fn new(node: NodeId) -> Result<Listener, Error> {
        let host = host()?;
        let salt = getrandom::u64().map_err(|e| Error::System(e.to_string()))?;
        let name = format!("tandem-{node}-{salt:016x}").into_bytes();
        let socket = new_socket()?;
        let address = SocketAddrUnix::new_abstract_name(&name).map_err(system)?;
        bind(&socket, &address).map_err(system)?;
        listen(&socket, BACKLOG).map_err(system)?;
        Ok(Listener { socket, offer: Offer { host, name } })
    }

    pub(crate) fn offer(&self) -> Offer {
        self.offer.clone()
    }

    /// The next lane on its way; None when the listener was stopped.
    pub(super) fn accept(&self) -> Option<Socket> {
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    let socket = Socket(socket);
                    match socket.check_user() {
                        Ok(()) => return Some(socket),
                        Err(error) => tracing::warn!(%error, "shared memory lane refused"),
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::INVAL) => return None,
                Err(error) => {
                    // Out of descriptors, as a rule: peers fall back to another path meanwhile.
                    tracing::warn!(%error, "cannot take shared memory lanes");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    pub(crate) fn stop(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

/// Names this host as long as it runs.
pub(crate) fn host() -> Result<[u8; 16], Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|e| Error::System(format!("{path}: {e}")))?;
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = digits.chunks_exact(2).map(byte).collect();
    let id = bytes.and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
    id.ok_or_else(|| Error::System(format!("{path} holds no id: {text:?}")))
}

fn new_socket() -> Result<OwnedFd, Error> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(system)
}

fn system(error: Errno) -> Error {
    Error::System(error.to_string())
}

/// One lane's socket.
pub(super) struct Socket(OwnedFd);

/// What came over a socket.
pub(super) enum Received {
    Message(Message, Option<OwnedFd>),
    Nothing,
    /// The peer's end is closed.
    End,
}

impl Socket {
    pub(super) fn connect(offer: &Offer) -> Result<Socket, Error> {
        if offer.host != host()? {
            return Err(Error::OtherHost);
        }
        let socket = Socket(new_socket()?);
        socket.be_patient()?;
        let address = SocketAddrUnix::new_abstract_name(&offer.name).map_err(system)?;
        connect(&socket.0, &address).map_err(Error::Connect)?;
        socket.check_user()?;
        Ok(socket)
    }

    /// From now on, sending and receiving take [`PATIENCE`] at most.
    pub(super) fn be_patient(&self) -> Result<(), Error> {
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&self.0, direction, Some(PATIENCE)).map_err(system)?;
        }
        Ok(())
    }

    /// Memory is shared between processes of one user only.
    fn check_user(&self) -> Result<(), Error> {
        let peer = socket_peercred(&self.0).map_err(system)?.uid;
        let own = rustix::process::geteuid();
        if peer == own { Ok(()) } else { Err(Error::OtherUser { peer: peer.as_raw(), own: own.as_raw() }) }
    }

    /// Sends, with a descriptor if there is one. Waits as long as the socket was told to, or not at all.
    pub(super) fn send(
        &self,
        message: &Message,
        file: Option<BorrowedFd<'_>>,
        wait: bool,
    ) -> Result<(), Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = file.map(|file| [file]);
        if let Some(files) = &files {
            ancillary.push(SendAncillaryMessage::ScmRights(files));
        }
        let flags = if wait { SendFlags::NOSIGNAL } else { SendFlags::NOSIGNAL | SendFlags::DONTWAIT };
        loop {
            match sendmsg(&self.0, &[IoSlice::new(&message.encode())], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(system(error)),
            }
        }
    }

    /// Receives. Waits as long as the socket was told to, or not at all.
    pub(super) fn receive(&self, wait: bool) -> Result<Received, Error> {
        let mut bytes = [0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags =
            if wait { RecvFlags::CMSG_CLOEXEC } else { RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT };
        let got = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::CONNRESET) => return Ok(Received::End),
                got => break got.map_err(system)?,
            }
        };
        // There may be room for more than one, by alignment. All of them are closed but the one that is returned.
        let mut files = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => files.collect(),
            _ => Vec::new(),
        });
        let (file, surplus) = (files.next(), files.next());
        if got.bytes == 0 {
            return Ok(Received::End);
        }
        if surplus.is_some() || got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(Error::Rule("a message is too long, or comes with too many descriptors"));
        }
        match Message::decode(&bytes[..got.bytes]) {
            Some(message) => Ok(Received::Message(message, file)),
            None => Err(Error::Rule("a message cannot be read")),
        }
    }

    /// Waits until something can be received or the peer is gone, for `at_most`.
    pub(super) fn wait(&self, at_most: Duration) {
        let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: at_most.subsec_nanos().into() };
        // Interrupted or not, the caller looks for itself.
        let _ = rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout));
    }

    /// Both sides see the end.
    pub(super) fn close(&self) {
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let messages = [
            Message::Join { node: NodeId(5), life: u64::MAX, secret: [9; 32], gpu: None },
            Message::Join { node: NodeId(5), life: u64::MAX, secret: [9; 32], gpu: Some([8; 16]) },
            Message::GpuRegion { serial: 3, len: 1 << 40, handle: [7; 64] },
            Message::Welcome,
            Message::Region { serial: 3, len: 1 << 40 },
            Message::Wake,
        ];
        for message in messages {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Some(message));
            assert!(bytes.len() < MAX_MESSAGE);
            assert_eq!(Message::decode(&[bytes, vec![0]].concat()), None);
        }
        assert_eq!(Message::decode(&[]), None);
    }

    #[test]
    fn a_socket_is_found_by_its_offer_and_carries_descriptors() {
        let listener = Listener::new(NodeId(1)).unwrap();
        let offer = listener.offer();
        assert!(matches!(Socket::connect(&Offer { host: [0; 16], ..offer.clone() }), Err(Error::OtherHost)));
        let nobody = Offer { name: b"tandem-nobody".to_vec(), ..offer.clone() };
        assert!(matches!(Socket::connect(&nobody), Err(Error::Connect(_))));
        let dialler = Socket::connect(&offer).unwrap();
        let answerer = listener.accept().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        dialler.send(&Message::Welcome, Some(file.as_fd()), true).unwrap();
        assert!(matches!(answerer.receive(true).unwrap(), Received::Message(Message::Welcome, Some(_))));
        assert!(matches!(answerer.receive(false).unwrap(), Received::Nothing));
        dialler.close();
        assert!(matches!(answerer.receive(true).unwrap(), Received::End));
        listener.stop();
        assert!(listener.accept().is_none());
    }
}
