use std::sync::{Arc, OnceLock};
use std::task::{Wake, Waker};
use std::thread::Thread;
use std::time::Duration;
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Message;
use tokio::sync::mpsc;

/// What happened outside the node's loop.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all events are messages, the largest")]
pub enum NodeEvent {
    /// The router accepted this node; it may be another router than before.
    RouterUp {
        /// Its id.
        router: NodeId,
    },
    /// A peer's control connection is up, however it came about.
    Up {
        /// Which peer.
        peer: NodeId,
    },
    /// A peer's control connection is gone. The router's too.
    Down {
        /// Which peer.
        peer: NodeId,
        /// Why.
        reason: String,
    },
    /// A peer could not be reached.
    DialFailed {
        /// Which peer.
        peer: NodeId,
        /// Why.
        reason: String,
    },
    /// A message arrived.
    Message {
        /// From whom.
        from: NodeId,
        /// What.
        message: Message,
    },
    /// The process was asked to finish: take nothing new.
    Drain,
    /// The time to drain is over: stop now.
    Stop,
}

/// The node loop's end of the seam. Bounded: when it is full, the network waits.
pub struct Inbox {
    events: mpsc::Receiver<NodeEvent>,
}

/// Wakes the node's loop, from any thread.
#[derive(Clone, Default)]
pub struct Unpark {
    loop_thread: Arc<LoopThread>,
}

#[derive(Default)]
struct LoopThread(OnceLock<Thread>);

impl Wake for LoopThread {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(thread) = self.0.get() {
            thread.unpark();
        }
    }
}

impl Unpark {
    /// Names the calling thread as the one to wake.
    pub fn bind_current_thread(&self) {
        let _ = self.loop_thread.0.set(std::thread::current());
    }

    /// Wakes it, or lets its next wait return at once.
    pub fn unpark(&self) {
        self.loop_thread.wake_by_ref();
    }

    /// The same, as the standard library's handle.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.loop_thread))
    }
}

/// Where events go in.
pub type InboxSender = mpsc::Sender<NodeEvent>;

/// An inbox for `limit` events, and where they go in.
#[must_use]
pub fn inbox(limit: usize) -> (InboxSender, Inbox) {
    let (sender, events) = mpsc::channel(limit);
    (sender, Inbox { events })
}

impl Inbox {
    /// The next event, if there is one. `Stop` once every sender is gone.
    pub fn try_next(&mut self) -> Option<NodeEvent> {
        match self.events.try_recv() {
            Ok(event) => Some(event),
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => Some(NodeEvent::Stop),
        }
    }

    /// Waits until [`Unpark::unpark`] or for `at_most`.
    pub fn wait(&self, at_most: Duration) {
        std::thread::park_timeout(at_most);
    }
}

/// What a node's loop does after a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// It has more to do.
    Again,
    /// Nothing until something happens, or until the deadline.
    Wait(Option<tandem_proto::ids::Time>),
    /// It is done for good.
    Finished,
}
