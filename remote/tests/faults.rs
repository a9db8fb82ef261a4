//! Stores that fail, hang and lie: calls end in time, memory is let go, and nothing of a lie is believed.

mod fake;

use fake::{Fake, Say, Speech};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tandem_kv_store::tier::contract::{self, Caller};
use tandem_kv_store::tier::{Outcome, TierError};
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;
use tandem_remote::{Remote, RemoteConfig};

const DEADLINE: Duration = Duration::from_millis(600);
/// What a call may take beyond its deadline, on a machine that is busy with other things.
const SLACK: Duration = Duration::from_secs(5);
const SPEECHES: [Speech; 2] = [Speech::Redis, Speech::S3];

/// Someone who calls a fake store.
fn caller(fake: &Fake, deadline: Duration) -> Caller {
    let url = fake.url();
    Caller::new(&|wake| {
        let mut config = RemoteConfig::new(url.parse().expect("a URL"));
        config.deadline = deadline;
        Box::new(Remote::open(config, wake).expect("it opens"))
    })
}

fn object((header, body): &(ChunkHeader, Vec<u8>)) -> Vec<u8> {
    [header.encode(), body.clone()].concat()
}

fn load(caller: &mut Caller, key: ChunkKey) -> Result<(ChunkHeader, Vec<u8>), TierError> {
    caller.load(key, contract::whole(1).1.len())
}

#[derive(Debug, PartialEq)]
enum Is {
    Loaded,
    Absent,
    Damaged,
    Failed,
}

/// What a load ends with when the store says this, in each speech.
fn check(say: impl Fn(Speech) -> Say, is: Is) {
    for speech in SPEECHES {
        let chunk = contract::whole(1);
        let fake = Fake::start(speech, say(speech));
        let mut caller = caller(&fake, DEADLINE);
        let begun = Instant::now();
        let loaded = load(&mut caller, chunk.0.key);
        assert!(begun.elapsed() < DEADLINE + SLACK, "{speech:?} took {:?}", begun.elapsed());
        let ended = match &loaded {
            Ok(loaded) => {
                assert!(*loaded == chunk);
                Is::Loaded
            }
            Err(TierError::Absent { .. }) => Is::Absent,
            Err(TierError::Damaged { key, .. }) => {
                assert_eq!(*key, chunk.0.key);
                Is::Damaged
            }
            Err(TierError::Failed { reason, .. }) => {
                assert!(reason.contains(&fake.shown()) && reason.contains("load"), "{reason}");
                assert!(reason.len() < 1000, "{reason}");
                Is::Failed
            }
            Err(other) => panic!("{other}"),
        };
        assert_eq!(ended, is, "{speech:?}: {:?}", loaded.map(|_| ()));
        assert_eq!(caller.usage().damaged, u64::from(is == Is::Damaged));
        assert_eq!(caller.usage().under_way, 0);
    }
}

#[test]
fn the_truth_is_believed() {
    check(|speech| speech.object(&object(&contract::whole(1))), Is::Loaded);
    check(Speech::nothing, Is::Absent);
}

#[test]
fn objects_that_are_not_the_chunk_are_damaged() {
    let whole = object(&contract::whole(1));
    let wrong: Vec<Vec<u8>> = vec![
        object(&contract::whole(2)),
        whole[..whole.len() - 1].to_vec(),
        whole[..5].to_vec(),
        [&whole[..], &[0]].concat(),
        vec![],
        vec![7; whole.len()],
        b"<html>welcome to the hotel</html>".to_vec(),
    ];
    for wrong in &wrong {
        check(|speech| speech.object(wrong), Is::Damaged);
    }
}

#[test]
fn garbage_and_refusals_are_failures() {
    check(|_| Say::these(b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec()), Is::Failed);
    check(|_| Say::these(vec![0xFF; 100_000]), Is::Failed);
    check(|_| Say::these(vec![]), Is::Failed);
    check(Speech::refusal, Is::Failed);
    check(Speech::overload, Is::Failed);
}

#[test]
fn a_connection_that_ends_in_the_middle_is_a_failure() {
    let whole = object(&contract::whole(1));
    for cut in [1, 13, 200, whole.len() / 2, whole.len() - 1] {
        check(|speech| speech.object(&whole).cut(whole.len() - cut), Is::Failed);
    }
}

#[test]
fn a_store_that_hangs_is_given_up_in_time() {
    let whole = object(&contract::whole(1));
    check(|_| Say::nothing_ever(), Is::Failed);
    check(|speech| speech.object(&whole).hang(whole.len() / 2), Is::Failed);
    check(|speech| speech.object(&whole).hang(1), Is::Failed);
}

/// An object without end, and an error without end: what is read of them is bounded.
#[test]
fn what_has_no_end_is_not_read_to_it() {
    let chunk = contract::whole(1);
    for speech in SPEECHES {
        for (say, bound) in [
            (speech.endless(&object(&chunk)), 16 << 20),
            (speech.endless(&[9; 4096]), 16 << 20),
            (speech.endless_refusal(), 16 << 20),
        ] {
            let fake = Fake::start(speech, say);
            let mut caller = caller(&fake, SLACK);
            assert!(load(&mut caller, chunk.0.key).is_err());
            drop(caller);
            let sent = fake.stop();
            assert!(sent < bound, "{speech:?} sent {sent} bytes before it was left");
        }
    }
}

/// After a call was answered its memory is the caller's, whatever still comes.
#[test]
fn memory_is_let_go_by_calls_that_are_given_up() {
    let chunk = contract::whole(1);
    for speech in SPEECHES {
        let whole = object(&chunk);
        let half = speech.object(&whole).late(whole.len() / 2, DEADLINE * 2);
        let fake = Fake::start(speech, half);
        let mut caller = caller(&fake, DEADLINE);
        let memory = contract::memory(chunk.1.len());
        let given = memory.clone();
        let ticket = caller.begin(|tier, ticket| tier.load(ticket, chunk.0.key, given));
        assert!(matches!(caller.answer(ticket), Err(TierError::Failed { .. })));
        assert_eq!(Arc::strong_count(memory.region()), 1, "{speech:?} holds it");
        let (stored, source) = caller.begin_store(&chunk.0, &chunk.1);
        let _ = caller.answer(stored);
        assert_eq!(Arc::strong_count(source.region()), 1, "{speech:?} holds it");
        // The rest of the object comes, to nobody.
        std::thread::sleep(DEADLINE * 2);
        assert!(contract::read(&memory)[chunk.1.len() / 2 + 512..].iter().all(|byte| *byte == 0));
    }
}

/// When the caller is woken, which is in the middle of answering, nobody holds the memory but the caller.
#[test]
fn memory_is_let_go_before_the_answer() {
    let chunk = contract::whole(1);
    for speech in SPEECHES {
        for say in [speech.object(&object(&chunk)), speech.full(&object(&chunk)), Say::nothing_ever()] {
            let fake = Fake::start(speech, say);
            let memory = contract::memory(chunk.1.len());
            let region = Arc::clone(memory.region());
            let (url, holders) = (fake.url(), Arc::new(AtomicUsize::new(0)));
            let mut caller = Caller::new(&|wake| {
                let (region, holders) = (Arc::clone(&region), Arc::clone(&holders));
                let watch = move || {
                    holders.fetch_max(Arc::strong_count(&region), Ordering::SeqCst);
                    wake();
                };
                let config = RemoteConfig::new(url.parse().expect("a URL"));
                let config = RemoteConfig { deadline: DEADLINE, ..config };
                Box::new(Remote::open(config, Arc::new(watch)).expect("it opens"))
            });
            let header = Arc::new(chunk.0.clone());
            let given = memory.clone();
            let load = caller.begin(|tier, ticket| tier.load(ticket, chunk.0.key, given));
            let _ = caller.answer(load);
            let given = memory.clone();
            let store = caller.begin(|tier, ticket| tier.store(ticket, header, given));
            let _ = caller.answer(store);
            // That of the test's memory, and one each in the test and the watch.
            assert_eq!(holders.load(Ordering::SeqCst), 3, "{speech:?} holds it");
        }
    }
}

/// A store that is down is asked a few times, and then left alone; calls are answered at once meanwhile. Once it works
/// again, so do calls.
#[test]
fn a_store_that_is_down_is_left_alone_until_it_works() {
    let chunk = contract::whole(1);
    for speech in SPEECHES {
        let fake = Fake::start(speech, Say::nothing_ever());
        let mut caller = caller(&fake, DEADLINE);
        for _ in 0..3 {
            assert!(load(&mut caller, chunk.0.key).is_err());
        }
        let asked = fake.asked();
        for _ in 0..50 {
            assert!(load(&mut caller, chunk.0.key).is_err());
        }
        assert!(fake.asked() <= asked + 2, "{speech:?}: it is left alone");
        fake.say(speech.object(&object(&chunk)));
        let until = Instant::now() + Duration::from_secs(30);
        while load(&mut caller, chunk.0.key).is_err() {
            assert!(Instant::now() < until, "{speech:?}: it is never tried again");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(load(&mut caller, chunk.0.key).is_ok());
    }
}

/// A store that refuses what is stored still gives what it has.
#[test]
fn loads_go_on_when_stores_fail() {
    let chunk = contract::whole(1);
    for speech in SPEECHES {
        let fake = Fake::start(speech, speech.full(&object(&chunk)));
        let mut caller = caller(&fake, DEADLINE);
        for _ in 0..6 {
            let error = caller.store(&contract::whole(2)).expect_err("it refuses");
            assert!(matches!(error, TierError::Failed { .. }), "{error}");
        }
        assert!(load(&mut caller, chunk.0.key).is_ok());
    }
}

#[test]
fn calls_that_wait_behind_a_store_that_hangs_are_all_answered() {
    for speech in SPEECHES {
        let fake = Fake::start(speech, Say::nothing_ever());
        let mut caller = caller(&fake, DEADLINE);
        let begun = Instant::now();
        let tickets: Vec<_> = (0..600)
            .map(|number| {
                let (header, body) = contract::whole(number);
                match number % 4 {
                    0 => caller.begin_store(&header, &body).0,
                    1 => caller.begin(|tier, ticket| tier.find(ticket, [header.key].into())),
                    2 => caller.begin(|tier, ticket| tier.remove(ticket, header.key)),
                    _ => {
                        let memory = contract::memory(body.len());
                        caller.begin(|tier, ticket| tier.load(ticket, header.key, memory))
                    }
                }
            })
            .collect();
        for ticket in tickets {
            let answer = caller.answer(ticket);
            assert!(matches!(answer, Err(TierError::Failed { .. } | TierError::Busy { .. })), "{answer:?}");
        }
        assert!(begun.elapsed() < DEADLINE + SLACK);
        assert_eq!(caller.usage().under_way, 0);
    }
}

/// A tier may go while calls are under way: it does not wait for a store that hangs.
#[test]
fn the_end_of_a_tier_waits_for_nobody() {
    for speech in SPEECHES {
        let fake = Fake::start(speech, Say::nothing_ever());
        let mut caller = caller(&fake, Duration::from_secs(60));
        let memory = contract::memory(64);
        let given = memory.clone();
        caller.begin(|tier, ticket| tier.load(ticket, contract::whole(1).0.key, given));
        while fake.asked() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begun = Instant::now();
        drop(caller);
        assert!(begun.elapsed() < SLACK);
        assert_eq!(Arc::strong_count(memory.region()), 1);
    }
}

#[test]
fn a_connection_that_the_store_closed_is_replaced() {
    let chunk = contract::whole(1);
    for speech in SPEECHES {
        let fake = Fake::start(speech, speech.object(&object(&chunk)));
        let mut caller = caller(&fake, SLACK);
        for _ in 0..3 {
            assert!(load(&mut caller, chunk.0.key).is_ok(), "{speech:?}");
            fake.close_connections();
        }
        let found = caller.begin(|tier, ticket| tier.find(ticket, [chunk.0.key].into()));
        assert_eq!(caller.answer(found), Ok(Outcome::Found(1)));
    }
}
