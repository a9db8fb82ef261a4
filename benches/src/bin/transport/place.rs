//! Where processes run, and how they are started there.

use anyhow::Context;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// A host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    /// Where others reach it. With a port, each process takes one from that on; with 0 a free one.
    pub(crate) addr: SocketAddr,
    /// What starts this program there.
    pub(crate) command: Vec<String>,
}

impl Place {
    /// This host; or, under `scripts/two-hosts`, its two.
    pub(crate) fn usual() -> anyhow::Result<[Place; 2]> {
        let this = std::env::current_exe()?.into_os_string().into_string().ok().context("a path in UTF-8")?;
        let ip = |name: &str| match std::env::var(name) {
            Ok(ip) => ip.parse().with_context(|| format!("{name}={ip}")),
            Err(_) => Ok(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        };
        let enter =
            std::env::var("TWO_HOSTS_PEER").map(|host| ["ip", "netns", "exec", &host].map(str::to_owned));
        let there = enter.into_iter().flatten().chain([this.clone()]).collect();
        Ok([("TWO_HOSTS_IP", vec![this]), ("TWO_HOSTS_PEER_IP", there)]
            .map(|(name, command)| ip(name).map(|ip| Place { addr: SocketAddr::new(ip, 0), command }))
            .into_iter()
            .collect::<anyhow::Result<Vec<_>>>()?
            .try_into()
            .expect("two of two"))
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let mut words = text.split_whitespace().map(str::to_owned);
        let addr = words.next().unwrap_or_default();
        let addr = match addr.parse() {
            Ok(ip) => SocketAddr::new(ip, 0),
            Err(_) => addr.parse().map_err(|_| format!("{addr:?} is no IP address, nor one with a port"))?,
        };
        let command: Vec<_> = words.collect();
        if command.is_empty() {
            return Err(format!("a command that starts this program follows {addr}, in the same argument"));
        }
        Ok(Place { addr, command })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let check = |text: &str, expected: Option<(&str, &[&str])>| {
            let found = text.parse::<Place>().ok();
            let found = found.map(|place| (place.addr.to_string(), place.command));
            let expected = expected.map(|(addr, command)| {
                (addr.to_owned(), command.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
            });
            assert_eq!(found, expected, "{text}");
        };
        check("10.0.0.1 ssh a ./transport", Some(("10.0.0.1:0", &["ssh", "a", "./transport"])));
        check("10.0.0.1:7000 ./transport", Some(("10.0.0.1:7000", &["./transport"])));
        check("[fe80::1]:7000 x", Some(("[fe80::1]:7000", &["x"])));
        check("::1 x", Some(("[::1]:0", &["x"])));
        check("10.0.0.1", None);
        check("host ./transport", None);
        check("", None);
    }
}
