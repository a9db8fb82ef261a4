//! Memory of a real GPU. Without one, each test says that it was skipped, and passes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use tandem_memory::HostRegion;
use tandem_memory::cuda::{Copies, CudaError, Device, DeviceRegion, IpcHandle, PinnedRegion};

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31) >> 3) as u8).collect()
}

#[test]
fn bytes_come_back() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let stream = device.stream().unwrap();
    let region = DeviceRegion::take(&device, 100_000).unwrap();
    let sent = pattern(50_000);
    let extent = region.extent(30_000..80_000).unwrap();
    extent.write(&stream, &sent).unwrap();
    let copy = DeviceRegion::take(&device, 50_000).unwrap().extent(0..50_000).unwrap();
    extent.copy_to(&stream, &copy).unwrap();
    let mut back = vec![0; 50_000];
    copy.read(&stream, &mut back).unwrap();
    assert_eq!(back, sent);
    let mut back = vec![0; 20_000];
    extent.part(10_000..30_000).unwrap().read(&stream, &mut back).unwrap();
    assert_eq!(back, sent[10_000..30_000]);
    assert!(extent.read(&stream, &mut back).is_err(), "of another length");
    assert!(extent.copy_to(&stream, &copy.part(1..2).unwrap()).is_err(), "of another length");
    assert!(region.extent(0..100_001).is_err());
    assert!(extent.part(1..50_001).is_err());
}

#[test]
fn memory_is_given_back() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let free = || device.memory().unwrap().0;
    let before = free();
    let region = DeviceRegion::take(&device, 4 << 30).unwrap();
    let extent = region.extent(0..1).unwrap();
    drop(region);
    assert!(free() + (3 << 30) < before, "an extent holds its region");
    drop(extent);
    assert!(free() + (1 << 30) > before, "nothing holds it");
    let error = DeviceRegion::take(&device, 1 << 50).unwrap_err();
    assert!(error.to_string().contains("1125899906842624 bytes"), "{error}");
}

#[test]
fn host_memory_is_pinned_once_and_let_go() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let stream = device.stream().unwrap();
    for memory in [HostRegion::map(3 << 20).unwrap(), HostRegion::private(3 << 20).unwrap()] {
        let pinned = PinnedRegion::pin(&device, Arc::clone(&memory)).unwrap();
        let error = PinnedRegion::pin(&device, Arc::clone(&memory)).err().unwrap();
        assert!(error.to_string().contains("pin 3145728 bytes"), "{error}");
        let extent = pinned.memory().extent(0..1000).unwrap();
        // SAFETY: this test is the only holder.
        unsafe { extent.bytes_mut() }.fill(7);
        let region = DeviceRegion::take(&device, 1000).unwrap().extent(0..1000).unwrap();
        // SAFETY: as above.
        region.write(&stream, unsafe { extent.bytes() }).unwrap();
        let mut back = vec![0; 1000];
        region.read(&stream, &mut back).unwrap();
        assert_eq!(back, [7; 1000]);
        drop(pinned);
        PinnedRegion::pin(&device, memory).unwrap();
    }
}

/// Threads of their own, as lanes have them.
#[test]
fn a_twin_holds_the_true_bytes() {
    let Some(device) = Device::open_or_skip(0) else { return };
    const LEN: usize = 5 << 20;
    let region = HostRegion::with_twin(&device, LEN).unwrap();
    assert_eq!((region.len(), region.twin().unwrap().len()), (LEN, LEN));
    let parts: Vec<_> = (0..5).map(|i| region.extent(i << 20..(i + 1) << 20).unwrap()).collect();
    std::thread::scope(|scope| {
        for part in &parts {
            scope.spawn(move || {
                let sent = pattern(part.len() + part.offset() % 4093)[part.offset() % 4093..].to_vec();
                // SAFETY: each thread has its part to itself.
                unsafe { part.bytes_mut() }.copy_from_slice(&sent);
                part.deposit().unwrap();
                // SAFETY: as above.
                unsafe { part.bytes_mut() }.fill(0);
                let stream = part.on_device().unwrap().region().device().stream().unwrap();
                let mut there = vec![0; part.len()];
                part.on_device().unwrap().read(&stream, &mut there).unwrap();
                assert_eq!(there, sent);
                // SAFETY: as above.
                unsafe { part.fetch() }.unwrap();
                // SAFETY: as above.
                assert!(unsafe { part.bytes() } == sent);
            });
        }
    });
    // Beside it nothing is touched.
    let stream = device.stream().unwrap();
    let whole = region.extent(0..LEN).unwrap();
    region.twin().unwrap().extent(0..LEN).unwrap().write(&stream, &vec![7; LEN]).unwrap();
    // SAFETY: this test is the only holder.
    unsafe { whole.bytes_mut() }.fill(9);
    region.extent(100..200).unwrap().deposit().unwrap();
    // SAFETY: as above.
    unsafe { region.extent(50..300).unwrap().fetch() }.unwrap();
    // SAFETY: as above.
    let bytes = unsafe { whole.bytes() }[..400].to_vec();
    let expected = |i: usize| if (50..100).contains(&i) || (200..300).contains(&i) { 7 } else { 9 };
    assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == expected(i)), "{bytes:?}");
    let plain = HostRegion::map(100).unwrap().extent(0..100).unwrap();
    assert!(plain.on_device().is_none());
    plain.deposit().unwrap();
}

/// Measured over several, as the driver keeps what it once took for a stream.
#[test]
fn twins_are_given_back() {
    let Some(device) = Device::open_or_skip(0) else { return };
    const LEN: usize = 256 << 20;
    let free = || device.memory().unwrap().0;
    let take_and_use = || {
        let region = HostRegion::with_twin(&device, LEN).unwrap();
        let taken = free();
        let extent = region.extent(0..LEN).unwrap();
        drop(region);
        extent.deposit().unwrap();
        // SAFETY: this test is the only holder.
        unsafe { extent.fetch() }.unwrap();
        taken
    };
    let before = free();
    take_and_use();
    let settled = free();
    println!("the first twin: {before} bytes free before, {settled} after");
    for _ in 0..8 {
        assert!(take_and_use() + LEN <= settled, "a twin takes its length");
        assert!(free() + (LEN >> 3) > settled, "the twin is given back");
    }
    let now = free();
    println!("eight more: {now} after");
    assert!(before < now + LEN / 2 && settled < now + (8 << 20), "{before}, {settled}, {now}");
}

/// By one launch: of many lengths and places, aligned and not, more than one launch takes.
#[test]
fn many_pieces_are_copied_at_once() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let stream = device.stream().unwrap();
    const LEN: usize = 40 << 20;
    let (from, to) = (DeviceRegion::take(&device, LEN).unwrap(), DeviceRegion::take(&device, LEN).unwrap());
    let sent = pattern(LEN);
    from.extent(0..LEN).unwrap().write(&stream, &sent).unwrap();
    let mut expected = vec![7; LEN];
    to.extent(0..LEN).unwrap().write(&stream, &expected).unwrap();
    let mut copies = Vec::new();
    let mut at = 3;
    // Around a unit, a tile and more; both ends by the same and by different places within a unit.
    for (index, len) in [0, 1, 15, 16, 17, 31, 32, 33, 100, 4096, 65535, 65536, 65537, 131_100, 1 << 20]
        .into_iter()
        .cycle()
        .take(2 * Copies::AT_ONCE + 5)
        .enumerate()
    {
        let (shift_from, shift_to) = [(0, 0), (0, 1), (5, 5), (8, 0), (15, 2), (3, 3)][index % 6];
        at = (at / 16 + 2) * 16;
        let (source, target) = (at + shift_from..at + shift_from + len, at + shift_to..at + shift_to + len);
        expected[target.clone()].copy_from_slice(&sent[source.clone()]);
        copies.push((from.extent(source).unwrap(), to.extent(target).unwrap()));
        at += len + 16;
    }
    let engine = Copies::new(&device, 2).unwrap();
    engine.start_all(&copies).unwrap();
    engine.mark().unwrap().wait().unwrap();
    assert!(engine.mark().unwrap().is_over().unwrap(), "nothing was started since");
    let mut back = vec![0; LEN];
    to.extent(0..LEN).unwrap().read(&stream, &mut back).unwrap();
    assert!(
        back == expected,
        "wrong from byte {:?} on",
        back.iter().zip(&expected).position(|(a, b)| a != b)
    );
    let (short, long) = (from.extent(0..10).unwrap(), to.extent(0..11).unwrap());
    assert!(engine.start_all(&[(short.clone(), long)]).is_err(), "of another length");
    let Some(other) = Device::open_or_skip(1) else { return };
    let foreign = DeviceRegion::take(&other, 10).unwrap();
    let theirs = foreign.extent(0..10).unwrap();
    let error = engine.start_all(&[(short.clone(), theirs)]).unwrap_err();
    assert!(matches!(error, CudaError::OutOfReach { .. }), "{error}");
    if device.reaches(&other).unwrap() {
        let reached = DeviceRegion::import(&device, &foreign.export().unwrap(), 10).unwrap();
        engine.start_all(&[(short, reached.extent(0..10).unwrap())]).unwrap();
        engine.wait().unwrap();
        let mut there = [0; 10];
        foreign.extent(0..10).unwrap().read(&other.stream().unwrap(), &mut there).unwrap();
        assert_eq!(there, sent[..10]);
    }
}

#[test]
fn a_region_is_a_dma_buf_where_that_can_be() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let region = DeviceRegion::take(&device, 5 << 20).unwrap();
    match region.dma_buf() {
        Ok(fd) => println!("dma-buf: {fd:?}"),
        Err(error @ CudaError::NoDmaBuf { .. }) => println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_region_is_reached_by_peermem_where_that_can_be() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let region = DeviceRegion::take(&device, 5 << 20).unwrap();
    match region.peermem() {
        Ok(address) => assert_eq!(address, region.address()),
        Err(error @ CudaError::NoPeermem { .. }) => println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_nics_write_can_be_waited_for() {
    let Some(device) = Device::open_or_skip(0) else { return };
    match device.check_remote_writes() {
        Ok(()) => device.see_remote_writes().unwrap(),
        Err(error @ CudaError::NoRemoteWrites { .. }) => println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
}

/// Not a test of its own: what [`another_process_uses_the_memory`] starts.
#[test]
#[ignore = "started by another test"]
fn owner() {
    let Some(device) = Device::open_or_skip(Device::count().unwrap() - 1) else { return };
    let stream = device.stream().unwrap();
    let region = DeviceRegion::take(&device, 1 << 20).unwrap();
    let extent = region.extent(0..1 << 20).unwrap();
    extent.write(&stream, &pattern(1 << 20)).unwrap();
    println!("handle {}", region.export().unwrap());
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let mut bytes = vec![0; 1 << 20];
    extent.read(&stream, &mut bytes).unwrap();
    let mut want = pattern(1 << 20);
    want[1000..2000].fill(9);
    assert_eq!(bytes, want, "what the other process wrote");
}

#[test]
fn another_process_uses_the_memory() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let stream = device.stream().unwrap();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner", "--ignored", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Heard to its end: the owner fails when it is not.
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines().map_while(Result::ok);
    let handle: IpcHandle =
        lines.by_ref().find_map(|line| Some(line.split_once("handle ")?.1.parse().unwrap())).unwrap();
    let region = DeviceRegion::import(&device, &handle, 1 << 20).unwrap();
    let mut bytes = vec![0; 1 << 20];
    region.extent(0..1 << 20).unwrap().read(&stream, &mut bytes).unwrap();
    assert_eq!(bytes, pattern(1 << 20));
    region.extent(1000..2000).unwrap().write(&stream, &[9; 1000]).unwrap();
    assert!(region.export().is_err(), "imported memory cannot be passed on");
    assert!(matches!(region.dma_buf(), Err(CudaError::NoDmaBuf { .. })));
    assert!(matches!(region.peermem(), Err(CudaError::NoPeermem { .. })));
    drop(region);
    // Two megabytes are the least that is taken.
    let error = DeviceRegion::import(&device, &handle, (2 << 20) + 1).unwrap_err();
    assert!(matches!(error, CudaError::Bounds(_)), "{error}");
    assert!(DeviceRegion::import(&device, &IpcHandle([7; 64]), 1).is_err(), "no handle at all");
    owner.stdin.take().unwrap().write_all(b"\n").unwrap();
    lines.for_each(|line| println!("owner: {line}"));
    assert!(owner.wait().unwrap().success());
}
