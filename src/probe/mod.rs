//! Evidence about the way between a client and this service.

pub mod echo;
