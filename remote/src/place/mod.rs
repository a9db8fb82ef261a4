//! The stores, each with what a tier asks of it. None waits longer than its caller lets it live: a call that is dropped
//! is over, and has let go of the chunk's memory.

mod objects;
mod redis;
mod resp;

use crate::landing::{Landing, Misfit};
use crate::lent::Lent;
use crate::tier::OpenError;
use crate::url::StoreUrl;
pub(crate) use objects::Objects;
pub(crate) use redis::Redis;
use tandem_proto::keys::ChunkKey;

/// The longest reason that is told, of however much a store said.
const LONGEST_REASON: usize = 300;

/// A store.
pub(crate) enum Place {
    Objects(Objects),
    Redis(Redis),
}

/// Why a call did not end well.
#[derive(Debug)]
pub(crate) enum Fault {
    /// There is no such object.
    Absent,
    /// What is there is not the chunk.
    Misfit(Misfit),
    /// The store, or the way to it, failed.
    Failed { reason: String, passing: bool },
}

impl Fault {
    /// A failure that may be gone at the next try, or not.
    pub(crate) fn failed(reason: impl ToString, passing: bool) -> Fault {
        let reason = reason.to_string();
        let shown = reason.chars().map(|char| if char.is_control() { ' ' } else { char });
        Fault::Failed { reason: shown.take(LONGEST_REASON).collect(), passing }
    }
}

impl From<Misfit> for Fault {
    fn from(misfit: Misfit) -> Fault {
        Fault::Misfit(misfit)
    }
}

impl Place {
    pub(crate) fn open(url: &StoreUrl) -> Result<Place, OpenError> {
        match url {
            StoreUrl::Redis { .. } => Ok(Place::Redis(Redis::new(url))),
            StoreUrl::S3 { .. } | StoreUrl::Directory { .. } => Objects::open(url).map(Place::Objects),
        }
    }

    /// Removes what writers that died have left behind.
    pub(crate) async fn tidy(&self) {
        match self {
            Place::Objects(objects) => objects.tidy().await,
            Place::Redis(_) => {}
        }
    }

    /// Counts in `found` the keys that are there, from the one after those that it counts already up to the first that
    /// is not.
    pub(crate) async fn find(&self, keys: &[ChunkKey], found: &mut usize) -> Result<(), Fault> {
        match self {
            Place::Objects(objects) => objects.find(keys, found).await,
            Place::Redis(redis) => redis.find(keys, found).await,
        }
    }

    /// Puts an object there, unless one is.
    pub(crate) async fn put(&self, key: ChunkKey, header: &[u8], body: &Lent) -> Result<(), Fault> {
        match self {
            Place::Objects(objects) => objects.put(key, header, body).await,
            Place::Redis(redis) => redis.put(key, header, body).await,
        }
    }

    /// Reads an object.
    pub(crate) async fn get(&self, landing: &mut Landing) -> Result<(), Fault> {
        match self {
            Place::Objects(objects) => objects.get(landing).await,
            Place::Redis(redis) => redis.get(landing).await,
        }
    }

    /// Removes an object, if it is there.
    pub(crate) async fn delete(&self, key: ChunkKey) -> Result<(), Fault> {
        match self {
            Place::Objects(objects) => objects.delete(key).await,
            Place::Redis(redis) => redis.delete(key).await,
        }
    }
}

/// What the object of a chunk is called: shared out over 256 folders, so that no listing is of all.
fn name(prefix: &str, key: ChunkKey) -> String {
    let hex = key.to_string();
    let folder = &hex[..2];
    if prefix.is_empty() { format!("{folder}/{hex}") } else { format!("{prefix}/{folder}/{hex}") }
}
