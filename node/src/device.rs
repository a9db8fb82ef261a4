//! What a node computes on.

use std::fmt;
use std::str::FromStr;

/// The CPU, or a GPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// The cores of this host.
    Cpu,
    /// An NVIDIA GPU, counted as `CUDA_VISIBLE_DEVICES` shows them. Builds without CUDA refuse its name.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        if text == "cpu" {
            return Ok(Device::Cpu);
        }
        let ordinal = text.strip_prefix("cuda:").map(str::parse::<usize>);
        match ordinal {
            #[cfg(feature = "cuda")]
            Some(Ok(ordinal)) => Ok(Device::Cuda(ordinal)),
            #[cfg(not(feature = "cuda"))]
            Some(Ok(_)) => Err("this build has no CUDA: build it with --features cuda, or use cpu".into()),
            _ => Err("expected cpu, or cuda:N for the GPU with number N, such as cuda:0".into()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A device, as the node's status shows it.
pub(crate) struct Shown {
    /// As it is called in options.
    pub(crate) device: Device,
    /// As its maker calls it.
    pub(crate) model: String,
    /// Bytes of its memory that are free, and all of them, when asked. A CPU's are its host's, and not told.
    pub(crate) memory: Box<dyn Fn() -> Option<(usize, usize)> + Send + Sync>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        let check = |text: &str, expected: Result<&str, &str>| {
            let parsed = text.parse::<Device>().map(|device| device.to_string());
            match (&parsed, expected) {
                (Ok(device), Ok(expected)) => assert_eq!(device, expected),
                (Err(error), Err(expected)) => assert!(error.contains(expected), "{text}: {error}"),
                _ => panic!("{text}: {parsed:?}"),
            }
        };
        check("cpu", Ok("cpu"));
        #[cfg(feature = "cuda")]
        check("cuda:3", Ok("cuda:3"));
        #[cfg(not(feature = "cuda"))]
        check("cuda:3", Err("--features cuda"));
        for text in ["", "cuda", "cuda:", "cuda:-1", "cuda:x", "gpu:0", "CPU"] {
            check(text, Err("such as cuda:0"));
        }
    }
}
