//! The program `t3-dispatch`: everything it does is in the library, which is documented there.

use std::process::ExitCode;

/// The only one of the usual allocators that gives memory back after many WebSockets have ended, at no cost in CPU.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Read by jemalloc when the process starts: give freed pages back after a second, from a thread of its own; and look after each
/// 4 MiB, not after each 64 KiB, which is a request, for what a thread's cache has too much of. A reference to an array is one
/// pointer, which is what jemalloc reads.
#[allow(
    unsafe_code,
    reason = "jemalloc finds its options by the name of this symbol"
)]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &[u8; 89] =
    b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,tcache_gc_incr_bytes:4194304\0";

fn main() -> ExitCode {
    t3_dispatch::cli::main()
}
