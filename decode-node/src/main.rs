//! Takes prompts' KV from prefill nodes and generates from it.

use clap::Parser;
use decode_node::{Inbound, Limits, Node};
use tandem_engine::Engine;
use tandem_kernels::{Kernels, Paged};
use tandem_node::{NodeLoop, NodeOptions, Parts, start};
use tandem_process::units;
use tandem_proto::wire::Role;

/// Takes the KV of prompts from prefill nodes, verifies it, and generates from it.
#[derive(Parser, Debug)]
#[command(
    name = "decode-node",
    version,
    after_help = "Example:\n  decode-node --model models/tiny --router 127.0.0.1:7000 --tls-dir .run/tls"
)]
struct Config {
    #[command(flatten)]
    node: NodeOptions,
    /// Memory in which KV lands before it is verified. Prompts share it chunk by chunk, and wait when it is full.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = units::bytes, help_heading = "Memory and speed")]
    landing_memory: usize,
    /// Completions that get a token in the same step. More take turns.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Memory and speed")]
    max_batch: u16,
    /// Requests expected, waiting or generating. More are refused, and the client is told to try again.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_requests: usize,
}

fn main() -> anyhow::Result<()> {
    let config = tandem_process::parse::<Config>("TANDEM_DECODE");
    let Config { node, landing_memory, max_batch, max_requests } = config;
    let limits = Limits { max_requests, max_batch: usize::from(max_batch) };
    start(node, Role::Decode, Decode { landing_memory, limits })
}

struct Decode {
    landing_memory: usize,
    limits: Limits,
}

impl NodeLoop for Decode {
    fn packed_memory(&self) -> usize {
        self.landing_memory
    }

    fn run<E: Engine, K: Kernels<Pages = E::Pages>>(self, parts: Parts<E, K>) -> anyhow::Result<()> {
        let Parts { clock, cluster, inbox, transport, engine, kv, kernels, board, join, .. } = parts;
        let (shape, landing) = (*kv.shape(), self.landing_memory);
        let inbound = Inbound::new(clock, cluster, inbox, transport, kernels, shape, landing)?;
        join();
        Node::new(engine, kv, inbound, self.limits).showing(board).run()
    }
}
