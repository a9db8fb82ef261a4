//! TLS 1.3 records: their headers, and the keys that seal and open them.
//!
//! A record is `[23][3][3][length: u16]`, then ciphertext of the content and of one byte that says what the
//! content is, then a tag. No record here is padded. Both directions change keys by TLS's own `KeyUpdate`, long
//! before a key has sealed what is safe.

use super::TlsError;
use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets as Secrets;
use rustls::crypto::cipher::{AeadKey, Iv};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) const HEADER_BYTES: usize = 5;
/// The byte that says what the content is, and the tag.
const TRAILER_BYTES: usize = 1 + TAG_BYTES;
const TAG_BYTES: usize = 16;
/// What a record costs beside its content.
pub(super) const OVERHEAD_BYTES: usize = HEADER_BYTES + TRAILER_BYTES;
/// The most content of a record, by TLS.
pub(super) const MAX_CONTENT: usize = 1 << 14;
/// The longest record that is sent or taken here.
pub(super) const MAX_RECORD: usize = MAX_CONTENT + OVERHEAD_BYTES;

/// Records that one key seals before the next one takes over: 64 GiB of full ones.
const REKEY_AFTER: u64 = 1 << 22;
/// Records that one key opens, at most: beyond this AES-GCM is not safe.
const KEY_LIMIT: u64 = 1 << 24;

/// The `KeyUpdate` message that asks for nothing in return.
pub(super) const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// What a record's content is, as TLS numbers it.
pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const DATA: u8 = 23;

/// Makes the next keys of a connection, from TLS's key schedule.
pub(super) trait Schedule: Send {
    fn next_sealing(&mut self) -> Result<(u64, Secrets), rustls::Error>;
    fn next_opening(&mut self) -> Result<(u64, Secrets), rustls::Error>;
}

pub(super) type SharedSchedule = Arc<Mutex<dyn Schedule>>;

/// A key of one direction.
struct Key {
    aead: LessSafeKey,
    iv: [u8; 12],
    /// Of the next record. Counts the records of this key, so it never comes near its end.
    sequence: u64,
}

impl Key {
    fn new((sequence, secrets): (u64, Secrets)) -> Result<Key, TlsError> {
        let new = |algorithm, key: AeadKey, iv: Iv| {
            let unbound = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| TlsError::Keys)?;
            let iv = iv.as_ref().try_into().map_err(|_| TlsError::Keys)?;
            Ok(Key { aead: LessSafeKey::new(unbound), iv, sequence })
        };
        match secrets {
            Secrets::Aes128Gcm { key, iv } => new(&AES_128_GCM, key, iv),
            Secrets::Aes256Gcm { key, iv } => new(&AES_256_GCM, key, iv),
            Secrets::Chacha20Poly1305 { key, iv } => new(&CHACHA20_POLY1305, key, iv),
            _ => Err(TlsError::Keys),
        }
    }

    /// Each is handed out once.
    fn next_nonce(&mut self) -> Result<Nonce, TlsError> {
        if self.sequence >= KEY_LIMIT {
            return Err(TlsError::Rule("it used a key for too many records"));
        }
        let mut nonce = self.iv;
        for (byte, count) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= count;
        }
        self.sequence += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

fn header(body_bytes: usize) -> [u8; HEADER_BYTES] {
    // A body is never longer than `MAX_RECORD`.
    let [high, low] = (body_bytes as u16).to_be_bytes();
    [DATA, 3, 3, high, low]
}

/// How long the record's body is, from its header.
pub(super) fn body_bytes(header: [u8; HEADER_BYTES]) -> Result<usize, TlsError> {
    let [kind, major, minor, high, low] = header;
    if [kind, major, minor] != [DATA, 3, 3] {
        return Err(TlsError::Rule("its bytes are no TLS record"));
    }
    let bytes = usize::from(u16::from_be_bytes([high, low]));
    if !(TRAILER_BYTES..=MAX_CONTENT + TRAILER_BYTES).contains(&bytes) {
        return Err(TlsError::Rule("it sent a record of a length that does not occur"));
    }
    Ok(bytes)
}

/// Seals records to be sent.
pub(super) struct Sealer {
    key: Key,
    rekey_after: u64,
    schedule: SharedSchedule,
}

impl Sealer {
    pub(super) fn new(first: (u64, Secrets), schedule: SharedSchedule) -> Result<Sealer, TlsError> {
        Ok(Sealer { key: Key::new(first)?, rekey_after: REKEY_AFTER, schedule })
    }

    #[cfg(test)]
    pub(super) fn rekey_after(&mut self, records: u64) {
        self.rekey_after = records;
    }

    /// Writes a record of `content` to `out`, in one pass. Returns its length.
    pub(super) fn seal(&mut self, kind: u8, content: &[u8], out: &mut [u8]) -> Result<usize, TlsError> {
        let record = content.len() + OVERHEAD_BYTES;
        if content.len() > MAX_CONTENT || out.len() < record {
            return Err(TlsError::Rule("a record was cut too long"));
        }
        let header = header(content.len() + TRAILER_BYTES);
        let (head, rest) = out[..record].split_at_mut(HEADER_BYTES);
        let (cipher, trailer) = rest.split_at_mut(content.len());
        head.copy_from_slice(&header);
        let nonce = self.key.next_nonce()?;
        self.key
            .aead
            .seal_out_of_place_scatter(nonce, Aad::from(header), content, cipher, &[kind], trailer)
            .map_err(|_| TlsError::Keys)?;
        Ok(record)
    }

    pub(super) fn is_worn(&self) -> bool {
        self.key.sequence >= self.rekey_after
    }

    /// Takes the next key: after the record that says so.
    pub(super) fn renew(&mut self) -> Result<(), TlsError> {
        let next = self.schedule.lock().unwrap_or_else(PoisonError::into_inner).next_sealing();
        self.key = Key::new(next.map_err(TlsError::Tls)?)?;
        Ok(())
    }
}

/// Opens records that were received.
pub(super) struct Opener {
    key: Key,
    schedule: SharedSchedule,
}

impl Opener {
    pub(super) fn new(first: (u64, Secrets), schedule: SharedSchedule) -> Result<Opener, TlsError> {
        Ok(Opener { key: Key::new(first)?, schedule })
    }

    /// Opens a record into `out`, which holds the content and the byte after it that says what it is: that byte
    /// is returned. What `out` holds after an error means nothing.
    pub(super) fn open(&mut self, record: &Record<'_>, out: &mut [u8]) -> Result<u8, TlsError> {
        let nonce = self.key.next_nonce()?;
        self.key
            .aead
            .open_separate_gather(nonce, Aad::from(record.header), record.cipher, record.tag, out)
            .map_err(|_| TlsError::Garbled)?;
        out.last().copied().ok_or(TlsError::Garbled)
    }

    /// Takes the next key, as the peer did.
    pub(super) fn renew(&mut self) -> Result<(), TlsError> {
        let next = self.schedule.lock().unwrap_or_else(PoisonError::into_inner).next_opening();
        self.key = Key::new(next.map_err(TlsError::Tls)?)?;
        Ok(())
    }
}

/// A whole record as it came in.
pub(super) struct Record<'a> {
    header: [u8; HEADER_BYTES],
    /// Of the content and the byte after it.
    cipher: &'a [u8],
    tag: &'a [u8],
}

impl<'a> Record<'a> {
    /// Cuts the record at the beginning of `bytes` off; None if it is not whole yet.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Option<Record<'a>>, TlsError> {
        let Some((header, rest)) = bytes.split_first_chunk() else {
            return Ok(None);
        };
        let Some(body) = rest.get(..body_bytes(*header)?) else {
            return Ok(None);
        };
        let (cipher, tag) = body.split_at(body.len() - TAG_BYTES);
        Ok(Some(Record { header: *header, cipher, tag }))
    }

    /// Bytes of the whole record.
    pub(super) fn bytes(&self) -> usize {
        HEADER_BYTES + self.cipher.len() + self.tag.len()
    }

    /// Bytes of its content.
    pub(super) fn content_bytes(&self) -> usize {
        self.cipher.len() - 1
    }
}

/// A record never reaches beyond the bytes that it was cut from.
pub(super) fn fuzz(bytes: &[u8]) {
    if let Ok(Some(record)) = Record::parse(bytes) {
        assert!(record.bytes() <= bytes.len() && record.bytes() <= MAX_RECORD);
        assert!(record.content_bytes() <= MAX_CONTENT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys that both sides derive alike.
    struct Counted(u8, u8);

    fn secrets(number: u8) -> (u64, Secrets) {
        (0, Secrets::Aes256Gcm { key: AeadKey::from([number; 32]), iv: Iv::from([number; 12]) })
    }

    impl Schedule for Counted {
        fn next_sealing(&mut self) -> Result<(u64, Secrets), rustls::Error> {
            self.0 += 1;
            Ok(secrets(self.0))
        }

        fn next_opening(&mut self) -> Result<(u64, Secrets), rustls::Error> {
            self.1 += 1;
            Ok(secrets(self.1))
        }
    }

    fn pair() -> (Sealer, Opener) {
        let schedule = || Arc::new(Mutex::new(Counted(1, 1)));
        (Sealer::new(secrets(1), schedule()).unwrap(), Opener::new(secrets(1), schedule()).unwrap())
    }

    fn open(opener: &mut Opener, bytes: &[u8]) -> Result<Vec<u8>, TlsError> {
        let record = Record::parse(bytes)?.ok_or(TlsError::Closed)?;
        let mut out = vec![0; record.content_bytes() + 1];
        assert_eq!(opener.open(&record, &mut out)?, DATA);
        out.pop();
        Ok(out)
    }

    #[test]
    fn records_of_every_length_survive() {
        let (mut sealer, mut opener) = pair();
        let mut out = vec![0; MAX_RECORD];
        let content: Vec<u8> = (0..=MAX_CONTENT).map(|i| (i * 7) as u8).collect();
        let lengths = (0..300).chain(4090..4100).chain(8190..8194).chain(MAX_CONTENT - 40..=MAX_CONTENT);
        for len in lengths {
            let record = sealer.seal(DATA, &content[..len], &mut out).unwrap();
            assert_eq!(record, len + OVERHEAD_BYTES);
            for cut in [0, 4, 5, record - 1] {
                assert!(Record::parse(&out[..cut]).unwrap().is_none(), "{cut} of {record} bytes are whole");
            }
            assert_eq!(open(&mut opener, &out).unwrap(), content[..len]);
        }
        assert!(sealer.seal(DATA, &content, &mut out).is_err(), "TLS has no records as long as this");
    }

    #[test]
    fn what_was_garbled_anywhere_is_refused() {
        let content = [5; 100];
        let mut out = vec![0; MAX_RECORD];
        for at in 0..content.len() + OVERHEAD_BYTES {
            for bit in 0..8 {
                let (mut sealer, mut opener) = pair();
                let record = sealer.seal(DATA, &content, &mut out).unwrap();
                out[at] ^= 1 << bit;
                assert!(open(&mut opener, &out[..record]).is_err(), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn records_are_taken_once_and_in_order() {
        let (mut sealer, mut opener) = pair();
        let mut records = [[0; 64]; 3];
        for (i, out) in records.iter_mut().enumerate() {
            sealer.seal(DATA, &[i as u8], out).unwrap();
        }
        assert!(matches!(open(&mut opener, &records[1]), Err(TlsError::Garbled)));
        let (_, mut opener) = pair();
        assert_eq!(open(&mut opener, &records[0]).unwrap(), [0]);
        assert!(matches!(open(&mut opener, &records[0]), Err(TlsError::Garbled)), "replayed");
    }

    #[test]
    fn a_key_is_used_for_no_more_than_is_safe() {
        let (mut sealer, mut opener) = pair();
        let mut out = [0; 64];
        for _ in 0..3 {
            sealer.seal(DATA, b"old", &mut out).unwrap();
            assert_eq!(open(&mut opener, &out).unwrap(), b"old");
            sealer.renew().unwrap();
            opener.renew().unwrap();
        }
        sealer.key.sequence = REKEY_AFTER - 1;
        assert!(!sealer.is_worn());
        sealer.seal(DATA, b"", &mut out).unwrap();
        assert!(sealer.is_worn());
        opener.key.sequence = KEY_LIMIT;
        assert!(matches!(open(&mut opener, &out), Err(TlsError::Rule(_))));
    }
}
