//! A lane in the session of two nodes.

use super::{Arrival, Lane, Offer, Rdma, Session};
use crate::net::header::Header;
use crate::net::lane::{self, Job, LaneId, Path};
use crate::net::life::Life;
use crate::net::node::Node;
use crate::window::Landing;
use std::sync::{Arc, Weak};
use std::time::Duration;
#[cfg(feature = "cuda")]
use tandem_memory::Extent;

/// Queue pairs of the side that was dialled, offered to the dialler.
pub(crate) struct Offered(Arc<Lane>);

impl Offered {
    pub(crate) fn new(rdma: &Rdma) -> Result<Offered, String> {
        rdma.prepare().map(Offered).map_err(|error| error.to_string())
    }

    pub(crate) fn offer(&self) -> Vec<u8> {
        self.0.offer().encode()
    }

    /// Makes the lane with the dialler's answer. Waits for the greeting.
    pub(crate) fn join(
        self,
        life: &Life,
        secret: &[u8; 32],
        answer: &[u8],
        within: Duration,
    ) -> Result<(), String> {
        let answer = Offer::decode(answer).ok_or("its answer cannot be read")?;
        self.0.connect(&answer)?;
        // It was connected last, so the dialler hears it.
        self.0.greet(true, within)?;
        attach(self.0, life, secret)
    }
}

/// Queue pairs of the dialler, connected to those that were offered.
pub(crate) struct Answered(Arc<Lane>);

impl Answered {
    pub(crate) fn new(rdma: &Rdma, offer: &[u8]) -> Result<Answered, String> {
        let offer = Offer::decode(offer).ok_or("its offer cannot be read")?;
        let lane = rdma.prepare_for(&offer).map_err(|error| error.to_string())?;
        lane.connect(&offer)?;
        Ok(Answered(lane))
    }

    pub(crate) fn answer(&self) -> Vec<u8> {
        self.0.offer().encode()
    }

    /// Makes the lane, once the peer has the answer. Waits for the greeting.
    pub(crate) fn join(self, life: &Life, secret: &[u8; 32], within: Duration) -> Result<(), String> {
        self.0.greet(false, within)?;
        attach(self.0, life, secret)
    }
}

fn attach(lane: Arc<Lane>, life: &Life, secret: &[u8; 32]) -> Result<(), String> {
    let attached =
        life.new_lane_id(secret).is_some_and(|id| life.attach_lane(Arc::new(RdmaLane { id, lane })));
    if attached { Ok(()) } else { Err("the session was over before it was made".into()) }
}

struct RdmaLane {
    id: LaneId,
    lane: Arc<Lane>,
}

/// The session, as the lane's thread sees it.
struct NetSession {
    node: Arc<Node>,
    life: Arc<Life>,
    /// The life's lanes hold it until they are closed, and the thread ends then.
    lane: Weak<RdmaLane>,
}

impl lane::Lane for RdmaLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn path(&self) -> Path {
        Path::Rdma
    }

    #[cfg(feature = "cuda")]
    fn reads_twin(&self, source: &Extent) -> bool {
        self.lane.reads_twin(source.region())
    }

    fn push(&self, job: Job) {
        self.lane.push(job);
    }

    fn load(&self) -> u64 {
        self.lane.load()
    }

    fn start(self: Arc<Self>, node: &Arc<Node>, life: &Arc<Life>) {
        let session = Arc::new(NetSession {
            node: Arc::clone(node),
            life: Arc::clone(life),
            lane: Arc::downgrade(&self),
        });
        let work = self.lane.work(session);
        if let Err(error) = node.spawn("rdma-lane".into(), work) {
            node.lane_failed(life, &*self, &format!("no thread for it: {error}"));
        }
    }

    fn close(&self, _reason: &str) {
        self.lane.close();
    }
}

impl Session for NetSession {
    fn arrived(&self, header: &Header) -> Arrival {
        if let Some(generation) = header.failed {
            if !self.node.failed_at_peer(&self.life, generation) {
                // The life is over, and the peer is being told.
                return Arrival::Refused;
            }
            if self.life.has_landed(header.sequence) {
                return Arrival::Landed;
            }
        }
        match self.node.windows.find(self.life.peer, &header.window, header.offset, header.len) {
            Some(landing) => Arrival::Open(landing),
            None => {
                self.node.note_refused(&self.life, Path::Rdma, header);
                Arrival::Refused
            }
        }
    }

    fn land(&self, landing: &Landing, header: &Header, on_twin: bool) -> Option<bool> {
        let Header { offset, len, immediate, sequence, floor, .. } = *header;
        let peer = self.life.peer;
        let there = if on_twin { landing.see_on_twin() } else { landing.deposit(offset, len) };
        if !there
            || !landing.complete(|| self.node.report_landed_quietly(peer, immediate, len, landing.key()))
        {
            self.node.note_refused(&self.life, Path::Rdma, header);
            return Some(false);
        }
        self.node.wake();
        self.node.count_landed(&self.life, Path::Rdma, len);
        self.life.note_landed(sequence, floor).ok().map(|()| true)
    }

    fn settle(&self, sequence: u64, landed: bool) {
        if let Some(lane) = self.lane.upgrade() {
            self.node.settle_quietly(&self.life, &*lane, &[(sequence, landed)]);
            self.node.wake();
        }
    }

    fn failed(&self, reason: &str) {
        if let Some(lane) = self.lane.upgrade() {
            self.node.lane_failed(&self.life, &*lane, reason);
        }
    }

    fn wait_for_room(&self, at_most: Duration) -> bool {
        self.node.wait_until_polled(at_most)
    }
}
