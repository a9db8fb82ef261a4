use std::collections::BTreeMap;
use tandem_proto::handoff::{
    Push, Receiver, ReceiverAction, ReceiverConfig, Sender, SenderAction, SenderConfig,
};
use tandem_proto::ids::{ChunkIdx, LayerIdx, NodeId, RequestId, SlotEpoch, SlotId, Time, TokenId};
use tandem_proto::layout::{KvDtype, KvShape};
use tandem_proto::wire::{Handoff, Lease, LeaseToken, Sampled, Window};

const SHAPE: KvShape =
    KvShape { layers: 2, kv_heads: 1, head_dim: 1, page_tokens: 2, chunk_tokens: 4, dtype: KvDtype::F16 };
const PREFILL: NodeId = NodeId(1);
const DECODE: NodeId = NodeId(2);

/// Reads an input as numbers.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn small(&mut self, below: u32) -> u32 {
        u32::from(self.next().unwrap_or(0)) % below
    }

    fn request(&mut self) -> RequestId {
        RequestId(self.small(4).into())
    }

    /// Any message, of a peer that has lost its mind.
    fn message(&mut self) -> Handoff {
        let request = self.request();
        let token = |input: &mut Self| LeaseToken {
            slot: SlotId(input.small(6)),
            epoch: SlotEpoch(input.small(4)),
            request,
        };
        match self.small(6) {
            0 => Handoff::Offer { request, tokens: self.small(12) + 1 },
            1 => {
                let leases = (0..self.small(3))
                    .map(|_| Lease {
                        chunk: ChunkIdx(self.small(5)),
                        token: token(self),
                        window: Window { region: 0, key: 0, offset: 0, len: self.small(64).into() },
                    })
                    .collect();
                Handoff::Grant { request, leases }
            }
            2 => Handoff::ChunkDone {
                token: token(self),
                digests: (0..self.small(4)).map(|_| self.small(3).into()).collect(),
            },
            3 => Handoff::Done { request, first: vec![Sampled { token: TokenId(1), logprobs: None }] },
            4 => Handoff::Cancel { request },
            _ => Handoff::Fenced { request, error: None },
        }
    }
}

/// What the nodes have begun for them.
#[derive(Default)]
struct UnderWay {
    pushes: Vec<Push>,
    scatters: Vec<(LeaseToken, LayerIdx)>,
}

/// One sender and one receiver under any order of events and any messages, also ones that no peer would send.
/// Neither panics, every slot comes back, and nothing is left once every deadline has passed and the peers are
/// severed.
pub fn handoff(input: &[u8]) {
    let mut input = Input(input);
    let mut sender = Sender::new(SHAPE, SenderConfig::default());
    let mut receiver = Receiver::new(SHAPE, ReceiverConfig { slots: 3, ..ReceiverConfig::default() });
    let mut now = Time(1);
    let mut under_way = UnderWay::default();
    let mut begun: BTreeMap<RequestId, (u32, u32)> = BTreeMap::new();
    while let Some(what) = input.next() {
        let request = input.request();
        let UnderWay { pushes, scatters } = &mut under_way;
        let deadline = now.after_us(50_000);
        match what % 15 {
            0 if !begun.contains_key(&request) => {
                let tokens = input.small(12) + 1;
                begun.insert(request, (tokens, 0));
                sender.begin(request, DECODE, tokens, deadline);
                receiver.expect(now, request, PREFILL, tokens, deadline);
            }
            1 => {
                if let Some((tokens, done)) = begun.get_mut(&request)
                    && *done < SHAPE.chunks(*tokens) * SHAPE.layers
                {
                    sender.ready(request, ChunkIdx(*done / SHAPE.layers), LayerIdx(*done % SHAPE.layers));
                    *done += 1;
                }
            }
            2 => sender.first(request, vec![Sampled { token: TokenId(1), logprobs: None }]),
            3 => pushes.extend(sender.next_push()),
            4 if !pushes.is_empty() => {
                let push = pushes.swap_remove(input.small(pushes.len() as u32) as usize);
                receiver.landed(PREFILL, push.immediate.to_bits());
                sender.sent(push.request, push.chunk, push.layer, 1);
            }
            5 if !pushes.is_empty() => {
                let push = pushes.pop().expect("not empty");
                sender.not_sent(now, push.request, "fuzz");
            }
            6 => receiver.landed(PREFILL, u32::from(what) << 18 | input.small(1 << 8)),
            7 => receiver.reserved(request),
            8 => sender.give_up(now, request, None),
            9 => receiver.give_up(now, request, None),
            10 => sender.message(now, DECODE, input.message()),
            11 => receiver.message(now, PREFILL, input.message()),
            12 => {
                now = now.after_us(u64::from(input.small(256)) * 1000);
                sender.tick(now);
                receiver.tick(now);
            }
            13 if input.small(8) == 0 => {
                sender.peer_lost(now, DECODE, "fuzz");
                receiver.peer_lost(now, PREFILL, "fuzz");
            }
            14 if !scatters.is_empty() => {
                let (token, layer) = scatters.swap_remove(input.small(scatters.len() as u32) as usize);
                match input.small(8) {
                    0 => receiver.not_scattered(now, token, "fuzz"),
                    _ => receiver.scattered(now, token, layer, 1),
                }
            }
            _ => {}
        }
        settle(&mut sender, &mut receiver, now, &mut under_way, input.small(4) != 0);
    }
    for _ in 0..4 {
        now = now.after_us(60_000_000);
        sender.tick(now);
        receiver.tick(now);
        settle(&mut sender, &mut receiver, now, &mut under_way, true);
    }
    sender.severed(DECODE);
    receiver.severed(PREFILL);
    for (token, layer) in std::mem::take(&mut under_way.scatters) {
        receiver.scattered(now, token, layer, 1);
    }
    settle(&mut sender, &mut receiver, now, &mut under_way, true);
    assert_eq!(sender.open_requests(), 0, "the sender holds a request for ever");
    assert_eq!(receiver.open_requests(), 0, "the receiver holds a request for ever");
    assert_eq!(receiver.free_slots(), receiver.slots(), "a slot is lost");
}

/// Carries out what both want, delivering messages or losing them.
fn settle(sender: &mut Sender, receiver: &mut Receiver, now: Time, under_way: &mut UnderWay, deliver: bool) {
    // Bounded: an endless conversation would be a bug.
    for _ in 0..1000 {
        if let Some(action) = sender.poll_action() {
            match action {
                SenderAction::Send { message, .. } if deliver => receiver.message(now, PREFILL, message),
                SenderAction::Sever { peer } => {
                    for push in under_way.pushes.drain(..) {
                        sender.not_sent(now, push.request, "severed");
                    }
                    sender.severed(peer);
                }
                SenderAction::Send { .. } | SenderAction::Release { .. } => {}
            }
        } else if let Some(action) = receiver.poll_action() {
            match action {
                ReceiverAction::Send { message, .. } if deliver => sender.message(now, DECODE, message),
                ReceiverAction::Grant { request, leases, .. } if deliver => {
                    for (_, granted) in &leases {
                        let is_read = |(token, _): &(LeaseToken, _)| token.slot == granted.slot;
                        assert!(
                            !under_way.scatters.iter().any(is_read),
                            "a slot was granted while it is read"
                        );
                    }
                    let leases = leases
                        .into_iter()
                        .map(|(chunk, token)| Lease {
                            chunk,
                            token,
                            window: Window { region: 0, key: 0, offset: 0, len: 32 },
                        })
                        .collect();
                    sender.message(now, DECODE, Handoff::Grant { request, leases });
                }
                ReceiverAction::Scatter { token, layer, .. } => under_way.scatters.push((token, layer)),
                ReceiverAction::Reserve { request } => receiver.reserved(request),
                ReceiverAction::Sever { peer } => receiver.severed(peer),
                _ => {}
            }
        } else {
            return;
        }
    }
    panic!("sender and receiver never come to rest");
}
