//! Stand-ins for the mint command: shell scripts, because a mint command is a process and its faults are a process's.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Where the stand-in of an OS user keeps its state.
pub fn home(base: &Path, os_user: &str) -> PathBuf {
    base.join("instances").join(os_user)
}

/// A mint command that works. It leaves a line `start OS_USER` and a line `end OS_USER` in `BASE/mints`.
pub fn working(base: &Path) -> Vec<String> {
    script(
        base,
        "mint",
        &format!("{}\n{}\n{}", NOTE_START, MINT, NOTE_END),
    )
}

/// A mint command that works and takes `seconds` for it.
pub fn slow(base: &Path, seconds: f32) -> Vec<String> {
    script(
        base,
        "mint-slow",
        &format!("{NOTE_START}\nsleep {seconds}\n{MINT}\n{NOTE_END}"),
    )
}

/// A mint command that does what `body` says; `$base` and `$user` are set.
pub fn script(base: &Path, name: &str, body: &str) -> Vec<String> {
    std::fs::create_dir_all(base).unwrap();
    let path = base.join(name);
    let text = format!("#!/bin/sh\nbase='{}'\nuser=$1\n{body}\n", base.display());
    // Written under another name first: a process forked meanwhile would hold it open, and exec would fail.
    let written = base.join(format!("{name}.new"));
    std::fs::write(&written, text).unwrap();
    std::fs::set_permissions(&written, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&written, &path).unwrap();
    vec!["/bin/sh".into(), path.display().to_string()]
}

const NOTE_START: &str = "echo \"start $user\" >> \"$base/mints\"";
const NOTE_END: &str = "echo \"end $user\" >> \"$base/mints\"";

/// Makes a credential that the user's stand-in takes once, and prints it as a real one does, over several lines.
pub const MINT: &str = r#"credential=$(od -An -N6 -tx1 /dev/urandom | tr -d ' \n')
mkdir -p "$base/instances/$user/credentials"
: > "$base/instances/$user/credentials/$credential"
printf '{\n  "id": "b0e1",\n  "credential": "%s",\n  "scopes": ["all"],\n  "expiresAt": "2026-11-21T00:00:00.000Z"\n}\n' "$credential""#;

/// The mint commands that have run, as the lines of `BASE/mints`.
pub fn notes(base: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(base.join("mints")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// How many mint commands have begun for `os_user`.
pub fn count(base: &Path, os_user: &str) -> usize {
    notes(base)
        .iter()
        .filter(|line| **line == format!("start {os_user}"))
        .count()
}
