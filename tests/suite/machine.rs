//! A machine to be root on: mount namespaces in which `/etc`, `/usr/bin/t3*`, `/usr/local/bin`, `/run` and `/dev/log` are
//! a test's own. Nothing outside of them changes.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;

use tempfile::TempDir;

pub const ALICE: u32 = 61001;
pub const SERVICE: u32 = 61500;

/// Run by a shell in a new mount namespace; `$B` is the machine's folder.
const ENTER: &str = r#"set -e
export PATH="$B/programs:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
mount --bind "$B/etc" /etc
mount -t tmpfs -o mode=755 none "$B/dev"
for name in null zero full random urandom; do
  : > "$B/dev/$name"
  mount --bind "/dev/$name" "$B/dev/$name"
done
ln -s /proc/self/fd "$B/dev/fd"
ln -s "$B/log" "$B/dev/log"
mount --rbind "$B/dev" /dev
mount --bind /usr/bin "$B/programs"
mount -t tmpfs -o mode=755 none /usr/bin
hash -r
ln -s "$B"/programs/* /usr/bin/
[ ! -e "$B/t3" ] || ln -sf "$B/t3" /usr/bin/t3
ln -sf "$B/t3-mint" /usr/bin/t3-mint
rm -f /usr/bin/t3-dispatch
: > /usr/bin/t3-dispatch
mount --bind "$DISPATCH" /usr/bin/t3-dispatch
mount --bind "$B/local" /usr/local/bin
mount -t tmpfs -o mode=755 none /run
exec env -u B -u DISPATCH PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$@""#;

/// Whatever `t3-mint` sees of the machine. Each run has a namespace of its own over the same files.
pub struct Machine {
    base: TempDir,
    log: UnixDatagram,
    /// What came in at it. It is emptied after each run, or sudo would wait for ever to tell what it did.
    lines: Mutex<Vec<String>>,
}

impl Machine {
    /// A machine with alice and bob, who are mapped, a service user, and no `t3`.
    pub fn new() -> Machine {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test has to run as root: it mounts files of its own over /etc in a namespace of its own"
        );
        let base = TempDir::new().unwrap();
        open(base.path());
        let log = UnixDatagram::bind(base.path().join("log")).unwrap();
        log.set_nonblocking(true).unwrap();
        let machine = Machine {
            base,
            log,
            lines: Mutex::default(),
        };
        for folder in [
            "dev",
            "programs",
            "local",
            "home",
            "etc/t3-serve",
            "etc/sudoers.d",
            "etc/pam.d",
        ] {
            machine.folder(folder);
        }
        let home = machine.path("home");
        let home = home.display();
        let users = [
            ("root", 0, "/root".to_owned()),
            ("toor", 0, "/root".to_owned()),
            ("alice", ALICE, format!("{home}/alice")),
            ("bob", ALICE + 1, format!("{home}/bob")),
            ("homeless", ALICE + 2, "/nonexistent".to_owned()),
            ("rootdir", ALICE + 3, "/".to_owned()),
            ("unwritten", ALICE + 4, String::new()),
            ("stranger", ALICE + 5, format!("{home}/bob")),
            ("t3-dispatch", SERVICE, "/nonexistent".to_owned()),
        ];
        let (mut passwd, mut group, mut shadow) = (String::new(), String::new(), String::new());
        for (name, id, home) in users {
            passwd += &format!("{name}:x:{id}:{id}::{home}:/bin/sh\n");
            group += &format!("{name}:x:{id}:\n");
            shadow += &format!("{name}:*:19000:0:99999:7:::\n");
        }
        group += "developers:x:61900:alice,bob\nmakers:x:61901:alice\nothers:x:61902:bob\n";
        machine.file("etc/passwd", &passwd);
        machine.file("etc/group", &group);
        machine.file("etc/shadow", &shadow);
        machine.file(
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        );
        machine.file("etc/hosts", "127.0.0.1 localhost\n");
        let permits =
            ["auth", "account", "session"].map(|kind| format!("{kind} required pam_permit.so\n"));
        machine.file("etc/pam.d/sudo", &permits.concat());
        machine.file("etc/sudoers", "@includedir /etc/sudoers.d\n");
        machine.file(
            "etc/sudoers.d/t3-dispatch",
            include_str!("../../packaging/sudoers.d/t3-dispatch"),
        );
        for file in ["etc/sudoers", "etc/sudoers.d/t3-dispatch"] {
            fs::set_permissions(machine.path(file), Permissions::from_mode(0o440)).unwrap();
        }
        fs::copy(env!("CARGO_BIN_EXE_t3-mint"), machine.path("t3-mint")).unwrap();
        for (name, uid) in [("alice", ALICE), ("bob", ALICE + 1)] {
            machine.folder(&format!("home/{name}"));
            chown(machine.path(&format!("home/{name}")), Some(uid), Some(uid)).unwrap();
        }
        machine.file("etc/ttyd-user-map", "alice@example.com=alice\nbob=bob\n");
        machine
    }

    pub fn path(&self, part: &str) -> PathBuf {
        self.base.path().join(part)
    }

    pub fn folder(&self, path: &str) {
        fs::create_dir_all(self.path(path)).unwrap();
        open(&self.path(path));
    }

    /// Writes a file, readable by all.
    pub fn file(&self, path: &str, text: &str) {
        fs::write(self.path(path), text).unwrap();
        fs::set_permissions(self.path(path), Permissions::from_mode(0o644)).unwrap();
    }

    /// Installs a `t3` at `path`, which does what `body` says.
    pub fn t3(&self, path: &str, body: &str) {
        if let Some(folder) = Path::new(path).parent() {
            self.folder(&folder.display().to_string());
        }
        self.file(path, &format!("#!/bin/sh\n{body}\n"));
        open(&self.path(path));
    }

    /// The beginning of a command line that runs the rest of it on this machine.
    pub fn enter(&self) -> Command {
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                ENTER,
                "sh",
            ])
            .env("B", self.base.path())
            .env("DISPATCH", env!("CARGO_BIN_EXE_t3-dispatch"))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command line.
    pub fn run(&self, line: &[&str]) -> Told {
        let told = Told::from(self.enter().args(line).output().unwrap());
        self.empty_log();
        told
    }

    /// Runs `t3-mint` as root.
    pub fn mint(&self, arguments: &[&str]) -> Told {
        self.run(&[&["t3-mint"], arguments].concat())
    }

    /// Runs `t3-mint alice` and gives its status alone.
    pub fn status(&self) -> i32 {
        self.mint(&["alice"]).status
    }

    fn empty_log(&self) {
        let mut buffer = [0; 4096];
        while let Ok(size) = self.log.recv(&mut buffer) {
            let line = String::from_utf8_lossy(&buffer[..size]).into_owned();
            self.lines.lock().unwrap().push(line);
        }
    }

    /// What has come in at `/dev/log` since the last time.
    pub fn logged(&self) -> Vec<String> {
        self.empty_log();
        std::mem::take(&mut self.lines.lock().unwrap())
    }
}

/// Readable and executable by all.
fn open(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

/// How a command ended and what it printed.
#[derive(Debug)]
pub struct Told {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Told {
    fn from(output: Output) -> Told {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let told = Told {
            status: output.status.code().unwrap_or(-1),
            out: text(output.stdout),
            err: text(output.stderr),
        };
        assert!(
            !told.err.contains("unshare") && !told.err.contains("mount:"),
            "this test needs a mount namespace of its own, which a container may have to be allowed: {told:?}"
        );
        told
    }
}
