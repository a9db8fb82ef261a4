//! The TLS lane, one TCP connection of a life: for networks without RDMA, at a fraction of what QUIC costs a
//! processor.
//!
//! rustls shakes hands, with the cluster's certificates on both sides; the records after that are sealed and
//! opened here, on threads that block on their sockets: from the source into the send buffer in one pass, and
//! from the receive buffer straight into the place where the bytes belong. What is on the wire is ordinary TLS.
//!
//! [`record`] seals and opens, [`frame`] says what the records hold, [`join`] makes connections of a life,
//! and [`lane`] is such a connection at work, on its threads [`send`] and [`receive`].

#[cfg(feature = "cuda")]
mod channel;
mod frame;
mod handshake;
#[cfg(test)]
mod hostile;
mod incoming;
mod join;
mod lane;
mod outgoing;
mod receive;
mod record;
mod send;

#[cfg(feature = "cuda")]
pub(crate) use channel::Channel;
pub(crate) use join::{Listener, Offer, accept, dial};

use rustls::AlertDescription;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Tells this protocol from everything else that the cluster's certificates may be used for.
const PROTOCOL: &[u8] = b"tandem-lane/1";

/// The most connections between two nodes.
pub(crate) const MAX_CONNECTIONS: usize = 16;

/// The most bytes of a message on a connection that carries those of another lane: one record has them.
#[cfg(feature = "cuda")]
pub(crate) const MAX_MESSAGE: usize = record::MAX_CONTENT - 1;

/// The most threads for a direction of a connection: what they do has two steps.
pub(crate) const MAX_TURNS: usize = 2;

/// Why a connection did not come about, or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("the peer offers none")]
    NotOffered,
    #[error("this node could not set it up")]
    NotHere,
    #[error("cannot connect to TCP {addr}: {source}: let the port through, or leave tls out")]
    Connect { addr: SocketAddr, source: io::Error },
    #[error("cannot listen on TCP {addr}: {source}")]
    Listen { addr: SocketAddr, source: io::Error },
    #[error("the connection broke: {0}")]
    Socket(#[from] io::Error),
    #[error("TLS: {}", tls_text(.0))]
    Tls(#[from] rustls::Error),
    #[error("the peer ended TLS: {}", alert_text(*.0))]
    Alert(AlertDescription),
    #[error("the peer closed the connection")]
    Closed,
    #[error("gave up {doing} after {within:?}")]
    TooLong { doing: &'static str, within: Duration },
    #[error("nothing moved for {0:?} in the middle of a write")]
    Stalled(Duration),
    #[error("a record is not what the peer sealed")]
    Garbled,
    #[error("the peer broke a rule: {0}")]
    Rule(&'static str),
    #[error("TLS came to no usable keys")]
    Keys,
    #[error("the session was over before it was made")]
    Gone,
}

impl TlsError {
    /// Whether there may be a lane later in the same session.
    pub(crate) fn may_pass(&self) -> bool {
        use TlsError as E;
        matches!(
            self,
            E::Connect { .. } | E::Socket(_) | E::Closed | E::TooLong { .. } | E::Stalled(_) | E::Gone
        )
    }
}

fn tls_text(error: &rustls::Error) -> String {
    use rustls::CertificateError as C;
    let way_out = match error {
        rustls::Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => {
            "the peer's CA is another: give both nodes the same"
        }
        rustls::Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => {
            "the peer needs a new one, or a clock is wrong"
        }
        rustls::Error::NoCertificatesPresented => "whoever connected is no node of this cluster",
        _ => return error.to_string(),
    };
    format!("{error} ({way_out})")
}

fn alert_text(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let way_out = match alert {
        A::UnknownCA | A::BadCertificate | A::DecryptError => "its CA is another: give both nodes the same",
        A::CertificateRequired => "this node sent no certificate",
        A::CertificateExpired => {
            "this node's certificate has expired: issue a new one, or correct the clocks"
        }
        A::NoApplicationProtocol => "another protocol is spoken there: run the same build everywhere",
        _ => return format!("{alert:?}"),
    };
    format!("{alert:?} ({way_out})")
}

/// Gives bytes to every decoder of this lane.
pub(crate) fn fuzz(bytes: &[u8]) {
    join::fuzz(bytes);
    frame::fuzz(bytes);
    record::fuzz(bytes);
    // Describes any alert, and never fails.
    let _ = handshake::alert(bytes).to_string();
}

/// Of each, one to be damaged by fuzzing.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let mut samples = frame::samples();
    // A record of three bytes, a fatal alert, an offer.
    samples.extend([[&[23, 3, 3, 0, 20][..], &[1; 20]].concat(), vec![2, 48], vec![103, 18, 3, 0]]);
    samples
}
