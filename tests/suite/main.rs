//! The real binary over real sockets, one file a behaviour.

#[path = "../common/mod.rs"]
mod common;

mod admin;
mod browser;
mod commands;
mod downstream;
mod fuzz_corpora;
mod gate;
mod identity;
mod isolation;
mod log;
mod machine;
mod manual;
mod mint;
mod operator;
mod pairing;
mod pool;
mod prober;
mod prober_settings;
mod probes;
mod proxying;
mod refusals;
mod restarts;
mod secrets;
mod sessions;
mod settings;
mod smuggling;
mod tables;
mod tokens;
mod tunnels;
mod verdicts;
mod world;
