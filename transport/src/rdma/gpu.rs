//! How NICs come to the memory of a GPU: by a dma-buf, else by nvidia-peermem. Where they do not, writes go by the host's
//! side of a region, between which and the GPU the transport copies.

#[cfg(feature = "cuda")]
use super::verbs::Memory;
#[cfg(feature = "cuda")]
use std::sync::Arc;
#[cfg(feature = "cuda")]
use tandem_memory::{HostRegion, cuda::DeviceRegion};

/// A way past the host's memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Way {
    DmaBuf,
    Peermem,
}

impl Way {
    /// The best first: a dma-buf needs no module beside the drivers.
    const ALL: [Way; 2] = [Way::DmaBuf, Way::Peermem];

    fn name(self) -> &'static str {
        match self {
            Way::DmaBuf => "dma-buf",
            Way::Peermem => "nvidia-peermem",
        }
    }
}

/// Why a way is none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    way: Way,
    /// None if it was the GPU.
    device: Option<String>,
    why: String,
}

/// Which way was taken, and why not a better one.
pub(super) struct Chosen<S, M> {
    /// What was shown to the devices, and what each made of it.
    pub(super) taken: Option<(Way, S, Vec<M>)>,
    refusals: Vec<Refusal>,
}

/// Finds the first way that all devices take: memory has one place, and which device writes it is not known before.
/// `show` has the GPU give it for a way, and `take` a device take that.
pub(super) fn choose<D, S, M>(
    devices: &[D],
    name: impl Fn(&D) -> &str,
    mut show: impl FnMut(Way) -> Result<S, String>,
    mut take: impl FnMut(&S, &D) -> Result<M, String>,
) -> Chosen<S, M> {
    let mut refusals = Vec::new();
    for way in Way::ALL {
        let shown = match show(way) {
            Ok(shown) => shown,
            Err(why) => {
                refusals.push(Refusal { way, device: None, why });
                continue;
            }
        };
        // Each is asked, so that the log has all that is missing.
        let mut taken = Vec::new();
        for device in devices {
            match take(&shown, device) {
                Ok(one) => taken.push(one),
                Err(why) => refusals.push(Refusal { way, device: Some(name(device).into()), why }),
            }
        }
        if taken.len() == devices.len() {
            return Chosen { taken: Some((way, shown, taken)), refusals };
        }
    }
    Chosen { taken: None, refusals }
}

/// Has a GPU show a region's twin.
#[cfg(feature = "cuda")]
pub(super) fn show(way: Way, region: &Arc<HostRegion>, twin: &DeviceRegion) -> Result<Arc<Memory>, String> {
    // Else nobody could tell when what has landed may be read.
    twin.device().check_remote_writes().map_err(|error| error.to_string())?;
    match way {
        Way::DmaBuf => {
            let buffer = twin.dma_buf().map_err(|error| error.to_string())?;
            Ok(Memory::dma_buf(Arc::clone(region), buffer, twin.address()))
        }
        Way::Peermem => Memory::peermem(Arc::clone(region)),
    }
}

/// What the log has been told, each thing once: at most as much as there are GPUs, ways and devices.
#[derive(Default)]
pub(super) struct Said(std::sync::Mutex<std::collections::BTreeSet<String>>);

impl Said {
    /// What there is to tell of a GPU's memory that was not told before.
    pub(super) fn news<S, M>(&self, gpu: &str, chosen: &Chosen<S, M>) -> Vec<String> {
        let refusal = |Refusal { way, device, why }: &Refusal| {
            let by = device.as_ref().map_or(String::new(), |device| format!(" of {device}"));
            let what = format!("the memory of {gpu} is not for RDMA{by} by {}", way.name());
            (what.clone(), format!("{what}: {why}"))
        };
        let mut lines: Vec<_> = chosen.refusals.iter().map(refusal).collect();
        let outcome = match &chosen.taken {
            Some((way, ..)) => format!("RDMA reads and writes the memory of {gpu} by {}", way.name()),
            None => format!("RDMA takes the host's memory for that of {gpu}, which costs a copy at this end"),
        };
        lines.push((outcome.clone(), outcome));
        // Guards single insertions. The reasons may have lengths in them: they make no news.
        let mut said = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        lines.into_iter().filter_map(|(what, line)| said.insert(what).then_some(line)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a GPU shows, and what each of two devices says to it, for each way.
    type Answers = [(Result<(), &'static str>, [Result<(), &'static str>; 2]); 2];

    #[test]
    fn the_first_way_is_taken_that_every_device_takes() {
        let check = |answers: Answers, expected: Option<Way>, why: &[(Way, Option<&str>, &str)]| {
            let chosen = choose(
                &[0, 1],
                |device| ["mlx5_0", "mlx5_1"][*device],
                |way| answers[way as usize].0.map(|()| way).map_err(str::to_owned),
                |way, device| {
                    answers[*way as usize].1[*device].map(|()| (*way, *device)).map_err(str::to_owned)
                },
            );
            let taken = chosen.taken.as_ref().map(|(way, shown, taken)| {
                assert_eq!((shown, &taken[..]), (way, &[(*way, 0), (*way, 1)][..]));
                *way
            });
            assert_eq!(taken, expected, "{answers:?}");
            let refusals: Vec<_> =
                chosen.refusals.iter().map(|r| (r.way, r.device.as_deref(), r.why.as_str())).collect();
            assert_eq!(refusals, why, "{answers:?}");
        };
        let (yes, no) = ([Ok(()), Ok(())], [Ok(()), Err("no such verb")]);
        let (buf, peer) = (Way::DmaBuf, Way::Peermem);
        check([(Ok(()), yes), (Err("unasked"), yes)], Some(buf), &[]);
        check([(Err("old"), yes), (Ok(()), yes)], Some(peer), &[(buf, None, "old")]);
        check([(Ok(()), no), (Ok(()), yes)], Some(peer), &[(buf, Some("mlx5_1"), "no such verb")]);
        let all = [(buf, Some("mlx5_1"), "no such verb"), (peer, None, "not loaded")];
        check([(Ok(()), no), (Err("not loaded"), yes)], None, &all);
        // One of them takes this, and one that: neither is taken.
        let both = [(buf, Some("mlx5_1"), "no such verb"), (peer, Some("mlx5_0"), "no")];
        check([(Ok(()), no), (Ok(()), [Err("no"), Ok(())])], None, &both);
    }

    #[test]
    fn each_thing_is_said_once() {
        let said = Said::default();
        let check =
            |gpu: &str, taken: Option<Way>, refusals: &[(Way, Option<&str>, &str)], expected: &[&str]| {
                let refusal = |(way, device, why): &(Way, Option<&str>, &str)| Refusal {
                    way: *way,
                    device: device.map(str::to_owned),
                    why: (*why).to_owned(),
                };
                let taken = taken.map(|way| (way, (), Vec::<()>::new()));
                let chosen = Chosen { taken, refusals: refusals.iter().map(refusal).collect() };
                assert_eq!(said.news(gpu, &chosen), expected);
            };
        let old = (Way::DmaBuf, None, "the kernel is old");
        let all = [
            "the memory of GPU 0 is not for RDMA by dma-buf: the kernel is old",
            "RDMA reads and writes the memory of GPU 0 by nvidia-peermem",
        ];
        check("GPU 0", Some(Way::Peermem), &[old], &all);
        check("GPU 0", Some(Way::Peermem), &[old], &[]);
        let refused = (Way::Peermem, Some("mlx5_0"), "4096 bytes are too many");
        let more = [
            "the memory of GPU 0 is not for RDMA of mlx5_0 by nvidia-peermem: 4096 bytes are too many",
            "RDMA takes the host's memory for that of GPU 0, which costs a copy at this end",
        ];
        check("GPU 0", None, &[old, refused], &more);
        check("GPU 0", None, &[(Way::Peermem, Some("mlx5_0"), "8192 bytes are too many")], &[]);
        check(
            "GPU 1",
            None,
            &[],
            &["RDMA takes the host's memory for that of GPU 1, which costs a copy at this end"],
        );
    }
}
