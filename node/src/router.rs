//! The node's side of its connection to the router.

use crate::{Cluster, SendError};
use std::collections::VecDeque;
use tandem_proto::ids::{NodeId, Time};
use tandem_proto::wire::Message;

/// How soon a router whose queue was full is tried again.
const RETRY_US: u64 = 1000;

/// Messages that wait for it, at most: beyond so many it is cut off, and its requests are given up.
const MAX_UNTOLD: usize = 1 << 14;

/// Who the router is, and what it has yet to be told.
///
/// A router that takes messages more slowly than they are made is waited for: what it must know stays here,
/// in order. Without a router nothing is kept: the next one knows none of its requests.
#[derive(Debug, Default)]
pub struct RouterLink {
    router: Option<NodeId>,
    untold: VecDeque<Message>,
    draining: bool,
}

impl RouterLink {
    /// The router accepted this node.
    pub fn up(&mut self, cluster: &dyn Cluster, router: NodeId) {
        self.router = Some(router);
        self.untold.clear();
        if self.draining {
            self.tell(cluster, Message::Draining);
        }
    }

    /// A peer is gone: whether it was the router.
    pub fn down(&mut self, peer: NodeId, reason: &str) -> bool {
        if self.router != Some(peer) {
            return false;
        }
        tracing::warn!(router = %peer, reason, "the router is gone; giving up its requests");
        self.router = None;
        self.untold.clear();
        true
    }

    /// The node takes nothing new from now on.
    pub fn drain(&mut self, cluster: &dyn Cluster) {
        self.draining = true;
        self.tell(cluster, Message::Draining);
    }

    /// Who the router is, while there is one.
    #[must_use]
    pub fn router(&self) -> Option<NodeId> {
        self.router
    }

    /// Whether the node was asked to finish.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Tells the router, now or as soon as its queue has room.
    pub fn tell(&mut self, cluster: &dyn Cluster, message: Message) {
        let Some(router) = self.router else { return };
        self.untold.push_back(message);
        self.flush(cluster);
        if self.untold.len() > MAX_UNTOLD {
            tracing::warn!(%router, "the router reads nothing; closing its connection");
            self.untold.clear();
            cluster.close(router);
        }
    }

    /// Tells the router if its queue has room and nothing waits before this; false if it must be told later.
    #[must_use]
    pub fn try_tell(&mut self, cluster: &dyn Cluster, message: &Message) -> bool {
        self.flush(cluster);
        self.untold.is_empty() && self.send(cluster, message)
    }

    /// Tells the router what waits, as far as its queue has room.
    pub fn flush(&mut self, cluster: &dyn Cluster) {
        while let Some(message) = self.untold.pop_front() {
            if !self.send(cluster, &message) {
                self.untold.push_front(message);
                return;
            }
        }
    }

    /// False when its queue is full.
    fn send(&self, cluster: &dyn Cluster, message: &Message) -> bool {
        let Some(router) = self.router else { return true };
        match cluster.send(router, message) {
            Err(SendError::Backlogged) => false,
            Ok(()) | Err(SendError::NotConnected) => true,
            Err(error) => {
                // Cut off, the router knows that this node's requests are lost; behind a lost message it would not.
                tracing::warn!(%router, %error, "cannot tell the router; closing its connection");
                cluster.close(router);
                true
            }
        }
    }

    /// When to flush again, if something waits.
    #[must_use]
    pub fn next_flush(&self, now: Time) -> Option<Time> {
        (!self.untold.is_empty()).then(|| now.after_us(RETRY_US))
    }
}
