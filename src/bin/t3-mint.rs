//! `t3-mint OS_USER` mints a pairing credential as that OS user, whose `t3` prints it: the only thing here that runs as
//! root. `t3-mint --socket` is asked by the service user over the connection on 0 and 1. The rest is in docs/mint.md.
#![deny(clippy::undocumented_unsafe_blocks)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong};
use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::os::unix::{fs::*, net::UnixDatagram, process::*};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const SETTINGS: &str = "/etc/t3-serve/mint.json";
const LIMIT: Duration = Duration::from_secs(10);

unsafe extern "C" {
    safe fn alarm(seconds: c_uint) -> c_uint;
    safe fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int;
    safe fn getuid() -> u32;
    safe fn kill(pid: c_int, signal: c_int) -> c_int;
    safe fn setsid() -> c_int;
    safe fn setgid(gid: u32) -> c_int;
    safe fn setuid(uid: u32) -> c_int;
    fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int;
    safe fn signal(signal: c_int, handler: Option<extern "C" fn(c_int)>) -> usize;
    safe fn umask(mask: c_uint) -> c_uint;
    safe fn waitpid(pid: c_int, status: &mut c_int, options: c_int) -> c_int;
    fn getsockopt(fd: c_int, level: c_int, name: c_int, value: *mut u32, size: *mut u32) -> c_int;
    fn initgroups(user: *const c_char, gid: u32) -> c_int;
}

/// Gives up, with an exit status, and why.
macro_rules! refuse {
    ($status:expr, $($why:tt)*) => { return Err(($status, format!($($why)*))) };
}

fn main() -> ExitCode {
    // The last resort where the limit does not reach: a user database on the network, a process that cannot die.
    alarm(20);
    umask(0o077);
    // Nothing that the caller ignores stays so, or children could not be waited for. SIGPIPE (13) is Rust's.
    for number in (1..=64).filter(|number| *number != 13) {
        signal(number, None);
    }
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let socket = arguments == ["--socket"];
    let asked = match &arguments[..] {
        _ if getuid() != 0 => Err((126, "is for root, by sudo or its socket".into())),
        [_] if socket => request(),
        [user] => Ok(user.to_string_lossy().into_owned()),
        _ => Err((2, "usage: t3-mint OS_USER".into())),
    };
    let status = asked.and_then(mint).unwrap_or_else(|(status, why)| {
        log(&format!("refused exit={status} {why}"));
        let _ = writeln!(io::stderr(), "t3-mint: {why}");
        status
    });
    if socket {
        let _ = write!(io::stdout(), "\nexit {status}\n");
    }
    ExitCode::from(status)
}

/// Reads the OS user that the service user, and nobody else, asks for on the socket. A line that is cut short is none.
fn request() -> Result<String, (u8, String)> {
    let (mut peer, mut size) = ([0, u32::MAX, u32::MAX], 12);
    // SAFETY: SO_PEERCRED (17 of SOL_SOCKET, 1) writes three numbers of 32 bits at most: pid, uid, gid.
    let told = unsafe { getsockopt(0, 1, 17, peer.as_mut_ptr(), &mut size) } == 0;
    let settings = json(SETTINGS)?;
    let service = settings["service_user"].as_str().unwrap_or("t3-dispatch");
    if !told || account(service).is_none_or(|(uid, ..)| uid != peer[1]) {
        refuse!(5, "uid {} on the socket is not {service}", peer[1]);
    }
    let mut line = String::new();
    let _ = io::stdin().lock().take(34).read_line(&mut line);
    Ok(line.strip_suffix('\n').unwrap_or_default().to_owned())
}

/// The text of a file that only root can have written; `None` where there is none.
fn read(path: &str) -> Result<Option<String>, (u8, String)> {
    let good = |meta: Metadata| meta.is_file() && meta.uid() == 0 && meta.mode() & 0o022 == 0;
    // O_NONBLOCK, for FIFOs.
    match File::options().read(true).custom_flags(0o4000).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Ok(file) if !file.metadata().is_ok_and(good) => refuse!(4, "{path} is not root's alone"),
        opened => match opened.and_then(io::read_to_string) {
            Ok(text) => Ok(Some(text)),
            Err(error) => refuse!(4, "{path}: {error}"),
        },
    }
}

fn json(path: &str) -> Result<serde_json::Value, (u8, String)> {
    let text = read(path)?.unwrap_or_else(|| "null".into());
    serde_json::from_str(&text).map_err(|error| (4, format!("{path}: {error}")))
}

/// The uid, gid and home of a user, wherever the system knows its users from.
fn account(name: &str) -> Option<(u32, u32, String)> {
    let mut getent = Command::new("/usr/bin/getent");
    let told = getent.args(["passwd", name]).env_clear().output().ok()?;
    let line = String::from_utf8(told.stdout).ok()?;
    let fields: Vec<_> = line.trim_end().split(':').collect();
    let (uid, gid) = (fields.get(2)?.parse(), fields.get(3)?.parse());
    Some((uid.ok()?, gid.ok()?, fields.get(5)?.to_string()))
}

fn mint(user: String) -> Result<u8, (u8, String)> {
    let start = Instant::now();
    // ^[a-z_][a-z0-9_-]{0,31}$
    let fits = |sign| matches!(sign, 'a'..='z' | '_' | '0'..='9' | '-');
    let begins = !user.starts_with(|sign: char| sign == '-' || sign.is_ascii_digit());
    if !(1..=32).contains(&user.len()) || !begins || !user.chars().all(fits) {
        refuse!(2, "not the name of an OS user");
    }
    let table = json("/etc/t3-serve/dispatch.json")?;
    let map = match read("/etc/ttyd-user-map")? {
        None if table.is_null() => refuse!(4, "there is no file that says who is mapped"),
        map => map.unwrap_or_default(),
    };
    let mut lines = map.lines().flat_map(|line| line.split_once('='));
    let named = |name: &str| !name.is_empty() && !name.starts_with('#');
    let in_map = lines.any(|(name, os_user)| named(name.trim()) && os_user.trim() == user);
    let mut entries = table.as_object().into_iter().flatten();
    if !in_map && !entries.any(|(_, entry)| entry["os_user"] == user) {
        refuse!(3, "os_user={user} is mapped to nobody");
    }
    let is_home = |home: &str| home.len() > 1 && home.starts_with('/') && Path::new(home).is_dir();
    let Some((uid @ 1.., gid, home)) = account(&user).filter(|(.., home)| is_home(home)) else {
        refuse!(3, "os_user={user} does not exist, is root, or has no home");
    };
    let own = format!("{home}/.local/bin/t3");
    let places = ["/usr/bin/t3", "/usr/local/bin/t3", &own];
    let allowed = 2 + usize::from(json(SETTINGS)?["allow_home_t3"] == true);
    let Some(t3) = places[..allowed].iter().find(|t3| Path::new(t3).is_file()) else {
        refuse!(127, "os_user={user} no t3 where it may be");
    };
    log(&format!("minting os_user={user} uid={uid} t3={t3}"));
    let mut command = Command::new(t3);
    let words = ["auth", "pairing", "create", "--base-dir"];
    command.args(words).arg(format!("{home}/.t3"));
    command.args(["--ttl", "5m", "--json"]).stdin(Stdio::null());
    command.env_clear().env("LANG", "C.UTF-8");
    command.env("PATH", "/usr/local/bin:/usr/bin:/bin");
    command.envs([("HOME", &home), ("USER", &user)]);
    let name = CString::new(&*user).unwrap_or_default();
    // SAFETY: there is one thread, so the fork leaves nothing locked. PR_SET_CHILD_SUBREAPER: orphans come to this process.
    unsafe {
        prctl(36, 1, 0, 0, 0);
        command.pre_exec(move || become_user(&name, uid, gid, &home));
    }
    let spawned = command.spawn();
    let mut child = spawned.or_else(|error| refuse!(126, "os_user={user} {t3}: {error}"))?;
    let mut ended = None;
    while ended.is_none() && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(2));
        ended = child.try_wait().unwrap_or_default();
    }
    // What it has left behind ends with it, in whatever session that is.
    let children = || fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    while let Some(Ok(pid)) = children().split_whitespace().next().map(str::parse) {
        kill(pid, 9);
        waitpid(pid, &mut 0, 0);
    }
    let Some(ended) = ended else {
        refuse!(124, "os_user={user} took more than {LIMIT:?}");
    };
    let status = ended.code().unwrap_or(128 + ended.signal().unwrap_or(0)) as u8;
    log(&format!("minted os_user={user} exit={status}"));
    Ok(status)
}

/// Makes the process, which is about to run `t3`, the user's and nobody else's.
fn become_user(name: &CStr, uid: u32, gid: u32, home: &str) -> io::Result<()> {
    // SAFETY: the name ends with 0 and the rest are numbers: PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, CLOSE_RANGE_CLOEXEC.
    let became = unsafe {
        setsid() != -1
            && initgroups(name.as_ptr(), gid) == 0
            && setgid(gid) == 0
            && setuid(uid) == 0
            && prctl(1, 9, 0, 0, 0) == 0
            && prctl(38, 1, 0, 0, 0) == 0
            && close_range(3, c_uint::MAX, 4) == 0
            && setuid(0) == -1
    };
    if !became {
        return Err(io::Error::last_os_error());
    }
    std::env::set_current_dir(home).or_else(|_| std::env::set_current_dir("/"))
}

/// Writes to syslog, as authpriv.notice. A log that is absent or full holds nobody up.
fn log(text: &str) {
    let line = format!("<85>t3-mint[{}]: {text}", std::process::id());
    let _ = UnixDatagram::unbound().and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.send_to(line.as_bytes(), "/dev/log")
    });
}
