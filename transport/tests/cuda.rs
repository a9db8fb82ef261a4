//! What lanes between GPUs promise while these copy, which the contract's sizes are too small to show. Without
//! a GPU, or two and NCCL for its lane, each test says that it was skipped, and passes.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_memory::cuda::{Device, DeviceExtent, DeviceRegion};
use tandem_proto::ids::NodeId;
use tandem_transport::{
    BindError, Event, Identity, NetConfig, NetTransport, Path, RegionId, Transport, Window, Write,
};

const PATIENCE: Duration = Duration::from_secs(20);
const LEN: usize = 256 << 20;

struct End {
    device: Arc<Device>,
    node: NodeId,
    memory: Arc<HostRegion>,
    region: RegionId,
    transport: NetTransport,
    events: Vec<Event>,
}

impl End {
    fn new(ordinal: usize, test: &str, paths: &[Path]) -> Option<End> {
        let device = Device::open_or_skip(ordinal)?;
        let memory = HostRegion::with_twin(&device, LEN).unwrap();
        let config = NetConfig {
            paths: paths.to_vec(),
            // NCCL needs a while, for the first time in a process above all.
            connect_timeout: Duration::from_secs(12),
            repair: Duration::from_millis(100)..=Duration::from_millis(500),
            gpu: Some(Arc::clone(&device)),
            write_limit: 1 << 12,
            ..NetConfig::default()
        };
        let dir = std::env::temp_dir().join(format!("tandem-cuda-{}-{test}", std::process::id()));
        let identity = Identity::load_or_create(&dir).unwrap();
        let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut transport = match NetTransport::bind(here, &identity, config) {
            Err(BindError::Nccl(why)) => {
                println!("skipped: {why}");
                return None;
            }
            bound => bound.unwrap(),
        };
        let region = transport.register(Arc::clone(&memory)).unwrap();
        Some(End { device, node: identity.node(), memory, region, transport, events: Vec::new() })
    }

    fn twin(&self, range: Range<usize>) -> DeviceExtent {
        self.memory.extent(range).unwrap().on_device().unwrap()
    }
}

/// Two that are connected; none without a GPU, or without what else the first path needs.
fn ends(test: &str, paths: &[Path]) -> Option<[End; 2]> {
    let last = Device::count().unwrap_or(1).clamp(1, 2) - 1;
    if paths[0] == Path::Nccl && last == 0 {
        println!("skipped: NCCL is between two GPUs");
        return None;
    }
    let test = &format!("{test}-{}", paths[0]);
    let [mut writer, mut reader] = [End::new(0, test, paths)?, End::new(last, test, paths)?];
    writer.transport.connect(reader.node, reader.transport.local_addr());
    let until = Instant::now() + PATIENCE;
    while writer.events.is_empty() || reader.events.is_empty() {
        writer.transport.poll(&mut writer.events);
        reader.transport.poll(&mut reader.events);
        assert!(Instant::now() < until, "no connection");
    }
    std::fs::remove_dir_all(std::env::temp_dir().join(format!("tandem-cuda-{}-{test}", std::process::id())))
        .unwrap();
    writer.events.clear();
    reader.events.clear();
    assert_eq!(writer.transport.path(reader.node), Some(paths[0]));
    Some([writer, reader])
}

#[test]
fn what_cuda_ipc_reports_is_there() {
    what_is_reported_is_there(Path::CudaIpc);
}

#[test]
fn what_nccl_reports_is_there() {
    what_is_reported_is_there(Path::Nccl);
}

#[test]
fn a_window_closed_under_cuda_ipc_is_its_owners() {
    a_closed_window_is_its_owners(Path::CudaIpc);
}

#[test]
fn a_window_closed_under_nccl_is_its_owners() {
    a_closed_window_is_its_owners(Path::Nccl);
}

fn pattern(salt: u64, len: usize) -> Vec<u8> {
    let words = (0..len.div_ceil(8) as u64).map(|i| (i + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt);
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

fn submit(writer: &mut End, reader: NodeId, window: Window, range: Range<usize>, number: usize) {
    let source = writer.memory.extent(range.clone()).unwrap();
    let (offset, immediate) = (range.start as u64, number as u32);
    let write = Write { ticket: number as u64, source, window, offset, immediate };
    writer.transport.submit(reader, write).unwrap();
}

/// One write that engines copy in several pieces, and many that are gathered: at the moment of the report, a write's last
/// bytes are read, faster than a GPU copies the rest.
fn what_is_reported_is_there(path: Path) {
    let Some([mut writer, mut reader]) = ends("reported", &[path]) else { return };
    let stream = reader.device.stream().unwrap();
    let from = writer.device.stream().unwrap();
    for (round, size) in [LEN, 1 << 20, LEN, 1 << 20, 3 << 20, 64 << 10].into_iter().enumerate() {
        let sent = pattern(round as u64, LEN);
        writer.twin(0..LEN).write(&from, &sent).unwrap();
        let window = reader.transport.open_window(writer.node, reader.region, 0..LEN).unwrap();
        let writes = (LEN / size).min(256);
        for number in 0..writes {
            submit(&mut writer, reader.node, window, number * size..(number + 1) * size, number);
        }
        let (mut landed, until) = (0, Instant::now() + PATIENCE);
        while landed < writes {
            assert!(Instant::now() < until, "{landed} of {writes} have landed");
            reader.transport.poll(&mut reader.events);
            for event in std::mem::take(&mut reader.events) {
                let Event::Landed { immediate, .. } = event else { panic!("{event:?}") };
                let end = (immediate as usize + 1) * size;
                let mut last = [0; 64];
                reader.twin(end - 64..end).read(&stream, &mut last).unwrap();
                assert!(last == sent[end - 64..end], "write {immediate} of {size} bytes is not there yet");
                landed += 1;
            }
        }
        let mut all = vec![0; writes * size];
        reader.twin(0..writes * size).read(&stream, &mut all).unwrap();
        assert!(all == sent[..writes * size], "writes of {size} bytes");
        reader.transport.close_window(window);
        drain(&mut writer, writes);
    }
}

fn drain(writer: &mut End, writes: usize) {
    let (mut over, until) = (0, Instant::now() + PATIENCE);
    while over < writes {
        assert!(Instant::now() < until, "{over} of {writes} writes were settled");
        writer.transport.poll(&mut writer.events);
        for event in writer.events.drain(..) {
            assert!(matches!(event, Event::Sent { .. } | Event::Failed { .. }), "{event:?}");
            over += 1;
        }
    }
}

/// Closed under copies of every kind, a window's memory is its owner's at once: what he puts there stays.
fn a_closed_window_is_its_owners(path: Path) {
    let Some([mut writer, mut reader]) = ends("closed", &[path]) else { return };
    let stream = reader.device.stream().unwrap();
    writer.twin(0..LEN).write(&writer.device.stream().unwrap(), &pattern(1, LEN)).unwrap();
    let own = DeviceRegion::take(&reader.device, LEN).unwrap().extent(0..LEN).unwrap();
    own.write(&stream, &vec![0xaa; LEN]).unwrap();
    let mut in_the_middle = 0;
    for round in 0..32u32 {
        let size = [32 << 20, 1 << 20, 5 << 20, 128 << 10][round as usize % 4];
        let window = reader.transport.open_window(writer.node, reader.region, 0..LEN).unwrap();
        let writes = (LEN / size).min(512);
        for number in 0..writes {
            submit(&mut writer, reader.node, window, number * size..(number + 1) * size, number);
        }
        let until = Instant::now() + Duration::from_micros(u64::from(round / 4) * 60);
        while Instant::now() < until {
            reader.transport.poll(&mut reader.events);
        }
        reader.transport.close_window(window);
        own.copy_to(&stream, &reader.twin(0..LEN)).unwrap();
        stream.synchronize().unwrap();
        in_the_middle += usize::from(reader.events.len() < writes);
        drain(&mut writer, writes);
        let mut bytes = vec![0; LEN];
        reader.twin(0..LEN).read(&stream, &mut bytes).unwrap();
        let late = bytes.iter().position(|byte| *byte != 0xaa);
        assert_eq!(late, None, "round {round}: bytes of writes of {size} landed after closing");
        reader.events.clear();
        reader.transport.poll(&mut reader.events);
        assert!(reader.events.is_empty(), "reported after closing: {:?}", reader.events);
    }
    println!("{in_the_middle} of 32 in the middle of the transfer");
    assert!(in_the_middle > 6);
}

/// Failed on either side in the middle of writes of every kind, NCCL's lane leaves the rest to QUIC; every byte
/// lands once, and the lane is made anew.
#[test]
fn what_nccl_leaves_goes_another_way() {
    let Some([mut writer, mut reader]) = ends("failed", &[Path::Nccl, Path::Quic]) else { return };
    let (stream, from) = (reader.device.stream().unwrap(), writer.device.stream().unwrap());
    let mut in_the_middle = 0;
    for round in 0..8usize {
        let size = [32 << 20, 1 << 20, 5 << 20, 128 << 10][round % 4];
        let until = Instant::now() + PATIENCE;
        while [&writer, &reader].map(|end| end.transport.metrics().paths[Path::Nccl as usize].opened)
            != [round as u64 + 1; 2]
        {
            assert!(Instant::now() < until, "round {round}: NCCL's lane did not come back");
            std::thread::sleep(Duration::from_millis(1));
        }
        let sent = pattern(round as u64, LEN);
        writer.twin(0..LEN).write(&from, &sent).unwrap();
        let window = reader.transport.open_window(writer.node, reader.region, 0..LEN).unwrap();
        let writes = (LEN / size).min(512);
        for number in 0..writes {
            submit(&mut writer, reader.node, window, number * size..(number + 1) * size, number);
        }
        std::thread::sleep(Duration::from_micros(100 * round as u64));
        let (failing, peer) = if round < 4 { (&writer, reader.node) } else { (&reader, writer.node) };
        failing.transport.fail_path(peer, Path::Nccl);
        let (mut landed, until) = (vec![false; writes], Instant::now() + PATIENCE);
        while landed.contains(&false) {
            assert!(Instant::now() < until, "round {round}: writes are lost");
            reader.transport.poll(&mut reader.events);
            for event in reader.events.drain(..) {
                let Event::Landed { immediate, .. } = event else { panic!("{event:?}") };
                assert!(
                    !std::mem::replace(&mut landed[immediate as usize], true),
                    "{immediate} landed twice"
                );
            }
        }
        drain(&mut writer, writes);
        let mut all = vec![0; writes * size];
        reader.twin(0..writes * size).read(&stream, &mut all).unwrap();
        assert!(all == sent[..writes * size], "round {round}: writes of {size} bytes");
        in_the_middle += writer.transport.metrics().writes_repeated();
        reader.transport.close_window(window);
        reader.events.clear();
    }
    println!("{in_the_middle} writes were repeated");
    assert!(in_the_middle > 0);
}
