//! Computes prompts and hands their KV to decode nodes, layer by layer.

use anyhow::Context;
use clap::Parser;
use prefill_node::{Cache, Limits, Node, Outbound};
use std::time::Duration;
use tandem_engine::Engine;
use tandem_kernels::{Kernels, Paged};
use tandem_kv_store::policy::PolicyKind;
use tandem_kv_store::{HostPool, PoolConfig, Store, StoreConfig, StoreLimits};
use tandem_node::{NodeLoop, NodeOptions, Parts, start};
use tandem_process::units;
use tandem_proto::wire::Role;

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
    /// How long a chunk is kept at most after it was computed. Without it, until room is needed.
    #[arg(long, value_name = "DURATION", value_parser = units::duration, help_heading = "Cache")]
    cache_ttl: Option<Duration>,
}

fn main() -> anyhow::Result<()> {
    let config = tandem_process::parse::<Config>("TANDEM_PREFILL");
    let Config { node, staging_memory, step_tokens, max_waiting, cache_memory, cache_policy, cache_ttl } =
        config;
    let limits = Limits { step_tokens, max_waiting };
    let ttl_us = cache_ttl.map(|ttl| u64::try_from(ttl.as_micros()).unwrap_or(u64::MAX));
    let pool = PoolConfig { policy: cache_policy, ttl_us, tenant_slots: None };
    start(node, Role::Prefill, Prefill { staging_memory, limits, cache_memory, pool })
}

struct Prefill {
    staging_memory: usize,
    limits: Limits,
    cache_memory: usize,
    pool: PoolConfig,
}

/// How long a prompt waits for chunks from slower tiers: as long as some thousand tokens take to be computed.
const PATIENCE_US: u64 = 2_000_000;

impl NodeLoop for Prefill {
    fn packed_memory(&self) -> usize {
        self.staging_memory
    }

    fn run<E: Engine, K: Kernels<Pages = E::Pages>>(self, parts: Parts<E, K>) -> anyhow::Result<()> {
        let Parts { clock, cluster, inbox, transport, engine, kv, kernels, board, join } = parts;
        let (shape, staging) = (*kv.shape(), self.staging_memory);
        let cache = self.cache(&engine, &kernels)?;
        let mut outbound = Outbound::new(clock, cluster, inbox, transport, kernels, shape, staging)?;
        if let Some(cache) = cache {
            outbound = outbound.with_cache(cache);
        }
        join();
        Node::new(engine, kv, outbound, self.limits).showing(board).run()
    }
}

impl Prefill {
    /// None if the options want none.
    fn cache<K: Kernels>(&self, engine: &impl Engine, kernels: &K) -> anyhow::Result<Option<Cache>> {
        if self.cache_memory == 0 {
            return Ok(None);
        }
        let info = engine.info();
        let (fingerprint, shape) = (info.fingerprint, info.kv);
        let chunk_bytes = shape.packed_bytes(shape.chunk_tokens);
        anyhow::ensure!(
            self.cache_memory >= chunk_bytes,
            "--cache-memory of {} bytes has no room for one chunk of {chunk_bytes}: say more, or 0",
            self.cache_memory
        );
        let what = || format!("--cache-memory of {} bytes", self.cache_memory);
        let region = kernels.host_memory(self.cache_memory).with_context(what)?;
        let pool = HostPool::new(&region, chunk_bytes, self.pool).with_context(what)?;
        tracing::info!(chunks = pool.slots(), chunk_bytes, policy = %self.pool.policy, "caching in host memory");
        let config = StoreConfig { fingerprint, shape, limits: StoreLimits::default() };
        Ok(Some(Cache::new(Store::new(config, pool, Vec::new()), fingerprint, shape, PATIENCE_US)))
    }
}
