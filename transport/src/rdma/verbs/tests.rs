//! Real verbs, where there is a device: `scripts/check rdma` runs them in a virtual machine that has two.

use super::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;

const LIMITS: QueuePairLimits = QueuePairLimits { work: 64, receives: 16, message: 64 };
const MTU_4096: u8 = 5;

/// The devices of this machine, the first twice if there is but one. None, said loudly, where there is none.
pub(in crate::rdma) fn device_names() -> Option<[String; 2]> {
    match names() {
        Ok(names) if !names.is_empty() => Some([names[0].clone(), names[names.len() - 1].clone()]),
        Ok(_) => {
            println!("skipped: no RDMA device");
            None
        }
        Err(error) => {
            println!("skipped: no RDMA device: {error}");
            None
        }
    }
}

struct End {
    device: Arc<Device>,
    completions: Arc<CompletionQueue>,
    pair: QueuePair,
    memory: Arc<HostRegion>,
    region: MemoryRegion,
}

fn registered(device: &Arc<Device>, memory: &Arc<HostRegion>) -> MemoryRegion {
    let memory = Memory::host(Arc::clone(memory));
    MemoryRegion::new(device, &memory, 0..memory.len(), Rights::Windows).unwrap()
}

impl End {
    fn new(name: &str) -> End {
        let device = Arc::new(Device::open(name).unwrap());
        let port = device.ports().remove(0).unwrap();
        assert!(port.mtu <= MTU_4096 && port.gid[8..12] == [0, 0, 0xff, 0xff], "{port:?}");
        let completions = CompletionQueue::new(&device, 128).unwrap();
        let pair = QueuePair::new(&port, &completions, LIMITS).unwrap();
        let memory = HostRegion::map(1 << 20).unwrap();
        let region = registered(&device, &memory);
        End { device, completions, pair, memory, region }
    }

    fn remote(&self, packet: u32) -> Remote {
        let port = self.pair.port();
        Remote { number: self.pair.number(), packet, lid: port.lid, gid: port.gid, mtu: port.mtu }
    }

    /// The next completion, waited for as lanes do.
    fn next(&self) -> Completion {
        let began = Instant::now();
        let mut ended = Vec::new();
        while began.elapsed() < Duration::from_secs(5) {
            self.completions.arm().unwrap();
            self.completions.poll(&mut ended).unwrap();
            if let Some(first) = ended.first() {
                // What else was posted on a broken queue pair ends with the first.
                assert!(ended[1..].iter().all(|other| failed(other.ended)), "{ended:?}");
                return *first;
            }
            wait_readable(&[self.completions.fd()], Duration::from_millis(100));
        }
        panic!("nothing ended within 5 s");
    }

    /// Lets the peer write a range, and says by which key.
    fn bind(&self, window: &mut MemoryWindow, range: std::ops::Range<usize>) -> u32 {
        let key = window.next_key();
        self.pair.post(1, &[Work::Bind { window, region: &self.region, range }]).unwrap();
        assert_eq!(self.next().ended, Ended::Done);
        key
    }

    fn write(&self, len: usize, to: u64, key: u32) {
        let from = self.region.local(7..7 + len).unwrap();
        let half = Local { len: from.len / 2, ..from };
        let rest = Local { address: from.address + u64::from(half.len), len: from.len - half.len, ..from };
        let chain = [
            Work::Write { from: half, to, key, immediate: None },
            Work::Write { from: rest, to: to + u64::from(half.len), key, immediate: Some(0xdead_beef) },
        ];
        self.pair.post(2, &chain).unwrap();
    }

    fn bytes(&self, range: std::ops::Range<usize>) -> Vec<u8> {
        let mut out = Vec::new();
        self.region.read(range, &mut out);
        out
    }
}

fn connected(names: [&String; 2]) -> [End; 2] {
    let ends = names.map(|name| End::new(name));
    ends[0].pair.connect(&ends[1].remote(77), 0xff_fffe).unwrap();
    ends[1].pair.connect(&ends[0].remote(0xff_fffe), 77).unwrap();
    ends
}

fn failed(ended: Ended) -> bool {
    matches!(ended, Ended::Failed { .. })
}

#[test]
fn without_a_device_or_the_library_it_says_so() {
    match names() {
        Ok(names) => {
            let refused = Device::open("none such").err().expect("no device has a space in its name");
            assert!(matches!(&refused, VerbsError::UnknownDevice { known, .. } if *known == names));
            assert!(names.iter().all(|name| refused.to_string().contains(name)), "{refused}");
        }
        Err(error) => println!("{error}"),
    }
}

#[test]
fn a_window_is_written_while_it_is_bound_and_never_after() {
    let Some(names) = device_names() else { return };
    for names in [[&names[0], &names[1]], [&names[0], &names[0]]] {
        let [writer, reader] = connected(names);
        assert!(reader.device.memory_windows);
        let source = writer.memory.extent(7..50_007).unwrap();
        // SAFETY: this test is the only holder, and nothing is posted.
        unsafe { source.bytes_mut() }.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8);
        let expected: Vec<u8> = (0..50_000).map(|i| (i % 251) as u8).collect();

        // A message, then a write into the window.
        writer.pair.post(9, &[Work::Send(b"hello")]).unwrap();
        let Completion { id, ended, .. } = reader.next();
        assert_eq!(ended, Ended::Message(5));
        let mut message = Vec::new();
        reader.pair.message(id, 5, &mut message);
        assert_eq!(message, b"hello");
        assert_eq!(writer.next(), Completion { id: 9, queue_pair: writer.pair.number(), ended: Ended::Done });

        let mut window = MemoryWindow::new(&reader.device).unwrap();
        let range = 1001..51_001;
        let to = reader.region.address_of(&range).unwrap();
        let key = reader.bind(&mut window, range.clone());
        writer.write(50_000, to, key);
        assert_eq!(reader.next().ended, Ended::Immediate(0xdead_beef));
        assert_eq!(writer.next().ended, Ended::Done);
        assert_eq!(reader.bytes(range.clone()), expected);
        assert_eq!(reader.bytes(0..1001), vec![0; 1001], "nothing before it");
        assert_eq!(reader.bytes(51_001..52_000), vec![0; 999], "nothing behind it");

        // Taken back, and bound anew elsewhere: the old key is worth nothing, the new one is.
        reader.pair.post(3, &[Work::Invalidate(key)]).unwrap();
        assert_eq!(reader.next().ended, Ended::Done);
        let again = reader.bind(&mut window, 200_000..200_100);
        assert_ne!(again, key);
        writer.write(100, reader.region.address_of(&(200_000..200_100)).unwrap(), again);
        assert_eq!(reader.next().ended, Ended::Immediate(0xdead_beef));
        assert_eq!(writer.next().ended, Ended::Done);
        assert_eq!(reader.bytes(200_000..200_100), expected[..100]);
        writer.write(100, to + 60_000, key);
        assert!(failed(writer.next().ended));
        let [rest, ..] = [reader.bytes(51_001..52_000)];
        assert_eq!(rest, vec![0; 999]);
    }
}

#[test]
fn what_is_not_in_the_window_is_not_written() {
    let Some(names) = device_names() else { return };
    // The region's own key; the window of another queue pair; outside the region. (That a window's bounds hold is
    // left to NICs: soft-RoCE checks the region's only.)
    for case in 0..3 {
        let [writer, reader] = connected([&names[0], &names[1]]);
        let source = writer.memory.extent(0..4096).unwrap();
        // SAFETY: this test is the only holder, and nothing is posted.
        unsafe { source.bytes_mut() }.fill(1);
        let mut window = MemoryWindow::new(&reader.device).unwrap();
        let key = reader.bind(&mut window, 1000..2000);
        let inside = reader.region.address_of(&(1000..2000)).unwrap();
        match case {
            0 => writer.write(10, inside, reader.region.remote_key()),
            1 => writer.write(10, inside + (1 << 20), key),
            _ => {
                let port = reader.device.ports().remove(0).unwrap();
                let own = registered(&writer.device, &HostRegion::map(4096).unwrap());
                let pairs = [&writer, &reader].map(|end| {
                    let port = if std::ptr::eq(end, &raw const reader) { &port } else { writer.pair.port() };
                    QueuePair::new(port, &end.completions, LIMITS).unwrap()
                });
                let remote = |pair: &QueuePair| Remote {
                    number: pair.number(),
                    packet: 1,
                    lid: pair.port().lid,
                    gid: pair.port().gid,
                    mtu: MTU_4096,
                };
                pairs[0].connect(&remote(&pairs[1]), 1).unwrap();
                pairs[1].connect(&remote(&pairs[0]), 1).unwrap();
                let from = own.local(0..10).unwrap();
                pairs[0].post(2, &[Work::Write { from, to: inside, key, immediate: None }]).unwrap();
            }
        }
        let ended = writer.next().ended;
        let landed = reader.bytes(0..4096).iter().filter(|byte| **byte != 0).count();
        assert!(failed(ended) && landed == 0, "case {case}: {ended:?}, {landed} bytes landed");
    }
}

/// As windows are registered for memory that no memory window is bound to.
#[test]
fn a_part_that_is_registered_by_itself_is_written_until_it_is_not() {
    let Some(names) = device_names() else { return };
    let range = 1001..51_001;
    // Inside; before it; across its end; and where it was.
    for (case, at) in [range.start, range.start - 1, range.end - 99, range.start].into_iter().enumerate() {
        let [writer, reader] = connected([&names[0], &names[1]]);
        let source = writer.memory.extent(0..200).unwrap();
        // SAFETY: this test is the only holder, and nothing is posted.
        unsafe { source.bytes_mut() }.fill(1);
        let memory = Memory::host(Arc::clone(&reader.memory));
        let part = MemoryRegion::new(&reader.device, &memory, range.clone(), Rights::Peers).unwrap();
        assert_eq!(part.address_of(&(range.start - 1..range.end)), None);
        assert_eq!(part.local(range.start..range.end + 1), None);
        let (key, to) = (part.remote_key(), reader.memory.base() as u64 + at as u64);
        let mut part = Some(part);
        if case == 3 {
            part = None;
        }
        writer.write(100, to, key);
        assert_eq!(failed(writer.next().ended), case > 0, "case {case}");
        drop(part);
        let landed = reader.bytes(0..60_000).iter().filter(|byte| **byte != 0).count();
        // Both halves of the write are work of their own: the first lies inside when the second does not.
        assert_eq!(landed, [100, 0, 50, 0][case], "case {case}");
    }
}

/// Soft-RoCE takes no dma-buf at all, and its kernel makes none: that a NIC takes one is not seen here.
#[test]
fn dma_buf_memory_is_refused_with_the_reason() {
    let Some(names) = device_names() else { return };
    let device = Arc::new(Device::open(&names[0]).unwrap());
    let region = HostRegion::map(1 << 20).unwrap();
    let check = |range: std::ops::Range<usize>| {
        let file = std::fs::File::open("/dev/zero").unwrap();
        let memory = Memory::dma_buf(Arc::clone(&region), file.into(), region.base() as u64);
        let error = MemoryRegion::new(&device, &memory, range.clone(), Rights::Peers).err().unwrap();
        println!("{error}");
        assert!(matches!(&error, VerbsError::DmaBuf { len, .. } if *len == range.len()), "{error}");
    };
    // No dma-buf; no range; one that leaves the region.
    check(0..4096);
    check(4096..4096);
    check(4096..(1 << 20) + 1);
}

#[test]
fn a_broken_or_stopped_queue_pair_ends_the_work_at_the_other_end() {
    let Some(names) = device_names() else { return };
    for stop in [true, false] {
        let [writer, reader] = connected([&names[0], &names[1]]);
        if stop {
            reader.pair.stop();
        } else {
            reader.pair.fail();
        }
        let began = Instant::now();
        writer.pair.post(5, &[Work::Send(b"anyone?")]).unwrap();
        assert!(failed(writer.next().ended));
        println!("noticed after {:?} (stop: {stop})", began.elapsed());
        assert!(began.elapsed() < Duration::from_millis(900));
        writer.pair.stop();
        writer.pair.post(6, &[Work::Send(b"not any more")]).unwrap();
    }
}
