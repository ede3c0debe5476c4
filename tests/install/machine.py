"""A Debian machine of the test's own: a root made by debootstrap, which is kept, and booted with systemd-nspawn."""

import ctypes
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

SUITE = "bookworm"
# What the package leans on, so that nothing has to be fetched later.
PACKAGES = "systemd,systemd-sysv,dbus,adduser,sudo,ca-certificates,python3"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


def wait(what, condition, limit=60):
    until = time.monotonic() + limit
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"in {limit} s: {what}")
        time.sleep(0.1)


class Machine:
    def __init__(self, folder):
        """A root without the package, in `folder`/machine."""
        self.root = folder / "machine"
        self.nspawn = None
        self.leader = None
        kept = folder / f"{SUITE}.tar"
        self.remove()
        if not kept.exists():
            # Its user may have something to do meanwhile.
            command = ["nice", "-n", "19", "debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, self.root]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            new = kept.with_suffix(".new")
            subprocess.run(["tar", "-C", self.root, "-cf", new, "."], check=True)
            new.rename(kept)
        else:
            self.root.mkdir(parents=True)
            subprocess.run(["tar", "-C", self.root, "-xpf", kept], check=True)
        # Debootstrap leaves the name of the machine that it runs on.
        self.file("/etc/hostname", "t3\n")
        self.file("/etc/hosts", "127.0.0.1 localhost t3\n")

    def remove(self):
        shutil.rmtree(self.root, ignore_errors=True)

    def path(self, inside):
        return self.root / inside.lstrip("/")

    def file(self, path, text, mode=0o644):
        # As root inside sees it; nothing here follows links out of the root.
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)
        self.path(path).chmod(mode)

    def run(self, *command, user=None, script=None):
        """Runs a command inside, or a script of bash's: booted or not."""
        if script is not None:
            command = ["bash", "-euo", "pipefail", "-c", script]
        if user:
            command = ["runuser", "-u", user, "--", *command]
        enter = ["chroot", self.root]
        if self.leader:
            enter = ["nsenter", "-t", str(self.leader), "-m", "-p", "-u", "-i", "-n", "-C", "--"]
        done = subprocess.run(
            [*enter, *command],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        done.out = done.stdout.strip()
        return done

    def boot(self):
        # Where no systemd runs, the folder that nspawn takes for granted is missing.
        if not pathlib.Path("/run/systemd").exists():
            os.mkdir("/run/systemd")
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run/systemd"], check=True)
        console = open(self.root.parent / "console", "wb")
        options = ["--register=no", "--keep-unit", "--private-network", f"--machine=t3-{os.getpid()}"]
        self.nspawn = subprocess.Popen(
            ["systemd-nspawn", "--quiet", "--boot", *options, f"--directory={self.root}"],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
        children = pathlib.Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children")
        wait("systemd-nspawn has a child", lambda: self.nspawn.poll() is not None or children.read_text().strip())
        if self.nspawn.poll() is not None:
            sys.exit(f"systemd-nspawn: {(self.root.parent / 'console').read_text()}")
        self.leader = int(children.read_text().split()[0])
        states = "running", "degraded"
        wait("systemd is up", lambda: self.run("systemctl", "is-system-running").out in states)
        # From here on, 127.0.0.1 is the machine's.
        with open(f"/proc/{self.leader}/ns/net", "rb") as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")

    def end(self):
        if self.nspawn and self.nspawn.poll() is None:
            self.run("systemctl", "poweroff")
            try:
                self.nspawn.wait(30)
            except subprocess.TimeoutExpired:
                os.kill(self.leader, signal.SIGKILL)
                self.nspawn.wait(30)
        self.leader = None
        self.remove()
