//! What a prefill node's cache tells those who watch it.

use crate::board::{CacheShown, ReusedTokens, Shown};
use crate::status::single;
use serde_json::{Value, json};
use tandem_kv_store::{Latency, PoolCounts, StoreStats, TierStats};
use tandem_process::exposition::{head, sample};

/// Where KV was that was not computed, and how many tokens.
fn reused(shown: &Shown) -> [(&'static str, u64); 4] {
    let ReusedTokens { pages, host, disk, remote } = shown.reused;
    [("pages", pages), ("host", host), ("disk", disk), ("remote", remote)]
}

/// Chunks that are no longer in the host pool, by the reason.
fn gone(store: &StoreStats) -> [(&'static str, u64); 4] {
    let PoolCounts { evicted, evicted_by_quota, expired, removed } = store.pool;
    [("room", evicted), ("quota", evicted_by_quota), ("ttl", expired), ("removed", removed)]
}

/// Chunks that were not saved, by the reason.
fn dropped(cache: &CacheShown) -> [(&'static str, u64); 5] {
    let store = &cache.store;
    [
        ("queue_full", cache.dropped_queue),
        ("pages_needed", cache.dropped_pages),
        ("store_full", store.refused_full),
        ("quota", store.refused_quota),
        ("kernels", cache.failed),
    ]
}

fn time(latency: &Latency) -> Value {
    json!({"count": latency.count, "total_us": latency.total_us, "max_us": latency.max_us})
}

fn map(counts: &[(&'static str, u64)]) -> Value {
    counts.iter().map(|(name, count)| ((*name).to_owned(), Value::from(*count))).collect()
}

pub(crate) fn json(shown: &Shown) -> Value {
    let mut cache = json!({"reused_tokens": map(&reused(shown))});
    let Some(shown) = &shown.cache else { return cache };
    let store = &shown.store;
    cache["hits"] = store.hits.into();
    cache["misses"] = store.misses.into();
    cache["damaged"] = store.damaged.into();
    cache["host"] = json!({
        "chunks": store.host.chunks, "bytes": store.host.bytes, "budget_bytes": store.host.budget,
        "stored": store.stored, "gone": map(&gone(store)), "not_saved": map(&dropped(shown)),
        "load_time": time(&shown.load_time), "save_time": time(&shown.save_time),
    });
    cache["waiting_prompts"] = shown.waiting.into();
    cache["loading_prompts"] = shown.loading.into();
    cache["saving_chunks"] = shown.saving.into();
    cache["tiers"] = store.tiers.iter().map(tier_json).collect();
    cache
}

fn tier_json(tier: &TierStats) -> Value {
    json!({
        "name": tier.name, "chunks": tier.usage.chunks, "bytes": tier.usage.bytes,
        "budget_bytes": tier.usage.budget, "hits": tier.hits, "loaded": tier.loaded,
        "loaded_bytes": tier.loaded_bytes, "load_failed": tier.load_failed, "damaged": tier.damaged,
        "find_failed": tier.find_failed, "stored": tier.stored, "stored_bytes": tier.stored_bytes,
        "store_failed": tier.store_failed, "dropped": tier.dropped, "queued": tier.queued,
        "evicted": tier.usage.evicted, "expired": tier.usage.expired,
        "load_time": time(&tier.load_time), "store_time": time(&tier.store_time),
    })
}

/// Samples of one metric: each has a label of this name.
fn by(out: &mut String, (name, kind, help): (&str, &str, &str), label: &str, counts: &[(&'static str, u64)]) {
    let name = format!("tandem_node_cache_{name}");
    head(out, &name, kind, help);
    for (value, count) in counts {
        sample(out, &name, &[(label, value)], count);
    }
}

pub(crate) fn exposition(out: &mut String, shown: &Shown) {
    let tokens = ("reused_tokens_total", "counter", "Tokens of prompts that were not computed.");
    by(out, tokens, "tier", &reused(shown));
    let Some(cache) = &shown.cache else { return };
    let store = &cache.store;
    for (name, kind, help, value) in [
        ("lookup_hits_total", "counter", "Chunks that prompts found in the store.", store.hits),
        ("lookup_misses_total", "counter", "Chunks that prompts did not find in the store.", store.misses),
        ("damaged_total", "counter", "Stored chunks whose bytes were not those stored.", store.damaged),
        ("saved_total", "counter", "Chunks that were stored.", store.stored),
        ("saved_bytes_total", "counter", "Their bytes.", store.stored * cache.chunk_bytes),
        ("waiting_prompts", "gauge", "Prompts that wait for slower tiers.", cache.waiting as u64),
        ("loading_prompts", "gauge", "Prompts whose chunks go to pages.", cache.loading as u64),
        ("saving_chunks", "gauge", "Chunks that are being saved.", cache.saving as u64),
    ] {
        single(out, &format!("tandem_node_cache_{name}"), kind, help, value);
    }
    by(out, ("not_saved_total", "counter", "Chunks not saved."), "reason", &dropped(cache));
    by(out, ("gone_total", "counter", "Chunks that left host memory."), "reason", &gone(store));
    by_tier(out, cache);
    times(out, cache);
}

/// What each tier holds and has moved, host memory first.
fn by_tier(out: &mut String, cache: &CacheShown) {
    let store = &cache.store;
    type Read = fn(&TierStats) -> u64;
    // Host memory has no queue, and what it gives is counted by tokens.
    let metrics: [(&str, &str, &str, Option<u64>, Read); 12] = [
        ("chunks", "gauge", "Chunks that a tier holds.", Some(store.host.chunks), |t| t.usage.chunks),
        ("bytes", "gauge", "Bytes that they take.", Some(store.host.bytes), |t| t.usage.bytes),
        ("budget_bytes", "gauge", "Bytes that they may take.", Some(store.host.budget), |t| t.usage.budget),
        ("tier_hits_total", "counter", "Chunks that prompts found first from there.", None, |t| t.hits),
        ("tier_loaded_total", "counter", "Chunks that were brought from there.", None, |t| t.loaded),
        ("tier_loaded_bytes_total", "counter", "Their bytes.", None, |t| t.loaded_bytes),
        ("tier_load_failures_total", "counter", "Chunks that could not be brought.", None, |t| t.load_failed),
        ("tier_stored_total", "counter", "Chunks that were stored there.", None, |t| t.stored),
        ("tier_stored_bytes_total", "counter", "Their bytes.", None, |t| t.stored_bytes),
        ("tier_store_failures_total", "counter", "Chunks that could not be stored.", None, |t| {
            t.store_failed
        }),
        ("tier_dropped_total", "counter", "Chunks not stored there for want of room.", None, |t| t.dropped),
        ("tier_queued", "gauge", "Chunks that wait to be stored there.", None, |t| t.queued),
    ];
    for (name, kind, help, host, read) in metrics {
        let host = host.map(|value| ("host", value));
        let all: Vec<_> = host.into_iter().chain(store.tiers.iter().map(|t| (t.name, read(t)))).collect();
        if !all.is_empty() {
            by(out, (name, kind, help), "tier", &all);
        }
    }
}

/// How long chunks took, as sums and counts.
fn times(out: &mut String, cache: &CacheShown) {
    let tiers = &cache.store.tiers;
    let loads = tiers.iter().map(|tier| (tier.name, tier.load_time));
    let stores = tiers.iter().map(|tier| (tier.name, tier.store_time));
    let host = |latency| std::iter::once(("host", latency));
    for (name, help, all) in [
        ("load_seconds", "From a tier to where it is used.", host(cache.load_time).chain(loads).collect()),
        (
            "store_seconds",
            "Until a tier has a chunk.",
            host(cache.save_time).chain(stores).collect::<Vec<_>>(),
        ),
    ] {
        let name = format!("tandem_node_cache_{name}");
        head(out, &name, "summary", help);
        for (tier, latency) in &all {
            let seconds = latency.total_us as f64 / 1e6;
            sample(out, &format!("{name}_sum"), &[("tier", tier)], seconds);
            sample(out, &format!("{name}_count"), &[("tier", tier)], latency.count);
        }
    }
}
