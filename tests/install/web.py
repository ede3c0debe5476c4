"""A browser, as far as the tests need one."""

import http.client
import os
import socket

DISPATCHER = ("127.0.0.1", 3780)


def get(port, path, **headers):
    """The status, headers and body of what is there; without an answer, 0 and why."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return 0, http.client.HTTPMessage(), str(error)
    finally:
        connection.close()


def visit(user, cookie=""):
    """Opens the site as somebody whom the edge names."""
    named = {"X_authentik_username": user, "Sec_Fetch_Dest": "document", "Accept": "text/html"}
    return get(DISPATCHER[1], "/", Cookie=cookie, **named)


def first_visit(user):
    """Has a browser paired: gives its cookie and what it then sees, or raises."""
    status, headers, body = visit(user)
    if (status, headers["Location"]) != (302, "/"):
        raise AssertionError(f"{status} {headers['Location']} {headers['X-T3-Dispatch-Error']}: {body[:200]}")
    cookie = headers["Set-Cookie"].partition(";")[0]
    return cookie, visit(user, cookie)[2]


class WebSocket:
    """One WebSocket, which is never opened again."""

    def __init__(self, user, cookie):
        self.stream = socket.create_connection(DISPATCHER, timeout=20)
        self.stream.sendall(
            f"GET /ws HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: {user}\r\nCookie: {cookie}\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        self.file = self.stream.makefile("rb")
        status = self.file.readline()
        if b" 101 " not in status:
            raise AssertionError(status)
        while self.file.readline().strip():
            pass

    def say(self, text):
        mask = os.urandom(4)
        data = bytes(byte ^ mask[place % 4] for place, byte in enumerate(text.encode()))
        self.stream.sendall(bytes([0x81, 0x80 | len(data)]) + mask + data)

    def hear(self):
        """The next frame's kind and content."""
        head = self.file.read(2)
        if len(head) < 2:
            raise EOFError("the WebSocket is at its end")
        return head[0] & 0x0F, self.file.read(head[1] & 0x7F)


def echoing(sockets, text):
    """How many of them still bring a message back."""
    count = 0
    for number, each in enumerate(sockets):
        try:
            each.say(f"{text} {number}")
        except OSError:
            pass
    for number, each in enumerate(sockets):
        try:
            count += each.hear() == (1, f"{text} {number}".encode())
        except (OSError, EOFError):
            pass
    return count


def closed(sockets):
    """How many of them were told 1001, going away."""
    count = 0
    for each in sockets:
        try:
            kind, content = each.hear()
            count += kind == 8 and content[:2] == (1001).to_bytes(2, "big")
        except (OSError, EOFError):
            pass
    return count
