//! The manual pages and completions that the package carries.

#[path = "../../examples/manual.rs"]
mod generator;

use std::process::Command;

use clap::CommandFactory;
use t3_dispatch::cli::Cli;
use tempfile::TempDir;

/// Hyphens are written in a way of their own in a manual page.
fn plain(page: &str) -> String {
    page.replace("\\-", "-")
}

#[test]
fn every_command_and_every_option_has_its_place() {
    let folder = TempDir::new().unwrap();
    generator::write(folder.path()).unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let completions = ["t3-dispatch.bash", "_t3-dispatch", "t3-dispatch.fish"].map(read);
    let overview = plain(&read("t3-dispatch.1"));
    let mut program = Cli::command();
    program.build();
    let mut options = 0;
    let commands = program.get_subcommands();
    for command in commands.filter(|command| command.get_name() != "help") {
        let name = command.get_name();
        assert!(
            overview.contains(&format!("t3-dispatch-{name}(1)")),
            "{name}"
        );
        let page = plain(&read(&format!("t3-dispatch-{name}.1")));
        assert!(
            page.contains(&command.get_about().unwrap().to_string()),
            "{name}"
        );
        for text in &completions {
            assert!(text.contains(name), "{name}");
        }
        for option in command.get_arguments() {
            let Some(long) = option.get_long() else {
                continue;
            };
            options += 1;
            assert!(page.contains(&format!("--{long}")), "{name} --{long}");
            for text in &completions[..2] {
                assert!(text.contains(&format!("--{long}")), "{name} --{long}");
            }
            assert!(
                completions[2].contains(&format!("-l {long}")),
                "{name} --{long}"
            );
        }
    }
    assert!(options >= 15, "{options}");
    // The shell that is everywhere here can read its own.
    let read = Command::new("bash")
        .arg("-n")
        .arg(folder.path().join("t3-dispatch.bash"))
        .status();
    assert!(read.unwrap().success());
}

/// What `t3-mint` says of its statuses and files stands in three places, for three kinds of readers.
#[test]
fn the_page_of_t3_mint_says_what_its_document_says() {
    let page = plain(include_str!("../../packaging/man/t3-mint.8"));
    let document = include_str!("../../docs/mint.md");
    let mut statuses = 0;
    for line in document.lines() {
        if let Some((status, _)) = line.strip_prefix("| ").and_then(|row| row.split_once(" |"))
            && status.bytes().all(|byte| byte.is_ascii_digit())
        {
            statuses += 1;
            assert!(page.contains(&format!(".B {status}\n")), "{status}");
        }
    }
    assert_eq!(statuses, 7);
    for word in [
        "/etc/t3-serve/dispatch.json",
        "/etc/ttyd-user-map",
        "/etc/t3-serve/mint.json",
        "allow_home_t3",
        "service_user",
    ] {
        assert!(page.contains(word) && document.contains(word), "{word}");
    }
}

/// The package takes its version from the one, and tells of it in the other.
#[test]
fn the_changelog_of_the_package_is_of_this_version() {
    let changelog = include_str!("../../packaging/debian/changelog");
    let newest = format!("t3-dispatch ({}-1) ", env!("CARGO_PKG_VERSION"));
    assert!(changelog.starts_with(&newest), "{newest}");
}
