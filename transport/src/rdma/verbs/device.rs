//! Devices, their ports and what happens to them.

use super::wait::set_nonblocking;
use super::{VerbsError, check, refused};
use rdma_mummy_sys as ffi;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::net::Ipv6Addr;
use std::os::fd::RawFd;

/// The most GIDs of a device that are looked at: more do not fit what the kernel is asked by.
const MAX_GIDS: usize = 2000;

/// An opened device with one protection domain, which everything on it shares: what a peer may touch is held by
/// memory windows, each of which belongs to one queue pair.
pub(crate) struct Device {
    pub(super) context: *mut ffi::ibv_context,
    pub(super) domain: *mut ffi::ibv_pd,
    name: String,
    ports: u8,
    /// Completions that a completion queue can hold, and work requests that a queue can.
    pub(crate) max_completions: u32,
    pub(crate) max_work: u32,
    /// Whether windows of type 2 can be bound: a part of a region, for one queue pair, until it is taken back.
    pub(crate) memory_windows: bool,
    /// The node of memory and cores that it is attached to, where that is known.
    pub(crate) numa_node: Option<u32>,
    /// Whether this process may run on a core of that node: false where it is bound to others.
    pub(crate) near: bool,
}

// SAFETY: libibverbs promises that its calls may be made from any thread, and the pointers are freed once, in drop.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// The names of all devices.
pub(crate) fn names() -> Result<Vec<String>, VerbsError> {
    with_list(|devices| devices.iter().map(|device| device_name(*device)).collect())
}

fn device_name(device: *mut ffi::ibv_device) -> String {
    // SAFETY: the device is of a list that is not freed yet; its name ends in a zero byte.
    unsafe { CStr::from_ptr((*device).name.as_ptr()) }.to_string_lossy().into_owned()
}

/// Calls `with` while the list of devices is held.
fn with_list<T>(with: impl FnOnce(&[*mut ffi::ibv_device]) -> T) -> Result<T, VerbsError> {
    let mut count = 0;
    // SAFETY: the pointer is to an integer that lives through the call.
    let list = unsafe { ffi::ibv_get_device_list(&mut count) };
    if list.is_null() {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            // What the stub says when it found no library.
            Some(libc::EOPNOTSUPP) => VerbsError::NoLibrary,
            _ => VerbsError::NoKernel(source),
        });
    }
    // SAFETY: the call returned an array of that many devices.
    let devices = unsafe { std::slice::from_raw_parts(list, usize::try_from(count).unwrap_or(0)) };
    let result = with(devices);
    // SAFETY: the list was not freed; opened devices outlive it.
    unsafe { ffi::ibv_free_device_list(list) };
    Ok(result)
}

/// What a port is wired to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LinkLayer {
    InfiniBand,
    /// RoCE v2.
    Ethernet,
}

/// A port that can be used, and where it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Port {
    pub(crate) number: u8,
    pub(crate) link: LinkLayer,
    pub(crate) lid: u16,
    pub(crate) gid: [u8; 16],
    pub(crate) gid_index: u8,
    /// As verbs number it: 1 is 256 bytes, 5 is 4096.
    pub(crate) mtu: u8,
    /// The largest message.
    pub(crate) max_message: u32,
}

/// What happened to a device, of what matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AsyncEvent {
    /// A queue pair broke, by its number.
    QueuePair(u32),
    /// A port is down, or its addresses changed.
    Port(u8),
    /// The device, or one of its completion queues, is of no use any more.
    Fatal,
    /// Anything else.
    Other,
}

impl Device {
    /// Opens a device by its name.
    pub(crate) fn open(name: &str) -> Result<Device, VerbsError> {
        let context = with_list(|devices| {
            let device = devices.iter().find(|device| device_name(**device) == name)?;
            // SAFETY: the device is of a list that is not freed yet.
            Some(unsafe { ffi::ibv_open_device(*device) })
        })?;
        let Some(context) = context else {
            return Err(VerbsError::UnknownDevice { name: name.into(), known: names()? });
        };
        if context.is_null() {
            return Err(refused(name, "be opened", io::Error::last_os_error()));
        }
        // From here on, dropping it closes the context.
        let mut device = Device {
            context,
            domain: std::ptr::null_mut(),
            name: name.into(),
            ports: 0,
            max_completions: 0,
            max_work: 0,
            memory_windows: false,
            numa_node: described(name, "numa_node").and_then(|node| node.trim().parse().ok()),
            near: described(name, "local_cpulist")
                .zip(allowed_cores())
                .is_none_or(|(local, allowed)| overlap(&local, &allowed)),
        };
        let mut attributes = MaybeUninit::<ffi::ibv_device_attr>::zeroed();
        // SAFETY: the context is open and the pointer is to the structure that the call fills.
        check(name, "describe itself", unsafe { ffi::ibv_query_device(context, attributes.as_mut_ptr()) })?;
        // SAFETY: all bytes of it were zero, which is a value of each field, and then filled.
        let attributes = unsafe { attributes.assume_init() };
        device.ports = attributes.phys_port_cnt;
        device.max_completions = u32::try_from(attributes.max_cqe).unwrap_or(0);
        device.max_work = u32::try_from(attributes.max_qp_wr).unwrap_or(0);
        device.memory_windows =
            attributes.device_cap_flags & ffi::ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2B.0 != 0;
        // SAFETY: the context is open.
        device.domain = unsafe { ffi::ibv_alloc_pd(context) };
        if device.domain.is_null() {
            return Err(refused(name, "make a protection domain", io::Error::last_os_error()));
        }
        // SAFETY: the context is open.
        set_nonblocking(unsafe { (*context).async_fd })
            .map_err(|source| refused(name, "tell its events without blocking", source))?;
        Ok(device)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Readable when [`Device::next_event`] has something.
    pub(crate) fn events_fd(&self) -> RawFd {
        // SAFETY: the context is open as long as the device lives.
        unsafe { (*self.context).async_fd }
    }

    /// What happened, if anything did.
    pub(crate) fn next_event(&self) -> Option<AsyncEvent> {
        let mut event = MaybeUninit::<ffi::ibv_async_event>::zeroed();
        // SAFETY: the context is open, and the pointer is to the structure that the call fills.
        if unsafe { ffi::ibv_get_async_event(self.context, event.as_mut_ptr()) } != 0 {
            return None;
        }
        let pointer = event.as_mut_ptr();
        // As a number: a kernel may know events that the enumeration does not.
        // SAFETY: the field was filled by the call, and is as large as an `u32`.
        let kind = unsafe { (&raw const (*pointer).event_type).cast::<u32>().read() };
        use ffi::ibv_event_type as E;
        let told = if kind == E::IBV_EVENT_QP_FATAL as u32
            || kind == E::IBV_EVENT_QP_REQ_ERR as u32
            || kind == E::IBV_EVENT_QP_ACCESS_ERR as u32
        {
            // SAFETY: for these events the union holds a queue pair, which is not destroyed before the event is
            // acknowledged below.
            AsyncEvent::QueuePair(unsafe { (*(*pointer).element.qp).qp_num })
        } else if kind == E::IBV_EVENT_PORT_ERR as u32
            || kind == E::IBV_EVENT_GID_CHANGE as u32
            || kind == E::IBV_EVENT_LID_CHANGE as u32
        {
            // SAFETY: for these events the union holds a port's number.
            AsyncEvent::Port(unsafe { (*pointer).element.port_num }.try_into().unwrap_or(u8::MAX))
        } else if kind == E::IBV_EVENT_DEVICE_FATAL as u32 || kind == E::IBV_EVENT_CQ_ERR as u32 {
            AsyncEvent::Fatal
        } else {
            AsyncEvent::Other
        };
        // SAFETY: the event was told by the call above and is acknowledged once.
        unsafe { ffi::ibv_ack_async_event(pointer) };
        Some(told)
    }

    /// Its ports that are up and have an address, and for each of the others why not.
    pub(crate) fn ports(&self) -> Vec<Result<Port, VerbsError>> {
        (1..=self.ports).map(|number| self.port(number)).collect()
    }

    /// A port, if it is up and has an address that leads somewhere.
    pub(crate) fn port(&self, number: u8) -> Result<Port, VerbsError> {
        let unusable = |reason: String| VerbsError::Port { device: self.name.clone(), port: number, reason };
        let mut attributes = MaybeUninit::<ffi::ibv_port_attr>::zeroed();
        // SAFETY: the context is open and the pointer is to the structure that the call fills.
        let code = unsafe { ffi::ibv_query_port(self.context, number, attributes.as_mut_ptr()) };
        check(&self.name, "describe its port", code)?;
        // SAFETY: all bytes of it were zero, which is a value of each field, and then filled.
        let attributes = unsafe { attributes.assume_init() };
        if attributes.state != ffi::ibv_port_state::IBV_PORT_ACTIVE {
            return Err(unusable("it is not active: check the cable, or `ip link`".into()));
        }
        let link = if attributes.link_layer == ffi::IBV_LINK_LAYER_ETHERNET {
            LinkLayer::Ethernet
        } else {
            LinkLayer::InfiniBand
        };
        let gid = self
            .gids()?
            .into_iter()
            .filter(|entry| entry.port == number)
            .filter_map(|entry| Some((entry.rank(link)?, entry)))
            .min_by_key(|(rank, entry)| (*rank, entry.index))
            .ok_or_else(|| {
                unusable("no RoCE v2 address but link-local ones: give its interface an IP address".into())
            })?
            .1;
        Ok(Port {
            number,
            link,
            lid: attributes.lid,
            gid: gid.gid,
            gid_index: gid.index,
            mtu: attributes.active_mtu as u8,
            max_message: attributes.max_msg_sz,
        })
    }

    fn gids(&self) -> Result<Vec<Gid>, VerbsError> {
        let nothing = ffi::ibv_gid_entry {
            gid: ffi::ibv_gid { raw: [0; 16] },
            gid_index: 0,
            port_num: 0,
            gid_type: 0,
            ndev_ifindex: 0,
        };
        let mut entries = vec![nothing; MAX_GIDS];
        // SAFETY: the context is open, and the pointer is to as many entries as are named.
        let found = unsafe { ffi::ibv_query_gid_table(self.context, entries.as_mut_ptr(), MAX_GIDS, 0) };
        let found = usize::try_from(found).map_err(|_| {
            let code = i32::try_from(found.unsigned_abs()).unwrap_or(libc::EIO);
            refused(&self.name, "list its addresses", io::Error::from_raw_os_error(code))
        })?;
        entries.truncate(found);
        Ok(entries
            .iter()
            .filter_map(|entry| {
                Some(Gid {
                    // SAFETY: every pattern of bytes is a GID.
                    gid: unsafe { entry.gid.raw },
                    index: u8::try_from(entry.gid_index).ok()?,
                    port: u8::try_from(entry.port_num).ok()?,
                    roce_v2: entry.gid_type == ffi::IBV_GID_TYPE_ROCE_V2,
                    infiniband: entry.gid_type == ffi::IBV_GID_TYPE_IB,
                })
            })
            .collect())
    }
}

/// What the system says of a device.
fn described(name: &str, what: &str) -> Option<String> {
    fs::read_to_string(format!("/sys/class/infiniband/{name}/device/{what}")).ok()
}

/// The cores that this process may run on, as the system lists them.
fn allowed_cores() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(str::to_owned)
}

/// Whether two lists such as `0-3,8` have a core in common; of one that says nothing, all.
fn overlap(a: &str, b: &str) -> bool {
    let ranges = |list: &str| -> Vec<(u32, u32)> {
        let range = |range: &str| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
        };
        list.split(',').filter_map(range).collect()
    };
    let (a, b) = (ranges(a), ranges(b));
    a.is_empty() || b.is_empty() || a.iter().any(|a| b.iter().any(|b| a.0 <= b.1 && b.0 <= a.1))
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything made on the device holds an Arc of it, so nothing is left in the domain, and no
        // event is unacknowledged.
        unsafe {
            if !self.domain.is_null() {
                ffi::ibv_dealloc_pd(self.domain);
            }
            ffi::ibv_close_device(self.context);
        }
    }
}

/// An entry of the GID table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Gid {
    gid: [u8; 16],
    index: u8,
    port: u8,
    roce_v2: bool,
    infiniband: bool,
}

impl Gid {
    /// How good an address it is, the least best; none if it leads nowhere: RoCE's link-local addresses are not
    /// routed, and on hosts whose interface was renamed or bridged lead to no neighbour either.
    fn rank(&self, link: LinkLayer) -> Option<u8> {
        let address = Ipv6Addr::from(self.gid);
        match link {
            LinkLayer::InfiniBand => self.infiniband.then_some(0),
            LinkLayer::Ethernet if !self.roce_v2 || address.is_unspecified() => None,
            LinkLayer::Ethernet if address.to_ipv4_mapped().is_some() => Some(0),
            LinkLayer::Ethernet if address.is_unicast_link_local() => None,
            LinkLayer::Ethernet => Some(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_devices_share_a_core_with_the_process() {
        let check = |a: &str, b: &str, expected: bool| {
            assert_eq!((overlap(a, b), overlap(b, a)), (expected, expected), "{a:?} {b:?}");
        };
        check("0-15,32-47\n", "\t0-63", true);
        check("0-15,32-47\n", "\t16-31,48-63", false);
        check("0-15,32-47\n", "\t47", true);
        check("3\n", "\t2,4", false);
        check("\n", "\t2", true);
    }

    #[test]
    fn addresses_that_lead_nowhere_are_not_taken() {
        let check = |address: &str, roce_v2: bool, link: LinkLayer, expected: Option<u8>| {
            let gid = address.parse::<Ipv6Addr>().unwrap().octets();
            let entry = Gid { gid, index: 3, port: 1, roce_v2, infiniband: !roce_v2 };
            assert_eq!(entry.rank(link), expected, "{address} {link:?}");
        };
        check("::ffff:10.0.0.1", true, LinkLayer::Ethernet, Some(0));
        check("2001:db8::1", true, LinkLayer::Ethernet, Some(1));
        check("fe80::1", true, LinkLayer::Ethernet, None);
        check("::", true, LinkLayer::Ethernet, None);
        check("::ffff:10.0.0.1", false, LinkLayer::Ethernet, None);
        check("fe80::1", false, LinkLayer::InfiniBand, Some(0));
    }
}
