//! A slow tier behind the stores of all prefill nodes, as a remote one is: it outlives them, is late, fails and lies.

use super::breaks::Break;
use super::chance::Rng;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tandem_kernels::checksum;
use tandem_kv_store::tier::{Outcome, Ticket, Tier, TierError, Usage};
use tandem_memory::Extent;
use tandem_node::Clock;
use tandem_proto::ids::{LayerIdx, Time};
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;

const NAME: &str = "disk";
/// Chunks that it has room for.
const ROOM: usize = 60;

/// What is stored.
pub(super) type Shelf = Arc<Mutex<BTreeMap<ChunkKey, (ChunkHeader, Vec<u8>)>>>;

/// When a tier has something to tell.
#[derive(Clone)]
pub(super) struct Due(Arc<AtomicU64>);

impl Due {
    pub(super) fn at(&self) -> Option<Time> {
        Some(Time(self.0.load(Ordering::Relaxed))).filter(|at| at.0 < u64::MAX)
    }
}

/// One node's way to the shelf.
pub(super) struct SimTier {
    clock: Clock,
    shelf: Shelf,
    rng: Rng,
    /// Whether it does what it should.
    honest: bool,
    broken: Option<Break>,
    pending: Vec<Pending>,
    due: Due,
}

struct Pending {
    at: Time,
    ticket: Ticket,
    call: Call,
}

enum Call {
    Find(Arc<[ChunkKey]>),
    Store(Arc<ChunkHeader>, Extent),
    Load(ChunkKey, Extent),
    Remove(ChunkKey),
}

impl SimTier {
    pub(super) fn new(clock: Clock, shelf: &Shelf, rng: Rng, honest: bool, broken: Option<Break>) -> SimTier {
        let due = Due(Arc::new(AtomicU64::new(u64::MAX)));
        SimTier { clock, shelf: Arc::clone(shelf), rng, honest, broken, pending: Vec::new(), due }
    }

    pub(super) fn due(&self) -> Due {
        self.due.clone()
    }

    fn ask(&mut self, ticket: Ticket, call: Call) {
        let us = match self.rng.between(0, 19) {
            0 if !self.honest => self.rng.between(100_000, 4_000_000),
            1..4 => self.rng.between(2_000, 60_000),
            _ => self.rng.between(20, 2_000),
        };
        self.pending.push(Pending { at: self.clock.now().after_us(us), ticket, call });
        self.tell_due();
    }

    fn tell_due(&self) {
        let first = self.pending.iter().map(|pending| pending.at.0).min();
        self.due.0.store(first.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn misbehaves(&mut self, probability: f64) -> bool {
        !self.honest && self.rng.chance(probability)
    }

    fn answer(&mut self, call: Call) -> Result<Outcome, TierError> {
        if self.misbehaves(0.05) {
            return Err(TierError::Failed { tier: NAME, reason: "it did not answer in time".into() });
        }
        let shelf = Arc::clone(&self.shelf);
        let mut shelf = shelf.lock().expect("one thread");
        match call {
            Call::Find(keys) => {
                let found = keys.iter().take_while(|key| shelf.contains_key(key)).count();
                let lie = usize::from(self.misbehaves(0.1)) * self.rng.between(1, 3) as usize;
                Ok(Outcome::Found(found + lie))
            }
            Call::Store(header, body) => {
                if shelf.len() >= ROOM {
                    shelf.pop_first();
                }
                shelf.insert(header.key, ((*header).clone(), read(&body)));
                Ok(Outcome::Stored)
            }
            Call::Load(key, body) => {
                let Some((header, bytes)) = shelf.get(&key) else {
                    return Err(TierError::Absent { tier: NAME });
                };
                let (mut header, mut bytes) = (header.clone(), bytes.clone());
                if self.misbehaves(0.05) {
                    let at = self.rng.between(0, bytes.len() as u64 - 1) as usize;
                    bytes[at] ^= 1 << self.rng.between(0, 7);
                    if self.broken == Some(Break::ChecksumNotCompared) {
                        agree(&mut header, &bytes);
                    }
                }
                if self.misbehaves(0.03) {
                    header.key.0[0] ^= 1;
                }
                write(&body, &bytes);
                if self.misbehaves(0.03) {
                    return Err(TierError::Damaged { tier: NAME, key, reason: "its header".into() });
                }
                Ok(Outcome::Loaded(header))
            }
            Call::Remove(key) => {
                shelf.remove(&key);
                Ok(Outcome::Removed)
            }
        }
    }
}

/// Has the header say of these bytes that they are right: then whoever compares finds nothing.
fn agree(header: &mut ChunkHeader, bytes: &[u8]) {
    for layer in 0..header.shape.layers {
        header.checksums[layer as usize] = checksum(&bytes[header.layer(LayerIdx(layer))]);
    }
}

#[allow(unsafe_code)]
fn read(body: &Extent) -> Vec<u8> {
    // SAFETY: the store gave these bytes to a call that is not answered yet, so nobody writes them.
    unsafe { body.bytes() }.to_vec()
}

#[allow(unsafe_code)]
fn write(body: &Extent, bytes: &[u8]) {
    // SAFETY: the store gave these bytes to a call that is not answered yet, so nobody else uses them.
    unsafe { body.bytes_mut() }.copy_from_slice(bytes);
}

impl Tier for SimTier {
    fn name(&self) -> &'static str {
        NAME
    }

    fn find(&mut self, ticket: Ticket, keys: Arc<[ChunkKey]>) {
        self.ask(ticket, Call::Find(keys));
    }

    fn store(&mut self, ticket: Ticket, header: Arc<ChunkHeader>, body: Extent) {
        self.ask(ticket, Call::Store(header, body));
    }

    fn load(&mut self, ticket: Ticket, key: ChunkKey, body: Extent) {
        self.ask(ticket, Call::Load(key, body));
    }

    fn remove(&mut self, ticket: Ticket, key: ChunkKey) {
        self.ask(ticket, Call::Remove(key));
    }

    fn pin(&mut self, _: ChunkKey, _: bool) {}

    fn poll(&mut self, answers: &mut Vec<(Ticket, Result<Outcome, TierError>)>) {
        let now = self.clock.now();
        let due: Vec<_> = self.pending.extract_if(.., |pending| pending.at <= now).collect();
        for Pending { ticket, call, .. } in due {
            answers.push((ticket, self.answer(call)));
        }
        self.tell_due();
    }

    fn usage(&self) -> Usage {
        Usage { under_way: self.pending.len() as u64, ..Usage::default() }
    }
}
