//! The small corpora that fuzzing has left, through the properties that it asserted.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[path = "../../fuzz/properties.rs"]
mod properties;

fn folder(path: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(path);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn what_the_fuzzer_has_found_holds() {
    let mut broken = Vec::new();
    for (target, property) in properties::TARGETS {
        let files = folder(&format!("corpus/{target}"));
        assert!(!files.is_empty(), "{target} has no corpus");
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            if std::panic::catch_unwind(|| property(&bytes)).is_err() {
                broken.push(file);
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_target_is_replayed() {
    let names = |files: Vec<PathBuf>| -> BTreeSet<String> {
        let stem = |file: PathBuf| file.file_stem().unwrap().to_str().unwrap().to_owned();
        files.into_iter().map(stem).collect()
    };
    let replayed = properties::TARGETS.map(|(target, _)| target.to_owned());
    let replayed = BTreeSet::from(replayed);
    assert_eq!(names(folder("fuzz_targets")), replayed);
    assert_eq!(names(folder("corpus")), replayed);
}
