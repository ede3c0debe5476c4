//! Every segment, broken in every way: the verdict on each WebSocket that dropped has to name it.

#[path = "../common/mod.rs"]
mod common;
mod drills;

use drills::{Drill, Matrix};

/// Laboratories that run at once: they wait most of the time.
const AT_ONCE: usize = 10;

#[tokio::test(flavor = "multi_thread")]
async fn every_drop_is_given_the_segment_that_was_broken() {
    let drills = Drill::all();
    let matrix = Matrix::of(drills, AT_ONCE, |_| {}).await;
    eprintln!("{matrix}");
    assert_eq!(matrix.failed(), Vec::<String>::new());
    assert!(matrix.drops() >= 200, "{matrix}");
    assert_eq!(matrix.false_convictions(), Vec::<String>::new());
    assert!(matrix.right() * 100 >= matrix.drops() * 98, "{matrix}");
}
