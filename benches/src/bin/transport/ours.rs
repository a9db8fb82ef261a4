//! The transport, held to one path.

use crate::pattern::Slots;
use crate::{PATIENCE, Sender, here};
use anyhow::{Context, bail, ensure};
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_transport::{Event, Identity, NetConfig, NetTransport, Path, Transport, Tuning, Window, Write};

const SENDER: NodeId = NodeId(1);
const RECEIVER: NodeId = NodeId(2);

pub(crate) fn config(path: Path, tuning: Tuning, connections: usize) -> NetConfig {
    let config = NetConfig { paths: vec![path], tuning, write_limit: 4096, ..NetConfig::default() };
    match path {
        Path::Quic => NetConfig { threads: connections, connections, ..config },
        Path::Tls => NetConfig { tls_connections: connections, ..config },
        Path::Shm | Path::Rdma => config,
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

pub(crate) struct Ours {
    transport: NetTransport,
    window: Window,
    source: Arc<HostRegion>,
    events: Vec<Event>,
}

impl Ours {
    pub(crate) fn connect(
        hello: &str,
        identity: &Identity,
        config: NetConfig,
        source: Arc<HostRegion>,
    ) -> anyhow::Result<Ours> {
        let (addr, window) = hello.split_once(' ').context("address and window")?;
        let window: Vec<u64> = window.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [region, key, offset, len] = window[..] else { bail!("a window has four numbers") };
        let window = Window { region: region as u32, key, offset, len };
        let mut transport = NetTransport::bind(here()?, identity, SENDER, config)?;
        transport.register(Arc::clone(&source))?;
        transport.set_waker(Waker::from(Arc::new(Unpark(std::thread::current()))));
        transport.connect(RECEIVER, addr.parse()?);
        let mut ours = Ours { transport, window, source, events: Vec::new() };
        match ours.next(Instant::now() + PATIENCE)? {
            Event::Connected { .. } => Ok(ours),
            other => bail!("{other:?}"),
        }
    }

    fn next(&mut self, until: Instant) -> anyhow::Result<Event> {
        loop {
            if let Some(event) = self.events.pop() {
                return Ok(event);
            }
            self.transport.poll(&mut self.events);
            if self.events.is_empty() {
                let left = until.saturating_duration_since(Instant::now());
                ensure!(!left.is_zero(), "nothing happened for {PATIENCE:?}");
                std::thread::park_timeout(left);
                self.transport.poll(&mut self.events);
            }
        }
    }
}

impl Sender for Ours {
    fn run(&mut self, slots: Slots, time: Duration) -> anyhow::Result<u64> {
        let (begun, mut submitted, mut landed) = (Instant::now(), 0u64, 0u64);
        loop {
            let more = begun.elapsed() < time || submitted <= slots.count as u64;
            if !more && landed == submitted {
                return Ok(landed);
            }
            if more && submitted - landed < slots.depth() as u64 {
                let range = slots.range(submitted);
                let write = Write {
                    ticket: submitted,
                    offset: range.start as u64,
                    source: self.source.extent(range)?,
                    window: self.window,
                    immediate: 0,
                };
                self.transport.submit(RECEIVER, write)?;
                submitted += 1;
                continue;
            }
            match self.next(Instant::now() + PATIENCE)? {
                Event::Sent { .. } => landed += 1,
                other => bail!("{other:?}"),
            }
        }
    }
}

/// Lands what comes. Its events are taken by a thread of its own, as a node's loop takes them.
pub(crate) fn receive(
    identity: &Identity,
    config: NetConfig,
    landing: Arc<HostRegion>,
) -> anyhow::Result<()> {
    let mut transport = NetTransport::bind(here()?, identity, RECEIVER, config)?;
    let len = landing.len();
    let region = transport.register(landing)?;
    let window = transport.open_window(SENDER, region, 0..len)?;
    println!("{} {} {} {} {}", transport.local_addr(), window.region, window.key, window.offset, window.len);
    std::thread::spawn(move || {
        transport.set_waker(Waker::from(Arc::new(Unpark(std::thread::current()))));
        let mut events = Vec::new();
        loop {
            transport.poll(&mut events);
            if events.iter().any(|event| matches!(event, Event::Severed { .. })) {
                return;
            }
            events.clear();
            std::thread::park_timeout(PATIENCE);
        }
    });
    Ok(())
}
