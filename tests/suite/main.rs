//! The real binary over real sockets, one file a behaviour.

#[path = "../common/mod.rs"]
mod common;

mod admin;
mod browser;
mod commands;
mod gate;
mod identity;
mod machine;
mod manual;
mod mint;
mod operator;
mod pairing;
mod prober;
mod prober_settings;
mod probes;
mod proxying;
mod refusals;
mod restarts;
mod secrets;
mod sessions;
mod settings;
mod tables;
mod tunnels;
mod verdicts;
mod world;
