//! What two nodes tell each other before there is a lane, and what follows from it.

/// How a lane can be made to a node: told over the authenticated connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    /// Where it takes TLS connections.
    pub(crate) port: u16,
    /// Names the host as long as it runs.
    pub(crate) host: [u8; 16],
    /// Names the GPU that the node's memory is on.
    pub(crate) gpu: [u8; 16],
    /// NCCL's, as it counts.
    pub(crate) version: u32,
    /// The host has RDMA devices.
    pub(crate) rdma: bool,
    /// The path was asked for by name.
    pub(crate) named: bool,
}

pub(crate) const OFFER_BYTES: usize = 39;

impl Offer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let flags = u8::from(self.rdma) | u8::from(self.named) << 1;
        let (port, version) = (self.port.to_le_bytes(), self.version.to_le_bytes());
        [&port[..], &self.host, &self.gpu, &version, &[flags]].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Offer> {
        let (port, rest) = bytes.split_first_chunk()?;
        let (host, rest) = rest.split_first_chunk()?;
        let (gpu, rest) = rest.split_first_chunk()?;
        let (version, rest) = rest.split_first_chunk()?;
        let &[flags] = rest else { return None };
        (flags < 4).then(|| Offer {
            port: u16::from_le_bytes(*port),
            host: *host,
            gpu: *gpu,
            version: u32::from_le_bytes(*version),
            rdma: flags & 1 == 1,
            named: flags & 2 == 2,
        })
    }
}

#[cfg(feature = "cuda")]
impl Offer {
    /// Which networks a lane between the two may use. NCCL's bytes are not encrypted, and by itself it takes
    /// any network that it finds. So a node that was told nothing uses it where the bytes stay on the host, and
    /// over RDMA, which is trusted or not there ([`crate::rdma`]); over anything else only where both were told
    /// to.
    pub(super) fn net(&self, peer: &Offer) -> Result<super::library::Net, super::Error> {
        use super::Error;
        use super::library::Net;
        if self.gpu == peer.gpu {
            return Err(Error::SameGpu);
        }
        if self.version != peer.version {
            return Err(Error::OtherVersion { ours: self.version, theirs: peer.version });
        }
        if self.host == peer.host || self.named && peer.named {
            Ok(Net::Any)
        } else if self.rdma && peer.rdma {
            Ok(Net::InfiniBand)
        } else {
            Err(Error::NotTrusted)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Offer =
        Offer { port: 4711, host: [1; 16], gpu: [2; 16], version: 22_703, rdma: true, named: false };

    #[test]
    fn offers_survive_the_wire() {
        for (rdma, named) in [(false, false), (true, false), (false, true), (true, true)] {
            let offer = Offer { rdma, named, ..OFFER };
            let bytes = offer.encode();
            assert_eq!((bytes.len(), Offer::decode(&bytes)), (OFFER_BYTES, Some(offer)));
            assert_eq!(Offer::decode(&bytes[1..]), None);
            assert_eq!(Offer::decode(&[&bytes[..OFFER_BYTES - 1], &[4]].concat()), None);
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn what_is_not_encrypted_stays_where_that_is_no_harm() {
        let check = |ours: Offer, theirs: Offer, expected: &str| {
            let found = |net: Result<_, crate::nccl::Error>| match net {
                Ok(net) => format!("{net:?}"),
                Err(error) => error.to_string(),
            };
            for (a, b) in [(ours, theirs), (theirs, ours)] {
                assert!(found(a.net(&b)).contains(expected), "{:?}", found(a.net(&b)));
            }
        };
        let other = Offer { gpu: [3; 16], ..OFFER };
        let away = Offer { host: [9; 16], ..other };
        check(OFFER, other, "Any");
        check(OFFER, away, "InfiniBand");
        let [named, away_named] = [OFFER, away].map(|offer| Offer { named: true, ..offer });
        check(named, away_named, "Any");
        check(named, away, "InfiniBand");
        let away_without = Offer { rdma: false, ..away };
        check(OFFER, away_without, "not encrypted");
        check(named, away_without, "not encrypted");
        check(named, Offer { named: true, ..away_without }, "Any");
        check(OFFER, Offer { gpu: OFFER.gpu, ..away }, "one GPU");
        check(OFFER, Offer { version: 22_800, ..other }, "its own version only");
    }
}
