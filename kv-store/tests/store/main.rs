//! The store over tiers that do whatever tiers may: thousands of seeds of random traffic, and what it promises one by
//! one.

mod chance;
mod directed;
mod fake;
mod traffic;
