//! What a cluster is compared with: the same engine, in one process.

use crate::ANSWER;
use anyhow::Context;
use std::path::{Path, PathBuf};
use tandem_engine::single::{GenRequest, GenResult, SingleError, SingleProcess};
use tandem_engine::{Engine, LoadFormat, ModelInfo};
use tandem_node::Device;
use tandem_proto::ids::{ChoiceIdx, TokenId};
use tandem_proto::wire::{Sampled, SamplingParams};

/// Tokens that any tokenizer has: the first few mean something, those after them may be missing.
const PLAIN: std::ops::Range<u32> = 6..4006;

/// Llama 3's shape of 8 billion parameters.
const EIGHT_BILLION: &str = include_str!("8b.json");

/// What it is loaded with.
pub struct Load<'a> {
    /// The model's folder.
    pub model: &'a Path,
    /// Where weights come from.
    pub format: LoadFormat,
    /// What computes.
    pub device: Device,
    /// Threads of a CPU; 0 takes as many as there are cores.
    pub threads: usize,
    /// Memory for KV.
    pub kv_memory: usize,
    /// Tokens of a step, at most.
    pub step_tokens: usize,
}

/// An engine with pages of its own, and prompts that nobody has seen.
pub struct OneProcess {
    single: Box<dyn Single>,
    prompts: u64,
}

/// Any engine's process.
trait Single {
    fn info(&self) -> &ModelInfo;

    fn generate(
        &mut self,
        requests: &[GenRequest],
        on_token: &mut dyn FnMut(usize, &Sampled),
    ) -> Result<Vec<GenResult>, SingleError>;
}

impl<E: Engine> Single for SingleProcess<E> {
    fn info(&self) -> &ModelInfo {
        self.engine().info()
    }

    fn generate(
        &mut self,
        requests: &[GenRequest],
        on_token: &mut dyn FnMut(usize, &Sampled),
    ) -> Result<Vec<GenResult>, SingleError> {
        self.generate_with(requests, on_token)
    }
}

impl OneProcess {
    /// Loads it.
    ///
    /// # Errors
    /// When the model or the device cannot be had.
    pub fn load(load: &Load<'_>) -> anyhow::Result<OneProcess> {
        let single: Box<dyn Single> = match load.device {
            Device::Cpu => {
                let options = tandem_engine::LoadOptions {
                    format: load.format,
                    threads: load.threads,
                    ..tandem_engine::LoadOptions::default()
                };
                let engine = tandem_engine::CpuEngine::load(load.model, options)?;
                let kv = tandem_kernels::KvPages::new(engine.info().kv, load.pages(&engine))?;
                Box::new(SingleProcess::new(engine, kv, load.step_tokens))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                let gpu = tandem_memory::cuda::Device::open(ordinal)?;
                println!("{}", gpu.name());
                let options = tandem_engine::CudaOptions { format: load.format, ..Default::default() };
                let engine = tandem_engine::CudaEngine::load(load.model, options, &gpu)?;
                let shape = engine.info().kv;
                let kv = tandem_kernels::cuda::KvDevicePages::new(&gpu, shape, load.pages(&engine))?;
                Box::new(SingleProcess::new(engine, kv, load.step_tokens))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => anyhow::bail!("this build has no CUDA: build it with --features cuda"),
        };
        Ok(OneProcess { single, prompts: 0 })
    }

    /// The model.
    #[must_use]
    pub fn info(&self) -> &ModelInfo {
        self.single.info()
    }

    /// A prompt that nobody has seen.
    pub fn prompt(&mut self, len: usize) -> Vec<TokenId> {
        self.prompts += 1;
        let tokens = PLAIN.end.min(self.info().vocab_size) - PLAIN.start;
        let mut state = self.prompts.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            TokenId(((state >> 33) % u64::from(tokens)) as u32 + PLAIN.start)
        };
        (0..len).map(|_| draw()).collect()
    }

    /// A request for so many tokens after a prompt that nobody has seen, answered as a cluster answers [`crate::ask()`].
    pub fn request(&mut self, len: usize, max_tokens: u32) -> GenRequest {
        GenRequest {
            prompt: self.prompt(len),
            sampling: SamplingParams {
                temperature: 0.0,
                logit_bias: vec![(TokenId(ANSWER), 100.0)],
                ..SamplingParams::default()
            },
            choice: ChoiceIdx(0),
            max_tokens,
            stop_tokens: Vec::new(),
        }
    }

    /// Generates all requests together; `on_token` is told the request of each token at once.
    ///
    /// # Errors
    /// When one of them cannot run.
    pub fn generate(
        &mut self,
        requests: &[GenRequest],
        on_token: &mut dyn FnMut(usize),
    ) -> anyhow::Result<()> {
        self.single.generate(requests, &mut |request, _| on_token(request))?;
        Ok(())
    }
}

impl Load<'_> {
    fn pages(&self, engine: &impl Engine) -> u32 {
        let kv = engine.info().kv;
        (self.kv_memory / (kv.layer_page_bytes() * kv.layers as usize)) as u32
    }
}

/// Makes a folder with a configuration of 8 billion parameters and a tokenizer, for made-up weights.
///
/// # Errors
/// When it cannot be written.
pub fn made_up_model(tokenizer: &Path) -> anyhow::Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("tandem-made-up-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(tokenizer.join(file), dir.join(file))
            .with_context(|| format!("{} of --tokenizer {}", file, tokenizer.display()))?;
    }
    std::fs::write(dir.join("config.json"), EIGHT_BILLION)?;
    Ok(dir)
}
