//! The node's place in a real cluster: its control channel, and the way to the router.

use crate::cluster::{Cluster, SendError, lane};
use crate::inbox::{InboxSender, NodeEvent, Unpark};
use std::net::SocketAddr;
use std::time::Duration;
use tandem_proto::ids::NodeId;
use tandem_proto::wire::{self, Hello, Message};
use tandem_transport::control::{self, Control, ControlEvent, ControlEvents};
use tokio::runtime::Handle;
use tokio::sync::broadcast;

/// Pauses between attempts to reach the router.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(2);

/// A node's membership of a cluster. Clones are the same.
#[derive(Clone)]
pub struct Member {
    control: Control,
    runtime: Handle,
    inbox: InboxSender,
    unpark: Unpark,
    /// Tells whoever keeps the node joined that a peer went.
    gone: broadcast::Sender<NodeId>,
}

impl Member {
    /// Puts what the control channel reports into the node's inbox, from now on. Call inside the runtime.
    #[must_use]
    pub fn new(control: Control, events: ControlEvents, inbox: InboxSender, unpark: Unpark) -> Member {
        let (gone, _) = broadcast::channel(64);
        let member = Member { control, runtime: Handle::current(), inbox, unpark, gone };
        tokio::spawn(member.clone().forward(events));
        member
    }

    /// Introduces the node to the router, and again whenever the connection was lost.
    pub fn join(&self, router: String, hello: Hello) {
        self.runtime.spawn(self.clone().keep_joined(router, hello));
    }

    /// Tells the node's loop something.
    pub async fn tell(&self, event: NodeEvent) {
        // When nobody receives, the loop is over and need not be told.
        let _ = self.inbox.send(event).await;
        self.unpark.unpark();
    }

    /// Sends what is queued, and leaves.
    pub async fn leave(&self) {
        self.control.shutdown().await;
    }

    async fn forward(self, mut events: ControlEvents) {
        while let Some(event) = events.recv().await {
            let event = match event {
                ControlEvent::Up { peer, .. } => NodeEvent::Up { peer },
                ControlEvent::Down { peer, reason } => {
                    // Nobody listens while the router is being dialled.
                    let _ = self.gone.send(peer);
                    NodeEvent::Down { peer, reason }
                }
                ControlEvent::Frame { peer, bytes, .. } => match wire::decode(&bytes) {
                    Ok(message) => NodeEvent::Message { from: peer, message },
                    Err(error) => {
                        tracing::warn!(%peer, %error, "bad message; closing the connection");
                        self.control.close(peer);
                        continue;
                    }
                },
            };
            self.tell(event).await;
        }
    }

    async fn keep_joined(self, router: String, hello: Hello) {
        let mut pause = *RETRY.start();
        loop {
            let mut gone = self.gone.subscribe();
            match self.try_join(&router, &hello).await {
                Ok(id) => {
                    tracing::info!(%router, id = %id, "joined");
                    let joined = tokio::time::Instant::now();
                    self.tell(NodeEvent::RouterUp { router: id }).await;
                    // Lagging counts as gone: joining again does no harm.
                    while gone.recv().await.is_ok_and(|peer| peer != id) {}
                    tracing::warn!(%router, "lost the router; joining again");
                    if joined.elapsed() > *RETRY.end() {
                        pause = *RETRY.start();
                    }
                }
                Err(error) => tracing::warn!(%router, error, "cannot join yet; trying again"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*RETRY.end());
        }
    }

    async fn try_join(&self, router: &str, hello: &Hello) -> Result<NodeId, String> {
        let mut addresses = tokio::net::lookup_host(router).await.map_err(|error| error.to_string())?;
        let address = addresses.next().ok_or("the name has no address")?;
        let id = self.control.connect(address).await.map_err(|error| error.to_string())?;
        self.send(id, &Message::Hello(hello.clone())).map_err(|error| error.to_string())?;
        Ok(id)
    }
}

impl Cluster for Member {
    fn send(&self, to: NodeId, message: &Message) -> Result<(), SendError> {
        let frame = wire::encode(message).map_err(|error| SendError::Unsendable(error.to_string()))?;
        self.control.send(to, lane(message), frame).map_err(|error| match error {
            control::SendError::NotConnected { .. } => SendError::NotConnected,
            control::SendError::Backlogged { .. } => SendError::Backlogged,
            control::SendError::Oversize { .. } => SendError::Unsendable(error.to_string()),
        })
    }

    fn dial(&self, peer: NodeId, address: SocketAddr) {
        let member = self.clone();
        self.runtime.spawn(async move {
            let event = match member.control.connect(address).await {
                Ok(id) if id == peer => NodeEvent::Up { peer },
                Ok(id) => {
                    NodeEvent::DialFailed { peer, reason: format!("another node, {id}, is at {address}") }
                }
                Err(error) => NodeEvent::DialFailed { peer, reason: error.to_string() },
            };
            member.tell(event).await;
        });
    }

    fn close(&self, peer: NodeId) {
        self.control.close(peer);
    }
}
