//! `t3-mint` as root on a machine of the test's own: whom it mints for, who they are when `t3` runs, and what is left.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::time::{Duration, Instant};

use std::os::unix::net::UnixListener;
use std::process::Stdio;

use serde_json::json;

use crate::common::dispatcher::Setup;
use crate::common::instance::{Instance, Version};
use crate::common::mint;
use crate::machine::{ALICE, Machine, SERVICE, Told};

/// A `t3` that works, for the questions that end before it.
const T3: &str = "echo '{\"credential\": \"a-secret\"}'";

fn machine() -> Machine {
    let machine = Machine::new();
    machine.t3("t3", T3);
    machine
}

#[test]
fn exactly_one_name_of_an_os_user() {
    let machine = machine();
    let (longest, too_long) = ("a".repeat(32), "a".repeat(33));
    machine.file(
        "etc/ttyd-user-map",
        &format!("x={too_long}\nx=Alice\nx=-alice\nx=1alice\nx=al ice\n"),
    );
    for refused in [
        &["alice", "bob"][..],
        &[],
        &[""],
        &[&too_long],
        &["1alice"],
        &["-alice"],
        &["Alice"],
        &["aLice"],
        &["alice\n"],
        &["\nalice"],
        &["al ice"],
        &["alice/../bob"],
        &["älice"],
        &["alice$"],
        &["--socket", "alice"],
        &["--socke"],
    ] {
        let told = machine.mint(refused);
        assert_eq!(
            (told.status, &*told.out),
            (2, ""),
            "{refused:?} {}",
            told.err
        );
        assert!(told.err.starts_with("t3-mint: "));
    }
    // These are names, if nobody's.
    for name in [longest.as_str(), "_", "_1-", "a", "x-"] {
        assert_eq!(machine.mint(&[name]).status, 3, "{name}");
    }
}

#[test]
fn only_who_is_mapped() {
    let machine = machine();
    let maps = |text: &str| {
        machine.file("etc/ttyd-user-map", text);
        machine.status()
    };
    for text in [
        "alice=alice",
        "someone.else=alice\n",
        "# who is who\n\nalice=alice\n",
        "  alice@example.com = alice  \n",
        "x=bob\r\na=alice\r\n",
        "a=alice\na=alice\n",
        "no sign\n=\nempty=\na=alice",
        "#a=bob\na=alice",
        "\ta=alice\t",
    ] {
        assert_eq!(maps(text), 0, "{text:?}");
    }
    for text in [
        "",
        "alice\n",
        "alice=\n",
        "=alice\n",
        " =alice\n",
        "alice=bob\n",
        "#a=alice\n",
        "  # a=alice\n",
        "a=alice # yes\n",
        "a=b=alice\n",
        "a=alicea\n",
        "a=al\n",
        "a=Alice\n",
        "a=alice,bob\n",
    ] {
        assert_eq!(maps(text), 3, "{text:?}");
    }
    // The table counts as well, beside the map and without it.
    let table = |text: &str| {
        machine.file("etc/t3-serve/dispatch.json", text);
        machine.status()
    };
    assert_eq!(table(r#"{"a": {"os_user": "alice", "port": 3773}}"#), 0);
    fs::remove_file(machine.path("etc/ttyd-user-map")).unwrap();
    assert_eq!(machine.status(), 0);
    for text in [
        "{}",
        r#"{"alice": {"os_user": "bob", "port": 3773}}"#,
        r#"{"a": {"user": "alice"}}"#,
        r#"{"a": "alice"}"#,
        r#"["alice"]"#,
    ] {
        assert_eq!(table(text), 3, "{text}");
    }
    assert_eq!(table("{"), 4);
    machine.file(
        "etc/t3-serve/dispatch.json",
        r#"{"a": {"os_user": "alice"}}"#,
    );
    // Whose machine has the user, but not the map.
    assert_eq!(machine.mint(&["stranger"]).status, 3);
    fs::remove_file(machine.path("etc/t3-serve/dispatch.json")).unwrap();
    let told = machine.mint(&["alice"]);
    assert_eq!(told.status, 4);
    assert!(
        told.err
            .contains("there is no file that says who is mapped")
    );
}

#[test]
fn never_root_nobody_or_who_has_no_home() {
    let machine = machine();
    let names = ["root", "toor", "homeless", "rootdir", "unwritten", "ghost"];
    let map: String = names
        .iter()
        .map(|name| format!("{name}={name}\n"))
        .collect();
    machine.file("etc/ttyd-user-map", &map);
    for name in names {
        let told = machine.mint(&[name]);
        assert_eq!((told.status, &*told.out), (3, ""), "{name}");
        assert!(!told.err.contains("mapped"), "{name}: {}", told.err);
    }
}

#[test]
fn files_that_only_root_can_have_written() {
    let machine = machine();
    machine.file("etc/t3-serve/mint.json", "{}");
    machine.file("etc/t3-serve/dispatch.json", "{}");
    let files = [
        "etc/ttyd-user-map",
        "etc/t3-serve/dispatch.json",
        "etc/t3-serve/mint.json",
    ];
    for part in files {
        let path = machine.path(part);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        let set = |uid, gid, extra| {
            chown(&path, Some(uid), Some(gid)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode | extra)).unwrap();
            machine.status()
        };
        assert_eq!(set(0, 0, 0), 0, "{part}");
        assert_eq!(set(0, SERVICE, 0), 0, "{part}");
        assert_eq!(set(0, 0, 0o020), 4, "{part}");
        assert_eq!(set(0, SERVICE, 0o020), 4, "{part}");
        assert_eq!(set(0, 0, 0o002), 4, "{part}");
        assert_eq!(set(ALICE, 0, 0), 4, "{part}");
        assert_eq!(set(SERVICE, 0, 0), 4, "{part}");
        assert_eq!(set(0, 0, 0), 0, "{part}");
    }
    // What configuration management does: a link to where only root can write.
    let table = machine.path("etc/t3-serve/dispatch.json");
    let link = |to: &str| {
        fs::remove_file(&table).unwrap();
        symlink(to, &table).unwrap();
        machine.status()
    };
    machine.folder("etc/managed");
    machine.file("etc/managed/table.json", "{}");
    assert_eq!(link("/etc/managed/table.json"), 0);
    assert_eq!(link("../managed/../managed/table.json"), 0);
    symlink("managed", machine.path("etc/current")).unwrap();
    assert_eq!(link("../current/table.json"), 0);
    // What is no file, or leads nowhere.
    assert_eq!(link("/etc/t3-serve"), 4);
    assert_eq!(link("dispatch.json"), 4);
    assert_eq!(link("/dev/null"), 4);
    fs::remove_file(&table).unwrap();
    let fifo = machine.run(&["mkfifo", "/etc/t3-serve/dispatch.json"]);
    assert_eq!(fifo.status, 0);
    let start = Instant::now();
    assert_eq!(machine.status(), 4);
    assert!(start.elapsed() < Duration::from_secs(5));
}

/// Notes about the process that `t3` is, as `KEY VALUE` lines.
const NOTES: &str = r#"out=$(readlink /proc/$$/fd/1)
{
  grep -E '^(Uid|Gid|Groups|NoNewPrivs|SigIgn|SigBlk|CapEff|CapPrm|CapBnd|CapAmb):' /proc/$$/status | tr '\t' ' '
  cut -d' ' -f6 /proc/$$/stat | sed 's/^/session: /'
  echo "self: $$"
  echo "umask: $(umask)"
  echo "cwd: $(readlink /proc/$$/cwd)"
  echo "args: $*"
  echo "stdin: $(readlink /proc/$$/fd/0)"
  echo "stdout: $out"
  echo "fds: $(cd /proc/$$/fd; echo *)"
  echo "environment: $(tr '\0' '\n' < /proc/$$/environ | sort | tr '\n' ' ')"
} > ~/notes"#;

#[test]
fn t3_runs_as_the_user_and_nothing_but_the_user() {
    let machine = Machine::new();
    machine.t3("t3", NOTES);
    let notes = || -> HashMap<String, String> {
        let text = fs::read_to_string(machine.path("home/alice/notes")).unwrap();
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        lines
            .map(|(key, value)| (key.into(), value.trim().into()))
            .collect()
    };
    // A caller that leaves as much as it can behind.
    let caller = r#"trap '' HUP INT QUIT TERM CHLD USR1 USR2 PIPE ALRM
        umask 0; cd /etc; export LD_LIBRARY_PATH=/tmp EVIL=1 HOME=/root BASH_ENV=/etc/passwd
        exec 5</etc/shadow 7<>/etc/shadow 99</etc/shadow
        exec t3-mint alice"#;
    let told = machine.run(&["bash", "-c", caller]);
    assert_eq!(told.status, 0, "{told:?}");
    let home = machine.path("home/alice");
    let home = home.display();
    let seen = notes();
    let said = |key: &str| seen[key].as_str();
    assert_eq!(said("Uid"), [ALICE.to_string().as_str(); 4].join(" "));
    assert_eq!(said("Gid"), [ALICE.to_string().as_str(); 4].join(" "));
    let mut groups: Vec<&str> = said("Groups").split(' ').collect();
    groups.sort_unstable();
    assert_eq!(groups, ["61001", "61900", "61901"]);
    for capabilities in ["CapEff", "CapPrm", "CapAmb"] {
        assert_eq!(said(capabilities), "0000000000000000");
    }
    assert_eq!(said("NoNewPrivs"), "1");
    // But for 32 and 33, which are the C library's own.
    let ignored = u64::from_str_radix(said("SigIgn"), 16).unwrap();
    assert_eq!(ignored & !(3 << 31), 0);
    assert_eq!(said("SigBlk"), "0000000000000000");
    assert_eq!(said("session"), said("self"));
    assert_eq!(said("umask"), "0077");
    assert_eq!(said("cwd"), home.to_string());
    assert_eq!(
        said("args"),
        format!("auth pairing create --base-dir {home}/.t3 --ttl 5m --json")
    );
    assert_eq!(said("stdin"), "/dev/null");
    // 10 and 11 are the shell's own, for the script and for what it redirects.
    let mut fds: Vec<u32> = said("fds")
        .split(' ')
        .map(|fd| fd.parse().unwrap())
        .collect();
    fds.sort_unstable();
    fds.retain(|fd| ![10, 11].contains(fd));
    // The listing has one of its own, which it closed.
    assert!(fds.starts_with(&[0, 1, 2]) && fds.len() <= 4, "{fds:?}");
    assert!(![5, 7, 99].iter().any(|fd| fds.contains(fd)), "{fds:?}");
    assert_eq!(
        said("environment"),
        format!("HOME={home} LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin USER=alice")
    );

    // Nothing open.
    let caller = "use POSIX; POSIX::close($_) for 0..2; exec 't3-mint', 'alice'";
    assert_eq!(machine.run(&["perl", "-e", caller]).status, 0);
    assert_eq!(notes()["stdout"], "/dev/null");

    // A home that cannot be entered by its owner.
    chown(machine.path("home/alice"), Some(0), Some(0)).unwrap();
    fs::set_permissions(machine.path("home/alice"), Permissions::from_mode(0o700)).unwrap();
    machine.t3("t3", "pwd");
    assert_eq!(machine.mint(&["alice"]).out, "/\n");
}

#[test]
fn the_exit_status_and_the_output_are_those_of_t3() {
    let machine = Machine::new();
    for (body, status) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 77", 77),
        ("exit 255", 255),
        ("kill -9 $$", 137),
    ] {
        machine.t3("t3", &format!("echo out\necho complaint >&2\n{body}"));
        let told = machine.mint(&["alice"]);
        assert_eq!(
            (told.status, &*told.out, &*told.err),
            (status, "out\n", "complaint\n"),
            "{body}"
        );
    }
    machine.t3("t3", T3);
    machine.file("t3", "#!/nonexistent/interpreter\n");
    fs::set_permissions(machine.path("t3"), Permissions::from_mode(0o755)).unwrap();
    assert_eq!(machine.status(), 126);
    fs::set_permissions(machine.path("t3"), Permissions::from_mode(0o644)).unwrap();
    assert_eq!(machine.status(), 126);
}

#[test]
fn where_t3_is_looked_for() {
    let machine = Machine::new();
    let own = "home/alice/.local/bin/t3";
    let told = |settings: &str| {
        machine.file("etc/t3-serve/mint.json", settings);
        let told = machine.mint(&["alice"]);
        (told.status, told.out)
    };
    let nothing = (127, String::new());
    let allowed = r#"{"allow_home_t3": true}"#;
    assert_eq!(told(allowed), nothing);
    machine.t3(own, "echo own");
    assert_eq!(told(allowed), (0, "own\n".into()));
    for settings in [
        "{}",
        r#"{"allow_home_t3": false}"#,
        r#"{"allow_home_t3": "true"}"#,
        "[]",
    ] {
        assert_eq!(told(settings), nothing, "{settings}");
    }
    assert_eq!(told("{"), (4, String::new()));
    fs::remove_file(machine.path("etc/t3-serve/mint.json")).unwrap();
    assert_eq!(machine.status(), 127);
    machine.t3("local/t3", "echo local");
    assert_eq!(told(allowed), (0, "local\n".into()));
    machine.t3("t3", "echo system");
    assert_eq!(told(allowed), (0, "system\n".into()));
}

/// Whether a process whose command line holds `mark` is alive.
fn alive(mark: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(mark)
    })
}

#[test]
fn nothing_is_left_behind() {
    let machine = Machine::new();
    machine.t3(
        "t3",
        "setsid sleep 7411.25 &\nsleep 7411.5 &\n(trap '' TERM HUP; setsid setsid sleep 7411.75) & echo done",
    );
    let start = Instant::now();
    let told = machine.mint(&["alice"]);
    assert_eq!((told.status, &*told.out), (0, "done\n"), "{told:?}");
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(!alive("7411."));
}

#[test]
fn after_ten_seconds_all_of_it_is_ended() {
    let machine = Machine::new();
    machine.t3(
        "t3",
        "trap '' TERM HUP INT\nsetsid sleep 7412.25 &\n(trap '' TERM; while :; do setsid sleep 7412.5; done) &\n\
         while :; do sleep 7412.75; done",
    );
    let start = Instant::now();
    let told = machine.mint(&["alice"]);
    assert_eq!(told.status, 124, "{told:?}");
    assert_eq!(told.err, "t3-mint: os_user=alice took more than 10s\n");
    let took = start.elapsed();
    assert!((10..14).contains(&took.as_secs()), "{took:?}");
    assert!(!alive("7412."));
    assert!(
        machine
            .logged()
            .iter()
            .any(|line| line.contains(" refused exit=124 os_user=alice "))
    );
}

#[test]
fn syslog_is_told_who_was_minted_for_and_no_credential() {
    let machine = machine();
    assert_eq!(machine.status(), 0);
    machine.mint(&["stranger"]);
    machine.mint(&["not a name\nat all"]);
    let lines = machine.logged();
    let texts: Vec<&str> = lines
        .iter()
        .map(|line| line.split_once("]: ").unwrap().1)
        .collect();
    assert_eq!(
        texts,
        [
            format!("minting os_user=alice uid={ALICE} t3=/usr/bin/t3").as_str(),
            "minted os_user=alice exit=0",
            "refused exit=3 os_user=stranger is mapped to nobody",
            "refused exit=2 not the name of an OS user",
        ]
    );
    // authpriv.notice
    assert!(
        lines.iter().all(|line| line.starts_with("<85>t3-mint[")),
        "{lines:?}"
    );
    assert!(!lines.concat().contains("a-secret"));
    // A log that nobody reads holds nobody up.
    let start = Instant::now();
    for _ in 0..8 {
        let repeated = "i=0; while [ $i -lt 40 ]; do t3-mint x; i=$((i+1)); done; t3-mint alice";
        assert_eq!(machine.run(&["sh", "-c", repeated]).status, 0);
    }
    assert!(start.elapsed() < Duration::from_secs(20));
    fs::remove_file(machine.path("log")).unwrap();
    assert_eq!(machine.status(), 0);
}

/// The beginning of a command line that is run as this user and no other.
fn as_uid(id: &str) -> [&str; 6] {
    ["setpriv", "--reuid", id, "--regid", id, "--clear-groups"]
}

#[test]
fn only_root_runs_it() {
    let machine = machine();
    let id = SERVICE.to_string();
    let service = |line: &[&str]| machine.run(&[&as_uid(&id)[..], line].concat());
    let told = service(&["t3-mint", "alice"]);
    assert_eq!((told.status, &*told.out), (126, ""), "{told:?}");
    // Not even where somebody has made it setuid.
    fs::set_permissions(machine.path("t3-mint"), Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(service(&["t3-mint", "alice"]).status, 126);
}

#[test]
fn sudo_lets_the_service_user_mint_and_nothing_else() {
    let machine = machine();
    let id = SERVICE.to_string();
    let as_user =
        |id: &str, line: &[&str]| machine.run(&[&as_uid(id)[..], &["sudo", "-n"], line].concat());
    let check = machine.run(&["visudo", "-c"]);
    assert_eq!(check.status, 0, "{check:?}");
    let mint = "/usr/bin/t3-mint";
    let longest = "a".repeat(32);
    let told = as_user(&id, &[mint, "alice"]);
    assert_eq!(told.status, 0, "{told:?}");
    assert!(told.out.contains("a-secret"));
    // Allowed by sudo, and then judged by t3-mint.
    for name in ["stranger", "_x-9", &longest] {
        assert_eq!(as_user(&id, &[mint, name]).status, 3, "{name}");
    }
    let too_long = "a".repeat(33);
    for line in [
        &[mint][..],
        &[mint, "alice", "bob"],
        &[mint, "alice bob"],
        &[mint, "alice\n"],
        &[mint, "alice\nbob"],
        &[mint, "--socket"],
        &[mint, "Alice"],
        &[mint, "1alice"],
        &[mint, "-alice"],
        &[mint, ""],
        &[mint, &too_long],
        &["-u", "alice", mint, "alice"],
        &["-g", "root", mint, "alice"],
        &["EVIL=1", mint, "alice"],
        &["-C", "9", mint, "alice"],
        &["/usr/bin/id"],
        &["sh", "-c", "t3-mint alice"],
        &["-s"],
    ] {
        let told = as_user(&id, line);
        assert_eq!((told.status, &*told.out), (1, ""), "{line:?} {}", told.err);
        assert!(!told.err.contains("t3-mint: "), "{line:?} {}", told.err);
    }
    assert_eq!(as_user(&ALICE.to_string(), &[mint, "alice"]).status, 1);
    let may = as_user(&id, &["-l"]);
    let rules: Vec<&str> = may
        .out
        .lines()
        .filter(|line| line.contains("NOPASSWD"))
        .collect();
    assert_eq!(rules.len(), 1, "{}", may.out);
    assert!(
        rules[0].contains("(root) NOPASSWD: /usr/bin/t3-mint ^[a-z_]"),
        "{}",
        may.out
    );
}

/// Does what systemd does for `t3-mint.socket`: a process for each connection, which is its standard input and output.
fn serve_socket(machine: &Machine) -> std::path::PathBuf {
    let path = machine.path("mint.sock");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    let mut mint = machine.enter();
    mint.args(["t3-mint", "--socket"]).stderr(Stdio::null());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = std::os::fd::OwnedFd::from(stream.unwrap());
            mint.stdin(stream.try_clone().unwrap()).stdout(stream);
            let mut child = mint.spawn().unwrap();
            // What the connection is to this process must not keep it open.
            mint.stdin(Stdio::null()).stdout(Stdio::null());
            child.wait().unwrap();
        }
    });
    path
}

/// A machine with an instance of alice's, whose credentials her `t3` makes, and a dispatcher that is the service user's.
async fn place(machine: &Machine) -> (Instance, Setup) {
    let base = machine.path("service");
    machine.folder("service");
    chown(&base, Some(SERVICE), Some(SERVICE)).unwrap();
    let home = mint::home(&base, "alice");
    let alice = Instance::start(&home, Version::V0_0_33).await;
    chown(home.join("credentials"), Some(ALICE), Some(ALICE)).unwrap();
    machine.t3(
        "t3",
        &format!("base='{}'\nuser=$USER\n{}", base.display(), mint::MINT),
    );
    let id = SERVICE.to_string();
    let setup = Setup::new(&base, Vec::new()).user("alice", "alice", alice.port());
    let mut through = machine.enter();
    through.args(as_uid(&id)).arg("t3-dispatch");
    (alice, setup.through(through))
}

/// `t3-dispatch check --pair alice`, as `uid`.
fn check(machine: &Machine, setup: &Setup, uid: u32) -> Told {
    let id = uid.to_string();
    let file = setup.write().display().to_string();
    let line = ["t3-dispatch", "check", "--pair", "alice", "-c", &file];
    machine.run(&[&as_uid(&id)[..], &line].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_pairs_by_sudo() {
    let machine = Machine::new();
    let (_alice, setup) = place(&machine).await;
    let setup = setup.set("pairing.mint", json!(["sudo", "-n", "/usr/bin/t3-mint"]));
    let told = check(&machine, &setup, SERVICE);
    assert_eq!(told.status, 0, "{told:?}");
    let dispatcher = setup.start().await;
    assert_eq!(dispatcher.navigate("alice", "").await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_pairs_at_the_socket() {
    let machine = Machine::new();
    let (_alice, mut setup) = place(&machine).await;
    let socket = machine.path("mint.sock").display().to_string();
    setup.dispatch["pairing"] = json!({ "mint_socket": socket });
    let told = check(&machine, &setup, SERVICE);
    assert_eq!(told.status, 1);
    let absent = format!("{socket}: No such file or directory (os error 2)");
    assert!(told.out.contains(&absent), "{told:?}");
    assert!(
        told.out.contains("(dispatch.pairing.mint_socket)"),
        "{told:?}"
    );

    serve_socket(&machine);
    let told = check(&machine, &setup, SERVICE);
    assert_eq!(told.status, 0, "{told:?}");
    assert!(told.out.contains(&format!("socket {socket}")), "{told:?}");
    // Nobody else is minted for there, root included.
    for uid in [0, ALICE] {
        let told = check(&machine, &setup, uid);
        assert_eq!(told.status, 1);
        assert!(
            told.out.contains("for somebody else than `service_user`"),
            "{told:?}"
        );
        let refused = format!("refused exit=5 uid {uid} on the socket is not t3-dispatch");
        assert!(machine.logged().concat().contains(&refused));
    }
    machine.file("etc/t3-serve/mint.json", r#"{"service_user": "alice"}"#);
    assert_eq!(check(&machine, &setup, ALICE).status, 0);
    assert_eq!(check(&machine, &setup, SERVICE).status, 1);
    machine.file("etc/t3-serve/mint.json", "{}");
    machine.file("etc/ttyd-user-map", "");
    let told = check(&machine, &setup, SERVICE);
    assert!(
        told.out
            .contains("answered exit status 3: `journalctl -t t3-mint`"),
        "{told:?}"
    );
    machine.file("etc/ttyd-user-map", "a=alice");

    let dispatcher = setup.start().await;
    let ready = crate::common::http::request(dispatcher.admin(), "GET", "/readyz", &[], b"").await;
    assert_eq!(ready.unwrap().status, 200);
    assert_eq!(dispatcher.navigate("alice", "").await.status, 302);
    fs::remove_file(&socket).unwrap();
    let ready = crate::common::http::request(dispatcher.admin(), "GET", "/readyz", &[], b"").await;
    let ready = ready.unwrap();
    assert_eq!(ready.status, 503);
    assert!(
        ready
            .text()
            .contains("mint (dispatch.pairing.mint_socket): ")
    );
}

/// What is said on a connection that is cut short, never ends, or says too much.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_cut_short_counts_for_nothing() {
    use std::io::{BufRead, BufReader, Write};
    let base = tempfile::TempDir::new().unwrap();
    let (home, path) = (
        mint::home(base.path(), "alice"),
        base.path().join("mint.sock"),
    );
    let alice = Instance::start(&home, Version::V0_0_33).await;
    let listener = UnixListener::bind(&path).unwrap();
    let (say, said) = std::sync::mpsc::channel::<(String, Duration)>();
    std::thread::spawn(move || {
        for (answer, hold) in said {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = String::new();
            BufReader::new(&stream).read_line(&mut asked).unwrap();
            assert_eq!(asked, "alice\n");
            let _ = stream.write_all(answer.as_bytes());
            // Held by another thread, so that the next one is answered meanwhile.
            std::thread::spawn(move || {
                std::thread::sleep(hold);
                drop(stream);
            });
        }
    });
    let mut setup = Setup::new(base.path(), Vec::new()).user("alice", "alice", alice.port());
    setup.dispatch["pairing"] =
        json!({ "mint_socket": path, "mint_timeout": "1s", "per_user_per_minute": 100 });
    let dispatcher = setup.start().await;
    let credential = "{\"credential\": \"c1\"}";
    let at_once = Duration::ZERO;
    for (answer, hold, code) in [
        (String::new(), at_once, "mint-failed"),
        (credential.to_owned(), at_once, "mint-failed"),
        (format!("{credential}\nexit 0"), at_once, "mint-failed"),
        (format!("{credential}\nexit 1\n"), at_once, "mint-failed"),
        (
            format!("{credential}\nexit 0\n"),
            Duration::from_secs(2),
            "mint-failed",
        ),
        ("\nexit 0\n".into(), at_once, "mint-unparseable"),
        (
            format!("{}\nexit 0\n", "x".repeat(70_000)),
            at_once,
            "mint-unparseable",
        ),
    ] {
        say.send((answer.clone(), hold)).unwrap();
        let reply = dispatcher.navigate("alice", "").await;
        assert_eq!(reply.get("x-t3-dispatch-error"), Some(code), "{answer:.40}");
    }
    fs::write(home.join("credentials/c1"), "").unwrap();
    say.send((format!("{credential}\nexit 0\n"), at_once))
        .unwrap();
    assert_eq!(dispatcher.navigate("alice", "").await.status, 302);
    let log = dispatcher.log();
    assert!(
        log.contains("broke off before the end") && log.contains("took more than 1s"),
        "{log}"
    );
    assert!(!log.contains("c1\""));
}
