use std::net::SocketAddr;
use tandem_proto::ids::NodeId;
use tandem_proto::wire::{Handoff, Message};
use tandem_transport::control::Lane;

/// How a node's loop reaches the rest of the cluster. No call blocks; what comes of it is a
/// [`crate::NodeEvent`].
pub trait Cluster: Send {
    /// Sends a message, or says why not. Messages to one peer arrive in order, but cancels may overtake.
    ///
    /// # Errors
    /// When the message was not taken. It never arrives then.
    fn send(&self, to: NodeId, message: &Message) -> Result<(), SendError>;

    /// Connects to a peer: `Up` or `DialFailed` follows, also when there is a connection already.
    fn dial(&self, peer: NodeId, address: SocketAddr);

    /// Ends the connection to a peer: `Down` follows if there was one.
    fn close(&self, peer: NodeId);
}

/// Why a message was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// There is no connection.
    #[error("not connected")]
    NotConnected,
    /// The peer takes messages more slowly than they are made.
    #[error("its queue is full")]
    Backlogged,
    /// It cannot be sent at all.
    #[error("{0}")]
    Unsendable(String),
}

/// The lane of a message: cancels never wait behind others.
#[must_use]
pub fn lane(message: &Message) -> Lane {
    match message {
        Message::Cancel { .. } | Message::Handoff(Handoff::Cancel { .. }) => Lane::Urgent,
        _ => Lane::Main,
    }
}
