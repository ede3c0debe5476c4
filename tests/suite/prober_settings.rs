//! Settings files of the prober: a folder of good ones, a folder of bad ones, and the sample.

use std::path::{Path, PathBuf};

use crate::common::dispatcher::program;

fn try_settings(file: &Path) -> Result<(), String> {
    t3_dispatch::probe::settings::Settings::load(file)
        .map(|_| ())
        .map_err(|error| error.to_string())
}

fn folder(name: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/conf")
        .join(name);
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn good_settings_are_taken() {
    let files = folder("probe-valid");
    assert!(files.len() >= 2);
    for file in files {
        try_settings(&file).unwrap();
    }
}

#[test]
fn bad_settings_are_refused_with_all_their_faults_at_once() {
    let files = folder("probe-invalid");
    assert!(files.len() >= 5);
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let expected: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# fault: "))
            .collect();
        assert!(!expected.is_empty(), "{} expects nothing", file.display());
        // Through the program, once with each way to run.
        let mut saids = Vec::new();
        for once in [&["probe", "-c"][..], &["probe", "--once", "-c"]] {
            let output = program().args(once).arg(&file).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{}", file.display());
            saids.push(String::from_utf8(output.stderr).unwrap());
        }
        assert_eq!(saids[0], saids[1]);
        let said = &saids[0];
        for fault in &expected {
            assert!(
                said.contains(fault),
                "{}: lacks {fault:?} in\n{said}",
                file.display()
            );
        }
        let told = match expected.len() {
            1 => 1,
            _ => said.lines().filter(|line| line.starts_with("  ")).count(),
        };
        assert_eq!(told, expected.len(), "{}: {said}", file.display());
        assert!(!said.contains("secret"), "{said}");
    }
}

/// The sample names every key, and those that it sets have their defaults.
#[test]
fn the_sample_has_every_key_with_its_default() {
    let sample = include_str!("../../conf/t3-probe.yaml");
    let parse = |text: &str| t3_dispatch::probe::settings::Settings::parse(text).unwrap();
    let sampled = parse(sample);
    let default = parse("probe: {legs: [{name: a, kind: http, url: 'http://t3.example.com'}]}");
    assert_eq!(sampled.legs.len(), 3);
    assert_eq!(sampled.listen, default.listen);
    assert_eq!(
        (
            sampled.heartbeat,
            sampled.rtt_timeout,
            sampled.connect_timeout
        ),
        (
            default.heartbeat,
            default.rtt_timeout,
            default.connect_timeout
        )
    );
    assert_eq!(
        (sampled.reconnect, sampled.reconnect_max),
        (default.reconnect, default.reconnect_max)
    );
    assert!(sampled.token.is_none() && sampled.roots.is_empty());
    let source = include_str!("../../src/probe/settings.rs");
    let taken = source
        .split("section")
        .filter(|rest| rest.starts_with(".take") || rest.starts_with(".require"))
        .filter_map(|rest| rest.split('"').nth(1));
    let keys: Vec<&str> = taken.chain(["token", "token_file", "legs"]).collect();
    assert!(keys.len() >= 12, "{keys:?}");
    for key in keys {
        let there = [format!(" {key}:"), format!("({key}:"), format!(" {key} ")];
        assert!(
            there.iter().any(|text| sample.contains(text)),
            "the sample lacks {key}"
        );
    }
}
