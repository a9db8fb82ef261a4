//! How much may be under way on a QUIC connection: a model of the path, after BBR.
//!
//! CUBIC takes every loss for a full queue, so chance decides its rate: at one packet in a thousand and 20 ms, it
//! gets a few percent of a gigabit. [`Bbr`] measures instead what the path delivers and how long its shortest round
//! trip is, and keeps their product under way, whatever is lost. It follows the published drafts of BBR
//! (draft-cardwell-iccrg-bbr-congestion-control), with what QUIC here decides:
//! - quinn paces by the window alone (five quarters of it in a round trip), so probing, draining and measuring the
//!   round trip all are changes of the window.
//! - Peers acknowledge some packets at a time, so the path's product alone would not fill it: room for two such
//!   batches, and for what is acknowledged in bursts, comes on top.
//! - On a short path the hosts' threads are late by more than a round trip; a millisecond's worth more is under way,
//!   unless that is lost.
//!
//! quinn's own BBR takes the rate from single packets' distances and never forgets it: its window has no bound that
//! means anything.

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;
use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a connection finds out how much its path carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Congestion {
    /// From what arrives and when: fills links that lose packets, and keeps queues short.
    Bbr,
    /// From what is lost: gives way to other traffic on a link whose queue it fills.
    Cubic,
}

impl std::str::FromStr for Congestion {
    type Err = String;

    fn from_str(text: &str) -> Result<Congestion, String> {
        match text {
            "bbr" => Ok(Congestion::Bbr),
            "cubic" => Ok(Congestion::Cubic),
            _ => Err("expected bbr or cubic".into()),
        }
    }
}

/// Rounds that the highest rate is remembered for.
const MEMORY: usize = 10;
/// A shortest round trip that was not seen again for this long is measured anew.
const MIN_RTT_AGE: Duration = Duration::from_secs(10);
/// How long the window is small then, at least: long enough that other flows' measurements meet this one.
const MEASURING: Duration = Duration::from_millis(200);
/// Growth of the window in startup, as a multiple of what the path was seen to carry: 2 / ln 2.
const STARTUP_GAIN: f64 = 2.89;
/// Rounds of a cycle: one that asks for more, one that takes back what queued, and six in peace.
const GAINS: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
/// The share of a round's bytes that no chance loses: the path carries less than was thought.
const OVERLOAD: f64 = 0.2;
/// Added to the shortest round trip while few packets are lost: threads are late by about as much, and on a short path
/// what is under way would have run out by then. Chance that takes it away on a long path takes little.
const LATENESS: Duration = Duration::from_millis(1);
/// The share of a round's bytes whose loss says that queues are too short for that.
const SHALLOW: f64 = 0.01;
/// Moments of sending that are remembered.
const MAX_HISTORY: usize = 1024;

/// Makes a [`Bbr`] for each connection.
pub(crate) struct BbrFactory {
    /// Packets that peers acknowledge at a time.
    pub(crate) ack_every: u32,
}

impl ControllerFactory for BbrFactory {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Bbr::new(self.ack_every, now, mtu))
    }
}

#[derive(Clone)]
pub(crate) struct Bbr {
    batch: u64,
    mtu: u64,
    window: u64,
    mode: Mode,
    /// Bytes acknowledged, and when the last ones were.
    delivered: u64,
    delivered_at: Instant,
    /// When the packet was sent that was acknowledged last.
    first_sent: Instant,
    /// What was known when packets were sent, oldest first.
    history: VecDeque<Sent>,
    /// What the acknowledgements now coming in have brought so far.
    acked: Option<Acked>,
    idle: bool,
    /// The sender has had too little to send for what is delivered before this to tell the path's rate.
    limited_until: u64,
    /// A round ends when what was sent after its beginning is acknowledged.
    round_ends: u64,
    round_began: (Instant, u64),
    lost_in_round: u64,
    /// Bytes a second, the highest of each of the last rounds, this one's last.
    rates: VecDeque<f64>,
    /// Bytes acknowledged beyond what the rate explains, likewise.
    bursts: VecDeque<f64>,
    min_rtt: Option<(Duration, Instant)>,
    /// How much of [`LATENESS`] is allowed for.
    lateness: Duration,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Mode {
    /// Looks for the path's rate.
    Startup { best: f64, rounds_without_growth: u32 },
    /// Waits until what startup queued is gone.
    Drain,
    /// Keeps the path full; which round of the cycle.
    Cruise(usize),
    /// Measures the round trip without a queue. `until` is set once the window is no longer exceeded.
    Measure { until: Option<Instant>, shortest: Option<Duration>, known: bool },
}

#[derive(Clone, Copy)]
struct Sent {
    at: Instant,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    limited: bool,
}

#[derive(Clone, Copy)]
struct Acked {
    newest: Instant,
    bytes: u64,
}

fn highest(of: &VecDeque<f64>) -> f64 {
    of.iter().copied().fold(0.0, f64::max)
}

fn raise(of: &mut VecDeque<f64>, value: f64) {
    if let Some(last) = of.back_mut() {
        *last = last.max(value);
    }
}

fn next_round(of: &mut VecDeque<f64>) {
    if of.len() == MEMORY {
        of.pop_front();
    }
    of.push_back(0.0);
}

impl Bbr {
    fn new(ack_every: u32, now: Instant, mtu: u16) -> Bbr {
        let mut bbr = Bbr {
            batch: u64::from(ack_every.max(2)),
            mtu: mtu.into(),
            window: 0,
            mode: Mode::Startup { best: 0.0, rounds_without_growth: 0 },
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            history: VecDeque::new(),
            acked: None,
            idle: true,
            limited_until: 0,
            round_ends: 0,
            round_began: (now, 0),
            lost_in_round: 0,
            rates: VecDeque::from([0.0]),
            bursts: VecDeque::from([0.0]),
            min_rtt: None,
            lateness: LATENESS,
        };
        bbr.window = bbr.initial_window();
        bbr
    }

    /// Room for what peers acknowledge at a time, twice: one batch is on its way while the next fills.
    fn floor(&self) -> u64 {
        2 * self.batch * self.mtu
    }

    /// Bytes that fill the path, times `gain`, without any queue.
    fn product(&self, gain: f64) -> f64 {
        self.min_rtt.map_or(0.0, |(rtt, _)| gain * highest(&self.rates) * rtt.as_secs_f64())
    }

    fn target(&self, gain: f64) -> u64 {
        // A burst longer than the path would be a queue.
        let bursts = highest(&self.bursts).min(self.product(1.0));
        let late = highest(&self.rates) * self.lateness.as_secs_f64();
        self.floor() + (self.product(gain) + bursts.max(late)) as u64
    }

    fn note_acked(&mut self, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        let acked = self.acked.get_or_insert(Acked { newest: sent, bytes: 0 });
        acked.newest = acked.newest.max(sent);
        acked.bytes += bytes;
    }

    /// What acknowledgements say about the path's rate.
    fn measure(&mut self, acked: Acked, now: Instant) -> Option<(f64, Sent)> {
        let after = self.history.partition_point(|sent| sent.at <= acked.newest);
        let sent = *self.history.get(after.checked_sub(1)?)?;
        // What is acknowledged later was sent later, but for what came out of order, which tells nothing new.
        self.history.drain(..after - 1);
        let sending = acked.newest.saturating_duration_since(sent.first_sent);
        let arriving = now.saturating_duration_since(sent.delivered_at);
        let within = sending.max(arriving);
        self.first_sent = acked.newest;
        self.delivered_at = now;
        if within.is_zero() || self.min_rtt.is_none_or(|(rtt, _)| within < rtt) {
            return Some((0.0, sent));
        }
        Some(((self.delivered - sent.delivered) as f64 / within.as_secs_f64(), sent))
    }

    fn note_rtt(&mut self, rtt: Duration, now: Instant) {
        if let Mode::Measure { shortest, .. } = &mut self.mode {
            *shortest = Some(shortest.map_or(rtt, |shortest| shortest.min(rtt)));
        }
        if self.min_rtt.is_none_or(|(shortest, _)| rtt <= shortest) {
            self.min_rtt = Some((rtt, now));
        }
    }

    /// Bytes acknowledged in this round beyond what the rate explains.
    fn note_burst(&mut self, now: Instant) {
        let (began, delivered) = self.round_began;
        let explained = highest(&self.rates) * now.saturating_duration_since(began).as_secs_f64();
        raise(&mut self.bursts, ((self.delivered - delivered) as f64 - explained).max(0.0));
    }

    fn round_is_over(&mut self, limited: bool, now: Instant) {
        let delivered = (self.delivered - self.round_began.1) as f64;
        let lost = std::mem::take(&mut self.lost_in_round) as f64;
        let overload = lost > OVERLOAD * (lost + delivered);
        self.round_ends = self.delivered;
        self.round_began = (now, self.delivered);
        if overload {
            self.forget_rates();
        }
        self.lateness = if lost > SHALLOW * (lost + delivered) {
            self.lateness / 2
        } else {
            LATENESS.min(self.lateness + LATENESS / 16)
        };
        match &mut self.mode {
            Mode::Startup { best, rounds_without_growth } if !limited => {
                let rate = highest(&self.rates);
                if rate >= 1.25 * *best {
                    (*best, *rounds_without_growth) = (rate, 0);
                } else {
                    *rounds_without_growth += 1;
                }
                if *rounds_without_growth >= 3 || overload {
                    self.mode = Mode::Drain;
                }
            }
            Mode::Cruise(phase) => *phase = (*phase + 1) % GAINS.len(),
            _ => {}
        }
        // Without enough to send, what the path was seen to carry stays true.
        if !limited {
            next_round(&mut self.rates);
            next_round(&mut self.bursts);
        }
    }

    /// Believes the last two rounds only.
    fn forget_rates(&mut self) {
        let old = self.rates.len().saturating_sub(2);
        self.rates.drain(..old);
    }

    fn change_mode(&mut self, in_flight: u64, now: Instant) {
        if self.mode == Mode::Drain && in_flight <= self.target(1.0) {
            self.mode = Mode::Cruise(2);
        }
        if let Mode::Measure { until, shortest, known } = &mut self.mode {
            match until {
                None if in_flight <= self.window => *until = Some(now + MEASURING),
                Some(until) if *until <= now => {
                    if let Some(shortest) = shortest {
                        self.min_rtt = Some((*shortest, now));
                    }
                    let known = *known;
                    let anew = Mode::Startup { best: 0.0, rounds_without_growth: 0 };
                    self.mode = if known { Mode::Cruise(0) } else { anew };
                }
                _ => {}
            }
        } else if self.min_rtt.is_some_and(|(_, at)| now.saturating_duration_since(at) > MIN_RTT_AGE) {
            let known = !matches!(self.mode, Mode::Startup { .. });
            self.mode = Mode::Measure { until: None, shortest: None, known };
        }
    }

    fn set_window(&mut self, acked: u64, limited: bool) {
        self.window = match self.mode {
            // Never less, and no more than acknowledgements justify.
            Mode::Startup { .. } if limited => self.window,
            Mode::Startup { .. } => {
                let initial = self.initial_window();
                let most = self.target(STARTUP_GAIN).max(initial);
                self.window.max(most.min(self.window + acked))
            }
            Mode::Drain => self.target(0.75),
            Mode::Cruise(phase) => self.target(GAINS[phase]),
            Mode::Measure { .. } => (self.product(0.5) as u64).max(self.floor()),
        };
    }
}

impl Controller for Bbr {
    /// quinn's count of bytes is of the whole batch so far each time, so it is not used.
    fn on_sent(&mut self, now: Instant, _: u64, _: u64) {
        if std::mem::take(&mut self.idle) {
            self.first_sent = now;
            self.delivered_at = now;
            self.round_began = (now, self.delivered);
        }
        // Finer than this, moments tell nothing more.
        let grain = self.min_rtt.map_or(Duration::ZERO, |(rtt, _)| rtt / 128);
        if self.history.back().is_some_and(|sent| now.saturating_duration_since(sent.at) <= grain) {
            return;
        }
        if self.history.len() == MAX_HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Sent {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            limited: self.delivered < self.limited_until,
        });
    }

    fn on_ack(&mut self, _: Instant, sent: Instant, bytes: u64, _: bool, _: &RttEstimator) {
        self.note_acked(sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        self.idle = in_flight == 0;
        let Some(acked) = self.acked.take() else { return };
        if app_limited {
            self.limited_until = self.delivered + in_flight;
        }
        self.note_rtt(now.saturating_duration_since(acked.newest), now);
        let Some((rate, sent)) = self.measure(acked, now) else { return };
        if !sent.limited || rate > highest(&self.rates) {
            raise(&mut self.rates, rate);
        }
        self.note_burst(now);
        if sent.delivered >= self.round_ends {
            self.round_is_over(sent.limited, now);
        }
        self.change_mode(in_flight, now);
        self.set_window(acked.bytes, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, _: Instant, persistent: bool, lost_bytes: u64) {
        self.lost_in_round += lost_bytes;
        if persistent {
            *self = Bbr { min_rtt: self.min_rtt, ..Bbr::new(self.batch as u32, now, self.mtu as u16) };
            self.window = self.floor();
        } else if lost_bytes == 0 {
            // A router says that its queue fills: give it a round to empty.
            self.forget_rates();
            if !matches!(self.mode, Mode::Measure { .. }) {
                self.mode = Mode::Cruise(1);
            }
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = mtu.into();
        self.window = self.window.max(self.floor());
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window;
        metrics.pacing_rate = Some((highest(&self.rates) * 8.0) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    /// A path that is short needs no more, and one that is slow takes it in a second.
    fn initial_window(&self) -> u64 {
        2 * self.floor()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const MTU: u64 = 1452;
    const ACK_EVERY: u32 = 16;

    /// A link, and connections that always have something to send over it.
    struct Path {
        /// Bytes a second.
        rate: f64,
        round_trip: Duration,
        queue_bytes: f64,
        loss: f64,
        now: Instant,
        free_at: Instant,
        flows: Vec<Flow>,
        rng: crate::rng::Rng,
    }

    struct Flow {
        bbr: Bbr,
        next: u64,
        /// When each was sent, and when its acknowledgement will be here; none if it is lost.
        under_way: BTreeMap<u64, (Instant, Option<Instant>)>,
        may_send_at: Instant,
        srtt: Duration,
        delivered: u64,
        lost: u64,
    }

    impl Path {
        fn new(rate: f64, round_trip: Duration, loss: f64, flows: usize) -> Path {
            let now = Instant::now();
            let flow = || Flow {
                bbr: Bbr::new(ACK_EVERY, now, MTU as u16),
                next: 0,
                under_way: BTreeMap::new(),
                may_send_at: now,
                srtt: round_trip,
                delivered: 0,
                lost: 0,
            };
            Path {
                rate,
                round_trip,
                queue_bytes: rate * round_trip.as_secs_f64(),
                loss,
                now,
                free_at: now,
                flows: (0..flows).map(|_| flow()).collect(),
                rng: crate::rng::Rng::new(7),
            }
        }

        /// Returns what each flow got, as a share of the link, and how long the queue was on average, as a share of
        /// the round trip.
        fn run(&mut self, time: Duration) -> (Vec<f64>, f64) {
            const STEP: Duration = Duration::from_micros(100);
            let before: Vec<u64> = self.flows.iter().map(|flow| flow.delivered).collect();
            let (end, mut queue, mut steps) = (self.now + time, 0.0, 0);
            while self.now < end {
                for flow in &mut self.flows {
                    flow.hear(self.now);
                    let paced = flow.srtt.mul_f64(0.8 * MTU as f64 / flow.bbr.window() as f64);
                    while flow.in_flight() + MTU < flow.bbr.window() && flow.may_send_at <= self.now {
                        let waiting =
                            self.free_at.saturating_duration_since(self.now).as_secs_f64() * self.rate;
                        let fits = waiting + MTU as f64 <= self.queue_bytes;
                        if fits {
                            let takes = Duration::from_secs_f64(MTU as f64 / self.rate);
                            self.free_at = self.free_at.max(self.now) + takes;
                        }
                        let arrives = fits && !self.rng.chance(self.loss);
                        let acked = arrives.then(|| self.free_at + self.round_trip);
                        flow.under_way.insert(flow.next, (self.now, acked));
                        flow.next += 1;
                        flow.may_send_at = flow.may_send_at.max(self.now - STEP * 4) + paced;
                        flow.bbr.on_sent(self.now, MTU, flow.next);
                    }
                }
                queue += self.free_at.saturating_duration_since(self.now).as_secs_f64();
                steps += 1;
                self.now += STEP;
            }
            let carries = self.rate * time.as_secs_f64();
            let got = self.flows.iter().zip(before).map(|(flow, before)| (flow.delivered - before) as f64);
            (got.map(|got| got / carries).collect(), queue / f64::from(steps) / self.round_trip.as_secs_f64())
        }
    }

    impl Flow {
        fn in_flight(&self) -> u64 {
            self.under_way.len() as u64 * MTU
        }

        /// Takes in what has arrived, a batch at a time, as peers acknowledge it.
        fn hear(&mut self, now: Instant) {
            let here =
                |(_, (_, acked)): &(&u64, &(Instant, Option<Instant>))| acked.is_some_and(|at| at <= now);
            let came: Vec<u64> = self.under_way.iter().filter(here).map(|(packet, _)| *packet).collect();
            for batch in came.chunks(ACK_EVERY as usize) {
                let waits = Duration::from_millis(2);
                let last = self.under_way[batch.last().unwrap()];
                if batch.len() < ACK_EVERY as usize && last.1.is_some_and(|at| now < at + waits) {
                    break;
                }
                for packet in batch {
                    let (sent, _) = self.under_way.remove(packet).unwrap();
                    self.bbr.note_acked(sent, MTU);
                    self.srtt = (self.srtt * 7 + (now - sent)) / 8;
                    self.delivered += MTU;
                }
                self.bbr.on_end_acks(now, self.in_flight(), false, batch.last().copied());
                let newest = *batch.last().unwrap();
                let lost: Vec<u64> =
                    self.under_way.range(..newest.saturating_sub(3)).map(|(p, _)| *p).collect();
                let lost: Vec<u64> = lost.into_iter().filter(|p| self.under_way[p].1.is_none()).collect();
                for packet in &lost {
                    self.under_way.remove(packet);
                }
                if !lost.is_empty() {
                    let bytes = lost.len() as u64 * MTU;
                    self.lost += bytes;
                    self.bbr.on_congestion_event(now, now, false, bytes);
                }
            }
        }
    }

    const GIGABIT: f64 = 125e6;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_link_is_filled_whatever_chance_loses() {
        for (loss, least) in [(0.0, 0.9), (0.001, 0.9), (0.01, 0.85), (0.05, 0.8)] {
            for round_trip in [1, 20, 40, 100] {
                let mut path = Path::new(GIGABIT / 2.0, ms(round_trip), loss, 1);
                path.run(ms(20 * round_trip));
                let (share, queue) = path.run(ms(16 * round_trip));
                assert!(share[0] > least, "{share:?} at {loss} lost, {round_trip} ms");
                assert!(round_trip < 20 || queue < 0.3, "a queue of {queue} round trips, {round_trip} ms");
            }
        }
    }

    #[test]
    fn startup_takes_a_few_round_trips() {
        let mut path = Path::new(GIGABIT, ms(40), 0.001, 1);
        let (share, _) = path.run(ms(600));
        assert!(share[0] > 0.5, "{share:?}");
    }

    #[test]
    fn what_a_link_carries_is_found_again_when_it_changes() {
        let mut path = Path::new(GIGABIT, ms(20), 0.001, 1);
        path.run(ms(1000));
        path.rate /= 10.0;
        path.run(ms(2000));
        let lost = path.flows[0].lost;
        let (share, queue) = path.run(ms(1000));
        let lost = (path.flows[0].lost - lost) as f64 / (path.rate * 1.0);
        assert!(share[0] > 0.85 && lost < 0.02, "{share:?}, {lost} lost, a queue of {queue}");
        path.rate *= 10.0;
        path.run(ms(3000));
        let (share, _) = path.run(ms(1000));
        assert!(share[0] > 0.85, "{share:?}");
    }

    #[test]
    fn a_path_that_became_longer_is_filled_again() {
        let mut path = Path::new(GIGABIT / 20.0, ms(5), 0.001, 1);
        path.run(ms(1000));
        path.round_trip = ms(50);
        path.run(MIN_RTT_AGE + ms(2000));
        let (share, _) = path.run(ms(2000));
        assert!(share[0] > 0.85, "{share:?}");
    }

    #[test]
    fn connections_share_a_link() {
        for flows in [2, 4] {
            let mut path = Path::new(GIGABIT, ms(20), 0.001, flows);
            path.run(ms(5000));
            let (share, queue) = path.run(ms(10_000));
            let (least, all) = (share.iter().copied().fold(1.0, f64::min), share.iter().sum::<f64>());
            assert!(all > 0.9 && queue < 1.0, "{share:?}, a queue of {queue}");
            assert!(least > 0.3 / flows as f64, "{share:?}");
        }
    }

    #[test]
    fn a_slow_link_gets_no_more_than_its_queue_holds() {
        let mut path = Path::new(GIGABIT / 1000.0, ms(20), 0.0, 1);
        path.queue_bytes = 200_000.0;
        path.run(ms(5000));
        assert_eq!(path.flows[0].lost, 0);
    }
}
