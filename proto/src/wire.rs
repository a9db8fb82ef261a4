//! The messages of the control channel, and the only code that knows their bytes.
//!
//! A frame is a two-byte version, then one [`Message`] in bincode. [`decode`] takes bytes from anywhere: it
//! caps every length before it allocates, refuses what is left over, and checks what a length cannot say.

use crate::ids::{ChoiceIdx, ChunkIdx, NodeId, RequestId, SlotEpoch, SlotId, TokenId};
use crate::keys::Fingerprint;
use crate::layout::{KvShape, MAX_LAYERS};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// The version of the messages and of the checksums in them. Peers of another version are refused in the handshake.
pub const WIRE_VERSION: u16 = 3;
/// The longest frame that is encoded or decoded.
pub const MAX_FRAME_BYTES: usize = 16 << 20;
/// The longest prompt, in tokens.
pub const MAX_PROMPT_TOKENS: usize = 1 << 20;
/// The most completions of one request.
pub const MAX_CHOICES: u32 = 128;
/// The most alternatives reported beside a sampled token.
pub const MAX_TOP_LOGPROBS: usize = 20;
/// The most leases in one grant.
pub const MAX_LEASES: usize = 1 << 14;
/// The longest text (a name, a reason) in a message, in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;
/// The most stop tokens or biased tokens of one request.
pub const MAX_TOKEN_LIST: usize = 4096;

/// Everything that is said between processes of a cluster.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Message {
    /// Node → router, first of all: who it is and what it serves.
    Hello(Hello),
    /// Node → router, whenever it changes: how much it has to do.
    Load(Load),
    /// Node → router: take nothing new to this node; it finishes what it has and leaves.
    Draining,
    /// Router → prefill: compute this prompt and hand it to a decode node.
    Submit(Submit),
    /// Router → decode: a prefill node will hand over this request; generate from it.
    Expect(Expect),
    /// Router → node: the request is over; stop and free what it holds. Never answered.
    Cancel {
        /// Which request.
        request: RequestId,
    },
    /// Prefill → router: the first token of every choice, before the handoff is complete.
    FirstTokens(FirstTokens),
    /// Decode → router: generated tokens of one choice.
    Tokens(Tokens),
    /// Node → router: the request failed here.
    Failed {
        /// Which request.
        request: RequestId,
        /// Why.
        error: RequestError,
    },
    /// Between prefill and decode nodes.
    Handoff(Handoff),
}

/// What a node computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Generates tokens.
    Decode,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        })
    }
}

/// How a node introduces itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// This incarnation.
    pub node: NodeId,
    /// Its name, for people.
    pub name: String,
    /// What it computes.
    pub role: Role,
    /// Where other nodes reach its control channel.
    pub control: SocketAddr,
    /// Where other nodes reach its transport.
    pub data: SocketAddr,
    /// The model it loaded; nodes of one cluster must agree.
    pub fingerprint: Fingerprint,
    /// The shape of its KV.
    pub kv: KvShape,
    /// The longest sequence it can hold, in tokens.
    pub max_sequence_tokens: u32,
}

/// How busy a node is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Load {
    /// Requests being computed.
    pub running: u32,
    /// Requests waiting for room.
    pub waiting: u32,
    /// Pages of the pool.
    pub pages: u32,
    /// Pages that are free.
    pub free_pages: u32,
    /// Landing slots, of a decode node.
    pub slots: u32,
    /// Landing slots that are free.
    pub free_slots: u32,
}

/// How tokens are chosen. Neutral values switch a rule off.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the smallest set of tokens with this much probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Drops tokens less likely than this share of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Subtracted once from the logit of every token generated before.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for every time it was generated before.
    pub frequency_penalty: f32,
    /// Divides (or multiplies, below zero) the logits of tokens in prompt or output; 1 is neutral.
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Randomness is a function of seed, choice and token index alone, so any node can go on from any token.
    pub seed: u64,
    /// Report the chosen token's log probability, with this many alternatives.
    pub top_logprobs: Option<u8>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            top_logprobs: None,
        }
    }
}

/// What to generate.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Generation {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Independent completions of the prompt.
    pub choices: u32,
    /// Tokens of each completion, at most; at least 1.
    pub max_tokens: u32,
    /// A completion ends with the first of these (the end-of-sequence tokens, unless they are ignored).
    pub stop_tokens: Vec<TokenId>,
}

/// A prompt to compute.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Submit {
    /// Which request.
    pub request: RequestId,
    /// The prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// What to generate; the prefill node samples the first token of each choice.
    pub generation: Generation,
    /// Where the KV goes. None when the first token is all that is wanted.
    pub decode: Option<Destination>,
    /// The tenant's salt for chunk keys.
    pub salt: Vec<u8>,
    /// Milliseconds until the handoff must be complete.
    pub handoff_timeout_ms: u32,
}

/// A node that KV is handed to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Destination {
    /// Which node.
    pub node: NodeId,
    /// Its control channel.
    pub control: SocketAddr,
    /// Its transport.
    pub data: SocketAddr,
}

/// A request whose KV will arrive.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Expect {
    /// Which request.
    pub request: RequestId,
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// What to generate.
    pub generation: Generation,
    /// The node that computes the prompt.
    pub prefill: NodeId,
    /// Milliseconds until the handoff must be complete.
    pub handoff_timeout_ms: u32,
    /// Milliseconds until the last token must be out.
    pub generation_timeout_ms: u32,
}

/// A token that was chosen, and how likely it was.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its log probability, and the likeliest alternatives, if they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// How likely a token was before any sampling rule changed that.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Logprobs {
    /// The chosen token's log probability.
    pub chosen: f32,
    /// The likeliest tokens, most likely first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a completion ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Finish {
    /// It generated a stop token.
    Stop,
    /// It reached `max_tokens`, or the longest sequence the node holds.
    Length,
}

/// The first token of every choice, in order of choice.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FirstTokens {
    /// Which request.
    pub request: RequestId,
    /// One token for each choice.
    pub tokens: Vec<Sampled>,
    /// Prompt tokens whose KV was reused rather than computed.
    pub cached: CachedTokens,
}

/// Tokens of a prompt whose KV was reused rather than computed, by where it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CachedTokens {
    /// In pages of the prefill node.
    pub pages: u32,
    /// In its host memory.
    pub host: u32,
    /// On its disk.
    pub disk: u32,
    /// In a remote store.
    pub remote: u32,
}

impl CachedTokens {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u32 {
        let CachedTokens { pages, host, disk, remote } = *self;
        [pages, host, disk, remote].into_iter().fold(0, u32::saturating_add)
    }

    /// Those of both.
    #[must_use]
    pub fn plus(self, other: CachedTokens) -> CachedTokens {
        CachedTokens {
            pages: self.pages.saturating_add(other.pages),
            host: self.host.saturating_add(other.host),
            disk: self.disk.saturating_add(other.disk),
            remote: self.remote.saturating_add(other.remote),
        }
    }
}

/// Generated tokens of one choice.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Tokens {
    /// Which request.
    pub request: RequestId,
    /// Which completion.
    pub choice: ChoiceIdx,
    /// Index of the first of `tokens` in the completion: whoever puts them together drops what it has.
    pub start: u32,
    /// The tokens.
    pub tokens: Vec<Sampled>,
    /// Set with the completion's last token.
    pub finish: Option<Finish>,
}

/// Why a node gave a request up. The router turns it into an HTTP status.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum RequestError {
    /// No room now; another time it may work.
    #[error("the node is full: {0}")]
    Busy(String),
    /// It can never be served here as it is.
    #[error("{0}")]
    Invalid(String),
    /// It was not done in time.
    #[error("not done in time: {0}")]
    Deadline(String),
    /// A node that took part is gone.
    #[error("a node was lost: {0}")]
    PeerLost(String),
    /// KV arrived other than it was sent.
    #[error("KV failed verification: {0}")]
    Corrupt(String),
    /// Something that should not happen did.
    #[error("internal error: {0}")]
    Internal(String),
}

/// A lease of one slot to one request. Writes and messages that carry another are refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct LeaseToken {
    /// The slot.
    pub slot: SlotId,
    /// Which of the slot's leases.
    pub epoch: SlotEpoch,
    /// Whose it is.
    pub request: RequestId,
}

/// The only place where a peer may write: a range of a region, open to it alone until it is closed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Window {
    /// The region, as its owner numbers it.
    pub region: u32,
    /// Random, so that no other window is written by mistake.
    pub key: u64,
    /// First byte in the region.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A granted slot for one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lease {
    /// The chunk that may land there.
    pub chunk: ChunkIdx,
    /// The lease.
    pub token: LeaseToken,
    /// Where to write.
    pub window: Window,
}

/// What prefill and decode nodes say to each other about a request's KV. See [`crate::handoff`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Handoff {
    /// Prefill → decode: this prompt is being computed and its KV will follow.
    Offer {
        /// Which request.
        request: RequestId,
        /// Tokens of the prompt.
        tokens: u32,
    },
    /// Decode → prefill: these chunks may be written now.
    Grant {
        /// Which request.
        request: RequestId,
        /// Slots for some of its chunks.
        leases: Vec<Lease>,
    },
    /// Prefill → decode: every byte of this chunk has landed, and nothing more will be written there.
    ChunkDone {
        /// The chunk's lease.
        token: LeaseToken,
        /// The checksum of each layer's extent.
        digests: Vec<u64>,
    },
    /// Prefill → decode: every chunk was announced by `ChunkDone`; generation starts from these tokens.
    Done {
        /// Which request.
        request: RequestId,
        /// The first token of each choice.
        first: Vec<Sampled>,
    },
    /// Decode → prefill: write nothing more for this request. Always answered by `Fenced`.
    Cancel {
        /// Which request.
        request: RequestId,
    },
    /// Prefill → decode: no write for this request is in flight and none will follow.
    Fenced {
        /// Which request.
        request: RequestId,
        /// Why the prefill node gave up, when it was not asked to.
        error: Option<RequestError>,
    },
}

/// Why a frame is refused.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Shorter than its version.
    #[error("frame of {0} bytes is too short")]
    Short(usize),
    /// Longer than any frame.
    #[error("frame of {0} bytes is longer than {MAX_FRAME_BYTES}")]
    Long(usize),
    /// Made by another version.
    #[error("frame has wire version {0}, this build speaks {WIRE_VERSION}")]
    Version(u16),
    /// Not a message.
    #[error("frame is not a message: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// The message cannot be written.
    #[error("message cannot be encoded: {0}")]
    Unencodable(#[from] bincode::error::EncodeError),
    /// Bytes follow the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// A field is out of bounds.
    #[error("message field {field} is {value}, allowed is {allowed}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: String,
    },
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_variable_int_encoding()
        .with_limit::<MAX_FRAME_BYTES>()
}

/// The message as a frame.
///
/// # Errors
/// When it would be longer than [`MAX_FRAME_BYTES`].
pub fn encode(message: &Message) -> Result<Vec<u8>, WireError> {
    let mut frame = WIRE_VERSION.to_le_bytes().to_vec();
    bincode::serde::encode_into_std_write(message, &mut frame, config())?;
    if frame.len() > MAX_FRAME_BYTES {
        return Err(WireError::Long(frame.len()));
    }
    Ok(frame)
}

/// The message of a frame.
///
/// # Errors
/// For every frame that [`encode`] would not have made from a message within bounds.
pub fn decode(frame: &[u8]) -> Result<Message, WireError> {
    if frame.len() > MAX_FRAME_BYTES {
        return Err(WireError::Long(frame.len()));
    }
    let Some((version, body)) = frame.split_first_chunk() else {
        return Err(WireError::Short(frame.len()));
    };
    let version = u16::from_le_bytes(*version);
    if version != WIRE_VERSION {
        return Err(WireError::Version(version));
    }
    let (message, used): (Message, usize) = bincode::serde::decode_from_slice(body, config())?;
    if used != body.len() {
        return Err(WireError::Trailing(body.len() - used));
    }
    check(&message)?;
    Ok(message)
}

fn field(field: &'static str, value: impl ToString, allowed: impl ToString) -> WireError {
    WireError::Field { field, value: value.to_string(), allowed: allowed.to_string() }
}

fn at_most(name: &'static str, len: usize, max: usize) -> Result<(), WireError> {
    if len > max { Err(field(name, len, format_args!("at most {max} entries"))) } else { Ok(()) }
}

fn check(message: &Message) -> Result<(), WireError> {
    match message {
        Message::Hello(hello) => {
            at_most("name", hello.name.len(), MAX_TEXT_BYTES)?;
            hello.kv.validate().map_err(|e| field("kv", e, "a usable shape"))
        }
        Message::Load(_) | Message::Draining | Message::Cancel { .. } => Ok(()),
        Message::Submit(submit) => {
            at_most("salt", submit.salt.len(), MAX_TEXT_BYTES)?;
            check_work(&submit.prompt, &submit.generation)
        }
        Message::Expect(expect) => check_work(&expect.prompt, &expect.generation),
        Message::FirstTokens(first) => check_sampled(&first.tokens, MAX_CHOICES as usize),
        Message::Tokens(tokens) => {
            if tokens.choice.0 >= MAX_CHOICES {
                return Err(field("choice", tokens.choice, format_args!("below {MAX_CHOICES}")));
            }
            check_sampled(&tokens.tokens, MAX_PROMPT_TOKENS)
        }
        Message::Failed { error, .. } => check_error(error),
        Message::Handoff(handoff) => check_handoff(handoff),
    }
}

fn check_handoff(handoff: &Handoff) -> Result<(), WireError> {
    match handoff {
        Handoff::Offer { tokens, .. } if *tokens == 0 || *tokens as usize > MAX_PROMPT_TOKENS => {
            Err(field("tokens", tokens, format_args!("1 to {MAX_PROMPT_TOKENS}")))
        }
        Handoff::Offer { .. } | Handoff::Cancel { .. } => Ok(()),
        Handoff::Grant { leases, .. } => at_most("leases", leases.len(), MAX_LEASES),
        Handoff::ChunkDone { digests, .. } => at_most("digests", digests.len(), MAX_LAYERS as usize),
        Handoff::Done { first, .. } => check_sampled(first, MAX_CHOICES as usize),
        Handoff::Fenced { error, .. } => error.as_ref().map_or(Ok(()), check_error),
    }
}

fn check_error(error: &RequestError) -> Result<(), WireError> {
    let (RequestError::Busy(why)
    | RequestError::Invalid(why)
    | RequestError::Deadline(why)
    | RequestError::PeerLost(why)
    | RequestError::Corrupt(why)
    | RequestError::Internal(why)) = error;
    at_most("error", why.len(), MAX_TEXT_BYTES)
}

fn check_work(prompt: &[TokenId], generation: &Generation) -> Result<(), WireError> {
    if prompt.is_empty() || prompt.len() > MAX_PROMPT_TOKENS {
        return Err(field("prompt", prompt.len(), format_args!("1 to {MAX_PROMPT_TOKENS} tokens")));
    }
    if generation.choices == 0 || generation.choices > MAX_CHOICES {
        return Err(field("choices", generation.choices, format_args!("1 to {MAX_CHOICES}")));
    }
    if generation.max_tokens == 0 {
        return Err(field("max_tokens", 0, "at least 1"));
    }
    at_most("stop_tokens", generation.stop_tokens.len(), MAX_TOKEN_LIST)?;
    let sampling = &generation.sampling;
    at_most("logit_bias", sampling.logit_bias.len(), MAX_TOKEN_LIST)?;
    at_most("top_logprobs", sampling.top_logprobs.unwrap_or(0).into(), MAX_TOP_LOGPROBS)?;
    let rules = [
        ("temperature", sampling.temperature),
        ("top_p", sampling.top_p),
        ("min_p", sampling.min_p),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
        ("repetition_penalty", sampling.repetition_penalty),
    ];
    let biases = sampling.logit_bias.iter().map(|(_, bias)| ("logit_bias", *bias));
    match rules.into_iter().chain(biases).find(|(_, value)| !value.is_finite()) {
        Some((name, value)) => Err(field(name, value, "a finite number")),
        None => Ok(()),
    }
}

fn check_sampled(sampled: &[Sampled], max: usize) -> Result<(), WireError> {
    at_most("tokens", sampled.len(), max)?;
    sampled
        .iter()
        .filter_map(|s| s.logprobs.as_ref())
        .try_for_each(|logprobs| at_most("top_logprobs", logprobs.top.len(), MAX_TOP_LOGPROBS))
}
