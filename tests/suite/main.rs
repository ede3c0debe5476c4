//! The real binary over real sockets, one file a behaviour.

#[path = "../common/mod.rs"]
mod common;

mod admin;
mod browser;
mod commands;
mod identity;
mod pairing;
mod proxying;
mod refusals;
mod secrets;
mod sessions;
mod settings;
mod tables;
mod world;
