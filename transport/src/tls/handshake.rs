//! From a TCP connection to keys: mutual TLS 1.3 by rustls, then its secrets for the records of this lane.
//!
//! The handshake reads one record at a time and nothing beyond the last one it needs, so every later byte is
//! still in the socket when the keys change hands. No session tickets are sent, so none come in between.

use super::record::{MAX_CONTENT, Opener, Schedule, Sealer, SharedSchedule};
use super::{PROTOCOL, TlsError};
use crate::identity::{Identity, server_name};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedConnectionCommon, UnbufferedStatus};
use rustls::{AlertDescription, ClientConfig, ConnectionTrafficSecrets, ExtractedSecrets, ServerConfig};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The longest record of a handshake: TLS allows ciphertext this much more than its content.
const MAX_HANDSHAKE_RECORD: usize = 5 + MAX_CONTENT + 256;
/// A handshake takes fewer than ten.
const MAX_HANDSHAKE_RECORDS: usize = 64;

/// TLS as this lane speaks it, for both roles. Cheap to clone.
#[derive(Clone)]
pub(super) struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    pub(super) fn new(identity: &Identity) -> Result<Tls, rustls::Error> {
        let mut client = identity.client_config(PROTOCOL)?;
        let mut server = identity.server_config(PROTOCOL)?;
        client.enable_secret_extraction = true;
        server.enable_secret_extraction = true;
        Ok(Tls { client: Arc::new(client), server: Arc::new(server) })
    }

    /// Connects and proves who this is, before the deadline.
    pub(super) fn dial(&self, addr: SocketAddr, deadline: Deadline) -> Result<Secured, TlsError> {
        let socket = TcpStream::connect_timeout(&addr, deadline.left("connecting")?)
            .map_err(|source| TlsError::Connect { addr, source })?;
        let connection = UnbufferedClientConnection::new(Arc::clone(&self.client), server_name())?;
        secure(socket, connection, deadline)
    }

    /// Lets whoever connected prove who it is, before the deadline.
    pub(super) fn answer(&self, socket: TcpStream, deadline: Deadline) -> Result<Secured, TlsError> {
        secure(socket, UnbufferedServerConnection::new(Arc::clone(&self.server))?, deadline)
    }
}

/// A connection whose peer has a certificate of the cluster.
pub(super) struct Secured {
    pub(super) socket: TcpStream,
    pub(super) sealer: Sealer,
    pub(super) opener: Opener,
}

/// When a handshake has taken too long.
#[derive(Clone, Copy)]
pub(super) struct Deadline {
    at: Instant,
    within: Duration,
}

impl Deadline {
    pub(super) fn after(within: Duration) -> Deadline {
        Deadline { at: Instant::now() + within, within }
    }

    pub(super) fn left(&self, doing: &'static str) -> Result<Duration, TlsError> {
        match self.at.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(TlsError::TooLong { doing, within: self.within }),
        }
    }

    /// Fills `bytes` from the socket, however slowly they drip in, before the deadline.
    pub(super) fn read(&self, mut socket: &TcpStream, bytes: &mut [u8]) -> Result<(), TlsError> {
        let mut at = 0;
        while at < bytes.len() {
            socket.set_read_timeout(Some(self.left("waiting for the peer's handshake")?))?;
            match socket.read(&mut bytes[at..]) {
                Ok(0) => return Err(TlsError::Closed),
                Ok(read) => at += read,
                Err(e) if is_retry(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, mut socket: &TcpStream, mut bytes: &[u8]) -> Result<(), TlsError> {
        while !bytes.is_empty() {
            socket.set_write_timeout(Some(self.left("sending the handshake")?))?;
            match socket.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(e) if is_retry(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Whether a blocking call only ran into its timeout, or was interrupted.
pub(super) fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// What rustls has two of.
trait Role {
    type Data;
    fn common(&mut self) -> &mut UnbufferedConnectionCommon<Self::Data>;
    fn step<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn into_keys(self) -> Result<(ExtractedSecrets, SharedSchedule), rustls::Error>;
}

impl Role for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn common(&mut self) -> &mut UnbufferedConnectionCommon<Self::Data> {
        self
    }

    fn step<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, SharedSchedule), rustls::Error> {
        let (secrets, schedule) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Arc::new(Mutex::new(schedule))))
    }
}

impl Role for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn common(&mut self) -> &mut UnbufferedConnectionCommon<Self::Data> {
        self
    }

    fn step<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, SharedSchedule), rustls::Error> {
        let (secrets, schedule) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Arc::new(Mutex::new(schedule))))
    }
}

impl<Data> Schedule for KernelConnection<Data>
where
    Data: Send,
{
    fn next_sealing(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_tx_secret()
    }

    fn next_opening(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_rx_secret()
    }
}

fn secure(socket: TcpStream, mut role: impl Role, deadline: Deadline) -> Result<Secured, TlsError> {
    socket.set_nodelay(true)?;
    shake_hands(&socket, &mut role, deadline)?;
    if role.common().alpn_protocol() != Some(PROTOCOL) {
        return Err(TlsError::Rule("it speaks another protocol over TLS"));
    }
    let (secrets, schedule) = role.into_keys()?;
    let sealer = Sealer::new(secrets.tx, Arc::clone(&schedule))?;
    let opener = Opener::new(secrets.rx, schedule)?;
    Ok(Secured { socket, sealer, opener })
}

/// Ends when this side has sent and received all that makes the handshake.
fn shake_hands(socket: &TcpStream, role: &mut impl Role, deadline: Deadline) -> Result<(), TlsError> {
    let mut incoming = Vec::new();
    let mut outgoing = Vec::new();
    let mut records = 0;
    loop {
        let UnbufferedStatus { discard, state } = role.step(&mut incoming);
        let mut wants_record = false;
        match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, &mut outgoing)?,
            Ok(ConnectionState::TransmitTlsData(data)) => {
                deadline.write(socket, &outgoing)?;
                outgoing.clear();
                data.done();
            }
            Ok(ConnectionState::BlockedHandshake) => wants_record = true,
            // An answerer may write before it knows who the dialler is; this one waits until it does.
            Ok(ConnectionState::WriteTraffic(_)) => wants_record = true,
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => return Err(TlsError::Closed),
            Ok(_) => return Err(TlsError::Rule("it sent data before the handshake was over")),
            Err(error) => {
                incoming.drain(..discard);
                say_why(socket, role, &mut incoming, deadline);
                return Err(match error {
                    rustls::Error::AlertReceived(alert) => TlsError::Alert(alert),
                    error => TlsError::Tls(error),
                });
            }
        }
        incoming.drain(..discard);
        if !role.common().is_handshaking() && wants_record {
            return Ok(());
        }
        if wants_record {
            records += 1;
            if records > MAX_HANDSHAKE_RECORDS {
                return Err(TlsError::Rule("its handshake does not end"));
            }
            read_record(socket, &mut incoming, deadline)?;
        }
    }
}

fn encode<Data>(
    data: &mut rustls::unbuffered::EncodeTlsData<'_, Data>,
    outgoing: &mut Vec<u8>,
) -> Result<(), TlsError> {
    let at = outgoing.len();
    let mut room = 4096;
    loop {
        outgoing.resize(at + room, 0);
        match data.encode(&mut outgoing[at..]) {
            Ok(written) => {
                outgoing.truncate(at + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) if needed.required_size > room => {
                room = needed.required_size;
            }
            Err(_) => return Err(TlsError::Keys),
        }
    }
}

/// Tells the peer why this side refuses it. It may be gone, and then does not need to know. rustls still looks
/// into what came in and was not used up.
fn say_why(socket: &TcpStream, role: &mut impl Role, incoming: &mut Vec<u8>, deadline: Deadline) {
    let mut alert = Vec::new();
    loop {
        let UnbufferedStatus { discard, state } = role.step(incoming);
        let Ok(ConnectionState::EncodeTlsData(mut data)) = state else { break };
        if encode(&mut data, &mut alert).is_err() {
            break;
        }
        incoming.drain(..discard);
    }
    let _ = deadline.write(socket, &alert);
}

/// Appends exactly one record.
fn read_record(socket: &TcpStream, incoming: &mut Vec<u8>, deadline: Deadline) -> Result<(), TlsError> {
    let mut header = [0; 5];
    deadline.read(socket, &mut header)?;
    let record = 5 + usize::from(u16::from_be_bytes([header[3], header[4]]));
    if record > MAX_HANDSHAKE_RECORD {
        return Err(TlsError::Rule("its bytes are no TLS record"));
    }
    let at = incoming.len();
    incoming.extend_from_slice(&header);
    incoming.resize(at + record, 0);
    deadline.read(socket, &mut incoming[at + 5..])
}

/// What an alert record says: why the peer ended the connection.
pub(super) fn alert(content: &[u8]) -> TlsError {
    match content {
        [_, 0] => TlsError::Closed,
        [_, description] => TlsError::Alert(AlertDescription::from(*description)),
        _ => TlsError::Rule("it sent an alert that is none"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::frame::Frame;
    use crate::tls::incoming::Incoming;
    use crate::tls::outgoing::Outgoing;
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
        date_time_ymd,
    };
    use rustls::client::ResolvesClientCert;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::sign::{CertifiedKey, SingleCertAndKey};
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    const WITHIN: Duration = Duration::from_secs(5);

    type Ca = CertifiedIssuer<'static, KeyPair>;

    fn ca() -> Ca {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "a CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn leaf() -> CertificateParams {
        let mut params = CertificateParams::new(vec!["tandem".to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params
    }

    /// TLS of a node that has a certificate of this CA.
    fn member(ca: &Ca) -> Tls {
        static DIRS: AtomicU64 = AtomicU64::new(0);
        let number = DIRS.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("tandem-tls-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let paths = ["ca", "leaf", "key"].map(|name| dir.join(name));
        let pems = [ca.pem(), leaf().signed_by(&key, ca).unwrap().pem(), key.serialize_pem()];
        for (path, pem) in paths.iter().zip(pems) {
            std::fs::write(path, pem).unwrap();
        }
        let identity = Identity::from_pem(&paths[0], &paths[1], &paths[2]).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        Tls::new(&identity).unwrap()
    }

    /// The same, but with another certificate.
    fn with_certificate(tls: &Tls, ca: &Ca, params: CertificateParams) -> Tls {
        let key = KeyPair::generate().unwrap();
        let leaf: CertificateDer<'static> = params.signed_by(&key, ca).unwrap().der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let certified = CertifiedKey::from_der(vec![leaf], key, tls.client.crypto_provider()).unwrap();
        let resolver = Arc::new(SingleCertAndKey::from(certified));
        let (mut client, mut server) = ((*tls.client).clone(), (*tls.server).clone());
        client.client_auth_cert_resolver = Arc::clone(&resolver) as _;
        server.cert_resolver = resolver;
        Tls { client: Arc::new(client), server: Arc::new(server) }
    }

    #[derive(Debug)]
    struct Nothing;

    impl ResolvesClientCert for Nothing {
        fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            None
        }

        fn has_certs(&self) -> bool {
            false
        }
    }

    fn without_certificate(tls: &Tls) -> Tls {
        let mut client = (*tls.client).clone();
        client.client_auth_cert_resolver = Arc::new(Nothing);
        Tls { client: Arc::new(client), server: Arc::clone(&tls.server) }
    }

    fn with_protocol(tls: &Tls, protocols: &[&[u8]]) -> Tls {
        let mut client = (*tls.client).clone();
        client.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Tls { client: Arc::new(client), server: Arc::clone(&tls.server) }
    }

    /// Both ends' outcomes; that of the dialler is known when it has heard the answerer's first word.
    fn meet(dialler: &Tls, answerer: &Tls) -> (Result<Secured, TlsError>, Result<Secured, TlsError>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let answer =
                scope.spawn(|| answerer.answer(listener.accept().unwrap().0, Deadline::after(WITHIN)));
            let dialled = dialler.dial(addr, Deadline::after(WITHIN));
            (dialled, answer.join().unwrap())
        })
    }

    /// Meets, and expects these words of both.
    #[track_caller]
    fn check_refused(dialler: &Tls, answerer: &Tls, dialler_says: &str, answerer_says: &str) {
        let (dialled, answered) = meet(dialler, answerer);
        let answered = answered.map(|_| ()).unwrap_err().to_string();
        assert!(answered.contains(answerer_says), "the answerer says: {answered}");
        let dialled = dialled.and_then(|secured| {
            secured.socket.set_read_timeout(Some(WITHIN))?;
            let mut incoming = Incoming::new(secured.opener);
            incoming.hear(&secured.socket).map(|_| ())
        });
        let dialled = dialled.unwrap_err().to_string();
        assert!(dialled.contains(dialler_says), "the dialler says: {dialled}");
    }

    #[test]
    fn members_of_one_cluster_meet() {
        let ca = ca();
        let (dialled, answered) = meet(&member(&ca), &member(&ca));
        let (dialled, answered) = (dialled.unwrap(), answered.unwrap());
        for (from, to) in [(&dialled, &answered), (&answered, &dialled)] {
            assert_eq!(from.socket.local_addr().unwrap(), to.socket.peer_addr().unwrap());
        }
    }

    #[test]
    fn strangers_are_refused_and_told_why() {
        let (ours, theirs) = (ca(), ca());
        let us = member(&ours);
        let mut expired = leaf();
        expired.not_after = date_time_ymd(2020, 1, 1);

        check_refused(&member(&theirs), &us, "the peer's CA is another", "its CA is another");
        check_refused(&us, &member(&theirs), "the peer's CA is another", "its CA is another");
        // It trusts our CA, but has a certificate of another.
        let impostor = with_certificate(&us, &theirs, leaf());
        check_refused(&impostor, &us, "its CA is another", "the peer's CA is another");
        check_refused(&us, &impostor, "the peer's CA is another", "its CA is another");
        let old = with_certificate(&us, &ours, expired);
        check_refused(&old, &us, "this node's certificate has expired", "the peer needs a new one");
        check_refused(&us, &old, "the peer needs a new one", "this node's certificate has expired");
        check_refused(
            &without_certificate(&us),
            &us,
            "this node sent no certificate",
            "no node of this cluster",
        );
        check_refused(&with_protocol(&us, &[b"h2"]), &us, "NoApplicationProtocol", "any known protocol");
        check_refused(&with_protocol(&us, &[]), &us, "another protocol", "another protocol");
    }

    #[test]
    fn the_silent_and_the_senseless_are_given_up() {
        let us = member(&ca());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let silent = TcpStream::connect(addr).unwrap();
        let answered = us.answer(listener.accept().unwrap().0, Deadline::after(Duration::from_millis(50)));
        assert!(matches!(answered, Err(TlsError::TooLong { .. })));
        drop(silent);
        for senseless in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[22, 3, 1, 255, 255], &[22, 3, 1, 0, 1, 9]] {
            let mut stranger = TcpStream::connect(addr).unwrap();
            stranger.write_all(senseless).unwrap();
            stranger.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(us.answer(listener.accept().unwrap().0, Deadline::after(WITHIN)).is_err());
        }
    }

    /// Keys change many times in both directions, and every frame arrives.
    #[test]
    fn keys_change_under_way() {
        let ca = ca();
        let (dialled, answered) = meet(&member(&ca), &member(&ca));
        let ends = [dialled.unwrap(), answered.unwrap()].map(|secured| {
            let Secured { socket, mut sealer, opener } = secured;
            sealer.rekey_after(3);
            (socket, Outgoing::new(sealer), Incoming::new(opener))
        });
        thread::scope(|scope| {
            for (socket, mut outgoing, mut incoming) in ends {
                scope.spawn(move || {
                    for expected in 0..1000 {
                        outgoing.say(&socket, &Frame::Stop(expected)).unwrap();
                        loop {
                            if let Some(content) = incoming.hear(&socket).unwrap() {
                                assert_eq!(Frame::decode(content), Some(Frame::Stop(expected)));
                                break;
                            }
                        }
                    }
                });
            }
        });
    }
}
