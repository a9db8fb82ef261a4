//! Queue pairs, the work posted on them, and its ends.

use super::wait::set_nonblocking;
use super::{
    Device, LinkLayer, Local, Memory, MemoryRegion, MemoryWindow, Port, Rights, VerbsError, check, refused,
};
use rdma_mummy_sys as ffi;
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tandem_memory::HostRegion;

/// Completions taken at once.
const BATCH: usize = 32;
/// How long a NIC waits for an acknowledgement before it sends again: 4.096 µs × 2^14 = 67 ms. With
/// [`RETRIES`] a cut link shows after half a second. Some NICs wait up to four times as long, so lanes have
/// deadlines of their own.
const ACK_TIMEOUT: u8 = 14;
/// 7 is for ever with soft-RoCE.
const RETRIES: u8 = 6;
/// Receives are posted before the peer may use them, so none is ever missing: where it is, the peer broke the
/// rules.
const RECEIVER_NOT_READY_RETRIES: u8 = 0;

/// Whether work of an id is such that never ends.
#[cfg(test)]
pub(crate) type Withheld = fn(u64) -> bool;

/// Where work ends. Belongs to one thread that polls it.
pub(crate) struct CompletionQueue {
    raw: *mut ffi::ibv_cq,
    channel: *mut ffi::ibv_comp_channel,
    device: Arc<Device>,
    /// Work of such ids never ends, as far as anyone hears.
    #[cfg(test)]
    withheld: Mutex<Option<Withheld>>,
}

// SAFETY: libibverbs promises that its calls may be made from any thread, and the pointers are freed once, in drop.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

/// The end of posted work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Completion {
    /// As it was posted.
    pub(crate) id: u64,
    /// Number of the queue pair.
    pub(crate) queue_pair: u32,
    pub(crate) ended: Ended,
}

/// How posted work ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// Writes, sends, bindings and invalidations: done, and all that were posted before on the queue pair.
    Done,
    /// A message of so many bytes was received.
    Message(u32),
    /// A write of the peer's is complete, and brought this.
    Immediate(u32),
    /// It failed, and the queue pair with it.
    Failed { status: u32 },
}

impl Ended {
    /// What the status of failed work means.
    pub(crate) fn describe(status: u32) -> String {
        // SAFETY: the call returns a static string for every number, or null where the library is missing.
        let text = unsafe {
            let text = ffi::ibv_wc_status_str(status);
            if text.is_null() { None } else { Some(CStr::from_ptr(text)) }
        };
        text.map_or_else(|| format!("status {status}"), |text| text.to_string_lossy().into_owned())
    }
}

impl CompletionQueue {
    pub(crate) fn new(device: &Arc<Device>, capacity: u32) -> Result<Arc<CompletionQueue>, VerbsError> {
        // SAFETY: the device's context is open as long as the device, which is held.
        let channel = unsafe { ffi::ibv_create_comp_channel(device.context) };
        if channel.is_null() {
            return Err(refused(device.name(), "make a completion channel", io::Error::last_os_error()));
        }
        let capacity = i32::try_from(capacity.min(device.max_completions)).unwrap_or(i32::MAX);
        // SAFETY: as above; the channel was just made.
        let raw = unsafe { ffi::ibv_create_cq(device.context, capacity, std::ptr::null_mut(), channel, 0) };
        if raw.is_null() {
            let error = refused(device.name(), "make a completion queue", io::Error::last_os_error());
            // SAFETY: nothing uses the channel.
            unsafe { ffi::ibv_destroy_comp_channel(channel) };
            return Err(error);
        }
        let queue = CompletionQueue {
            raw,
            channel,
            device: Arc::clone(device),
            #[cfg(test)]
            withheld: Mutex::default(),
        };
        set_nonblocking(queue.fd())
            .map_err(|source| refused(device.name(), "tell completions without blocking", source))?;
        Ok(Arc::new(queue))
    }

    /// Readable after a completion, once [`CompletionQueue::arm`] was called.
    pub(crate) fn fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as this.
        unsafe { (*self.channel).fd }
    }

    /// Appends what has ended, up to a limit: whether something may be left.
    pub(crate) fn poll(&self, out: &mut Vec<Completion>) -> Result<bool, VerbsError> {
        let mut batch = [MaybeUninit::<ffi::ibv_wc>::zeroed(); BATCH];
        // SAFETY: the queue lives as long as this, and the pointer is to as many entries as are named.
        let found = unsafe { ffi::ibv_poll_cq(self.raw, BATCH as i32, batch.as_mut_ptr().cast()) };
        let found = usize::try_from(found).map_err(|_| {
            refused(self.device.name(), "tell completions", io::Error::from(io::ErrorKind::Other))
        })?;
        for entry in &batch[..found.min(BATCH)] {
            // SAFETY: the call filled as many entries as it returned.
            let entry = unsafe { entry.assume_init_ref() };
            let ended = if entry.status != ffi::ibv_wc_status::IBV_WC_SUCCESS {
                Ended::Failed { status: entry.status }
            } else {
                match entry.opcode {
                    ffi::ibv_wc_opcode::IBV_WC_RECV => Ended::Message(entry.byte_len),
                    ffi::ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => {
                        // SAFETY: this opcode comes with an immediate; both fields of the union are 32 bits.
                        Ended::Immediate(u32::from_be(unsafe {
                            entry.imm_data_invalidated_rkey_union.imm_data
                        }))
                    }
                    _ => Ended::Done,
                }
            };
            #[cfg(test)]
            if ended == Ended::Done && self.withholds(entry.wr_id) {
                continue;
            }
            out.push(Completion { id: entry.wr_id, queue_pair: entry.qp_num, ended });
        }
        Ok(found == BATCH)
    }

    /// From now on work of such ids does not end, as with a NIC that hangs.
    #[cfg(test)]
    pub(crate) fn withhold(&self, such: Withheld) {
        *self.withheld.lock().unwrap_or_else(PoisonError::into_inner) = Some(such);
    }

    #[cfg(test)]
    fn withholds(&self, id: u64) -> bool {
        self.withheld.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|such| such(id))
    }

    /// Makes the next completion readable at [`CompletionQueue::fd`]. Poll after it and before waiting: what ended
    /// before it shows only there.
    pub(crate) fn arm(&self) -> Result<(), VerbsError> {
        loop {
            let (mut queue, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: the channel lives as long as this and does not block; the pointers are to what it fills.
            if unsafe { ffi::ibv_get_cq_event(self.channel, &mut queue, &mut context) } != 0 {
                break;
            }
            // SAFETY: one event of this queue, the channel's only one, was taken.
            unsafe { ffi::ibv_ack_cq_events(self.raw, 1) };
        }
        // SAFETY: the queue lives as long as this.
        check(self.device.name(), "announce completions", unsafe { ffi::ibv_req_notify_cq(self.raw, 0) })
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold an Arc of their completion queue, so none is left; every event taken was
        // acknowledged.
        unsafe {
            ffi::ibv_destroy_cq(self.raw);
            ffi::ibv_destroy_comp_channel(self.channel);
        }
    }
}

/// How much a queue pair holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct QueuePairLimits {
    /// Work that is posted and not known to be done.
    pub(crate) work: u32,
    /// Receives.
    pub(crate) receives: u32,
    /// Bytes of each received message; 0 if only immediates are received.
    pub(crate) message: u32,
}

/// The peer's end of a queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Remote {
    pub(crate) number: u32,
    /// The first packet's number.
    pub(crate) packet: u32,
    pub(crate) lid: u16,
    pub(crate) gid: [u8; 16],
    /// As verbs number it; the smaller of both ends' is used.
    pub(crate) mtu: u8,
}

/// One end of a reliable connection.
pub(crate) struct QueuePair {
    raw: *mut ffi::ibv_qp,
    number: u32,
    port: Port,
    limits: QueuePairLimits,
    device: Arc<Device>,
    /// Held while something is posted, so that nothing is after [`QueuePair::stop`].
    live: Mutex<bool>,
    /// Where messages are received, `limits.message` bytes each. Freed after the queue pair, as the last field.
    inbox: Option<MemoryRegion>,
    _completions: Arc<CompletionQueue>,
}

// SAFETY: libibverbs promises that its calls may be made from any thread, and the pointer is freed once, in drop.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

/// Work for a queue pair.
pub(crate) enum Work<'a> {
    /// Writes memory of the peer's; with an immediate, the peer is told.
    Write { from: Local, to: u64, key: u32, immediate: Option<u32> },
    /// Sends a message. Its bytes are copied when it is posted.
    Send(&'a [u8]),
    /// Lets the peer write a range of a region, by the window's key.
    Bind { window: &'a MemoryWindow, region: &'a MemoryRegion, range: Range<usize> },
    /// Takes that back.
    Invalidate(u32),
}

impl QueuePair {
    /// A queue pair that is not connected, with its receives posted.
    pub(crate) fn new(
        port: &Port,
        completions: &Arc<CompletionQueue>,
        limits: QueuePairLimits,
    ) -> Result<QueuePair, VerbsError> {
        let device = &completions.device;
        let inbox = match limits.message as usize * limits.receives as usize {
            0 => None,
            bytes => {
                let memory = HostRegion::map(bytes)
                    .map_err(|error| refused(device.name(), "receive messages", io::Error::other(error)))?;
                let memory = Memory::host(memory);
                Some(MemoryRegion::new(device, &memory, 0..bytes, Rights::Own)?)
            }
        };
        // SAFETY: the structure is plain numbers and pointers, for which zero is a value.
        let mut attributes: ffi::ibv_qp_init_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        attributes.send_cq = completions.raw;
        attributes.recv_cq = completions.raw;
        attributes.qp_type = ffi::ibv_qp_type::IBV_QPT_RC;
        attributes.cap.max_send_wr = limits.work;
        attributes.cap.max_recv_wr = limits.receives;
        attributes.cap.max_send_sge = 1;
        attributes.cap.max_recv_sge = 1;
        attributes.cap.max_inline_data = limits.message;
        // SAFETY: the domain and the completion queue live as long as the device and the queue, which are held.
        let raw = unsafe { ffi::ibv_create_qp(device.domain, &mut attributes) };
        if raw.is_null() {
            return Err(refused(device.name(), "make a queue pair", io::Error::last_os_error()));
        }
        let pair = QueuePair {
            raw,
            // SAFETY: the queue pair was just made.
            number: unsafe { (*raw).qp_num },
            port: port.clone(),
            limits,
            device: Arc::clone(device),
            live: Mutex::new(true),
            inbox,
            _completions: Arc::clone(completions),
        };
        let access = ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
            | if device.memory_windows { ffi::ibv_access_flags::IBV_ACCESS_MW_BIND.0 } else { 0 };
        use ffi::ibv_qp_attr_mask as M;
        // Not all drivers take the right to bind here; those that do not need no such right.
        for access in [access, ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0] {
            let outcome = pair.modify(
                "set up a queue pair",
                M::IBV_QP_STATE | M::IBV_QP_PKEY_INDEX | M::IBV_QP_PORT | M::IBV_QP_ACCESS_FLAGS,
                |attributes| {
                    attributes.qp_state = ffi::ibv_qp_state::IBV_QPS_INIT;
                    attributes.port_num = port.number;
                    attributes.qp_access_flags = access;
                },
            );
            if outcome.is_ok() {
                break;
            } else if access == ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0 {
                outcome?;
            }
        }
        for slot in 0..limits.receives {
            pair.receive(slot.into())?;
        }
        Ok(pair)
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn port(&self) -> &Port {
        &self.port
    }

    /// Connects it: afterwards it sends and receives. `packet` numbers its own first packet.
    pub(crate) fn connect(&self, remote: &Remote, packet: u32) -> Result<(), VerbsError> {
        use ffi::ibv_qp_attr_mask as M;
        self.modify(
            "receive from the peer",
            M::IBV_QP_STATE
                | M::IBV_QP_AV
                | M::IBV_QP_PATH_MTU
                | M::IBV_QP_DEST_QPN
                | M::IBV_QP_RQ_PSN
                | M::IBV_QP_MAX_DEST_RD_ATOMIC
                | M::IBV_QP_MIN_RNR_TIMER,
            |attributes| {
                attributes.qp_state = ffi::ibv_qp_state::IBV_QPS_RTR;
                attributes.path_mtu = self.port.mtu.min(remote.mtu).into();
                attributes.dest_qp_num = remote.number;
                attributes.rq_psn = remote.packet & 0xff_ffff;
                // Of 0.01 ms: the shortest. It is never needed.
                attributes.min_rnr_timer = 1;
                attributes.ah_attr.port_num = self.port.number;
                attributes.ah_attr.dlid = remote.lid;
                // Across subnets and on Ethernet the GID says the way; inside one of InfiniBand, the LID does.
                let routed = self.port.link == LinkLayer::Ethernet || self.port.gid[..8] != remote.gid[..8];
                if routed || remote.lid == 0 {
                    attributes.ah_attr.is_global = 1;
                    attributes.ah_attr.grh.dgid = ffi::ibv_gid { raw: remote.gid };
                    attributes.ah_attr.grh.sgid_index = self.port.gid_index;
                    attributes.ah_attr.grh.hop_limit = 64;
                }
            },
        )?;
        self.modify(
            "send to the peer",
            M::IBV_QP_STATE
                | M::IBV_QP_SQ_PSN
                | M::IBV_QP_TIMEOUT
                | M::IBV_QP_RETRY_CNT
                | M::IBV_QP_RNR_RETRY
                | M::IBV_QP_MAX_QP_RD_ATOMIC,
            |attributes| {
                attributes.qp_state = ffi::ibv_qp_state::IBV_QPS_RTS;
                attributes.sq_psn = packet & 0xff_ffff;
                attributes.timeout = ACK_TIMEOUT;
                attributes.retry_cnt = RETRIES;
                attributes.rnr_retry = RECEIVER_NOT_READY_RETRIES;
            },
        )
    }

    /// Ends everything on it, and returns when nothing of it is under way: no source is read for it and no byte
    /// of the peer lands through it any more. What was posted is never heard of again.
    pub(crate) fn stop(&self) {
        let mut live = self.live();
        if !std::mem::replace(&mut *live, false) {
            return;
        }
        let reset = self.modify("stop", ffi::ibv_qp_attr_mask::IBV_QP_STATE, |attributes| {
            attributes.qp_state = ffi::ibv_qp_state::IBV_QPS_RESET;
        });
        if let Err(error) = reset {
            // Of a device that is gone; then nothing moves through it.
            tracing::warn!(%error, "a queue pair could not be stopped");
        }
    }

    /// Whether it was not stopped.
    #[cfg(test)]
    pub(crate) fn is_live(&self) -> bool {
        *self.live()
    }

    /// Makes the queue pair fail as it would by itself: the work on it, here and at the peer, ends in errors.
    #[cfg(test)]
    pub(crate) fn fail(&self) {
        self.modify("fail", ffi::ibv_qp_attr_mask::IBV_QP_STATE, |attributes| {
            attributes.qp_state = ffi::ibv_qp_state::IBV_QPS_ERR;
        })
        .unwrap();
    }

    /// Posts work, to be done in this order, with one ring of the doorbell. Only the end of the last is told, under
    /// this id. Does nothing once stopped.
    pub(crate) fn post(&self, id: u64, chain: &[Work<'_>]) -> Result<(), VerbsError> {
        let mut pieces: Vec<ffi::ibv_sge> = chain.iter().map(Work::piece).collect();
        let mut requests: Vec<ffi::ibv_send_wr> =
            chain.iter().zip(&mut pieces).map(|(work, piece)| work.request(piece)).collect();
        let Some(last) = requests.last_mut() else {
            return Ok(());
        };
        last.wr_id = id;
        last.send_flags |= ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        for at in 1..requests.len() {
            requests[at - 1].next = &raw mut requests[at];
        }
        let live = self.live();
        if !*live {
            return Ok(());
        }
        let mut refused_one = std::ptr::null_mut();
        // SAFETY: the queue pair is live. The list and the pieces live through the call, which copies them, and the
        // bytes of sends with them; memory named by pieces is registered, or else the device refuses the work.
        let code = unsafe { ffi::ibv_post_send(self.raw, requests.as_mut_ptr(), &mut refused_one) };
        check(self.device.name(), "take work", code)
    }

    /// Posts a receive under this slot of the inbox.
    pub(crate) fn receive(&self, slot: u64) -> Result<(), VerbsError> {
        let mut piece = self.inbox.as_ref().and_then(|inbox| inbox.local(self.slot(slot))).map(piece_of);
        let mut request = ffi::ibv_recv_wr {
            wr_id: slot,
            next: std::ptr::null_mut(),
            sg_list: piece.as_mut().map_or(std::ptr::null_mut(), |piece| piece),
            num_sge: i32::from(piece.is_some()),
        };
        let live = self.live();
        if !*live {
            return Ok(());
        }
        let mut refused_one = std::ptr::null_mut();
        // SAFETY: the queue pair is live; the request and its piece live through the call, which copies them. The
        // piece is of the inbox, which outlives the queue pair.
        let code = unsafe { ffi::ibv_post_recv(self.raw, &mut request, &mut refused_one) };
        check(self.device.name(), "take a receive", code)
    }

    /// Copies out what was received under the slot. Call between its end and the next [`QueuePair::receive`].
    pub(crate) fn message(&self, slot: u64, len: u32, out: &mut Vec<u8>) {
        out.clear();
        let range = self.slot(slot);
        if let Some(inbox) = &self.inbox {
            inbox.read(range.start..range.end.min(range.start + len as usize), out);
        }
    }

    fn slot(&self, slot: u64) -> Range<usize> {
        let start = (slot as usize).saturating_mul(self.limits.message as usize);
        start..start.saturating_add(self.limits.message as usize)
    }

    fn live(&self) -> MutexGuard<'_, bool> {
        // Guards single calls.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn modify(
        &self,
        what: &'static str,
        mask: ffi::ibv_qp_attr_mask,
        fill: impl FnOnce(&mut ffi::ibv_qp_attr),
    ) -> Result<(), VerbsError> {
        // SAFETY: the structure is plain numbers, for which zero is a value.
        let mut attributes: ffi::ibv_qp_attr = unsafe { MaybeUninit::zeroed().assume_init() };
        fill(&mut attributes);
        // SAFETY: the queue pair lives as long as this, and the pointer is to the structure that the call reads.
        let code = unsafe { ffi::ibv_modify_qp(self.raw, &mut attributes, mask.0 as i32) };
        check(self.device.name(), what, code)
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the queue pair was made once and is destroyed once; everything on it ends with it.
        let code = unsafe { ffi::ibv_destroy_qp(self.raw) };
        if let Err(error) = check(self.device.name(), "free a queue pair", code) {
            tracing::warn!(%error, "a queue pair is left behind");
        }
    }
}

fn piece_of(local: Local) -> ffi::ibv_sge {
    ffi::ibv_sge { addr: local.address, length: local.len, lkey: local.key }
}

impl Work<'_> {
    fn piece(&self) -> ffi::ibv_sge {
        match self {
            Work::Write { from, .. } => piece_of(*from),
            // Messages are at most as long as the inline data that the queue pair was made for.
            Work::Send(bytes) => {
                ffi::ibv_sge { addr: bytes.as_ptr() as u64, length: bytes.len() as u32, lkey: 0 }
            }
            Work::Bind { .. } | Work::Invalidate(_) => ffi::ibv_sge { addr: 0, length: 0, lkey: 0 },
        }
    }

    fn request(&self, piece: &mut ffi::ibv_sge) -> ffi::ibv_send_wr {
        // SAFETY: the structure is plain numbers and pointers, for which zero is a value.
        let mut request: ffi::ibv_send_wr = unsafe { MaybeUninit::zeroed().assume_init() };
        request.sg_list = piece;
        request.num_sge = i32::from(piece.length > 0);
        match self {
            Work::Write { to, key, immediate, .. } => {
                request.wr = ffi::wr_t { rdma: ffi::rdma_t { remote_addr: *to, rkey: *key } };
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE;
                if let Some(immediate) = immediate {
                    request.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
                    request.imm_data_invalidated_rkey_union =
                        ffi::imm_data_invalidated_rkey_union_t { imm_data: immediate.to_be() };
                }
            }
            Work::Send(_) => {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_SEND;
                request.send_flags = ffi::ibv_send_flags::IBV_SEND_INLINE.0;
            }
            Work::Bind { window, region, range } => {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_BIND_MW;
                request.bind_mw_tso_union = ffi::bind_mw_tso_union_t {
                    bind_mw: ffi::bind_mw_t {
                        mw: window.raw,
                        rkey: window.key(),
                        bind_info: ffi::ibv_mw_bind_info {
                            mr: region.raw,
                            addr: region.address_of(range).unwrap_or(0),
                            length: range.len() as u64,
                            mw_access_flags: ffi::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0,
                        },
                    },
                };
            }
            Work::Invalidate(key) => {
                request.opcode = ffi::ibv_wr_opcode::IBV_WR_LOCAL_INV;
                request.imm_data_invalidated_rkey_union =
                    ffi::imm_data_invalidated_rkey_union_t { invalidated_rkey: *key };
            }
        }
        request
    }
}
