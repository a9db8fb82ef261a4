//! A TLS connection of a life that carries messages of a lane of another kind, which has no way of its own to
//! prove who it is and to keep them to itself.

use super::frame::{Frame, Hello};
use super::handshake::Deadline;
use super::incoming::Arrival;
use super::join::{Joined, say};
use super::lane::PATIENCE;
use super::{MAX_MESSAGE, TlsError};
use crate::net::life::Life;
use crate::net::node::Node;
use socket2::SockRef;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Room for what was said and not read yet: then sending never waits for a peer that keeps the rules.
const ROOM: usize = 256 << 10;

/// First it waits, as a handshake does; after [`Channel::stop_waiting`] it never does.
pub(crate) struct Channel(Joined);

impl Channel {
    /// To the peer of a life that was dialled here, which is told so.
    pub(crate) fn dial(
        node: &Node,
        life: &Life,
        addr: SocketAddr,
        secret: &[u8; 32],
        within: Duration,
    ) -> Result<Channel, TlsError> {
        let Some(listener) = node.tls() else { return Err(TlsError::NotHere) };
        let deadline = Deadline::after(within);
        let mut joined = Joined::new(listener.tls.dial(addr, deadline)?);
        let hello = Hello { node: node.local(), life: life.number, secret: *secret };
        say(&joined.socket, &mut joined.outgoing, &Frame::Channel(hello), deadline)?;
        Ok(Channel(joined))
    }

    /// Of a peer that has said so.
    pub(super) fn new(joined: Joined) -> Channel {
        Channel(joined)
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.0.socket
    }

    /// Waits for the next message.
    pub(crate) fn hear(&mut self, within: Duration) -> Result<Vec<u8>, TlsError> {
        self.0.hear(Deadline::after(within), |frame| match frame {
            Frame::Message(message) => Some(message.to_vec()),
            _ => None,
        })
    }

    /// Sends a message of at most [`MAX_MESSAGE`].
    pub(crate) fn say(&mut self, message: &[u8]) -> Result<(), TlsError> {
        debug_assert!(message.len() <= MAX_MESSAGE);
        self.0.outgoing.say(&self.0.socket, &Frame::Message(message))
    }

    pub(crate) fn stop_waiting(&self) -> Result<(), TlsError> {
        let socket = SockRef::from(&self.0.socket);
        socket.set_send_buffer_size(ROOM)?;
        socket.set_tcp_user_timeout(Some(PATIENCE))?;
        Ok(socket.set_nonblocking(true)?)
    }

    /// The next message that has come; none if there is none yet.
    pub(crate) fn receive(&mut self) -> Result<Option<Vec<u8>>, TlsError> {
        let Joined { socket, incoming, .. } = &mut self.0;
        loop {
            if incoming.arrived.whole_bytes()? == 0 && incoming.arrived.read(socket)? == Arrival::Nothing {
                return Ok(None);
            }
            let Some(record) = incoming.arrived.next_record()? else { continue };
            match incoming.opening.open(&record)?.map(Frame::decode) {
                // It was about the connection itself.
                None => {}
                Some(Some(Frame::Message(message))) => return Ok(Some(message.to_vec())),
                Some(_) => return Err(TlsError::Rule("it sent a frame that has no place there")),
            }
        }
    }
}
