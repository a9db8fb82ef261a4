//! Computes prompts and hands their KV to decode nodes, layer by layer.

use anyhow::Context;
use clap::Parser;
use prefill_node::{Cache, CacheLimits, Limits, Node, Outbound};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tandem_engine::{Engine, ModelInfo};
use tandem_kernels::{Kernels, Paged};
use tandem_kv_store::policy::PolicyKind;
use tandem_kv_store::tier::disk::{DiskConfig, DiskTier};
use tandem_kv_store::tier::{Tier, Wake};
use tandem_kv_store::{HostPool, PoolConfig, Store, StoreConfig, StoreLimits};
use tandem_node::{NodeLoop, NodeOptions, Parts, start};
use tandem_process::units;
use tandem_proto::wire::Role;
use tandem_remote::{Remote, RemoteConfig, StoreUrl};

/// Computes prompts and hands their KV to decode nodes, each layer as soon as it is computed.
#[derive(Parser, Debug)]
#[command(
    name = "prefill-node",
    version,
    after_help = "Example:\n  prefill-node --model models/tiny --router 127.0.0.1:7000 --tls-dir .run/tls"
)]
struct Config {
    #[command(flatten)]
    node: NodeOptions,
    /// Memory for packed layers that are being written. It is waited for, so it bounds what is in flight.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = units::bytes, help_heading = "Memory and speed")]
    staging_memory: usize,
    /// Tokens computed in one step, rounded down to whole chunks of 256. Other prompts and the handoff get their
    /// turn between layers; longer steps compute a little faster, shorter ones are fairer.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(256..=16384), help_heading = "Memory and speed")]
    step_tokens: u32,
    /// Prompts that may wait for their turn. More are refused, and the client is told to try again.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_waiting: usize,
    /// Memory of the host for chunks that prompts may begin with again, beyond those in pages: what has to leave the pages
    /// is brought back instead of being computed. Pinned where a GPU computes, else taken as it fills. 0 keeps none.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = units::bytes, help_heading = "Cache")]
    cache_memory: usize,
    /// What goes when that memory is full: lru, what was unused for longest; lfu, what was used least; s3fifo, what was
    /// not used again soon after it came, so that prompts that never return wash nothing out.
    #[arg(long, value_name = "NAME", default_value = "lru", help_heading = "Cache")]
    cache_policy: PolicyKind,
    /// How long a chunk is kept at most in host memory, and on disk. Without it, until room is needed.
    #[arg(long, value_name = "DURATION", value_parser = units::duration, help_heading = "Cache")]
    cache_ttl: Option<Duration>,
    /// A folder for chunks on disk, of this node alone: what host memory has no room for is found there, and after a
    /// restart too, by whatever loads the same model. Chunks are written to both.
    #[arg(long, value_name = "DIR", requires = "cache_disk_size", help_heading = "Cache")]
    cache_disk: Option<PathBuf>,
    /// What that folder may take, never more.
    #[arg(long, value_name = "SIZE", requires = "cache_disk", value_parser = units::bytes, help_heading = "Cache")]
    cache_disk_size: Option<usize>,
    /// A store for chunks that nodes share: s3://bucket/prefix?endpoint=https://host:port&region=name, or
    /// redis://user:password@host:port/database?prefix=name&ttl=seconds, or fs:///path for a folder that all of them reach.
    /// Credentials that are not in it come from the environment, as the tools of those stores take them. Nothing bounds
    /// what is kept there but the store itself.
    #[arg(long, value_name = "URL", help_heading = "Cache")]
    cache_remote: Option<StoreUrl>,
}

fn main() -> anyhow::Result<()> {
    let config = tandem_process::parse::<Config>("TANDEM_PREFILL");
    start(config.node.clone(), Role::Prefill, Prefill { config })
}

struct Prefill {
    config: Config,
}

impl NodeLoop for Prefill {
    fn packed_memory(&self) -> usize {
        self.config.staging_memory
    }

    fn run<E: Engine, K: Kernels<Pages = E::Pages>>(self, parts: Parts<E, K>) -> anyhow::Result<()> {
        let Parts { clock, cluster, inbox, transport, engine, kv, kernels, board, wake, join } = parts;
        let (shape, config) = (*kv.shape(), self.config);
        let cache = config.cache(engine.info(), &kernels, wake)?;
        let staging = config.staging_memory;
        let mut outbound = Outbound::new(clock, cluster, inbox, transport, kernels, shape, staging)?;
        if let Some(cache) = cache {
            outbound = outbound.with_cache(cache);
        }
        join();
        let limits = Limits { step_tokens: config.step_tokens, max_waiting: config.max_waiting };
        Node::new(engine, kv, outbound, limits).showing(board).run()
    }
}

impl Config {
    /// None if the options want none.
    fn cache<K: Kernels>(&self, model: &ModelInfo, kernels: &K, wake: Wake) -> anyhow::Result<Option<Cache>> {
        let bytes = self.cache_memory;
        if bytes == 0 {
            let none = self.cache_disk.is_none() && self.cache_remote.is_none();
            anyhow::ensure!(
                none,
                "--cache-disk and --cache-remote need memory to load chunks to: say more than 0 for --cache-memory"
            );
            return Ok(None);
        }
        let (fingerprint, shape) = (model.fingerprint, model.kv);
        let chunk_bytes = shape.packed_bytes(shape.chunk_tokens);
        anyhow::ensure!(
            bytes >= chunk_bytes,
            "--cache-memory of {bytes} bytes has no room for one chunk of {chunk_bytes}: say more, or 0"
        );
        let what = || format!("--cache-memory of {bytes} bytes");
        let region = kernels.host_memory(bytes).with_context(what)?;
        let ttl_us = self.cache_ttl.map(|ttl| u64::try_from(ttl.as_micros()).unwrap_or(u64::MAX));
        let pool = PoolConfig { policy: self.cache_policy, ttl_us, tenant_slots: None };
        let pool = HostPool::new(&region, chunk_bytes, pool).with_context(what)?;
        tracing::info!(chunks = pool.slots(), chunk_bytes, policy = %self.cache_policy, "caching in host memory");
        let config = StoreConfig { fingerprint, shape, limits: StoreLimits::default() };
        let store = Store::new(config, pool, self.tiers(wake)?);
        Ok(Some(Cache::new(store, fingerprint, shape, CacheLimits::default())))
    }

    /// What is behind host memory, the fastest first.
    fn tiers(&self, wake: Wake) -> anyhow::Result<Vec<Box<dyn Tier>>> {
        let mut tiers: Vec<Box<dyn Tier>> = Vec::new();
        if let (Some(dir), Some(size)) = (&self.cache_disk, self.cache_disk_size) {
            let disk = DiskConfig {
                policy: self.cache_policy,
                ttl: self.cache_ttl,
                ..DiskConfig::new(dir, size as u64)
            };
            tiers.push(Box::new(DiskTier::open(&disk, Arc::clone(&wake)).context("--cache-disk")?));
        }
        if let Some(url) = &self.cache_remote {
            let remote = Remote::open(RemoteConfig::new(url.clone()), wake).context("--cache-remote")?;
            tracing::info!(store = %url, "caching in a remote store");
            tiers.push(Box::new(remote));
        }
        Ok(tiers)
    }
}
