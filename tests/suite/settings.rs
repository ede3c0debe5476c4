//! Settings files: a folder of good ones and a folder of bad ones, each bad one with the faults it must be told.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::common::dispatcher::program;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/conf")
        .join(folder);
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

/// Tests the file together with an empty table.
fn try_settings(file: &Path) -> (bool, String) {
    let base = TempDir::new().unwrap();
    let table = base.path().join("dispatch.json");
    std::fs::write(&table, "{}").unwrap();
    let text = std::fs::read_to_string(file)
        .unwrap()
        .replace("TABLE", &table.display().to_string());
    let settings = base.path().join("settings.yaml");
    std::fs::write(&settings, text).unwrap();
    let output = program()
        .args(["serve", "-t", "-c"])
        .arg(&settings)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    if !output.status.success() {
        assert_eq!(output.status.code(), Some(1), "{}: {said}", file.display());
        assert!(said.contains(&settings.display().to_string()), "{said}");
    }
    (output.status.success(), said)
}

#[test]
fn good_settings_are_taken() {
    let files = files("valid");
    assert!(files.len() >= 4);
    for file in files {
        let (taken, said) = try_settings(&file);
        assert!(taken, "{}: {said}", file.display());
    }
}

#[test]
fn bad_settings_are_refused_with_all_their_faults_at_once() {
    let files = files("invalid");
    assert!(files.len() >= 10);
    for file in files {
        let (taken, said) = try_settings(&file);
        assert!(!taken, "{} was taken", file.display());
        let text = std::fs::read_to_string(&file).unwrap();
        let expected: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# fault: "))
            .collect();
        assert!(!expected.is_empty(), "{} expects nothing", file.display());
        for fault in &expected {
            assert!(
                said.contains(fault),
                "{}: lacks {fault:?} in\n{said}",
                file.display()
            );
        }
        // No more than these: a fault that is told twice or out of thin air is one too many.
        let told = if expected.len() == 1 {
            1
        } else {
            said.lines().filter(|line| line.starts_with("  ")).count()
        };
        assert_eq!(told, expected.len(), "{}: {said}", file.display());
    }
}

/// The sample names every key, with its default: taking any comment sign away changes nothing.
#[test]
fn the_sample_has_every_key_with_its_default() {
    let sample = include_str!("../../conf/t3-dispatch.yaml");
    let parse = |text: &str| t3_dispatch::config::Settings::parse(text).unwrap();
    let (sampled, default) = (parse(sample), parse(""));
    assert!(sampled.warnings.is_empty(), "{:?}", sampled.warnings);
    assert_eq!(sampled.dispatch, default.dispatch);
    assert_eq!(sampled.pingora.upgrade_sock, default.pingora.upgrade_sock);
    assert_eq!(sampled.pingora.pid_file, default.pingora.pid_file);
    let source = concat!(
        include_str!("../../src/config/mod.rs"),
        include_str!("../../src/config/jwt.rs")
    );
    let taken = source.replace("section.require", "section.take");
    let taken = taken
        .split("section.take")
        .skip(1)
        .filter_map(|rest| rest.split('"').nth(1));
    let keys: Vec<&str> = taken.collect();
    assert!(keys.len() >= 19, "{keys:?}");
    for key in keys {
        assert!(
            sample.contains(&format!("{key}:")),
            "the sample lacks {key}"
        );
    }
    let table = include_bytes!("../../conf/dispatch.json");
    let none = t3_dispatch::table::Table::default();
    assert_eq!(
        t3_dispatch::table::Table::parse(table, &none)
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn without_a_file_the_defaults_hold_and_a_missing_file_is_a_fault() {
    let settings = t3_dispatch::config::Settings::load(None).unwrap();
    assert_eq!(
        settings.pingora.threads,
        std::thread::available_parallelism().unwrap().get()
    );
    let output = program()
        .args(["serve", "-t", "-c", "/nonexistent/t3.yaml"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("/nonexistent/t3.yaml: cannot be read: No such file"),
        "{said}"
    );
}

#[test]
fn an_unknown_key_of_pingoras_is_told_and_ignored() {
    let base = TempDir::new().unwrap();
    let table = base.path().join("dispatch.json");
    std::fs::write(&table, "{}").unwrap();
    let file = base.path().join("settings.yaml");
    std::fs::write(
        &file,
        format!("thread: 2\ndispatch: {{table: {}}}\n", table.display()),
    )
    .unwrap();
    let output = program()
        .args(["serve", "-t", "-c"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("thread: is neither a key of Pingora's"),
        "{said}"
    );
}
