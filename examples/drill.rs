//! Breaks every segment in every way and prints which verdicts that gave: `cargo run --release --example drill`.
//!
//! Words after `--` choose drills by their names, for example `-- Edge idle`.

use std::process::ExitCode;

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/drills/drills.rs"]
mod drills;

use drills::{Drill, Matrix};

/// Laboratories that run at once: they wait most of the time.
const AT_ONCE: usize = 6;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    // The dispatcher and the prober are this very program again.
    if matches!(
        words.first().map(String::as_str),
        Some("serve" | "probe" | "reload")
    ) {
        return t3_dispatch::cli::main();
    }
    let mut chosen = Drill::all();
    chosen.retain(|drill| {
        let name = drill.to_string();
        words.iter().all(|word| name.contains(word))
    });
    println!("{} drills", chosen.len());
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let matrix = runtime.block_on(Matrix::of(chosen, AT_ONCE, |drill| {
        println!("done: {drill}")
    }));
    println!("\n{matrix}");
    if matrix.failed().is_empty()
        && matrix.false_convictions().is_empty()
        && matrix.right() * 100 >= matrix.drops() * 98
    {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
