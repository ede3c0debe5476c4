//! The command line: what was typed, then what it means.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use log::Level;

use crate::check;
use crate::config::Settings;
use crate::explain::{self, Question};
use crate::probe::{self, Show, settings, view};
use crate::server::{self, Start};
use crate::stderr::Stderr;
use crate::table::Table;
use crate::upgrade;

/// Sends each signed-in person to their own `t3 serve` instance, and pairs the browser on the way.
#[derive(Debug, Parser)]
#[command(
    name = "t3-dispatch",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the dispatcher
    ///
    /// SIGHUP reads the dispatch table again. SIGUSR2 replaces the process, as `reload` does; SIGQUIT hands over to one
    /// that was started with --upgrade. SIGTERM waits for requests in flight, SIGINT does not. RUST_LOG sets the log level
    /// (default: info).
    Serve(Serve),
    /// Replace the running dispatcher by a new process, with the program and the settings as they are now
    ///
    /// No socket and no request is lost. The exit status is 0 once the new process has taken over. If it cannot start, the
    /// running one goes on as if nothing had been asked, and the exit status is 1.
    Reload(Reload),
    /// Tell whether everything is in place: settings, table, mint command, and every instance
    ///
    /// One line for each. The exit status is 0 only if all is well.
    Check(Check),
    /// Say whose fault drops were, with the evidence
    ///
    /// Reads the ledger, also with the dispatcher down. Without --at, a table of the drops; with it, the story of the one
    /// nearest to that time, and the sentence to send to the person who asked.
    Explain(Explain),
    /// Hold permanent legs to a dispatcher and tell which are down
    ///
    /// At a terminal there is a live view, otherwise only log lines; metrics are on probe.listen. SIGTERM, SIGINT and SIGHUP
    /// end it in good order, with exit status 0.
    Probe(Probe),
}

#[derive(Debug, Args)]
struct Serve {
    /// Settings file; without it the defaults hold
    #[arg(short, long, value_name = "FILE")]
    conf: Option<PathBuf>,
    /// Take over the listening sockets of a running process, which is then to get SIGQUIT
    #[arg(short, long)]
    upgrade: bool,
    /// Go to the background
    #[arg(short, long)]
    daemon: bool,
    /// Only test the settings and the table, then exit
    #[arg(short, long)]
    test: bool,
}

#[derive(Debug, Args)]
struct Reload {
    /// Settings file of the running dispatcher, which says where it is reached
    #[arg(short, long, value_name = "FILE")]
    conf: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Check {
    /// Settings file; without it the defaults hold
    #[arg(short, long, value_name = "FILE")]
    conf: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Pair this user for real: mint, exchange, cookie, session check
    #[arg(long, value_name = "USER")]
    pair: Option<String>,
}

#[derive(Debug, Args)]
struct Probe {
    /// Settings file of the prober
    #[arg(short, long, value_name = "FILE")]
    conf: PathBuf,
    /// Try each leg once and print the time of each step; the exit status is 0 only if all are up
    #[arg(long)]
    once: bool,
}

#[derive(Debug, Args)]
struct Explain {
    /// Whose drops; without it everybody's
    user: Option<String>,
    /// How far back to look, such as 1h; without it a day
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    since: Option<std::time::Duration>,
    /// Tell the story of the drop nearest to this time, such as 14:05 or 2026-01-02T14:05:30Z
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Settings file of the dispatcher, which names the ledger; without it the defaults hold
    #[arg(short, long, value_name = "FILE")]
    conf: Option<PathBuf>,
}

/// Runs the command line of this process and gives its exit status: 0 for success, 1 for a fault, 2 for a command that
/// cannot be read.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let view = matches!(&cli.command, Command::Probe(probe) if !probe.once) && view::is_wanted();
    start_log(view && std::io::stderr().is_terminal());
    match cli.command {
        Command::Serve(serve) => {
            let start = Start {
                upgrade: serve.upgrade,
                daemon: serve.daemon,
                test: serve.test,
            };
            let file = serve.conf.as_deref();
            report(
                Settings::load(file)
                    .map_err(|error| error.to_string())
                    .and_then(|settings| {
                        server::serve(settings, file, start).map_err(|error| error.to_string())
                    }),
            )
        }
        Command::Reload(reload) => report(replace(reload.conf.as_deref())),
        Command::Explain(explain) => {
            let question = Question {
                user: explain.user,
                since: explain.since,
                at: explain.at,
                json: explain.json,
            };
            let answer = explain::run(explain.conf.as_deref(), &question);
            report(answer.map_err(|error| error.to_string()).and_then(print))
        }
        Command::Check(check) => {
            let report = check::run(check.conf.as_deref(), check.pair.as_deref());
            if check.json {
                println!("{:#}", report.json());
            } else {
                report.print();
            }
            if report.all_well() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Command::Probe(Probe { conf, once }) => {
            let outcome = settings::Settings::load(&conf)
                .map_err(|error| error.to_string())
                .and_then(|settings| {
                    if once {
                        probe::once(settings).map_err(|error| error.to_string())
                    } else {
                        let show = if view { Show::View } else { Show::Log };
                        probe::run(settings, show)
                            .map(|()| true)
                            .map_err(|error| error.to_string())
                    }
                });
            match outcome {
                Ok(false) => ExitCode::FAILURE,
                outcome => report(outcome.map(|_| ())),
            }
        }
    }
}

/// Has the running process replaced. Settings or a table that a new one could not use are told without asking it.
fn replace(file: Option<&Path>) -> Result<(), String> {
    let settings = Settings::load(file).map_err(|error| error.to_string())?;
    let table = &settings.dispatch.table;
    Table::load(table, &Table::beside(settings.dispatch.own_ports()))
        .map_err(|error| format!("{}: {error}", table.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let pid = runtime.block_on(upgrade::ask(&settings.pingora.upgrade_sock))?;
    println!("process {pid} has taken over");
    Ok(())
}

/// Prints an answer. Whoever reads only its beginning has what they wanted.
fn print(answer: String) -> Result<(), String> {
    let mut out = anstream::stdout().lock();
    let written = out.write_all(answer.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(format!("cannot print: {error}"))
        }
        _ => Ok(()),
    }
}

fn report(outcome: Result<(), String>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("t3-dispatch: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Where a view has the terminal, log lines are handed to it.
fn start_log(to_view: bool) {
    let default =
        env_logger::Env::default().default_filter_or("info,pingora=warn,pingora_proxy=off");
    let way: Box<dyn io::Write + Send> = if to_view {
        Box::new(view::Above)
    } else {
        Box::new(Stderr::default())
    };
    env_logger::Builder::from_env(default)
        .target(env_logger::Target::Pipe(way))
        .format(|line, record| {
            // On their finer levels libraries write whole requests, cookies and tokens included, whatever RUST_LOG asks for.
            if !record.target().starts_with("t3_dispatch") && record.level() > Level::Info {
                return Ok(());
            }
            let (time, level) = (line.timestamp_millis(), record.level());
            writeln!(line, "{time} {level} {}", record.args())
        })
        .init();
}
