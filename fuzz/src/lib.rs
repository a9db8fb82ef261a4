//! What is fuzzed: every decoder of bytes from outside, and the handoff under any order of events.
//!
//! Each function takes bytes and panics when a rule is broken. `tests/short.rs` plays each for a moment with
//! made-up and damaged input, as part of every check; `fuzz/libfuzzer` searches with coverage for as long as
//! one likes (`scripts/fuzz`).
#![forbid(unsafe_code)]

mod handoff;

pub use handoff::handoff;

use tandem_proto::handoff::Immediate;
use tandem_proto::wire;
use tandem_transport::control::frame::Decoder;

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 5] = [
    ("wire", wire_message),
    ("frames", frames),
    ("transport", tandem_transport::decode_anything),
    ("immediate", immediate),
    ("handoff", handoff),
];

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
