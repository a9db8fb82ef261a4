//! The router's part in the simulation: sends requests, checks every token that comes back.

use super::model::{SHAPE, VOCAB, expected};
use std::collections::BTreeMap;
use tandem_proto::ids::{NodeId, RequestId, Time, TokenId};
use tandem_proto::wire::{
    CachedTokens, Destination, Expect, Finish, FirstTokens, Generation, Message, RequestError, Sampled,
    SamplingParams, Submit, Tokens,
};
use tandem_transport::sim::SimNetwork;

/// Milliseconds that nodes get for a handoff, and for all of a request.
pub(super) const HANDOFF_TIMEOUT_MS: u32 = 8_000;
pub(super) const GENERATION_TIMEOUT_MS: u32 = 15_000;

/// A request that is to be made.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) at: Time,
    pub(super) prompt: Vec<TokenId>,
    pub(super) choices: u32,
    pub(super) max_tokens: u32,
    /// When the client goes away.
    pub(super) cancel_at: Option<Time>,
    /// Which nodes; any if None.
    pub(super) pair: Option<(NodeId, NodeId)>,
}

/// A request that was made.
pub(super) struct Made {
    pub(super) plan: Plan,
    pub(super) prefill: NodeId,
    pub(super) decode: NodeId,
    expected: Vec<TokenId>,
    got: Vec<Vec<TokenId>>,
    finished: Vec<bool>,
    pub(super) end: Option<End>,
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum End {
    Complete,
    Cancelled,
    Failed(RequestError),
    /// One of its nodes went.
    Lost,
}

#[derive(Default)]
pub(super) struct Requests {
    pub(super) made: BTreeMap<RequestId, Made>,
    pub(super) violations: Vec<String>,
    /// Of all prompts whose first token came.
    pub(super) cached: CachedTokens,
    /// Tokens of those that were computed, as their nodes say.
    pub(super) computed: u64,
}

impl Requests {
    /// Sends a request to both nodes. False when one of them takes no message.
    pub(super) fn make(
        &mut self,
        plan: Plan,
        network: &SimNetwork,
        router: NodeId,
        prefill: NodeId,
        decode: NodeId,
    ) {
        let request = RequestId(self.made.len() as u128 + 1);
        let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let generation = Generation {
            sampling,
            choices: plan.choices,
            max_tokens: plan.max_tokens,
            stop_tokens: Vec::new(),
        };
        let destination = Destination {
            node: decode,
            control: SimNetwork::address(decode),
            data: SimNetwork::address(decode),
        };
        let submit = Submit {
            request,
            prompt: plan.prompt.clone(),
            generation: generation.clone(),
            decode: Some(destination),
            salt: Vec::new(),
            handoff_timeout_ms: HANDOFF_TIMEOUT_MS,
        };
        let expect = Expect {
            request,
            prompt: plan.prompt.clone(),
            generation,
            prefill,
            handoff_timeout_ms: HANDOFF_TIMEOUT_MS,
            generation_timeout_ms: GENERATION_TIMEOUT_MS,
        };
        let made = Made {
            prefill,
            decode,
            expected: expected(&plan.prompt, plan.max_tokens as usize),
            got: vec![Vec::new(); plan.choices as usize],
            finished: vec![false; plan.choices as usize],
            end: None,
            plan,
        };
        self.made.insert(request, made);
        let sent = tell(network, router, decode, &Message::Expect(expect))
            && tell(network, router, prefill, &Message::Submit(submit));
        if !sent {
            self.end(request, End::Lost, network, router);
        }
    }

    /// Ends a request, and tells both nodes unless they know.
    pub(super) fn end(&mut self, request: RequestId, end: End, network: &SimNetwork, router: NodeId) {
        let Some(made) = self.made.get_mut(&request).filter(|made| made.end.is_none()) else {
            return;
        };
        if end != End::Complete {
            for node in [made.prefill, made.decode] {
                tell(network, router, node, &Message::Cancel { request });
            }
        }
        made.end = Some(end);
    }

    /// Ends all requests of a node that is gone.
    pub(super) fn node_lost(&mut self, node: NodeId, network: &SimNetwork, router: NodeId) {
        let of_node = self.made.iter().filter(|(_, made)| made.prefill == node || made.decode == node);
        for request in of_node.map(|(request, _)| *request).collect::<Vec<_>>() {
            self.end(request, End::Lost, network, router);
        }
    }

    pub(super) fn message(&mut self, message: Message, network: &SimNetwork, router: NodeId) {
        match message {
            Message::FirstTokens(FirstTokens { request, tokens, cached }) => {
                self.count_cached(request, cached);
                for (choice, token) in tokens.into_iter().enumerate() {
                    self.tokens(request, choice, 0, &[token], None);
                }
            }
            Message::Tokens(Tokens { request, choice, start, tokens, finish }) => {
                self.tokens(request, choice.0 as usize, start as usize, &tokens, finish);
                if self.made.get(&request).is_some_and(|made| made.finished.iter().all(|finished| *finished))
                {
                    self.end(request, End::Complete, network, router);
                }
            }
            Message::Failed { request, error } => self.end(request, End::Failed(error), network, router),
            _ => {}
        }
    }

    fn count_cached(&mut self, request: RequestId, cached: CachedTokens) {
        let Some(made) = self.made.get(&request) else { return };
        let (prompt, total) = (made.plan.prompt.len() as u32, cached.total());
        if total >= prompt || !total.is_multiple_of(SHAPE.chunk_tokens) {
            self.violations.push(format!("{request:?}: {cached:?} of {prompt} tokens were not computed"));
            return;
        }
        self.cached = self.cached.plus(cached);
        self.computed += u64::from(prompt - total);
    }

    fn tokens(
        &mut self,
        request: RequestId,
        choice: usize,
        start: usize,
        tokens: &[Sampled],
        finish: Option<Finish>,
    ) {
        let Some(made) = self.made.get_mut(&request).filter(|made| made.end.is_none()) else {
            return;
        };
        let got = &mut made.got[choice];
        if start > got.len() {
            self.violations
                .push(format!("{request:?} choice {choice}: tokens {}..{start} never came", got.len()));
            return;
        }
        for (index, sampled) in (start..).zip(tokens) {
            if made.expected.get(index) != Some(&sampled.token) {
                self.violations.push(format!(
                    "{request:?} choice {choice}: token {index} is {}, expected {:?} (prompt of {})",
                    sampled.token,
                    made.expected.get(index),
                    made.plan.prompt.len()
                ));
            }
            if index == got.len() {
                got.push(sampled.token);
            }
        }
        if finish.is_some() {
            made.finished[choice] = true;
            if got.len() != made.plan.max_tokens as usize {
                self.violations
                    .push(format!("{request:?} choice {choice} finished after {} tokens", got.len()));
            }
        }
    }
}

fn tell(network: &SimNetwork, router: NodeId, node: NodeId, message: &Message) -> bool {
    let frame = tandem_proto::wire::encode(message).expect("within bounds");
    network.send(router, node, tandem_node::lane(message), frame).is_ok()
}

/// A prompt that shares its beginning with others of its family.
pub(super) fn prompt(family: u64, len: u32, differs_from: u32) -> Vec<TokenId> {
    let token = |position: u32, family: u64| {
        let mixed =
            (u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ family.wrapping_mul(0x85eb_ca6b));
        TokenId(((mixed >> 33) % u64::from(VOCAB)) as u32)
    };
    (0..len)
        .map(|at| token(at, if at < differs_from { family } else { family + u64::from(differs_from) * 31 }))
        .collect()
}
