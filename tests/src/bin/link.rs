//! The link of `scripts/two-hosts`: carries packets between the TUN device on its standard input and the one on its
//! standard output, as slowly and as badly as it is told to, until it is killed.
//!
//! It sees what a wire sees: single packets no longer than the MTU, whatever the hosts' segmentation offload sends
//! at once. Each direction is a line of its own: a queue with a limit, which drops what finds it full, then the
//! wire, which loses and delays.
#![forbid(unsafe_code)]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, read, write};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// What a line is like, both ways.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Bits a second, of IP packets.
    rate: f64,
    /// From one end to the other.
    delay: Duration,
    /// Share of packets that get lost behind the queue.
    loss: f64,
    /// Share of packets that come late, so that up to [`LATE`] of delay's worth overtakes them.
    reorder: f64,
    /// Bytes that wait for the line, at most.
    queue: f64,
}

/// How late a packet comes that others overtake, beyond the delay.
const LATE: Duration = Duration::from_millis(2);
/// The longest packet of a TUN device.
const MAX_PACKET: usize = 65_536;
/// Packets that are taken before those that are due are handed on.
const BATCH: usize = 64;

/// One direction. Time is an argument.
struct Line {
    shape: Shape,
    /// When all that was taken so far has left the queue.
    free_at: Instant,
    /// On the wire, by when they arrive; those of one instant in their order.
    under_way: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    taken: u64,
    chance: u64,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
}

impl Line {
    fn new(shape: Shape, seed: u64, now: Instant) -> Line {
        Line { shape, free_at: now, under_way: BinaryHeap::new(), taken: 0, chance: seed, spare: Vec::new() }
    }

    /// True as often as `share` says; splitmix64.
    fn chance(&mut self, share: f64) -> bool {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) as f64) < share * (1u64 << 53) as f64
    }

    fn take(&mut self, packet: &[u8], now: Instant) {
        let waiting = self.free_at.saturating_duration_since(now).as_secs_f64() * self.shape.rate / 8.0;
        if waiting + packet.len() as f64 > self.shape.queue {
            return;
        }
        let on_the_line = Duration::from_secs_f64(packet.len() as f64 * 8.0 / self.shape.rate);
        self.free_at = self.free_at.max(now) + on_the_line;
        let (lost, late) = (self.chance(self.shape.loss), self.chance(self.shape.reorder));
        if lost {
            return;
        }
        let arrives = self.free_at + self.shape.delay + if late { LATE } else { Duration::ZERO };
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(packet);
        self.taken += 1;
        self.under_way.push(Reverse((arrives, self.taken, buffer)));
    }

    fn next_arrival(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse((at, ..))| *at)
    }

    fn deliver(&mut self, now: Instant, mut to: impl FnMut(&[u8])) {
        while self.next_arrival().is_some_and(|at| at <= now)
            && let Some(Reverse((_, _, packet))) = self.under_way.pop()
        {
            to(&packet);
            self.spare.push(packet);
        }
    }
}

/// Runs one direction; returns when a device is gone.
fn carry(mut line: Line, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Errno {
    let mut packet = vec![0; MAX_PACKET];
    loop {
        let mut more = true;
        for _ in 0..BATCH {
            match read(from, &mut packet[..]) {
                Ok(len) => line.take(&packet[..len], Instant::now()),
                Err(Errno::AGAIN | Errno::INTR) => {
                    more = false;
                    break;
                }
                Err(error) => return error,
            }
        }
        // A device that is down takes nothing, and says so: lost, as on a wire that is cut.
        line.deliver(Instant::now(), |packet| {
            let _ = write(to, packet);
        });
        if more {
            continue;
        }
        let wait = line.next_arrival().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        let mut polled = [PollFd::from_borrowed_fd(from, PollFlags::IN)];
        match poll(&mut polled, wait.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return error,
        }
    }
}

fn main() -> ExitCode {
    let numbers: Vec<f64> = std::env::args().skip(1).map_while(|n| n.parse().ok()).collect();
    let [rate, delay, loss, reorder, queue, seed] = numbers[..] else {
        eprintln!(
            "usage: link BITS_PER_SECOND DELAY_S LOSS REORDER QUEUE_BYTES SEED; scripts/two-hosts runs it"
        );
        return ExitCode::FAILURE;
    };
    let shape = Shape { rate, delay: Duration::from_secs_f64(delay), loss, reorder, queue };
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let (a, b) = (stdin.as_fd(), stdout.as_fd());
    let line = |seed| Line::new(shape, seed, Instant::now());
    let error = std::thread::scope(|scope| {
        let back = scope.spawn(|| carry(line(seed as u64 + 1), b, a));
        let error = carry(line(seed as u64), a, b);
        drop(back);
        // The other direction has a device less too.
        error
    });
    eprintln!("link: a device is gone: {error}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape =
        Shape { rate: 8e6, delay: Duration::from_millis(20), loss: 0.0, reorder: 0.0, queue: 50_000.0 };

    /// Sends a packet of 1,000 bytes, a millisecond of the line, every `every`; returns when each arrived.
    fn arrivals(shape: Shape, packets: u32, every: Duration) -> Vec<(u32, Duration)> {
        let begun = Instant::now();
        let mut line = Line::new(shape, 7, begun);
        for n in 0..packets {
            let mut packet = vec![0; 1000];
            packet[..4].copy_from_slice(&n.to_le_bytes());
            line.take(&packet, begun + every * n);
        }
        let mut came = Vec::new();
        while let Some(at) = line.next_arrival() {
            line.deliver(at, |packet| {
                came.push((u32::from_le_bytes(packet[..4].try_into().unwrap()), at - begun));
            });
        }
        came
    }

    #[test]
    fn packets_arrive_at_the_rate_after_the_delay_and_in_order() {
        let came = arrivals(SHAPE, 40, Duration::ZERO);
        let expected: Vec<_> = (0..40).map(|n| (n, Duration::from_millis(21 + u64::from(n)))).collect();
        assert_eq!(came, expected);
    }

    #[test]
    fn a_full_queue_drops_what_comes() {
        assert_eq!(arrivals(SHAPE, 500, Duration::ZERO).len(), 50);
        // Sent at twice the rate, half of what comes after the queue has filled is dropped.
        let came = arrivals(SHAPE, 2000, Duration::from_micros(500)).len();
        assert!((1040..1060).contains(&came), "{came}");
    }

    #[test]
    fn as_many_are_lost_and_late_as_was_asked_for() {
        let came = arrivals(Shape { loss: 0.05, ..SHAPE }, 10_000, Duration::from_millis(1));
        assert!((9_400..9_600).contains(&came.len()), "{}", came.len());
        let came = arrivals(Shape { reorder: 0.01, ..SHAPE }, 10_000, Duration::from_millis(1));
        let late = came.windows(2).filter(|pair| pair[0].0 > pair[1].0).count();
        assert_eq!(came.len(), 10_000);
        assert!((60..140).contains(&late), "{late}");
    }
}
