//! Evidence about the way between a client and this service.

pub mod echo;
pub mod far;
pub mod host;
pub mod serve;
