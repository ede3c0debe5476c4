//! Writes the manual pages and the completions of shells, as the command line itself has them, into a folder:
//!
//! ```sh
//! cargo run --example manual -- target/manual
//! ```

use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use t3_dispatch::cli::Cli;

#[allow(dead_code, reason = "the tests take what is below")]
fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "name the folder to write to as the one argument",
        )
    })?;
    write(Path::new(&folder))
}

/// Writes all of it: a page for the program and one for each of its commands, then the completions.
pub fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    // `help` would get a page for each command that it can explain. None of them says anything.
    let command = Cli::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, folder)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "t3-dispatch", folder)?;
    }
    Ok(())
}
