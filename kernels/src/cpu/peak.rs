//! What the cores can do at most, to hold the kernels against.

use super::Cpu;
use super::simd::{LANES, Op, Simd};
use std::time::{Duration, Instant};

/// Independent chains: enough to hide the latency of one on two units.
const CHAINS: usize = 12;
const ROUNDS: usize = 10_000;

impl Cpu {
    /// Fused multiply-adds on registers alone, on all threads, in 10^9 operations a second (an add and a
    /// multiplication each): the bound of every product. Takes about `time`.
    #[must_use]
    pub fn peak_gflops(&self, time: Duration) -> f64 {
        let mut best = 0.0f64;
        let begun = Instant::now();
        while begun.elapsed() < time {
            let tasks = self.team.threads() * 8;
            let start = Instant::now();
            self.team.run(tasks, |_| {
                std::hint::black_box(self.isa.run(Chains(std::hint::black_box(1e-9))));
            });
            let operations = (tasks * ROUNDS * CHAINS * LANES * 2) as f64;
            best = best.max(operations / start.elapsed().as_secs_f64() / 1e9);
        }
        best
    }
}

struct Chains(f32);

impl Op for Chains {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let x = s.splat(self.0);
        let mut chains = [x; CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = s.fma(*chain, x, x);
            }
        }
        let mut all = chains[0];
        for chain in &chains[1..] {
            all = s.add(all, *chain);
        }
        s.to_array(all)[0]
    }
}
