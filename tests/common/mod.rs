//! What the tests and the demo share: the stand-in instance and edge, the dispatcher as a process, a raw HTTP client.
#![allow(dead_code, unused_imports, reason = "each user takes a part")]

pub mod dispatcher;
pub mod edge;
pub mod frames;
pub mod http;
pub mod instance;
pub mod lab;
pub mod mint;
pub mod prober;
pub mod raw;
pub mod signer;
pub mod successor;
pub mod witness;
