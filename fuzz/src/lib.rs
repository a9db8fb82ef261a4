//! What is fuzzed: every decoder of bytes from outside, and the handoff under any order of events.
//!
//! Each function takes bytes and panics when a rule is broken. `tests/short.rs` plays each for a moment with
//! made-up and damaged input, as part of every check; `fuzz/libfuzzer` searches with coverage for as long as
//! one likes (`scripts/fuzz`).
#![forbid(unsafe_code)]

mod handoff;
pub mod samples;

pub use handoff::handoff;

use tandem_proto::handoff::Immediate;
use tandem_proto::wire;
use tandem_transport::control::frame::Decoder;
use tandem_transport::fuzz::DECODERS;

/// A target.
pub struct Target {
    /// As it is called.
    pub name: &'static str,
    /// What it does with an input.
    pub play: fn(&[u8]),
    /// Inputs that are right, to be damaged.
    pub samples: fn() -> Vec<Vec<u8>>,
}

/// All targets: each of ours, and each group of decoders of the transport.
#[must_use]
pub fn targets() -> Vec<Target> {
    let ours = [
        Target { name: "wire", play: wire_message, samples: samples::frames },
        Target { name: "frames", play: frames, samples: samples::streams },
        Target { name: "immediate", play: immediate, samples: Vec::new },
        Target { name: "handoff", play: handoff, samples: Vec::new },
    ];
    let transports = DECODERS.iter().map(|of| Target { name: of.name, play: of.decode, samples: of.samples });
    ours.into_iter().chain(transports).collect()
}

/// Plays an input to the target of this name.
///
/// # Panics
/// When there is none, or a rule is broken.
pub fn play(name: &str, input: &[u8]) {
    thread_local! {
        static TARGETS: Vec<Target> = targets();
    }
    let play = TARGETS.with(|all| all.iter().find(|target| target.name == name).map(|target| target.play));
    play.expect("the target exists")(input);
}

/// A message that is decoded is encoded to something that decodes to the same.
pub fn wire_message(input: &[u8]) {
    if let Ok(message) = wire::decode(input) {
        let frame = wire::encode(&message).expect("what was decoded can be encoded");
        let again = wire::decode(&frame).expect("what was encoded can be decoded");
        // Compared as bytes: a NaN is not equal to itself.
        assert_eq!(wire::encode(&again).expect("as before"), frame);
    }
}

/// Frames are the same however the bytes are cut, and none is longer than the limit.
pub fn frames(input: &[u8]) {
    const LIMIT: usize = 64;
    let Some((cut, bytes)) = input.split_first() else { return };
    let all = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut decoder = Decoder::new(LIMIT);
        let mut frames = Vec::new();
        for piece in pieces {
            decoder.push(piece);
            loop {
                match decoder.pop() {
                    Ok(Some(frame)) => {
                        assert!(frame.len() <= LIMIT);
                        frames.push(frame);
                    }
                    Ok(None) => break,
                    Err(_) => return (frames, true),
                }
            }
        }
        (frames, false)
    };
    let whole = all(&mut std::iter::once(bytes));
    let cut = all(&mut bytes.chunks(usize::from(*cut) + 1));
    assert_eq!(whole, cut);
}

/// Every pattern of bits is an immediate, and the same one again.
pub fn immediate(input: &[u8]) {
    for bits in input.chunks_exact(4) {
        let bits = u32::from_le_bytes(bits.try_into().expect("four bytes"));
        assert_eq!(Immediate::from_bits(bits).to_bits(), bits);
    }
}
