//! Histories of concurrent calls under a scheduler: random ones, races, and every request's answer lost.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]

#[path = "histories/found.rs"]
mod found;
#[path = "histories/judged.rs"]
mod judged;
#[path = "histories/late.rs"]
mod late;
#[path = "histories/lost.rs"]
mod lost;
#[path = "histories/paced.rs"]
mod paced;
#[path = "histories/races.rs"]
mod races;
#[path = "histories/random.rs"]
mod random;
#[path = "histories/sole.rs"]
mod sole;
