#!/usr/bin/env python3
"""Holds the samples for Traefik, Caddy and nginx to docs/deploy.md.

Each sample is run as it is, with addresses, ports and certificate put in, before a stand-in sign-on, and behind it once a
stand-in that tells which headers arrived, and once the real t3-dispatch with stand-in instances. Needs Python 3.9, openssl,
and the programs that are to be tested:

    packaging/edges/test.py --dispatcher target/debug/t3-dispatch --nginx nginx --caddy caddy --traefik traefik

Everything stays on loopback and in a temporary folder. It takes 90 s, for one WebSocket is silent for 80 s.
"""

import argparse
import base64
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler

HERE = pathlib.Path(__file__).resolve().parent.parent
HOST = "t3.example.com"
# Every spelling that some server takes for the identity header.
IDENTITY = re.compile(r"x[^a-z0-9]authentik[^a-z0-9]username", re.I)
TOKEN = "0123456789abcdef0123"


# --- Stand-ins --------------------------------------------------------------------------------------------------------


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def cookie(self, name):
        for line in self.headers.get_all("Cookie", []):
            for pair in line.split(";"):
                key, _, value = pair.strip().partition("=")
                if key == name:
                    return value
        return None

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class SignOn(Quiet):
    """Answers as an outpost does: who asks is in the cookie. `nameless` is let in without being named."""

    seen = []

    def do_GET(self):
        SignOn.seen.append((self.path, self.headers.items()))
        user = self.cookie("authentik")
        if not self.path.startswith("/outpost.goauthentik.io/auth/"):
            self.answer(302, [("Location", "https://authentik.example.com/")], b"")
        elif user == "nameless":
            self.answer(200)
        elif user:
            self.answer(200, [("X-authentik-username", user), ("X-authentik-jwt", "secret")])
        elif self.path.startswith("/outpost.goauthentik.io/auth/nginx"):
            self.answer(401)
        else:
            self.answer(302, [("Location", "https://authentik.example.com/")])


class Upstream(Quiet):
    """Tells which headers arrived; echoes WebSockets; takes uploads; pairs and knows its sessions as `t3 serve` does."""

    name = "echo"
    taken = {}

    def do_GET(self):
        if (self.headers.get("Upgrade") or "").lower() == "websocket":
            return self.websocket()
        if self.path == "/drip":
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1\r\na\r\n")
            self.wfile.flush()
            time.sleep(1.5)
            self.wfile.write(b"1\r\nb\r\n0\r\n\r\n")
            return None
        if self.path == "/api/auth/session":
            known = self.cookie("t3_session") == self.name
            return self.tell({"authenticated": known, "auth": {"sessionCookieName": "t3_session"}})
        return self.tell({"instance": self.name, "path": self.path, "headers": self.headers.items()})

    def do_POST(self):
        if self.path in ("/api/auth/browser-session", "/api/auth/bootstrap"):
            self.rfile.read(int(self.headers["Content-Length"]))
            cookie = ("Set-Cookie", f"t3_session={self.name}; Path=/; HttpOnly; SameSite=Lax")
            return self.tell({"authenticated": True}, [cookie])
        left, key = int(self.headers["Content-Length"]), self.path
        Upstream.taken[key] = 0
        while left:
            part = self.rfile.read1(min(left, 65536))
            if not part:
                return None
            left -= len(part)
            Upstream.taken[key] += len(part)
        return self.tell({"taken": Upstream.taken[key]})

    def tell(self, what, headers=()):
        self.answer(200, [("Content-Type", "application/json"), *headers], json.dumps(what).encode())

    def websocket(self):
        self.close_connection = True
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        send_frame(self.wfile, json.dumps({"instance": self.name, "headers": self.headers.items()}).encode())
        with contextlib.suppress(OSError, EOFError):
            while True:
                opcode, payload = read_frame(self.rfile)
                if opcode == 8:
                    return
                send_frame(self.wfile, payload)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_):
        pass  # A client that breaks off is none.


def serve(handler):
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


# --- A client that sends exactly what it is told ----------------------------------------------------------------------


def exactly(stream, size):
    data = b""
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def read_frame(stream):
    first, second = exactly(stream, 2)
    size = second & 127
    if size == 126:
        (size,) = struct.unpack(">H", exactly(stream, 2))
    elif size == 127:
        (size,) = struct.unpack(">Q", exactly(stream, 8))
    mask = exactly(stream, 4) if second & 128 else b"\0\0\0\0"
    return first & 15, bytes(byte ^ mask[i % 4] for i, byte in enumerate(exactly(stream, size)))


def send_frame(stream, payload, mask=b""):
    head = bytes([0x81])
    flag = 128 if mask else 0
    head += bytes([flag | len(payload)]) if len(payload) < 126 else bytes([flag | 126]) + struct.pack(">H", len(payload))
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if mask else payload
    stream.write(head + mask + body)
    stream.flush()


class Client:
    def __init__(self, port, ca):
        context = ssl.create_default_context(cafile=ca)
        context.set_alpn_protocols(["http/1.1"])
        plain = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket = context.wrap_socket(plain, server_hostname=HOST)

    def send(self, method, path, headers=()):
        lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", *(f"{name}: {value}" for name, value in headers)]
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())

    def response(self):
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        return response


class Answer:
    def __init__(self, response, body):
        self.status, self.body = response.status, body
        self.location = response.getheader("Location") or ""
        self.set_cookie = response.headers.get_all("Set-Cookie") or []
        self.error = response.getheader("X-T3-Dispatch-Error")

    @property
    def json(self):
        try:
            return json.loads(self.body)
        except ValueError:
            return {}

    def names(self):
        """Every identity that arrived, whatever its header's spelling."""
        return [value for name, value in self.json.get("headers", []) if IDENTITY.fullmatch(name)]

    def header(self, wanted):
        return [value for name, value in self.json.get("headers", []) if name.lower() == wanted.lower()]


UPGRADE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]


class Edge:
    def __init__(self, name, port, ca):
        self.name, self.port, self.ca = name, port, ca

    def get(self, path, headers=()):
        client = Client(self.port, self.ca)
        client.send("GET", path, [*headers, ("Connection", "close")])
        response = client.response()
        answer = Answer(response, response.read())
        client.socket.close()
        return answer

    def raw(self, path, headers):
        """With a Connection header of the caller's own."""
        client = Client(self.port, self.ca)
        client.send("GET", path, headers)
        response = client.response()
        answer = Answer(response, response.read())
        client.socket.close()
        return answer

    def websocket(self, path, headers=()):
        """The stream of a WebSocket, or the answer that was given instead."""
        client = Client(self.port, self.ca)
        client.send("GET", path, [*UPGRADE, *headers])
        stream = client.socket.makefile("rwb", buffering=0)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += exactly(stream, 1)
        status = int(head.split(b" ", 2)[1])
        return (stream, client) if status == 101 else status


def told(opened):
    """What the stand-in upstream says first on a WebSocket."""
    answer = Answer.__new__(Answer)
    answer.body = read_frame(opened[0])[1]
    return answer


def echo(opened, text):
    send_frame(opened[0], text, b"\1\2\3\4")
    return read_frame(opened[0])[1] == text


# --- The samples, made to run here ------------------------------------------------------------------------------------


def put_in(text, replacements):
    for old, new in replacements:
        assert old in text, f"the sample has no {old!r} any more"
        text = text.replace(old, new)
    return text


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Laboratory:
    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self.cert, self.key = str(folder / "cert.pem"), str(folder / "key.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
            + ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
            + ["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", self.key, "-out", self.cert],
            check=True, capture_output=True,
        )
        self.sign_on = serve(SignOn)

    def start(self, name, command, **env):
        log = open(self.folder / f"{name}.log", "wb")
        environment = {**os.environ, "HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder), **env}
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment)
        self.processes.append(process)
        return process

    def wait(self, port, name):
        for _ in range(150):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            time.sleep(0.1)
        raise SystemExit(f"{name} does not start:\n{(self.folder / f'{name}.log').read_text()}")

    def end(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def common(self, dispatcher):
        return [
            ("192.0.2.10:3780", f"127.0.0.1:{dispatcher}"),
            ("authentik.example.com:9000", f"127.0.0.1:{self.sign_on}"),
            (f"/etc/ssl/{HOST}.pem", self.cert),
            (f"/etc/ssl/{HOST}.key", self.key),
        ]

    def nginx(self, program, name, dispatcher, proxied):
        plain, tls = free_port(), free_port()
        ours = [("listen 80;", f"listen 127.0.0.1:{plain};"), ("listen 443 ", f"listen 127.0.0.1:{tls} ")]
        if proxied:
            ours += [("# set_real_ip_from 192.0.2.8;", "set_real_ip_from 127.0.0.1;"), ("# real_ip_header", "real_ip_header")]
        sample = put_in((HERE / "nginx/t3-dispatch.conf").read_text(), self.common(dispatcher) + ours)
        (self.folder / f"{name}.site").write_text(sample)
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/{name}-{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        conf = self.folder / f"{name}.conf"
        conf.write_text(
            f"daemon off; pid {self.folder}/{name}.pid; error_log stderr; worker_processes 1;\n"
            f"events {{}}\nhttp {{ access_log off;\n{temporary}include {self.folder}/{name}.site; }}\n"
        )
        self.start(name, [program, "-e", "stderr", "-c", str(conf)])
        return plain, tls

    def caddy(self, program, name, dispatcher, proxied):
        plain, tls = free_port(), free_port()
        head = f"{{\n\tadmin off\n\tpersist_config off\n\tdefault_bind 127.0.0.1\n\thttp_port {plain}\n\thttps_port {tls}\n\tservers {{"
        ours = [("{\n\tservers {", head)]
        if proxied:
            ours += [("# trusted_proxies static 192.0.2.8/32", "trusted_proxies static 127.0.0.1/32")]
            ours += [("# trusted_proxies_strict", "trusted_proxies_strict")]
        sample = put_in((HERE / "caddy/Caddyfile").read_text(), self.common(dispatcher) + ours)
        conf = self.folder / f"{name}.Caddyfile"
        conf.write_text(sample)
        self.start(name, [program, "run", "--adapter", "caddyfile", "--config", str(conf)])
        return plain, tls

    def traefik(self, program, name, dispatcher, proxied):
        plain, tls = free_port(), free_port()
        dynamic = self.folder / f"{name}-dynamic"
        dynamic.mkdir()
        sample = put_in((HERE / "traefik/dynamic/t3-dispatch.yml").read_text(), self.common(dispatcher))
        (dynamic / "t3-dispatch.yml").write_text(sample)
        ours = [('":80"', f'"127.0.0.1:{plain}"'), ('":443"', f'"127.0.0.1:{tls}"'), ("/etc/traefik/dynamic", str(dynamic))]
        if proxied:
            ours += [("trustedIPs: []", 'trustedIPs: ["127.0.0.1"]')]
        conf = self.folder / f"{name}.yml"
        conf.write_text(put_in((HERE / "traefik/traefik.yml").read_text(), ours))
        self.start(name, [program, f"--configFile={conf}"])
        return plain, tls

    def dispatcher(self, program):
        """The real one, with an instance each for alice and bob."""
        table = {}
        for user in ("alice", "bob"):
            table[user] = {"os_user": user, "port": serve(type(user, (Upstream,), {"name": user}))}
        (self.folder / "dispatch.json").write_text(json.dumps(table))
        port, admin = free_port(), free_port()
        (self.folder / "t3-dispatch.yaml").write_text(f"""
upgrade_sock: {self.folder}/upgrade.sock
pid_file: {self.folder}/t3-dispatch.pid
threads: 1
dispatch:
  listen: ["127.0.0.1:{port}"]
  admin: 127.0.0.1:{admin}
  table: {self.folder}/dispatch.json
  identity:
    trusted_proxies: [127.0.0.0/8]
  pairing:
    mint: [sh, -c, 'printf ''{{"credential":"good"}}''']
  tunnels:
    ledger: {self.folder}/closes.jsonl
  probe:
    token: {TOKEN}
""")
        self.start("t3-dispatch", [program, "serve", "-c", str(self.folder / "t3-dispatch.yaml")])
        self.wait(port, "t3-dispatch")
        return port


# --- What has to hold -------------------------------------------------------------------------------------------------

failed = passed = 0


def check(edge, what, held, seen=""):
    global failed, passed
    if held:
        passed += 1
    else:
        failed += 1
        print(f"FAIL {edge.name}: {what}: {seen}", flush=True)


ALICE = ("Cookie", "authentik=alice")
FORGED = {
    "as it is": [("X-authentik-username", "mallory")],
    "lower case": [("x-authentik-username", "mallory")],
    "upper case": [("X-AUTHENTIK-USERNAME", "mallory")],
    "underscores": [("x_authentik_username", "mallory")],
    "one underscore": [("X-authentik_username", "mallory")],
    "other underscore": [("X_authentik-username", "mallory")],
    "dots": [("X.authentik.username", "mallory")],
    "tildes": [("X~authentik~username", "mallory")],
    "twice": [("X-Authentik-Username", "mallory"), ("X-Authentik-Username", "mallory")],
    "both": [("X-authentik-username", "mallory"), ("X_authentik_username", "mallory")],
    "empty first": [("X-authentik-username", ""), ("X-authentik-username", "mallory")],
    "others": [("Forwarded", "for=mallory;host=mallory"), ("X-Forwarded-User", "mallory"), ("Remote-User", "mallory")],
}
PATHS = ["/healthz", "/probe/healthz", "/probe/ws", "/probe/../api", "/probe/%2e%2e/api", "/probe/..%2fapi", "/PROBE/ws", "//probe/ws"]


def headers_arrive(edge):
    answer = edge.get("/", [ALICE])
    check(edge, "signed in, the right name arrives", answer.names() == ["alice"], answer.body)
    check(edge, "Host arrives", answer.header("Host") == [HOST], answer.body)
    check(edge, "one X-Request-Id at most", len(answer.header("X-Request-Id")) <= 1, answer.body)
    check(edge, "the address of the client arrives", answer.header("X-Forwarded-For") == ["127.0.0.1"], answer.body)
    check(edge, "nothing else of the sign-on arrives", b"secret" not in answer.body, answer.body)
    answer = edge.get("/", [ALICE, ("X-Forwarded-For", "198.51.100.9"), ("X-Request-Id", "mallory")])
    check(edge, "an X-Forwarded-For of a client's does not arrive", b"198.51.100.9" not in answer.body, answer.body)
    check(edge, "an X-Request-Id of a client's does not arrive", b"mallory" not in answer.body, answer.body)
    for how, forged in FORGED.items():
        answer = edge.get("/", [ALICE, *forged])
        fine = answer.names() == ["alice"] and b"mallory" not in answer.body
        check(edge, f"forged {how}, signed in", fine, answer.body)
        answer = edge.get("/", [("Cookie", "authentik=nameless"), *forged])
        fine = answer.status == 200 and answer.names() == [] and b"mallory" not in answer.body
        check(edge, f"forged {how}, let in without a name", fine, answer.body)
        answer = edge.get("/", forged)
        check(edge, f"forged {how}, not signed in", answer.status == 302 and not answer.names(), answer.status)
        for path in PATHS:
            answer = edge.get(path, forged)
            fine = answer.names() == [] and b"mallory" not in answer.body
            check(edge, f"forged {how}, {path}", fine, answer.body)
        opened = edge.websocket("/ws", [ALICE, *forged])
        fine = not isinstance(opened, int) and (hello := told(opened)).names() == ["alice"] and b"mallory" not in hello.body
        check(edge, f"forged {how}, WebSocket", fine, opened)
        opened = edge.websocket("/probe/ws", forged)
        fine = not isinstance(opened, int) and (hello := told(opened)).names() == [] and b"mallory" not in hello.body
        check(edge, f"forged {how}, WebSocket of a probe", fine, opened)
        check(edge, f"forged {how}, WebSocket, not signed in", edge.websocket("/ws", forged) == 302)
    nominated = [ALICE, ("X-authentik-username", "mallory"), ("Connection", "close, X-Authentik-Username, X-Forwarded-For")]
    answer = edge.raw("/", nominated)
    fine = answer.names() in ([], ["alice"]) and b"mallory" not in answer.body
    check(edge, "named in Connection", fine, answer.body)
    NOTES.append(f"{edge.name}: with the header named in Connection arrive {answer.names()}, {answer.header('X-Forwarded-For')}")
    asked_about_what_is_wanted(edge)


def asked_about_what_is_wanted(edge):
    SignOn.seen.clear()
    edge.get("/wanted", [ALICE, *FORGED["both"], ("X-Forwarded-Host", "mallory"), ("X-Forwarded-Uri", "/mallory")]
             + [("X-Original-URL", "https://mallory/"), ("Forwarded", "host=mallory")])
    asked = str(SignOn.seen)
    check(edge, "the sign-on is asked about what is wanted", HOST in asked and "/wanted" in asked and "mallory" not in asked, asked)


def behind_another(edge):
    """Another proxy is in front, whose X-Forwarded-For is believed, and which passes on what a client wrote before it."""
    for chain in ("198.51.100.9", "203.0.113.66, 198.51.100.9"):
        answer = edge.get("/", [ALICE, ("X-Forwarded-For", chain)])
        arrived = ", ".join(answer.header("X-Forwarded-For"))
        # The last address that is no proxy's, as t3-dispatch reads it.
        check(edge, "the address of the client arrives", re.search(r"(^|, )198\.51\.100\.9(, 127\.0\.0\.1)?$", arrived), arrived)
        NOTES.append(f"{edge.name}: of the chain {chain} arrives {arrived}")
    asked_about_what_is_wanted(edge)
    for forged in FORGED.values():
        answer = edge.get("/", [ALICE, *forged])
        check(edge, "forged, through another proxy", answer.names() == ["alice"] and b"mallory" not in answer.body, answer.body)


def bodies_stream(edge):
    client, size = Client(edge.port, edge.ca), 64 << 20
    path = f"/upload-{edge.name}"
    client.send("POST", path, [ALICE, ("Content-Length", size), ("Connection", "close")])
    part = bytes(1 << 20)
    client.socket.sendall(part)
    deadline = time.monotonic() + 5
    while Upstream.taken.get(path, 0) < len(part) // 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    check(edge, "an upload arrives while it is sent", Upstream.taken.get(path, 0) >= len(part) // 2, Upstream.taken)
    for _ in range(size // len(part) - 1):
        client.socket.sendall(part)
    response = client.response()
    answer = Answer(response, response.read())
    check(edge, "an upload of 64 MiB arrives whole", answer.json.get("taken") == size, answer.body)
    client = Client(edge.port, edge.ca)
    client.send("GET", "/drip", [ALICE])
    response, start = client.response(), time.monotonic()
    first, soon = response.read(1), time.monotonic() - start < 1
    check(edge, "an answer comes as it is sent", first == b"a" and soon and response.read() == b"b")


NAVIGATION = [("Accept", "text/html"), ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document")]


def dispatcher_serves(edge):
    for user in ("alice", "bob"):
        signed_in = ("Cookie", f"authentik={user}")
        answer = edge.get("/", [signed_in, *NAVIGATION, *FORGED["both"]])
        paired = answer.status == 302 and answer.location == "/" and answer.set_cookie
        check(edge, f"{user} is paired", paired, (answer.status, answer.error))
        both = ("Cookie", f"authentik={user}; t3_session={user}")
        for how, forged in {"none": [], **FORGED}.items():
            other = [(name, value.replace("mallory", "bob" if user == "alice" else "alice")) for name, value in forged]
            answer = edge.get("/", [both, *NAVIGATION, *other])
            check(edge, f"{user} gets to their own, forged {how}", answer.json.get("instance") == user, answer.body)
            opened = edge.websocket("/ws", [both, ("Origin", f"https://{HOST}"), *other])
            fine = not isinstance(opened, int) and told(opened).json["instance"] == user and echo(opened, b"hello")
            check(edge, f"{user} gets to their own by WebSocket, forged {how}", fine, opened)
    check(edge, "a foreign origin is refused", edge.websocket("/ws", [both, ("Origin", "https://mallory.example.com")]) == 403)
    answer = edge.get("/", NAVIGATION)
    check(edge, "not signed in: to the sign-on", answer.status == 302 and answer.location != "/", answer.location)
    for path in ("/healthz", "/probe/healthz"):
        answer = edge.get(path)
        check(edge, f"{path} without sign-on", answer.status == 200 and answer.body == b"ok\n", answer.body)
    for path in ("/probe/../api", "/probe/%2e%2e/api", "/probe/..%2fapi", "/PROBE/x", "/probe/x"):
        for forged in FORGED.values():
            answer = edge.get(path, [*forged, ("Cookie", "t3_session=alice")])
            check(edge, f"{path} reaches no instance", "instance" not in answer.json, answer.body)
    # What docs/deploy.md has people look for.
    for how, forged in FORGED.items():
        answer = edge.get("/probe/x", [(name, value.replace("mallory", "alice")) for name, value in forged])
        check(edge, f"/probe/x, forged {how}", (answer.status, answer.error) == (403, "unknown-user"), answer.error)
    opened = edge.websocket("/probe/ws", FORGED["both"])
    check(edge, "/probe/ws without sign-on", not isinstance(opened, int) and echo(opened, b"hello"), opened)


def prober_holds(edge, laboratory, program):
    conf = laboratory.folder / f"{edge.name}-probe.yaml"
    conf.write_text(f"""
probe:
  token: {TOKEN}
  ca_file: {laboratory.cert}
  legs:
    - {{ name: internal, kind: websocket, url: "wss://{HOST}/probe/ws", resolve: "127.0.0.1:{edge.port}" }}
    - {{ name: healthz, kind: http, url: "https://{HOST}/probe/healthz", resolve: "127.0.0.1:{edge.port}" }}
""")
    done = subprocess.run([program, "probe", "--once", "-c", str(conf)], capture_output=True, text=True, timeout=60)
    check(edge, "t3-dispatch probe --once", done.returncode == 0, done.stdout + done.stderr)


NOTES = []


def runnable(name):
    found = shutil.which(name)
    if not found:
        raise argparse.ArgumentTypeError(f"no program {name}")
    return os.path.abspath(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for program in ("dispatcher", "nginx", "caddy", "traefik"):
        parser.add_argument(f"--{program}", metavar="PROGRAM", type=runnable)
    parser.add_argument("--idle", type=float, default=80, metavar="SECONDS", help="how long a WebSocket is silent")
    options = parser.parse_args()
    kinds = [(kind, getattr(options, kind)) for kind in ("nginx", "caddy", "traefik") if getattr(options, kind)]
    if not options.dispatcher or not kinds:
        parser.error("name the dispatcher and at least one edge")
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(pathlib.Path(folder))
        try:
            run(laboratory, kinds, options)
        finally:
            laboratory.end()
    for note in NOTES:
        print(note)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def run(laboratory, kinds, options):
    behind = {"echo": serve(Upstream), "real": laboratory.dispatcher(options.dispatcher)}
    behind["proxied"] = behind["echo"]
    edges = []
    for kind, program in kinds:
        for which, port in behind.items():
            name = f"{kind}-{which}"
            plain, tls = getattr(laboratory, kind)(program, name, port, which == "proxied")
            laboratory.wait(tls, name)
            edges.append((which, Edge(name, tls, laboratory.cert), plain))
    time.sleep(2)  # Traefik listens before it has its routes.
    silent, start = [], time.monotonic()
    for which, edge, plain in edges:
        sessions = ("Cookie", "authentik=alice; t3_session=alice")
        opened = edge.websocket("/ws", [sessions])
        check(edge, "a WebSocket opens", not isinstance(opened, int), opened)
        if not isinstance(opened, int):
            told(opened)
            silent.append((edge, opened))
    for which, edge, plain in edges:
        connection = http.client.HTTPConnection("127.0.0.1", plain, timeout=10)
        connection.request("GET", "/", headers={"Host": HOST})
        status = connection.getresponse().status
        check(edge, "plain HTTP is sent to https", status in (301, 302, 307, 308), status)
        if which == "echo":
            headers_arrive(edge)
            bodies_stream(edge)
        elif which == "proxied":
            behind_another(edge)
        else:
            dispatcher_serves(edge)
            prober_holds(edge, laboratory, options.dispatcher)
        print(f"{edge.name}: done", flush=True)
    time.sleep(max(0, options.idle - (time.monotonic() - start)))
    for edge, opened in silent:
        try:
            alive = echo(opened, b"still there?")
        except (OSError, EOFError) as error:
            alive = error
        check(edge, f"a WebSocket that was silent for {options.idle:.0f} s lives", alive is True, alive)


if __name__ == "__main__":
    sys.exit(main())
