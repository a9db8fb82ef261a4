//! How a lane comes about: over a channel of the life, both sides make the communicators, and try each once.

use super::Error;
use super::lane::NcclLane;
use super::library::{Comm, Nccl, Net};
use super::message::{ID_BYTES, Message};
use super::offer::Offer;
use crate::net::NetConfig;
use crate::net::lane::{Lane, LaneId, Path};
use crate::net::life::Life;
use crate::net::node::Node;
use crate::shm;
use crate::tls::Channel;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tandem_memory::cuda::Device;

/// Lanes that this process dialled in vain, at most: each may leave a thread of NCCL that waits for the peer
/// for ever.
const MAX_FRUITLESS: u32 = 16;
/// Bytes that each direction is tried with.
const TRIAL: usize = 16;

/// What a node has for lanes of this kind.
pub(crate) struct Here {
    nccl: &'static Nccl,
    device: Arc<Device>,
    offer: Offer,
    fruitless: AtomicU32,
}

impl Here {
    /// None where the node has no memory on a GPU, or the path is not wanted.
    pub(crate) fn open(config: &NetConfig) -> Result<Option<Here>, Error> {
        let Some(device) = config.gpu.clone().filter(|_| config.paths.contains(&Path::Nccl)) else {
            return Ok(None);
        };
        let nccl = Nccl::open()?;
        let offer = Offer {
            port: 0,
            host: shm::host().map_err(|error| std::io::Error::other(error.to_string()))?,
            gpu: device.id(),
            version: nccl.version()?,
            rdma: std::fs::read_dir("/sys/class/infiniband")
                .is_ok_and(|mut devices| devices.next().is_some()),
            named: config.paths.len() < Path::ALL.len(),
        };
        Ok(Some(Here { nccl, device, offer, fruitless: AtomicU32::new(0) }))
    }

    /// Of a node that takes TLS connections there.
    pub(crate) fn offer(&self, port: u16) -> Offer {
        Offer { port, ..self.offer }
    }

    /// Makes both communicators, and tries them: the dialler's has rank 0, and the first is its own to send
    /// with. Returns the one to send with, and the one to receive by.
    fn join(
        &self,
        ids: &[[u8; ID_BYTES]; 2],
        rank: u8,
        net: Net,
        until: Instant,
    ) -> Result<(Comm, Comm), Error> {
        let begin = |id| Comm::begin(self.nccl, &self.device, id, rank, net);
        let mut both = [begin(&ids[0])?, begin(&ids[1])?];
        for comm in &mut both {
            comm.settle("make a communicator", until)?;
            comm.take_memory()?;
        }
        let mut marks = Vec::new();
        for (direction, comm) in both.iter_mut().enumerate() {
            let place = comm.slot(0)?.part(0..TRIAL)?;
            let is_ours = direction == usize::from(rank);
            marks.push(if is_ours { comm.send(&place, None, until)? } else { comm.receive(&place, until)? });
        }
        for mark in &mut marks {
            while !mark.is_over()? {
                left(until, "move its first bytes")?;
                // The life is being made: nothing waits for this but its deadline.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let [first, second] = both;
        Ok(if rank == 0 { (first, second) } else { (second, first) })
    }
}

fn left(until: Instant, what: &'static str) -> Result<Duration, Error> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(Error::TooLong(what)) } else { Ok(left) }
}

/// A lane may take so much of the time that connecting may, so that there is time for another path.
fn deadline(node: &Node) -> Instant {
    Instant::now() + node.config.connect_timeout * 2 / 3
}

/// Makes a lane to the peer of a life that was dialled here.
pub(crate) fn dial(
    node: &Node,
    life: &Life,
    addr: SocketAddr,
    offer: &Offer,
    secret: &[u8; 32],
) -> Result<(), Error> {
    let here = node.nccl().ok_or(Error::NotHere)?;
    let net = here.offer.net(offer)?;
    let fruitless = here.fruitless.load(Ordering::Relaxed);
    if fruitless >= MAX_FRUITLESS {
        return Err(Error::Fruitless(fruitless));
    }
    let (begun, until) = (Instant::now(), deadline(node));
    let mut channel = Channel::dial(node, life, addr, secret, left(until, "be told of the peer")?)?;
    let ids = [here.nccl.new_id()?, here.nccl.new_id()?];
    here.fruitless.fetch_add(1, Ordering::Relaxed);
    channel.say(&Message::Join { offer: here.offer, ids }.encode())?;
    let (out, into) = here.join(&ids, 0, net, until)?;
    here.fruitless.fetch_sub(1, Ordering::Relaxed);
    let said = channel.hear(left(until, "be ready at the peer")?)?;
    if Message::decode(&said) != Some(Message::Ready) {
        return Err(Error::Rule("it said something else than that it is ready"));
    }
    tracing::info!(peer = %life.peer, took = ?begun.elapsed(), ?net, "NCCL works");
    let id = life.new_lane_id(secret).ok_or(Error::Gone)?;
    let lane = NcclLane::new(id, &here.device, channel, out, into)?;
    if life.attach_lane(lane) { Ok(()) } else { Err(Error::Gone) }
}

/// Makes the lane whose channel the peer has dialled.
pub(crate) fn admit(node: &Node, life: &Life, id: LaneId, channel: Channel) {
    if let Err(error) = take(node, life, id, channel) {
        tracing::warn!(peer = %life.peer, %error, "NCCL lane refused");
    }
}

fn take(node: &Node, life: &Life, id: LaneId, mut channel: Channel) -> Result<(), Error> {
    let here = node.nccl().ok_or(Error::NotHere)?;
    if life.lanes_being_made(Path::Nccl) > 0 {
        return Err(Error::Rule("it makes more lanes than there may be"));
    }
    let until = deadline(node);
    let said = channel.hear(left(until, "be told of the peer")?)?;
    let Some(Message::Join { offer, ids }) = Message::decode(&said) else {
        return Err(Error::Rule("its first message is another"));
    };
    let net = here.offer.net(&offer)?;
    let (out, into) = here.join(&ids, 1, net, until)?;
    // Said after the lane is in its place, so that the dialler never counts on one that is not.
    let lane = NcclLane::new(id, &here.device, channel, out, into)?;
    if !life.attach_lane(Arc::clone(&lane) as Arc<dyn Lane>) {
        return Err(Error::Gone);
    }
    lane.say_ready().inspect_err(|_| lane.close("its dialler is gone"))
}
