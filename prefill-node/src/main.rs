//! Computes prompts and hands their KV to decode nodes, layer by layer.

use clap::Parser;
use prefill_node::{Limits, Node, Outbound};
use tandem_engine::Engine;
use tandem_kernels::{Kernels, Paged};
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
}

fn main() -> anyhow::Result<()> {
    let config = tandem_process::parse::<Config>("TANDEM_PREFILL");
    let Config { node, staging_memory, step_tokens, max_waiting } = config;
    start(node, Role::Prefill, Prefill { staging_memory, limits: Limits { step_tokens, max_waiting } })
}

struct Prefill {
    staging_memory: usize,
    limits: Limits,
}

impl NodeLoop for Prefill {
    fn packed_memory(&self) -> usize {
        self.staging_memory
    }

    fn run<E: Engine, K: Kernels<Pages = E::Pages>>(self, parts: Parts<E, K>) -> anyhow::Result<()> {
        let Parts { clock, cluster, inbox, transport, engine, kv, kernels, board, join } = parts;
        let (shape, staging) = (*kv.shape(), self.staging_memory);
        let outbound = Outbound::new(clock, cluster, inbox, transport, kernels, shape, staging)?;
        join();
        Node::new(engine, kv, outbound, self.limits).showing(board).run()
    }
}
