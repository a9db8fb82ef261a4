//! A moment of fuzzing for every target, the same for a seed: made-up bytes, and messages that were damaged.

use tandem_fuzz::samples::messages;
use tandem_fuzz::{samples, targets};
use tandem_proto::ids::RequestId;
use tandem_proto::wire::{self, Handoff, Message, WireError};

/// Inputs for each target; `TANDEM_FUZZ_INPUTS=N` plays more.
fn inputs() -> u64 {
    std::env::var("TANDEM_FUZZ_INPUTS").map_or(20_000, |n| n.parse().expect("TANDEM_FUZZ_INPUTS is a number"))
}

struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

#[test]
fn every_target_holds_for_a_moment() {
    for target in targets() {
        let name = target.name;
        let mut valid = (target.samples)();
        if valid.is_empty() {
            valid = samples::frames();
        }
        let mut chance = Chance(0x5eed);
        for round in 0..inputs() {
            let len = chance.below(200);
            let input = if round % 2 == 0 {
                chance.bytes(len)
            } else {
                let mut frame = valid[chance.below(valid.len())].clone();
                for _ in 0..=chance.below(4) {
                    let at = chance.below(frame.len());
                    match chance.below(3) {
                        0 => frame[at] = chance.next() as u8,
                        1 => frame.truncate(at.max(1)),
                        _ => frame.insert(at, chance.next() as u8),
                    }
                }
                frame
            };
            let played = std::panic::catch_unwind(|| (target.play)(&input));
            assert!(played.is_ok(), "target {name} breaks on input {round}: {input:02x?}");
        }
    }
}

#[test]
fn messages_come_back_as_they_were() {
    for message in messages() {
        assert_eq!(wire::decode(&wire::encode(&message).unwrap()).unwrap(), message);
    }
}

#[test]
fn frames_that_encode_would_not_make_are_refused() {
    let good = wire::encode(&Message::Draining).unwrap();
    let with = |bytes: &[u8]| [&good[..], bytes].concat();
    assert!(matches!(wire::decode(&[]), Err(WireError::Short(0))));
    assert!(matches!(wire::decode(&with(&[0])), Err(WireError::Trailing(1))));
    assert!(matches!(wire::decode(&[9, 9, 0]), Err(WireError::Version(0x909))));
    assert!(matches!(wire::decode(&good[..2]), Err(WireError::Malformed(_))));
    let none = Message::Handoff(Handoff::Offer { request: RequestId(1), tokens: 0 });
    assert!(matches!(
        wire::decode(&wire::encode(&none).unwrap()),
        Err(WireError::Field { field: "tokens", .. })
    ));
}
