//! The ways for bytes, as they are named on the command line.

use std::fmt;
use std::str::FromStr;
use tandem_transport::{Path, Tuning};

/// A way for bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Way {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// None is what there is without asking.
    pub(crate) congestion: Option<String>,
    pub(crate) connections: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Memcpy,
    P2p,
    Aes,
    Cma,
    Tcp,
    Ours { path: Path, mtu: u16 },
    Quinn { mtu: u16 },
    Nixl { tcp: bool },
    Mooncake,
}

impl Way {
    /// For QUIC: what the transport is told, with this way's MTU on every path.
    pub(crate) fn tuning(&self) -> anyhow::Result<Tuning> {
        let (Kind::Ours { mtu, .. } | Kind::Quinn { mtu }) = self.kind else { return Ok(Tuning::default()) };
        let congestion =
            self.congestion.as_deref().map(str::parse).transpose().map_err(anyhow::Error::msg)?;
        let tuning = Tuning { mtu, loopback_mtu: mtu, ..Tuning::default() };
        Ok(Tuning { congestion: congestion.unwrap_or(tuning.congestion), ..tuning })
    }

    /// Whether it needs one process only: a limit of the machine, for any number of peers.
    pub(crate) fn is_alone(&self) -> bool {
        matches!(self.kind, Kind::Memcpy | Kind::P2p | Kind::Aes)
    }

    /// Whether messages lie in the memory of GPUs.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_on_gpus(&self) -> bool {
        matches!(self.kind, Kind::P2p | Kind::Ours { path: Path::CudaIpc | Path::Nccl, .. })
    }

    /// Whether the process where a message lands is told.
    pub(crate) fn tells_landings(&self) -> bool {
        matches!(self.kind, Kind::Tcp | Kind::Ours { .. } | Kind::Quinn { .. })
    }

    /// Whether it is another engine, driven by a script.
    pub(crate) fn is_peer(&self) -> bool {
        matches!(self.kind, Kind::Nixl { .. } | Kind::Mooncake)
    }

    /// The names of what bounds it, or what it is to be compared with.
    pub(crate) fn beside(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Memcpy | Kind::P2p | Kind::Aes | Kind::Tcp => &[],
            Kind::Cma => &["memcpy"],
            Kind::Ours { path: Path::CudaIpc | Path::Nccl, .. } => &["p2p"],
            Kind::Ours { path: Path::Shm, .. } => &["memcpy", "cma", "nixl", "mooncake"],
            Kind::Ours { .. } => &["tcp", "aes-128-gcm", "nixl-tcp", "mooncake"],
            Kind::Quinn { .. } | Kind::Mooncake | Kind::Nixl { tcp: true } => &["tcp"],
            Kind::Nixl { tcp: false } => &["cma"],
        }
    }
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Way, String> {
        let way = |kind, congestion, connections| Way { name: text.into(), kind, congestion, connections };
        let fixed = match text {
            "memcpy" => Some(Kind::Memcpy),
            "p2p" => Some(Kind::P2p),
            "aes-128-gcm" => Some(Kind::Aes),
            "cma" => Some(Kind::Cma),
            "nixl" => Some(Kind::Nixl { tcp: false }),
            "nixl-tcp" => Some(Kind::Nixl { tcp: true }),
            "mooncake" => Some(Kind::Mooncake),
            _ => None,
        };
        if let Some(kind) = fixed {
            return Ok(way(kind, None, 1));
        }
        let (what, connections) = match text.split_once(':') {
            Some((what, number)) => {
                let number: usize =
                    number.parse().map_err(|_| format!("{text}: a number follows the colon"))?;
                (what, Some(number))
            }
            None => (text, None),
        };
        let mut parts = what.split('-').peekable();
        let what = parts.next().unwrap_or_default();
        let mtu = parts.next_if(|part| part.starts_with(|c: char| c.is_ascii_digit()));
        let congestion = parts.next().map(str::to_owned);
        if let Some(more) = parts.next() {
            return Err(format!("{text}: nothing is known of {more:?}"));
        }
        let number = mtu.unwrap_or("1452").parse().map_err(|_| format!("{text}: that is no MTU"))?;
        let kind = match what {
            "tcp" => Kind::Tcp,
            "quinn" => Kind::Quinn { mtu: number },
            path => Kind::Ours {
                path: path.parse().map_err(|_| {
                    let paths = Path::ALL.map(Path::name).join(", ");
                    format!(
                        "{text}: the ways are memcpy, p2p, aes-128-gcm, cma, tcp, quinn, nixl, nixl-tcp, mooncake and our paths {paths}"
                    )
                })?,
                mtu: number,
            },
        };
        let is_quic = matches!(kind, Kind::Quinn { .. } | Kind::Ours { path: Path::Quic, .. });
        if mtu.is_some() && !is_quic {
            return Err(format!("{text}: an MTU can be set for quic and quinn only"));
        }
        if congestion.is_some() && !is_quic && kind != Kind::Tcp {
            return Err(format!("{text}: congestion control can be chosen for quic, quinn and tcp only"));
        }
        let several = matches!(kind, Kind::Tcp | Kind::Ours { path: Path::Quic | Path::Tls, .. });
        if connections.is_some_and(|number| number != 1 && !several || number == 0) {
            return Err(format!("{text}: tcp, tls and quic have several connections, others have one"));
        }
        Ok(way(kind, congestion, connections.unwrap_or(1)))
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let check = |text: &str, expected: Option<(Kind, Option<&str>, usize)>| {
            let found = text.parse::<Way>().ok();
            let found = found.as_ref().map(|way| (way.kind, way.congestion.as_deref(), way.connections));
            assert_eq!(found, expected, "{text}");
        };
        let ours = |path, mtu| Kind::Ours { path, mtu };
        check("memcpy", Some((Kind::Memcpy, None, 1)));
        check("aes-128-gcm", Some((Kind::Aes, None, 1)));
        check("nixl-tcp", Some((Kind::Nixl { tcp: true }, None, 1)));
        check("tcp-cubic:4", Some((Kind::Tcp, Some("cubic"), 4)));
        check("tls:2", Some((ours(Path::Tls, 1452), None, 2)));
        check("quic-8952-bbr:3", Some((ours(Path::Quic, 8952), Some("bbr"), 3)));
        check("quinn-1452", Some((Kind::Quinn { mtu: 1452 }, None, 1)));
        for wrong in
            ["", "cma:2", "shm:2", "shm-9000", "tls-cubic", "tcp:0", "tcp:x", "quic-1-2-3", "nixl-rdma"]
        {
            check(wrong, None);
        }
    }
}
