//! The cluster, its weather, and the rules it must keep.

use super::breaks::{Break, SharedSeen, SimCluster, WatchedTransport, claim_landed};
use super::chance::Rng;
use super::kernels::{SimKernels, SimPages};
use super::model::{ChainEngine, FINGERPRINT, SHAPE};
use super::router::{End, GENERATION_TIMEOUT_MS, Plan, Requests, prompt};
use super::tier::{Due, Shelf, SimTier};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tandem_kernels::Kernels;
use tandem_kv_store::policy::PolicyKind;
use tandem_kv_store::{HostPool, PoolConfig, Store, StoreConfig, StoreLimits};
use tandem_node::{Clock, ClockHand, Next, NodeEvent, inbox};
use tandem_proto::ids::{NodeId, Time};
use tandem_proto::wire::{self, CachedTokens, Handoff, Message, RequestError};
use tandem_transport::control::ControlEvent;
use tandem_transport::sim::{SimConfig, SimNetwork, SimTransport};
use tandem_transport::{Event, Path};

const ROUTER: NodeId = NodeId(1);
const MAX_POSITIONS: u32 = 128;
/// How long a cluster may take to come to rest after its last request ended: longer than any timeout of a node.
const REST_US: u64 = 20_000_000;

/// What a cluster has to live through.
#[derive(Clone, Debug)]
pub struct Weather {
    network: SimConfig,
    /// Clients go away.
    cancels: bool,
    /// Nodes crash, and others take their place.
    crashes: bool,
    /// Links are cut and mended.
    partitions: bool,
    /// That a write has landed is sometimes noticed late, after the messages that followed it.
    late_completions: bool,
    /// Packing and scattering take their time.
    slow_kernels: bool,
    /// The tier behind the stores is late, fails and lies.
    bad_tier: bool,
}

impl Weather {
    /// The weather of a seed: one in four has only small delays, one has lossy links and impatient clients, one
    /// has crashes, partitions and broken connections, and one flips bits. Each is played with kernels that are done at
    /// once and with such that take their time.
    #[must_use]
    pub fn of(seed: u64) -> Weather {
        let fair = SimConfig {
            write_limit: 8,
            detect_us: 450_000..=900_000,
            // Prompts are written as they are computed, or in one burst.
            path: (seed / 16 % 2 == 1).then_some(Path::CudaIpc),
            ..SimConfig::default()
        };
        let rough = SimConfig { loss: 0.02, stall: 0.005, latency_us: 20..=3_000, ..fair.clone() };
        let calm = Weather {
            network: fair,
            cancels: false,
            crashes: false,
            partitions: false,
            late_completions: false,
            slow_kernels: seed / 4 % 2 == 1,
            bad_tier: !(seed / 8).is_multiple_of(4),
        };
        let restless =
            Weather { network: rough.clone(), cancels: true, late_completions: true, ..calm.clone() };
        match seed % 4 {
            0 => calm,
            1 => restless,
            2 => Weather {
                network: SimConfig { break_connection: 0.002, ..rough },
                crashes: true,
                partitions: true,
                ..restless
            },
            _ => Weather { network: SimConfig { corrupt: 0.002, ..rough }, ..restless },
        }
    }

    fn is_harmless(&self) -> bool {
        !self.crashes && !self.partitions && self.network.break_connection == 0.0
    }
}

/// What was seen in one run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Every rule that was broken, with who and when.
    pub violations: Vec<String>,
    /// Requests whose every token came.
    pub complete: usize,
    /// Requests that were cancelled, failed or lost.
    pub ended_early: usize,
    /// Requests that failed because a flipped bit was noticed.
    pub corrupt: usize,
    /// Prompt tokens that were not computed.
    pub cached: CachedTokens,
    /// Simulated seconds.
    pub seconds: f64,
}

struct Actor {
    kind: Kind,
    inbox: tandem_node::InboxSender,
    made_up: Arc<Mutex<Vec<Event>>>,
    /// When the tier behind its store has something to tell, if it has one.
    tier: Option<Due>,
    /// When it has to be called, if nothing happens before. None: only when something happens.
    wake: Option<Time>,
    /// Computing until then.
    busy_until: Time,
}

enum Kind {
    Prefill(Box<prefill_node::Node<ChainEngine, SimKernels>>),
    Decode(Box<decode_node::Node<ChainEngine, SimKernels>>),
}

struct World {
    rng: Rng,
    weather: Weather,
    broken: Option<Break>,
    network: SimNetwork,
    clock: Clock,
    hand: ClockHand,
    seen: SharedSeen,
    actors: BTreeMap<NodeId, Actor>,
    next_node: u64,
    requests: Requests,
    plans: Vec<Plan>,
    /// Faults and repairs that are still to come, soonest last.
    faults: Vec<(Time, Fault)>,
    connected: Vec<NodeId>,
    shelf: Shelf,
    /// Tokens that prefill nodes computed.
    computed: Arc<AtomicU64>,
    /// Keeps the router on the network.
    _router_end: SimTransport,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Crash,
    Partition,
    Heal(NodeId, NodeId),
    Dial(NodeId),
}

/// Plays one seed.
#[must_use]
pub fn run(seed: u64, weather: Weather, broken: Option<Break>) -> Outcome {
    World::new(seed, weather, broken).play()
}

impl World {
    fn new(seed: u64, weather: Weather, broken: Option<Break>) -> World {
        let network = SimNetwork::new(seed, weather.network.clone());
        let (clock, hand) = Clock::told();
        let router_end = network.transport(ROUTER);
        let mut world = World {
            rng: Rng(seed ^ 0x7461_6e64_656d),
            weather,
            broken,
            network,
            clock,
            hand,
            _router_end: router_end,
            shelf: Shelf::default(),
            computed: Arc::default(),
            seen: SharedSeen::default(),
            actors: BTreeMap::new(),
            next_node: 10,
            requests: Requests::default(),
            plans: Vec::new(),
            faults: Vec::new(),
            connected: Vec::new(),
        };
        for _ in 0..world.rng.between(1, 2) {
            world.start(true);
        }
        for _ in 0..world.rng.between(1, 2) {
            world.start(false);
        }
        world.plan();
        world
    }

    /// Starts a node, with so little room that every queue is full at times.
    fn start(&mut self, prefill: bool) {
        let node = NodeId(self.next_node);
        self.next_node += 1;
        let late = self.weather.late_completions.then(|| Rng(self.rng.next()));
        let transport = WatchedTransport::new(node, &self.network, Arc::clone(&self.seen), self.broken, late);
        let made_up = transport.made_up();
        let (sender, inbox) = inbox(4096);
        let cluster = Box::new(SimCluster {
            node,
            network: self.network.clone(),
            seen: Arc::clone(&self.seen),
            broken: self.broken,
        });
        let kernels = SimKernels {
            node,
            clock: self.clock.clone(),
            seen: Arc::clone(&self.seen),
            broken: self.broken,
            shared_slots: prefill,
            slow: self.weather.slow_kernels.then(|| Rng(self.rng.next())),
            begun: Vec::new(),
        };
        let computed = if prefill { Arc::clone(&self.computed) } else { Arc::default() };
        let engine = ChainEngine::new(MAX_POSITIONS, computed);
        let mut tier = None;
        let layer_bytes = SHAPE.packed_bytes(SHAPE.chunk_tokens) / SHAPE.layers as usize;
        let clock = self.clock.clone();
        let kind = if prefill {
            let pages = self.rng.between(26, 50) as u32;
            let kv = SimPages::new(pages);
            let staging = self.rng.between(2, 6) as usize * layer_bytes;
            let cache = self.rng.chance(0.8).then(|| self.cache(&kernels, &mut tier));
            let mut outbound = prefill_node::Outbound::new(
                clock,
                cluster,
                inbox,
                Box::new(transport),
                kernels,
                SHAPE,
                staging,
            )
            .expect("memory");
            if let Some(cache) = cache {
                outbound = outbound.with_cache(cache);
            }
            let step_tokens = SHAPE.chunk_tokens * self.rng.between(1, 4) as u32;
            let limits = prefill_node::Limits { step_tokens, max_waiting: 64 };
            Kind::Prefill(Box::new(prefill_node::Node::new(engine, kv, outbound, limits)))
        } else {
            let pages = self.rng.between(45, 90) as u32;
            let kv = SimPages::new(pages);
            let landing = self.rng.between(2, 8) as usize * SHAPE.packed_bytes(SHAPE.chunk_tokens);
            let inbound = decode_node::Inbound::new(
                clock,
                cluster,
                inbox,
                Box::new(transport),
                kernels,
                SHAPE,
                landing,
            )
            .expect("memory");
            let limits = decode_node::Limits { max_requests: 64, max_batch: self.rng.between(2, 9) as usize };
            Kind::Decode(Box::new(decode_node::Node::new(engine, kv, inbound, limits)))
        };
        let now = self.network.now();
        self.actors
            .insert(node, Actor { kind, inbox: sender, made_up, tier, wake: Some(now), busy_until: now });
        self.network.connect_control(node, ROUTER);
    }

    /// A store of a few chunks, over the tier that all share.
    fn cache(&mut self, kernels: &SimKernels, due: &mut Option<Due>) -> prefill_node::Cache {
        let (clock, rng, honest) = (self.clock.clone(), Rng(self.rng.next()), !self.weather.bad_tier);
        let tier = SimTier::new(clock, &self.shelf, rng, honest, self.broken);
        *due = Some(tier.due());
        let slot_bytes = SHAPE.packed_bytes(SHAPE.chunk_tokens);
        let slots = self.rng.between(1, 20) as usize;
        let region = kernels.host_memory(slots * slot_bytes.next_multiple_of(4096)).expect("memory");
        let policies = [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo];
        let config = PoolConfig {
            policy: policies[self.rng.between(0, 2) as usize],
            ttl_us: self.rng.chance(0.2).then(|| self.rng.between(10_000, 1_000_000)),
            tenant_slots: None,
        };
        let pool = HostPool::new(&region, slot_bytes, config).expect("room for a slot");
        let config = StoreConfig { fingerprint: FINGERPRINT, shape: SHAPE, limits: StoreLimits::default() };
        let store = Store::new(config, pool, vec![Box::new(tier)]);
        let limits = prefill_node::CacheLimits {
            patience_us: self.rng.between(0, 100_000),
            turn_bytes: self.rng.between(1, 2 * slot_bytes as u64) as usize,
            under_way_bytes: self.rng.between(1, 4 * slot_bytes as u64) as usize,
            saves: self.rng.between(1, 8) as usize,
        };
        prefill_node::Cache::new(store, FINGERPRINT, SHAPE, limits)
    }

    /// Draws the requests and the faults of this run.
    fn plan(&mut self) {
        let mut at = Time(20_000);
        let bursts = self.rng.chance(0.5);
        for _ in 0..self.rng.between(8, 30) {
            at =
                at.after_us(if bursts && self.rng.chance(0.8) { 50 } else { self.rng.between(100, 150_000) });
            let len = match self.rng.between(0, 3) {
                0 => self.rng.between(1, 9),
                1 => self.rng.between(1, 40),
                _ => self.rng.between(20, 100),
            } as u32;
            let differs = self.rng.between(0, u64::from(len)) as u32;
            let cancels = self.weather.cancels && self.rng.chance(0.3);
            self.plans.push(Plan {
                at,
                prompt: prompt(self.rng.between(1, 3), len, differs),
                choices: if self.rng.chance(0.2) { 2 } else { 1 },
                max_tokens: self.rng.between(1, 12) as u32,
                cancel_at: cancels.then(|| at.after_us(self.rng.between(0, 60_000))),
                pair: None,
            });
        }
        for _ in 0..if self.weather.crashes { self.rng.between(0, 3) } else { 0 } {
            self.faults.push((Time(self.rng.between(20_000, at.0 + 500_000)), Fault::Crash));
        }
        for _ in 0..if self.weather.partitions { self.rng.between(0, 3) } else { 0 } {
            self.faults.push((Time(self.rng.between(20_000, at.0 + 500_000)), Fault::Partition));
        }
        self.plans.sort_by_key(|plan| std::cmp::Reverse(plan.at));
        self.sort_faults();
    }

    fn sort_faults(&mut self) {
        self.faults.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    }

    /// Plays the plan until the cluster is at rest; then, with faults over, every pair of nodes must serve one
    /// more request: a cluster that only survives is not healed.
    fn play(mut self) -> Outcome {
        self.play_to_rest();
        if self.weather.is_harmless() || self.broken.is_some() {
            self.check_rest();
            return self.outcome();
        }
        let planned = self.requests.made.len();
        self.network.calm();
        self.plan_probes();
        self.play_to_rest();
        for (request, made) in self.requests.made.iter().skip(planned) {
            if made.end != Some(End::Complete) {
                let (pair, end) = ((made.prefill, made.decode), &made.end);
                self.requests.violations.push(format!("{request:?} of {pair:?} after all faults: {end:?}"));
            }
        }
        self.check_rest();
        self.outcome()
    }

    fn plan_probes(&mut self) {
        let of_kind = |prefill: bool| -> Vec<NodeId> {
            let is = |actor: &Actor| matches!(actor.kind, Kind::Prefill(_)) == prefill;
            self.actors.iter().filter(|(_, actor)| is(actor)).map(|(node, _)| *node).collect()
        };
        let at = self.network.now().after_us(3_000_000);
        for prefill in of_kind(true) {
            for decode in of_kind(false) {
                let (prompt, cancel_at) = (prompt(9, 20, 20), None);
                let pair = Some((prefill, decode));
                self.plans.push(Plan { at, prompt, choices: 1, max_tokens: 3, cancel_at, pair });
            }
        }
    }

    fn play_to_rest(&mut self) {
        let mut at_rest_since = None;
        loop {
            let now = self.network.now();
            let open = !self.plans.is_empty() || self.requests.made.values().any(|made| made.end.is_none());
            let since = *at_rest_since.get_or_insert(now);
            if open {
                at_rest_since = None;
            } else if now.since_us(since) > REST_US || self.is_at_rest() && now.since_us(since) > 1_000_000 {
                break;
            }
            let next = self.next_moment(now);
            self.network.advance(next);
            self.hand.set(next);
            self.play_faults(next);
            self.play_router(next);
            self.play_nodes(next);
            self.check_deadlines(next);
            if self.requests.violations.len() > 20 {
                break;
            }
        }
    }

    /// When something happens next; a little later than now at least.
    fn next_moment(&self, now: Time) -> Time {
        let nodes =
            self.actors.values().filter_map(|actor| actor.wake.map(|wake| wake.max(actor.busy_until)));
        let busy =
            self.actors.iter().filter(|(node, _)| self.network.has_events(**node)).map(|(_, a)| a.busy_until);
        let tiers =
            self.actors.values().filter_map(|actor| Some(actor.tier.as_ref()?.at()?.max(actor.busy_until)));
        let plans = self.plans.last().map(|plan| plan.at);
        let cancels = self
            .requests
            .made
            .values()
            .filter(|made| made.end.is_none())
            .filter_map(|made| made.plan.cancel_at);
        let faults = self.faults.last().map(|(at, _)| *at);
        let next = nodes
            .chain(busy)
            .chain(tiers)
            .chain(plans)
            .chain(cancels)
            .chain(faults)
            .chain(self.network.next_at())
            .min();
        // Half a second when nothing is due: deadlines are checked by the clock.
        next.unwrap_or(now.after_us(500_000)).max(now.after_us(1)).min(now.after_us(500_000))
    }

    fn play_faults(&mut self, now: Time) {
        while let Some((_, fault)) = self.faults.pop_if(|(at, _)| *at <= now) {
            let nodes: Vec<_> = self.actors.keys().copied().collect();
            match fault {
                Fault::Crash => {
                    let victim = nodes[self.rng.between(0, nodes.len() as u64 - 1) as usize];
                    let actor = self.actors.remove(&victim).expect("it was listed");
                    self.network.crash(victim);
                    self.start(matches!(actor.kind, Kind::Prefill(_)));
                }
                Fault::Partition => {
                    let all: Vec<_> = nodes.iter().copied().chain([ROUTER]).collect();
                    let a = all[self.rng.between(0, all.len() as u64 - 1) as usize];
                    let b = all[self.rng.between(0, all.len() as u64 - 1) as usize];
                    if a != b {
                        self.network.partition(a, b);
                        let heal = now.after_us(self.rng.between(10_000, 2_500_000));
                        self.faults.push((heal, Fault::Heal(a, b)));
                        self.sort_faults();
                    }
                }
                Fault::Heal(a, b) => self.network.heal(a, b),
                Fault::Dial(node) => self.network.connect_control(node, ROUTER),
            }
        }
    }

    fn play_router(&mut self, now: Time) {
        let mut events = Vec::new();
        self.network.poll_control(ROUTER, &mut events);
        for event in events {
            match event {
                ControlEvent::Up { peer, .. } => self.connected.push(peer),
                ControlEvent::Down { peer, .. } => {
                    self.connected.retain(|node| *node != peer);
                    self.requests.node_lost(peer, &self.network, ROUTER);
                }
                ControlEvent::Frame { bytes, .. } => {
                    let message = wire::decode(&bytes).expect("nodes encode what they send");
                    self.requests.message(message, &self.network, ROUTER);
                }
            }
        }
        while let Some(mut plan) = self.plans.pop_if(|plan| plan.at <= now) {
            let up = |prefill: bool| {
                let is = |node: &&NodeId| {
                    self.actors
                        .get(node)
                        .is_some_and(|actor| matches!(actor.kind, Kind::Prefill(_)) == prefill)
                };
                self.connected.iter().filter(is).copied().collect::<Vec<_>>()
            };
            let (prefill, decode) = (up(true), up(false));
            let missing = plan.pair.is_some_and(|(p, d)| !prefill.contains(&p) || !decode.contains(&d));
            if prefill.is_empty() || decode.is_empty() || missing {
                let wait = 50_000;
                plan.at = now.after_us(wait);
                plan.cancel_at = plan.cancel_at.map(|at| at.after_us(wait));
                self.plans.push(plan);
                self.plans.sort_by_key(|plan| std::cmp::Reverse(plan.at));
                continue;
            }
            let mut draw = |of: &[NodeId]| of[self.rng.between(0, of.len() as u64 - 1) as usize];
            let drawn = (draw(&prefill), draw(&decode));
            let (prefill, decode) = plan.pair.unwrap_or(drawn);
            self.requests.make(plan, &self.network, ROUTER, prefill, decode);
        }
        let is_due = |made: &super::router::Made| {
            made.end.is_none() && made.plan.cancel_at.is_some_and(|at| at <= now)
        };
        let due: Vec<_> =
            self.requests.made.iter().filter(|(_, made)| is_due(made)).map(|(id, _)| *id).collect();
        for request in due {
            self.requests.end(request, End::Cancelled, &self.network, ROUTER);
        }
    }

    fn play_nodes(&mut self, now: Time) {
        for node in self.actors.keys().copied().collect::<Vec<_>>() {
            self.deliver(node, now);
        }
        let injected = std::mem::take(&mut self.seen.lock().expect("one thread").injected);
        for (node, event) in injected {
            if let Some(actor) = self.actors.get_mut(&node) {
                actor.inbox.try_send(event).expect("room in the inbox");
                actor.wake = Some(now);
            }
        }
        for actor in self.actors.values_mut() {
            if actor.tier.as_ref().and_then(Due::at).is_some_and(|at| at <= now) {
                actor.wake = Some(now);
            }
        }
        for node in self.actors.keys().copied().collect::<Vec<_>>() {
            self.turn(node, now);
        }
    }

    /// Puts what the control channel has for a node into its inbox, and breaks what is to be broken there.
    fn deliver(&mut self, node: NodeId, now: Time) {
        if !self.network.has_events(node) {
            return;
        }
        let mut events = Vec::new();
        self.network.poll_control(node, &mut events);
        let actor = self.actors.get_mut(&node).expect("it is an actor");
        actor.wake = Some(now);
        for event in events {
            let mut seen = self.seen.lock().expect("one thread");
            match &event {
                ControlEvent::Up { peer, .. } => drop(seen.connected.insert((node, *peer))),
                ControlEvent::Down { peer, .. } => drop(seen.connected.remove(&(node, *peer))),
                ControlEvent::Frame { .. } => {}
            }
            drop(seen);
            let event = match event {
                ControlEvent::Up { peer: ROUTER, .. } => NodeEvent::RouterUp { router: ROUTER },
                ControlEvent::Up { peer, .. } => NodeEvent::Up { peer },
                ControlEvent::Down { peer, reason } => {
                    if peer == ROUTER {
                        self.faults.push((now.after_us(20_000), Fault::Dial(node)));
                        self.faults.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
                    }
                    NodeEvent::Down { peer, reason }
                }
                ControlEvent::Frame { peer, bytes, .. } => {
                    let message = wire::decode(&bytes).expect("nodes encode what they send");
                    match (&message, self.broken) {
                        (Message::Handoff(Handoff::Cancel { request }), Some(Break::FencedTooSoon)) => {
                            let fenced = Message::Handoff(Handoff::Fenced { request: *request, error: None });
                            let frame = wire::encode(&fenced).expect("within bounds");
                            let _ = self.network.send(node, peer, tandem_node::lane(&fenced), frame);
                        }
                        (
                            Message::Handoff(Handoff::ChunkDone { token, .. }),
                            Some(Break::DoneBeforeAllBytes),
                        ) => {
                            claim_landed(&actor.made_up, peer, *token);
                        }
                        _ => {}
                    }
                    NodeEvent::Message { from: peer, message }
                }
            };
            actor.inbox.try_send(event).expect("room in the inbox");
        }
    }

    fn turn(&mut self, node: NodeId, now: Time) {
        let actor = self.actors.get_mut(&node).expect("it is an actor");
        if actor.busy_until > now || actor.wake.is_none_or(|wake| wake > now) {
            return;
        }
        let next = match &mut actor.kind {
            Kind::Prefill(prefill) => prefill.turn(),
            Kind::Decode(decode) => decode.turn(),
        };
        actor.wake = match next {
            Next::Again => Some(now),
            Next::Wait(until) => until.map(|time| time.max(now.after_us(1))),
            Next::Finished => {
                self.requests.violations.push(format!("{node:?} stopped by itself"));
                None
            }
        };
        let poked = std::mem::take(&mut self.seen.lock().expect("one thread").poked);
        if next == Next::Again || poked.contains(&node) {
            actor.wake = Some(now);
            actor.busy_until = now.after_us(self.rng.between(50, 2_000));
        }
    }

    fn check_deadlines(&mut self, now: Time) {
        for (request, made) in &self.requests.made {
            let due = made.plan.at.after_us(u64::from(GENERATION_TIMEOUT_MS) * 1000 + 1_000_000);
            // A router that cannot reach a node learns so from the connection, within its own time.
            if made.end.is_none() && now > due {
                self.requests.violations.push(format!("{request:?} is open after its deadline"));
                break;
            }
        }
    }

    fn is_at_rest(&self) -> bool {
        self.actors.values().all(|actor| actor.leaks().is_none())
    }

    /// After the last request ended, and every timeout passed: nobody holds anything.
    fn check_rest(&mut self) {
        for (node, actor) in &self.actors {
            if let Some(leak) = actor.leaks() {
                self.requests.violations.push(format!("{node:?} at rest: {leak}"));
            }
        }
        let computed = self.computed.load(Ordering::Relaxed);
        let all_came = self.requests.made.values().all(|made| made.end == Some(End::Complete));
        if all_came && self.weather.is_harmless() && self.requests.computed != computed {
            let said = self.requests.computed;
            self.requests.violations.push(format!("{computed} tokens were computed, and {said} as was said"));
        }
        let seen = self.seen.lock().expect("one thread");
        self.requests.violations.extend(seen.violations.iter().cloned());
        for writer in &seen.refused {
            let what = format!("a write of {writer:?} was refused: its slot was freed while it was written");
            self.requests.violations.push(what);
        }
        if self.weather.is_harmless() {
            for (who, whom) in &seen.severs {
                self.requests.violations.push(format!("{who:?} severed {whom:?}, which was healthy"));
            }
        }
        for (request, made) in &self.requests.made {
            let Some(End::Failed(error)) = &made.end else {
                continue;
            };
            let allowed = match error {
                RequestError::Corrupt(_) => self.weather.network.corrupt > 0.0,
                RequestError::PeerLost(_) | RequestError::Deadline(_) => !self.weather.is_harmless(),
                // A prefill node that was told of a cancel by the decode node before the router's own came.
                RequestError::Internal(why) => {
                    !self.weather.is_harmless() && why.contains("gave the request up")
                }
                RequestError::Busy(_) | RequestError::Invalid(_) => false,
            };
            if !allowed {
                self.requests.violations.push(format!("{request:?} failed for no reason: {error}"));
            }
        }
    }

    fn outcome(self) -> Outcome {
        let count = |is: fn(&End) -> bool| {
            self.requests.made.values().filter(|made| made.end.as_ref().is_some_and(is)).count()
        };
        Outcome {
            complete: count(|end| *end == End::Complete),
            ended_early: count(|end| *end != End::Complete),
            corrupt: count(|end| matches!(end, End::Failed(RequestError::Corrupt(_)))),
            cached: self.requests.cached,
            seconds: self.network.now().0 as f64 / 1e6,
            violations: self.requests.violations,
        }
    }
}

impl Actor {
    /// What the node holds although it has nothing to do.
    fn leaks(&self) -> Option<String> {
        let (load, under_way) = match &self.kind {
            Kind::Prefill(node) => (node.load(), node.under_way()),
            Kind::Decode(node) => (node.load(), node.under_way()),
        };
        let idle = load.running == 0
            && load.waiting == 0
            && load.free_pages == load.pages
            && load.free_slots == load.slots
            && under_way == (0, 0);
        (!idle).then(|| format!("{load:?}, under way {under_way:?}"))
    }
}
