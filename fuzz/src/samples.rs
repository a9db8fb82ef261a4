//! Inputs that are right.

use tandem_proto::ids::{NodeId, RequestId, TokenId};
use tandem_proto::wire::{self, Expect, Generation, Handoff, Message, RequestError, SamplingParams};

/// Messages of several kinds.
#[must_use]
pub fn messages() -> Vec<Message> {
    let generation = Generation {
        sampling: SamplingParams::default(),
        choices: 2,
        max_tokens: 9,
        stop_tokens: vec![TokenId(1)],
    };
    let request = RequestId(77);
    vec![
        Message::Expect(Expect {
            request,
            prompt: (0..300).map(TokenId).collect(),
            generation,
            prefill: NodeId(3),
            handoff_timeout_ms: 1000,
            generation_timeout_ms: 2000,
        }),
        Message::Failed { request, error: RequestError::Busy("full".into()) },
        Message::Handoff(Handoff::Offer { request, tokens: 300 }),
        Message::Handoff(Handoff::Cancel { request }),
        Message::Draining,
    ]
}

/// The same, as they are sent.
#[must_use]
pub fn frames() -> Vec<Vec<u8>> {
    messages().iter().map(|message| wire::encode(message).expect("a message can be encoded")).collect()
}

/// Frames one after another on a stream, after the byte that says how it is cut.
#[must_use]
pub fn streams() -> Vec<Vec<u8>> {
    let framed = |len: u32| [&len.to_le_bytes()[..], &vec![7; len as usize]].concat();
    vec![[vec![3], framed(0), framed(5), framed(64), framed(1)].concat()]
}
