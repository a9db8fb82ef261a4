//! Connects requests with nodes: keeps the membership, tells nodes what to do, and brings what they answer
//! to the request it belongs to.

use crate::membership::{Member, Members};
use crate::metrics::Metrics;
use crate::placement::{Unplaced, place};
use crate::requests::Plan;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tandem_proto::ids::{NodeId, RequestId};
use tandem_proto::keys::Fingerprint;
use tandem_proto::wire::{
    self, Destination, Expect, FirstTokens, Message, RequestError, Role, Submit, Tokens,
};
use tandem_transport::control::{Control, ControlEvent, ControlEvents, Lane, SendError};
use tokio::sync::mpsc;

/// Messages of nodes that wait for one request: some seconds of the fastest generation.
pub const INBOX: usize = 16_384;
/// How long a connection may last before it introduces itself.
const GREETING: Duration = Duration::from_secs(10);

/// How long the steps of a request may take, and how busy a node may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From submission until all KV is at the decode node.
    pub handoff_timeout: Duration,
    /// From submission until the last token.
    pub generation_timeout: Duration,
    /// Requests that may wait at a node before others are preferred.
    pub max_waiting: u32,
}

/// The router's side of the cluster. Shared by the endpoint and the loop that listens to nodes.
pub struct Dispatcher {
    control: Control,
    limits: Limits,
    metrics: Arc<Metrics>,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    members: Members,
    /// Connections that have not said hello yet.
    strangers: HashMap<NodeId, Instant>,
    /// Attempts that nodes work on. Each is here exactly as long as its [`Attempt`] lives.
    routes: HashMap<RequestId, Route>,
    turn: u64,
}

struct Route {
    prefill: NodeId,
    decode: Option<NodeId>,
    inbox: Inbox,
}

/// Where a request takes what nodes say about one of its prompts.
#[derive(Clone, Debug)]
pub struct Inbox {
    /// Which of the request's prompts.
    pub job: usize,
    /// The request's queue.
    pub sender: mpsc::Sender<Arrival>,
    /// Set when something did not fit into the queue, so the answer has a hole.
    pub overflowed: Arc<AtomicBool>,
}

/// Something that a node said about an attempt.
#[derive(Debug)]
pub struct Arrival {
    /// Which of the request's prompts.
    pub job: usize,
    /// Which attempt: what an attempt that was given up still said is told apart by this.
    pub request: RequestId,
    /// What it said.
    pub news: News,
}

/// What a node said.
#[derive(Debug)]
pub enum News {
    /// The first token of every choice.
    First(FirstTokens),
    /// Further tokens.
    Tokens(Tokens),
    /// It will not be done there.
    Failed {
        /// By the node of this role.
        role: Role,
        /// Why.
        error: RequestError,
    },
}

/// Why an attempt could not begin.
#[derive(Debug, thiserror::Error)]
pub enum NotStarted {
    /// There are no nodes for it.
    #[error(transparent)]
    Unplaced(#[from] Unplaced),
    /// A node cannot be told.
    #[error("{role} node {name} cannot be reached: {source}")]
    Send {
        /// The node's role.
        role: Role,
        /// The node.
        node: NodeId,
        /// The node's name.
        name: String,
        /// Why not.
        source: SendError,
    },
    /// The request does not fit into a message.
    #[error("the request cannot be sent to a node: {0}")]
    Encode(#[from] wire::WireError),
}

/// Nodes at work on a request. Dropped before [`Attempt::complete`], it tells them to stop.
pub struct Attempt {
    dispatcher: Arc<Dispatcher>,
    /// Its id, new for each attempt.
    pub request: RequestId,
    /// The node that computes the prompt.
    pub prefill: NodeId,
    /// The node that generates; none when the first token is all.
    pub decode: Option<NodeId>,
    completed: bool,
}

impl Dispatcher {
    /// The router's side of a cluster whose nodes dial `control`.
    #[must_use]
    pub fn new(control: Control, limits: Limits, metrics: Arc<Metrics>) -> Arc<Dispatcher> {
        Arc::new(Dispatcher { control, limits, metrics, shared: Mutex::default() })
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The nodes that are up.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.lock().members.list()
    }

    /// The longest sequence that every node holds.
    #[must_use]
    pub fn max_sequence_tokens(&self) -> Option<u32> {
        self.lock().members.max_sequence_tokens()
    }

    /// What the cluster serves.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.lock().members.fingerprint()
    }

    /// How many prefill and decode nodes take work.
    #[must_use]
    pub fn available(&self) -> (usize, usize) {
        let shared = self.lock();
        (shared.members.available(Role::Prefill), shared.members.available(Role::Decode))
    }

    /// Attempts that nodes work on.
    #[must_use]
    pub fn attempts(&self) -> usize {
        self.lock().routes.len()
    }

    /// Chooses nodes for `plan` and tells them. `avoid` lists nodes where it failed before.
    ///
    /// # Errors
    /// When there are no nodes, or one cannot be told.
    pub fn submit(
        self: &Arc<Self>,
        request: RequestId,
        plan: &Plan,
        avoid: &[NodeId],
        inbox: Inbox,
    ) -> Result<Attempt, NotStarted> {
        let pair = {
            let mut shared = self.lock();
            let members = shared.members.list();
            shared.turn = shared.turn.wrapping_add(1);
            let is_avoided = |member: &Member| avoid.contains(&member.hello.node);
            place(&members, shared.turn, self.limits.max_waiting, is_avoided)?
        };
        let (prefill, decode) = (pair.prefill.hello, pair.decode.hello);
        let hands_over = plan.generation.max_tokens > 1;
        let milliseconds = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        let handoff_timeout_ms = milliseconds(self.limits.handoff_timeout);
        let submit = wire::encode(&Message::Submit(Submit {
            request,
            prompt: plan.prompt.clone(),
            generation: plan.generation.clone(),
            decode: hands_over.then_some(Destination {
                node: decode.node,
                control: decode.control,
                data: decode.data,
            }),
            salt: Vec::new(),
            handoff_timeout_ms,
        }))?;

        // From here on the attempt exists: whatever fails, dropping it takes everything back.
        let attempt = Attempt {
            dispatcher: self.clone(),
            request,
            prefill: prefill.node,
            decode: hands_over.then_some(decode.node),
            completed: false,
        };
        let route = Route { prefill: attempt.prefill, decode: attempt.decode, inbox };
        self.lock().routes.insert(request, route);
        let send = |hello: &wire::Hello, frame: Vec<u8>| {
            self.control.send(hello.node, Lane::Main, frame).map_err(|source| NotStarted::Send {
                role: hello.role,
                node: hello.node,
                name: hello.name.clone(),
                source,
            })
        };
        if hands_over {
            let expect = wire::encode(&Message::Expect(Expect {
                request,
                prompt: plan.prompt.clone(),
                generation: plan.generation.clone(),
                prefill: prefill.node,
                handoff_timeout_ms,
                generation_timeout_ms: milliseconds(self.limits.generation_timeout),
            }))?;
            send(&decode, expect)?;
        }
        send(&prefill, submit)?;
        Ok(attempt)
    }

    /// Listens to nodes until the control channel is gone.
    pub async fn listen(self: Arc<Self>, mut events: ControlEvents) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                _ = tick.tick() => {
                    self.close_silent_strangers();
                    continue;
                }
            };
            match event {
                None => return,
                Some(ControlEvent::Up { peer, addr }) => {
                    tracing::debug!(node = %peer, %addr, "connected");
                    self.lock().strangers.insert(peer, Instant::now());
                }
                Some(ControlEvent::Frame { peer, bytes, .. }) => match wire::decode(&bytes) {
                    Ok(message) => self.handle_message(peer, message),
                    Err(error) => {
                        tracing::warn!(node = %peer, %error, "closed: its frame cannot be read");
                        self.control.close(peer);
                    }
                },
                Some(ControlEvent::Down { peer, reason }) => self.handle_down(peer, &reason),
            }
        }
    }

    fn handle_message(&self, peer: NodeId, message: Message) {
        match message {
            Message::Hello(hello) => self.handle_hello(peer, hello),
            Message::Load(load) => self.known(peer, self.lock().members.set_load(peer, load)),
            Message::Draining => {
                tracing::info!(node = %peer, "draining");
                self.known(peer, self.lock().members.set_draining(peer));
            }
            Message::FirstTokens(first) => self.deliver(peer, first.request, |_| News::First(first)),
            Message::Tokens(tokens) => self.deliver(peer, tokens.request, |_| News::Tokens(tokens)),
            Message::Failed { request, error } => {
                self.deliver(peer, request, |role| News::Failed { role, error });
            }
            Message::Submit(_) | Message::Expect(_) | Message::Cancel { .. } | Message::Handoff(_) => {
                tracing::warn!(node = %peer, "closed: it sent what only a router or another node's peer is sent");
                self.control.close(peer);
            }
        }
    }

    fn handle_hello(&self, peer: NodeId, hello: wire::Hello) {
        let (name, role, control) = (hello.name.clone(), hello.role, hello.control);
        let admitted = {
            let mut shared = self.lock();
            shared.strangers.remove(&peer);
            shared.members.admit(peer, hello)
        };
        match admitted {
            Ok(()) => tracing::info!(node = %peer, name, %role, %control, "node joined"),
            Err(refusal) => {
                tracing::error!(node = %peer, name, %role, reason = %refusal, "node refused");
                self.metrics.refused_nodes.add(1);
                self.control.close(peer);
            }
        }
    }

    /// Closes a peer that speaks before it introduced itself.
    fn known(&self, peer: NodeId, known: bool) {
        if !known {
            tracing::warn!(node = %peer, "closed: it did not introduce itself first");
            self.control.close(peer);
        }
    }

    fn handle_down(&self, peer: NodeId, reason: &str) {
        let (member, inboxes) = {
            let mut shared = self.lock();
            shared.strangers.remove(&peer);
            let inboxes = shared.routes.iter().filter_map(|(request, route)| {
                let role = route.role_of(peer)?;
                Some((*request, role, route.inbox.clone()))
            });
            let inboxes: Vec<_> = inboxes.collect();
            (shared.members.remove(peer), inboxes)
        };
        let Some(member) = member else { return };
        let (name, role) = (&member.hello.name, member.hello.role);
        if member.draining {
            tracing::info!(node = %peer, name, %role, reason, "node left");
        } else {
            tracing::warn!(node = %peer, name, %role, reason, requests = inboxes.len(), "node lost");
        }
        for (request, role, inbox) in inboxes {
            let error = RequestError::PeerLost(format!("{role} node {name}: {reason}"));
            inbox.put(request, News::Failed { role, error });
        }
    }

    /// Brings news to the request they are about, if it is still there and this peer works on it.
    fn deliver(&self, peer: NodeId, request: RequestId, news: impl FnOnce(Role) -> News) {
        let found = self.lock().routes.get(&request).map(|route| (route.role_of(peer), route.inbox.clone()));
        match found {
            Some((Some(role), inbox)) => inbox.put(request, news(role)),
            Some((None, _)) => tracing::warn!(node = %peer, %request, "ignored: another node's request"),
            // It was over here before the node knew.
            None => tracing::trace!(node = %peer, %request, "ignored: the request is over"),
        }
    }

    fn close_silent_strangers(&self) {
        let silent: Vec<NodeId> = {
            let shared = self.lock();
            shared
                .strangers
                .iter()
                .filter(|(_, since)| since.elapsed() > GREETING)
                .map(|(peer, _)| *peer)
                .collect()
        };
        for peer in silent {
            tracing::warn!(node = %peer, "closed: it did not introduce itself");
            self.control.close(peer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Route {
    fn role_of(&self, peer: NodeId) -> Option<Role> {
        if self.prefill == peer {
            return Some(Role::Prefill);
        }
        (self.decode == Some(peer)).then_some(Role::Decode)
    }
}

impl Inbox {
    fn put(&self, request: RequestId, news: News) {
        if let Err(mpsc::error::TrySendError::Full(_)) =
            self.sender.try_send(Arrival { job: self.job, request, news })
        {
            self.overflowed.store(true, Relaxed);
        }
    }
}

impl Attempt {
    /// The nodes are done with it, and need not be told.
    pub fn complete(mut self) {
        self.completed = true;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let dispatcher = &self.dispatcher;
        dispatcher.lock().routes.remove(&self.request);
        if self.completed {
            return;
        }
        dispatcher.metrics.cancellations.add(1);
        let Ok(frame) = wire::encode(&Message::Cancel { request: self.request }) else { return };
        for node in [Some(self.prefill), self.decode].into_iter().flatten() {
            // The urgent one is not stuck behind other messages; the one on the main lane cannot overtake
            // the message that it cancels. A node that cannot be told is gone, and its work with it.
            let _ = dispatcher.control.send(node, Lane::Urgent, frame.clone());
            let _ = dispatcher.control.send(node, Lane::Main, frame.clone());
        }
    }
}
