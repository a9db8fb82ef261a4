//! The contract of tiers, over every kind of store.
//!
//! Redis and S3 run with `scripts/stores`, which starts both and says where they are; elsewhere they are skipped.

mod place;

use place::Folder;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tandem_kv_store::tier::Tier;
use tandem_kv_store::tier::contract::{self, Caller};
use tandem_remote::{Remote, RemoteConfig};

/// Tests on a busy machine: no call is to fail because the machine has no time.
const PATIENT: Duration = Duration::from_secs(25);

fn open(url: &str, wake: tandem_kv_store::tier::Wake) -> Box<dyn Tier> {
    let mut config = RemoteConfig::new(url.parse().unwrap_or_else(|error| panic!("{url}: {error}")));
    config.deadline = PATIENT;
    Box::new(Remote::open(config, wake).unwrap_or_else(|error| panic!("{error}")))
}

/// Checks with a folder or a prefix of its own for each tier, put where the URL has `{}`.
fn check(url: &str) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    contract::check(&|wake| {
        let own = format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        open(&url.replace("{}", &own), wake)
    });
}

#[test]
fn a_directory_keeps_the_contract() {
    let folder = Folder::new();
    check(&format!("fs://{}/{{}}", folder.path().display()));
}

#[test]
fn redis_keeps_the_contract() {
    if let Some(url) = place::from_environment("TANDEM_STORES_REDIS") {
        check(&format!("{url}?prefix={{}}"));
        check(&format!("{url}?prefix={{}}&ttl=600"));
    }
}

#[test]
fn s3_keeps_the_contract() {
    if let Some(url) = place::from_environment("TANDEM_STORES_S3") {
        check(&url.replacen("?", "/{}?", 1));
    }
}

#[test]
fn redis_lets_chunks_go_when_their_time_is_over() {
    let Some(url) = place::from_environment("TANDEM_STORES_REDIS") else { return };
    let url = format!("{url}?prefix=ttl-{}&ttl=1", std::process::id());
    let mut caller = Caller::new(&|wake| open(&url, wake));
    let chunk = contract::whole(1);
    caller.store(&chunk).expect("it is stored");
    let until = std::time::Instant::now() + PATIENT;
    while caller.intact(&chunk) {
        assert!(std::time::Instant::now() < until, "it stays");
    }
}

/// Two processes, or a process and the one after it, see the same chunks.
#[test]
fn what_one_tier_stores_another_finds() {
    let folder = Folder::new();
    let url = format!("fs://{}/shared", folder.path().display());
    let chunk = contract::whole(1);
    let mut first = Caller::new(&|wake| open(&url, wake));
    let mut second = Caller::new(&|wake| open(&url, wake));
    first.store(&chunk).expect("it is stored");
    assert!(second.intact(&chunk));
    drop(first);
    assert_eq!(Caller::new(&|wake| open(&url, wake)).found(&[chunk.0.key]), 1);
}

#[test]
fn what_a_writer_left_behind_is_found_by_nobody_and_goes_after_an_hour() {
    let folder = Folder::new();
    let chunk = contract::whole(1);
    let key = chunk.0.key.to_string();
    let parts = folder.path().join(".partial").join(&key[..2]);
    std::fs::create_dir_all(&parts).expect("a folder");
    let (old, new) = (parts.join(format!("{key}.1")), parts.join(format!("{key}.2")));
    for part in [&old, &new] {
        std::fs::write(part, b"tdmC").expect("a file");
    }
    let before = std::time::SystemTime::now() - Duration::from_secs(2 * 3600);
    std::fs::File::options()
        .write(true)
        .open(&old)
        .expect("it is there")
        .set_modified(before)
        .expect("a time");
    let url = format!("fs://{}", folder.path().display());
    let mut caller = Caller::new(&|wake| open(&url, wake));
    assert_eq!(caller.found(&[chunk.0.key]), 0);
    let until = std::time::Instant::now() + PATIENT;
    while old.exists() {
        assert!(std::time::Instant::now() < until, "{} stays", old.display());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(new.exists(), "somebody may be writing it");
    caller.store(&chunk).expect("it is stored");
    assert!(caller.intact(&chunk));
}

/// Whatever bit of a stored object is another, it is told, or the checksums of the header tell it.
#[test]
fn flipped_bits_are_noticed() {
    let folder = Folder::new();
    let (mut header, body) = contract::whole(1);
    for layer in 0..header.shape.layers {
        let range = header.layer(tandem_proto::ids::LayerIdx(layer));
        header.checksums[layer as usize] = tandem_kernels::checksum(&body[range]);
    }
    let chunk = (header, body);
    let url = format!("fs://{}", folder.path().display());
    let mut caller = Caller::new(&|wake| open(&url, wake));
    caller.store(&chunk).expect("it is stored");
    let key = chunk.0.key.to_string();
    let file = folder.path().join(&key[..2]).join(&key);
    let whole = std::fs::read(&file).expect("it is there");
    let head = whole.len() - chunk.1.len();
    // Every bit of the header, and one of every 37th byte of the rest.
    let bits = (0..head * 8).chain((head..whole.len()).step_by(37).map(|byte| byte * 8 + byte % 8));
    for bit in bits {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&file, &flipped).expect("it is written");
        let Ok((header, body)) = caller.load(chunk.0.key, chunk.1.len()) else { continue };
        let same = (0..header.shape.layers).all(|layer| {
            let range = header.layer(tandem_proto::ids::LayerIdx(layer));
            header.checksums[layer as usize] == tandem_kernels::checksum(&body[range])
        });
        assert!(!same, "bit {bit} is used");
    }
    assert_eq!(caller.usage().damaged, head as u64 * 8, "those of the header");
    // Cut anywhere, or longer.
    for len in (0..whole.len()).step_by(211).chain([whole.len() - 1]) {
        std::fs::write(&file, &whole[..len]).expect("it is written");
        let refused = caller.load(chunk.0.key, chunk.1.len());
        assert!(
            matches!(refused, Err(tandem_kv_store::tier::TierError::Damaged { .. })),
            "{len}: {refused:?}"
        );
    }
    std::fs::write(&file, [&whole[..], &[0]].concat()).expect("it is written");
    assert!(caller.load(chunk.0.key, chunk.1.len()).is_err());
    std::fs::write(&file, &whole).expect("it is written");
    assert!(caller.intact(&chunk));
}

/// Whether a store works shows when it is called: a node starts without it.
#[test]
fn a_tier_opens_whether_its_store_is_there_or_not() {
    for url in ["redis://127.0.0.1:1/0", "s3://bucket/?endpoint=http://127.0.0.1:1&sign=no"] {
        let mut caller = Caller::new(&|wake| {
            let mut config = RemoteConfig::new(url.parse().expect("a URL"));
            config.deadline = Duration::from_millis(300);
            Box::new(Remote::open(config, wake).expect("it opens"))
        });
        let error = caller.store(&contract::whole(1)).expect_err("nobody is there").to_string();
        assert!(error.contains("127.0.0.1:1") && error.contains("refused"), "{error}");
    }
}
