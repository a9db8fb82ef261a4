//! What both ends of a new connection say first: who they are, and which connection stays when both dialled.
//!
//! On the connection's first stream: the dialler's [`Hello`], the answerer's [`Hello`], the dialler's
//! confirmation with the last life that it saw end, the answerer's verdict. A pair of nodes has one life at a
//! time in each plane; [`admits`] decides between two. On the first connection of the data plane there follow
//! the answerer's [`Offers`], and, once all other connections and lanes are made, the dialler's [`Choice`] of
//! paths and the answerer's word that the life has begun. This stream stays open: when the lanes of a life have
//! failed, the dialler asks on it for more ([`Exchange::ask_for_lanes`]), and offers, choice and word follow again.

use crate::identity::node_id;
use crate::net::lane::{Generation, Path};
use crate::{nccl, shm, tls};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use tandem_proto::ids::NodeId;

/// The version of everything below the messages: handshake, framing, write headers.
pub(crate) const VERSION: u16 = 3;

const MAGIC: [u8; 4] = *b"tndm";
const HELLO_BYTES: usize = 4 + 2 + 8 + 8 + 2 + 2 + 2 * MAX_PORTS;

/// The most sockets that a node's data plane has.
pub(crate) const MAX_PORTS: usize = 16;

/// Why a connection was closed, on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum CloseCode {
    /// The node closed it, or stopped.
    Goodbye = 0,
    /// It is not needed: another one is kept.
    Settled = 1,
    /// The other side broke the rules.
    Rules = 2,
}

impl From<CloseCode> for VarInt {
    fn from(code: CloseCode) -> VarInt {
        VarInt::from_u32(code as u32)
    }
}

/// How each side introduces itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Hello {
    /// What makes a node id of the sender's public key. The id itself is not said, so that nobody can say another's.
    pub(crate) nonce: u64,
    /// Drawn by the dialler; names this connection, or all connections of one life.
    pub(crate) life: u64,
    /// Which of the life's connections this is.
    pub(crate) part: u16,
    /// How many it has.
    pub(crate) parts: u16,
    /// The UDP ports of the sender's data plane; 0 marks the end.
    pub(crate) ports: [u16; MAX_PORTS],
}

/// Why two nodes do not understand each other.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("the peer left during the handshake: {0}")]
    Read(#[from] quinn::ReadExactError),
    #[error("the peer left during the handshake: {0}")]
    Write(#[from] quinn::WriteError),
    #[error("its certificate gives no node id: {0}")]
    Certificate(String),
    #[error("it does not speak this protocol")]
    Magic,
    #[error("its offers make no sense")]
    Offers,
    #[error("it wants lanes that are not to be had here")]
    Choice,
    #[error("it speaks transport version {0}, this build speaks {VERSION}: run the same build everywhere")]
    Version(u16),
}

impl Hello {
    pub(crate) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&self.nonce.to_le_bytes());
        put(&self.life.to_le_bytes());
        put(&self.part.to_le_bytes());
        put(&self.parts.to_le_bytes());
        self.ports.iter().for_each(|port| put(&port.to_le_bytes()));
        out
    }

    pub(crate) fn fuzz(bytes: &[u8]) {
        if let Some(bytes) = bytes.first_chunk()
            && let Ok(hello) = Hello::decode(bytes)
        {
            assert_eq!(hello.encode(), *bytes);
        }
    }

    pub(crate) fn sample() -> Vec<u8> {
        Hello { nonce: 7, life: 8, part: 1, parts: 2, ports: [9; MAX_PORTS] }.encode().to_vec()
    }

    fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, HandshakeError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u64_at = |at: usize| {
            let mut raw = [0; 8];
            raw.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(raw)
        };
        if bytes[..4] != MAGIC {
            return Err(HandshakeError::Magic);
        }
        if u16_at(4) != VERSION {
            return Err(HandshakeError::Version(u16_at(4)));
        }
        Ok(Hello {
            nonce: u64_at(6),
            life: u64_at(14),
            part: u16_at(22),
            parts: u16_at(24),
            ports: std::array::from_fn(|i| u16_at(26 + 2 * i)),
        })
    }
}

/// The most bytes of [`Offers`] on the wire.
const MAX_OFFERS: usize = 1024;

/// How else the answerer can be reached, for this life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Offers {
    /// Whoever makes a lane shows it.
    pub(crate) secret: [u8; 32],
    pub(crate) cuda_ipc: Option<shm::GpuOffer>,
    pub(crate) shm: Option<shm::Offer>,
    pub(crate) nccl: Option<nccl::Offer>,
    pub(crate) tls: Option<tls::Offer>,
    /// Queue pairs, as `rdma::Offer` encodes them; empty if there are devices and none can be used now. The dialler
    /// answers with its own, or nothing.
    pub(crate) rdma: Option<Vec<u8>>,
}

impl Offers {
    fn encode(&self) -> Vec<u8> {
        let mut out = self.secret.to_vec();
        let cuda_ipc = self.cuda_ipc.as_ref().map(|offer| (Path::CudaIpc, offer.encode()));
        let shm = self.shm.as_ref().map(|offer| (Path::Shm, offer.encode()));
        let nccl = self.nccl.as_ref().map(|offer| (Path::Nccl, offer.encode()));
        let tls = self.tls.as_ref().map(|offer| (Path::Tls, offer.encode()));
        let rdma = self.rdma.as_ref().map(|offer| (Path::Rdma, offer.clone()));
        for (path, bytes) in [cuda_ipc, shm, nccl, tls, rdma].into_iter().flatten() {
            out.push(path.code());
            out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
            out.extend_from_slice(&bytes);
        }
        out
    }

    /// Offers of paths that are not known here are passed over. None if the bytes are no offers.
    fn decode(bytes: &[u8]) -> Option<Offers> {
        let (secret, mut rest) = bytes.split_first_chunk()?;
        let mut offers =
            Offers { secret: *secret, cuda_ipc: None, shm: None, nccl: None, tls: None, rdma: None };
        while let Some((&code, after)) = rest.split_first() {
            let (len, after) = after.split_first_chunk()?;
            let (offer, after) = after.split_at_checked(u16::from_le_bytes(*len).into())?;
            match Path::of_code(code) {
                Some(Path::CudaIpc) => offers.cuda_ipc = Some(shm::GpuOffer::decode(offer)?),
                Some(Path::Shm) => offers.shm = Some(shm::Offer::decode(offer)?),
                Some(Path::Nccl) => offers.nccl = Some(nccl::Offer::decode(offer)?),
                Some(Path::Tls) => offers.tls = Some(tls::Offer::decode(offer)?),
                Some(Path::Rdma) => offers.rdma = Some(offer.to_vec()),
                Some(Path::Quic) | None => {}
            }
            rest = after;
        }
        Some(offers)
    }

    pub(crate) fn fuzz(bytes: &[u8]) {
        if let Some(offers) = Offers::decode(bytes) {
            assert_eq!(Offers::decode(&offers.encode()), Some(offers));
        }
    }

    pub(crate) fn sample() -> Vec<u8> {
        let shm = shm::Offer { host: [7; 16], name: b"tandem-1".to_vec() };
        let cuda_ipc = Some(shm::GpuOffer { socket: shm.clone(), gpu: [5; 16] });
        let tls = Some(tls::Offer { port: 4711, connections: 3 });
        let nccl = nccl::Offer { port: 5, host: [7; 16], gpu: [5; 16], version: 6, rdma: true, named: false };
        let (shm, nccl, rdma) = (Some(shm), Some(nccl), Some(vec![1; 58]));
        Offers { secret: [3; 32], cuda_ipc, shm, nccl, tls, rdma }.encode()
    }
}

/// The longest text of a [`Choice`], in bytes.
const MAX_WHY: usize = 512;

/// What the dialler makes of the offers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Choice {
    /// The paths that writes may take, the best first.
    pub(crate) paths: Vec<Path>,
    /// Why not a better one: one line.
    pub(crate) why: String,
}

impl Choice {
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.paths.len() as u8];
        out.extend(self.paths.iter().map(|path| path.code()));
        let cut = self.why.floor_char_boundary(MAX_WHY);
        out.extend_from_slice(&(cut as u16).to_le_bytes());
        out.extend_from_slice(&self.why.as_bytes()[..cut]);
        out
    }

    fn decode(codes: &[u8], why: &[u8]) -> Option<Choice> {
        let paths: Option<Vec<Path>> = codes.iter().map(|code| Path::of_code(*code)).collect();
        // It goes to the log as it is.
        let why = String::from_utf8_lossy(why).replace(char::is_control, " ");
        Some(Choice { paths: paths?, why })
    }

    pub(crate) fn fuzz(bytes: &[u8]) {
        let (codes, why) = bytes.split_at(bytes.len() / 2);
        if let Some(choice) = Choice::decode(codes, why) {
            assert!(!choice.why.contains(char::is_control));
        }
    }
}

/// A handshake under way, on the connection's first stream.
pub(crate) struct Exchange {
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
    /// Who is there: whoever has the key of the certificate that the connection began with.
    pub(crate) node: NodeId,
    /// The other side's introduction.
    pub(crate) peer: Hello,
}

impl Exchange {
    /// The dialler's beginning.
    pub(crate) async fn dial(connection: &Connection, local: &Hello) -> Result<Exchange, HandshakeError> {
        let (mut send, mut recv) = connection.open_bi().await?;
        send.write_all(&local.encode()).await?;
        let peer = read_hello(&mut recv).await?;
        Ok(Exchange { send, recv, node: node_of(connection, &peer)?, peer })
    }

    /// The answerer's beginning.
    pub(crate) async fn answer(connection: &Connection, local: &Hello) -> Result<Exchange, HandshakeError> {
        let (mut send, mut recv) = connection.accept_bi().await?;
        let peer = read_hello(&mut recv).await?;
        send.write_all(&local.encode()).await?;
        Ok(Exchange { send, recv, node: node_of(connection, &peer)?, peer })
    }

    /// The dialler's decision for this connection, and the answerer's verdict on it.
    pub(crate) async fn confirm(&mut self, last_ended: u64) -> Result<bool, HandshakeError> {
        self.send.write_all(&last_ended.to_le_bytes()).await?;
        let mut verdict = [0];
        self.recv.read_exact(&mut verdict).await?;
        Ok(verdict == [1])
    }

    /// The last life that the dialler saw end.
    pub(crate) async fn confirmation(&mut self) -> Result<u64, HandshakeError> {
        let mut last_ended = [0; 8];
        self.recv.read_exact(&mut last_ended).await?;
        Ok(u64::from_le_bytes(last_ended))
    }

    pub(crate) async fn offer(&mut self, offers: &Offers) -> Result<(), HandshakeError> {
        let bytes = offers.encode();
        self.send.write_all(&(bytes.len() as u16).to_le_bytes()).await?;
        Ok(self.send.write_all(&bytes).await?)
    }

    pub(crate) async fn offers(&mut self) -> Result<Offers, HandshakeError> {
        let mut len = [0; 2];
        self.recv.read_exact(&mut len).await?;
        let len = usize::from(u16::from_le_bytes(len));
        if len > MAX_OFFERS {
            return Err(HandshakeError::Offers);
        }
        let mut bytes = vec![0; len];
        self.recv.read_exact(&mut bytes).await?;
        Offers::decode(&bytes).ok_or(HandshakeError::Offers)
    }

    /// The dialler's queue pairs, if any were offered: nothing if it wants none.
    pub(crate) async fn answer_rdma(&mut self, answer: &[u8]) -> Result<(), HandshakeError> {
        self.send.write_all(&(answer.len() as u16).to_le_bytes()).await?;
        Ok(self.send.write_all(answer).await?)
    }

    #[cfg(feature = "rdma")]
    pub(crate) async fn rdma_answer(&mut self) -> Result<Vec<u8>, HandshakeError> {
        let mut len = [0; 2];
        self.recv.read_exact(&mut len).await?;
        let len = usize::from(u16::from_le_bytes(len));
        if len > MAX_OFFERS {
            return Err(HandshakeError::Offers);
        }
        let mut bytes = vec![0; len];
        self.recv.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    /// The dialler's choice, answered when the answerer's lanes carry writes: whether they do.
    pub(crate) async fn choose(&mut self, choice: &Choice) -> Result<bool, HandshakeError> {
        self.send.write_all(&choice.encode()).await?;
        let mut begun = [0];
        self.recv.read_exact(&mut begun).await?;
        Ok(begun == [1])
    }

    /// The dialler's choice.
    pub(crate) async fn chosen(&mut self) -> Result<Choice, HandshakeError> {
        let mut count = [0];
        self.recv.read_exact(&mut count).await?;
        let mut codes = vec![0; usize::from(count[0])];
        self.recv.read_exact(&mut codes).await?;
        let mut len = [0; 2];
        self.recv.read_exact(&mut len).await?;
        let len = usize::from(u16::from_le_bytes(len));
        if len > MAX_WHY {
            return Err(HandshakeError::Choice);
        }
        let mut why = vec![0; len];
        self.recv.read_exact(&mut why).await?;
        Choice::decode(&codes, &why).ok_or(HandshakeError::Choice)
    }

    pub(crate) async fn begun(&mut self, begun: bool) -> Result<(), HandshakeError> {
        Ok(self.send.write_all(&[u8::from(begun)]).await?)
    }

    /// The dialler wants lanes of this generation: those up to `failed` are over.
    pub(crate) async fn ask_for_lanes(
        &mut self,
        generation: Generation,
        failed: Generation,
    ) -> Result<(), HandshakeError> {
        let mut asked = [0; 8];
        asked[..4].copy_from_slice(&generation.0.to_le_bytes());
        asked[4..].copy_from_slice(&failed.0.to_le_bytes());
        Ok(self.send.write_all(&asked).await?)
    }

    /// The generation that the dialler wants, and the last that has failed there. Comes when it may, as long as the
    /// session lasts.
    pub(crate) async fn asked_for_lanes(&mut self) -> Result<(Generation, Generation), HandshakeError> {
        let mut asked = [0; 8];
        self.recv.read_exact(&mut asked).await?;
        let [a, b, c, d, e, f, g, h] = asked;
        Ok((Generation(u32::from_le_bytes([a, b, c, d])), Generation(u32::from_le_bytes([e, f, g, h]))))
    }

    pub(crate) async fn verdict(&mut self, admitted: bool) -> Result<(), HandshakeError> {
        Ok(self.send.write_all(&[u8::from(admitted)]).await?)
    }
}

fn node_of(connection: &Connection, peer: &Hello) -> Result<NodeId, HandshakeError> {
    let none = || HandshakeError::Certificate("there is none".into());
    let shown = connection.peer_identity().ok_or_else(none)?;
    let chain = shown.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| none())?;
    let certificate = chain.first().ok_or_else(none)?;
    node_id(certificate, peer.nonce).map_err(|error| HandshakeError::Certificate(error.to_string()))
}

async fn read_hello(recv: &mut RecvStream) -> Result<Hello, HandshakeError> {
    let mut bytes = [0; HELLO_BYTES];
    recv.read_exact(&mut bytes).await?;
    Hello::decode(&bytes)
}

/// What the answerer has with the dialler already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    Nothing,
    /// It dials too, and has `confirmed` if it has sent its confirmation.
    Dialling {
        confirmed: bool,
    },
    /// There is a life, as far as the answerer knows.
    Life {
        life: u64,
        dialled_here: bool,
    },
}

/// Whether the answerer admits a confirmed connection; what it has gives way then. Both sides come to the
/// same end, whatever crosses on the way: the smaller id's dial wins.
pub(crate) fn admits(local: NodeId, dialler: NodeId, standing: Standing, last_ended: u64) -> bool {
    match standing {
        Standing::Nothing | Standing::Dialling { confirmed: false } => true,
        // Both verdicts are open: each side decides for the same one.
        Standing::Dialling { confirmed: true } => dialler < local,
        // It would not dial if it had what it dialled before.
        Standing::Life { dialled_here: false, .. } => true,
        // It admitted what was dialled here. Either that has ended for it since, or its confirmation is older
        // than that.
        Standing::Life { life, dialled_here: true } => last_ended == life,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_survives_the_wire() {
        let hello = Hello { nonce: u64::MAX - 1, life: 42, part: 3, parts: 9, ports: [7; MAX_PORTS] };
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
        let mut other = hello.encode();
        other[4] = 9;
        assert!(matches!(Hello::decode(&other), Err(HandshakeError::Version(9))));
        other[0] = 0;
        assert!(matches!(Hello::decode(&other), Err(HandshakeError::Magic)));
    }

    #[test]
    fn offers_survive_the_wire() {
        let shm = shm::Offer { host: [7; 16], name: b"tandem-1".to_vec() };
        let gpu = shm::GpuOffer { socket: shm.clone(), gpu: [5; 16] };
        let tls = tls::Offer { port: 4711, connections: 3 };
        let rdma = vec![1, 2, 3];
        let nccl = nccl::Offer { port: 5, host: [7; 16], gpu: [5; 16], version: 6, rdma: false, named: true };
        let all = [
            (None, None, None, Some(tls), None),
            (Some(gpu.clone()), Some(shm.clone()), Some(nccl), None, Some(rdma.clone())),
            (Some(gpu), Some(shm), Some(nccl), Some(tls), Some(rdma)),
        ];
        for (cuda_ipc, shm, nccl, tls, rdma) in all {
            let offers = Offers { secret: [3; 32], cuda_ipc, shm, nccl, tls, rdma };
            assert_eq!(Offers::decode(&offers.encode()), Some(offers.clone()));
            // Of a later build.
            let more = [offers.encode(), vec![200, 2, 0, 1, 1]].concat();
            assert_eq!(Offers::decode(&more), Some(offers));
        }
        assert_eq!(Offers::decode(&[0; 31]), None);
        assert_eq!(Offers::decode(&[0; 34]), None);
    }

    #[test]
    fn choices_survive_the_wire_and_are_one_line_each() {
        let choice = Choice { paths: vec![Path::Tls, Path::Quic], why: "shm: another host".into() };
        let bytes = choice.encode();
        assert_eq!(bytes[..3], [2, Path::Tls.code(), Path::Quic.code()]);
        assert_eq!(Choice::decode(&bytes[1..3], &bytes[5..]), Some(choice));
        assert_eq!(Choice::decode(&[], "a\n\u{1b}b".as_bytes()).unwrap().why, "a  b");
        assert_eq!(Choice::decode(&[0], &[]), None);
        let long = Choice { paths: Vec::new(), why: "ä".repeat(MAX_WHY) };
        assert_eq!(long.encode().len(), 3 + MAX_WHY);
    }

    /// Both dial at once; the confirmations and verdicts cross in every order.
    #[test]
    fn both_sides_keep_the_same_connection() {
        let (small, large) = (NodeId(1), NodeId(2));
        let both = Standing::Dialling { confirmed: true };
        assert!(admits(large, small, both, 0));
        assert!(!admits(small, large, both, 0));
        // The large one admitted the small one's dial (life 5); its own confirmation arrives late.
        assert!(!admits(small, large, Standing::Life { life: 5, dialled_here: true }, 0));
        // It saw life 5 end, and dials anew.
        assert!(admits(small, large, Standing::Life { life: 5, dialled_here: true }, 5));
        // The dialler of what is kept dials again: it must have lost it.
        assert!(admits(large, small, Standing::Life { life: 5, dialled_here: false }, 0));
    }
}
