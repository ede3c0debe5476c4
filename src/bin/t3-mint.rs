//! `t3-mint OS_USER` mints a pairing credential as that OS user, whose `t3` prints it. It is the only thing here that
//! runs as root: by sudo for the service user, or as `t3-mint --socket` with a connection to that user on 0 and 1, on
//! which a line with the OS user comes in, and what `t3` prints goes out, then a last line `exit STATUS`.
//!
//! The exit status is that of `t3`, or 128 and the number of the signal that ended it, or, with the reason on standard
//! error and in syslog: 2, not one OS user; 3, not a mapped one, or root, or without a home; 4, a file that is not
//! root's alone, or none; 5, not the service user on the socket; 124, not done in 10 s; 126, not root, or cannot become
//! the user; 127, no `t3`.
#![warn(missing_docs)]
#![deny(clippy::undocumented_unsafe_blocks)]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_ulong};
use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::os::unix::{fs::*, net::UnixDatagram, process::*};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const SETTINGS: &str = "/etc/t3-serve/mint.json";
const LIMIT: Duration = Duration::from_secs(10);

/// What the C library knows of a user: name and password, uid, gid, comment and home, and more.
#[repr(C)]
struct Passwd([*const c_char; 2], u32, u32, [*const c_char; 2]);

// The C library is linked anyway, and it alone knows the users that do not stand in /etc/passwd.
unsafe extern "C" {
    safe fn alarm(seconds: c_uint) -> c_uint;
    safe fn getuid() -> u32;
    safe fn kill(pid: c_int, signal: c_int) -> c_int;
    safe fn setsid() -> c_int;
    safe fn setgid(gid: u32) -> c_int;
    safe fn setuid(uid: u32) -> c_int;
    safe fn sigprocmask(how: c_int, set: &[u64; 16], old: Option<&mut [u64; 16]>) -> c_int;
    safe fn umask(mask: c_uint) -> c_uint;
    safe fn waitpid(pid: c_int, status: &mut c_int, options: c_int) -> c_int;
    fn getpwnam(name: *const c_char) -> *const Passwd;
    fn getresgid(real: *mut u32, effective: *mut u32, saved: *mut u32) -> c_int;
    fn getresuid(real: *mut u32, effective: *mut u32, saved: *mut u32) -> c_int;
    fn getsockopt(fd: c_int, level: c_int, name: c_int, value: *mut u32, size: *mut u32) -> c_int;
    fn initgroups(user: *const c_char, gid: u32) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn syscall(number: c_long, ...) -> c_long;
}

/// An exit status, and why.
type Refusal = (u8, String);

macro_rules! refuse {
    ($status:expr, $($why:tt)*) => { return Err(($status, format!($($why)*))) };
}

fn main() -> ExitCode {
    // The last resort where the limit does not reach: a user database on the network, a process that cannot die.
    alarm(20);
    umask(0o077);
    // Nothing that the caller ignores or blocks stays so, or children could not be waited for. SIGPIPE (13) is Rust's.
    for number in (1..=64).filter(|number| *number != 13) {
        // SAFETY: 0 is SIG_DFL; no handler of ours comes into play.
        unsafe { signal(number, 0) };
    }
    sigprocmask(2 /* SIG_SETMASK */, &[0; 16], None);
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

/// Reads the OS user that the service user, and nobody else, asks for on the socket.
fn request() -> Result<String, Refusal> {
    let (mut peer, mut size) = ([0, u32::MAX, u32::MAX], 12);
    // SAFETY: SO_PEERCRED (17 of SOL_SOCKET, 1) writes three numbers of 32 bits at most: pid, uid, gid.
    let told = unsafe { getsockopt(0, 1, 17, peer.as_mut_ptr(), &mut size) } == 0;
    let settings = json(SETTINGS)?;
    let service = settings["service_user"].as_str().unwrap_or("t3-dispatch");
    if !told || account(service).is_none_or(|(_, uid, ..)| uid != peer[1]) {
        refuse!(5, "uid {} on the socket is not {service}", peer[1]);
    }
    let mut line = String::new();
    // A line that is cut short, or too long for a name, is no name.
    let _ = io::stdin().lock().take(34).read_line(&mut line);
    Ok(line.strip_suffix('\n').unwrap_or_default().to_owned())
}

/// The text of a file that only root can have written; `None` where there is none.
fn read(path: &str) -> Result<Option<String>, Refusal> {
    // O_NONBLOCK: not to wait at a FIFO.
    let opened = File::options().read(true).custom_flags(0o4000).open(path);
    let file = match opened {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => refuse!(4, "{path}: {error}"),
        Ok(file) => file,
    };
    let good = |meta: Metadata| meta.is_file() && roots_alone(meta);
    if !file.metadata().is_ok_and(good) || !vouched(Path::new(path)) {
        refuse!(4, "{path} or a folder on its way is not root's alone");
    }
    let text = io::read_to_string(file).map(Some);
    text.or_else(|error| refuse!(4, "{path}: {error}"))
}

fn roots_alone(meta: Metadata) -> bool {
    meta.uid() == 0 && meta.mode() & 0o002 == 0 && (meta.mode() & 0o020 == 0 || meta.gid() == 0)
}

/// Whether only root can put another file there: every folder on the way, also to where symbolic links point, is root's.
fn vouched(path: &Path) -> bool {
    let target = |link| vouched(&path.with_file_name::<std::path::PathBuf>(link));
    let here = || path.symlink_metadata().is_ok_and(roots_alone);
    path.parent().is_none_or(vouched) && path.read_link().map_or_else(|_| here(), target)
}

fn json(path: &str) -> Result<Value, Refusal> {
    let text = read(path)?.unwrap_or_else(|| "null".into());
    serde_json::from_str(&text).map_err(|error| (4, format!("{path}: {error}")))
}

/// The name, uid, gid and home of a user.
fn account(name: &str) -> Option<(CString, u32, u32, String)> {
    let name = CString::new(name).ok()?;
    // SAFETY: there is one thread, and what the record points to is copied before anybody asks for the next.
    unsafe {
        let Passwd(_, uid, gid, [_, home]) = getpwnam(name.as_ptr()).as_ref()?;
        let home = CStr::from_ptr(*home).to_str().ok()?.to_owned();
        Some((name, *uid, *gid, home))
    }
}

fn mint(user: String) -> Result<u8, Refusal> {
    let start = Instant::now();
    // ^[a-z_][a-z0-9_-]{0,31}$
    let begins = user.starts_with(|sign: char| matches!(sign, 'a'..='z' | '_'));
    let fits = |sign| matches!(sign, 'a'..='z' | '_' | '0'..='9' | '-');
    if !begins || user.len() > 32 || !user.chars().all(fits) {
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
    let Some((name, uid @ 1.., gid, home)) = account(&user) else {
        refuse!(3, "os_user={user} does not exist, or is root");
    };
    if !home.starts_with('/') || home == "/" || !Path::new(&home).is_dir() {
        refuse!(3, "os_user={user} has no home");
    }
    let own = format!("{home}/.local/bin/t3");
    let own_allowed = json(SETTINGS)?["allow_home_t3"] == true;
    let t3 = match ["/usr/bin/t3", "/usr/local/bin/t3"] {
        [first, _] if Path::new(first).is_file() => first,
        [_, second] if Path::new(second).is_file() => second,
        _ if own_allowed && Path::new(&own).is_file() => &own,
        _ => refuse!(127, "os_user={user} no t3 where it may be"),
    };
    log(&format!("minting os_user={user} uid={uid} t3={t3}"));
    let mut command = Command::new(t3);
    let base = format!("{home}/.t3");
    command.args(["auth", "pairing", "create", "--base-dir", &base]);
    command.args(["--ttl", "5m", "--json"]).stdin(Stdio::null());
    let path = ("PATH", "/usr/local/bin:/usr/bin:/bin");
    command.env_clear().envs([path, ("LANG", "C.UTF-8")]);
    command.envs([("HOME", &home), ("USER", &user)]);
    // SAFETY: there is one thread, so the fork leaves nothing locked. PR_SET_CHILD_SUBREAPER: orphans come to this process.
    unsafe {
        prctl(36, 1 as c_ulong);
        command.pre_exec(move || become_user(&name, uid, gid, &home));
    }
    let (leader, mut ended) = match command.spawn() {
        Ok(child) => (child.id() as c_int, None),
        Err(error) => refuse!(126, "os_user={user} {t3}: {error}"),
    };
    // Until no descendant is left, whatever session it is in. Nobody else waits for them, so none of the numbers is stale.
    loop {
        let (mut status, waiting) = (0, ended.is_none() && start.elapsed() < LIMIT);
        match waitpid(-1, &mut status, 1 /* WNOHANG */) {
            -1 => break,
            pid if waiting && pid == leader => ended = Some(ExitStatus::from_raw(status)),
            _ if waiting => {}
            _ => {
                let left = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
                for pid in left.split_whitespace().flat_map(str::parse) {
                    kill(pid, 9);
                }
            }
        }
        std::thread::sleep(Duration::from_millis(2));
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
    let [no, yes, three, four, nine]: [c_ulong; 5] = [0, 1, 3, 4, 9];
    let (mut uids, mut gids) = ([0; 3], [0; 3]);
    let ([r, e, s], [rg, eg, sg]) = (&mut uids, &mut gids);
    alarm(20);
    // SAFETY: names end with 0, each ID has a place of its own, and the rest are numbers: PR_SET_PDEATHSIG,
    // PR_SET_NO_NEW_PRIVS, and close_range of all but 0 to 2 on exec.
    let became = unsafe {
        setsid() != -1
            && initgroups(name.as_ptr(), gid) == 0
            && setgid(gid) == 0
            && setuid(uid) == 0
            && getresuid(r, e, s) == 0
            && getresgid(rg, eg, sg) == 0
            && prctl(1, nine) == 0
            && prctl(38, yes, no, no, no) == 0
            && syscall(436, three, c_uint::MAX, four) == 0
    };
    if !became || uids != [uid; 3] || gids != [gid; 3] || setuid(0) != -1 {
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
