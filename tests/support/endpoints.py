"""A chat endpoint that answers, or misbehaves, as a test asks it to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
Body = dict[str, Any]
Answer = Callable[[Body, int], object]


def completion(text: object) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message}]}).encode()


class Server:
    """Where the endpoint listens, and what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.ports: list[int] = []  # of those who asked: one for each connection
        self.most = 0  # requests served at a time
        self.now = 0

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@contextlib.contextmanager
def serving(answer: Answer, *, keep: bool = False) -> Iterator[Server]:
    """Serve `answer(body, number of the request)`: a text, a Reply, or None to hang up.

    With `keep`, connections are kept for further requests.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1" if keep else "HTTP/1.0"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.bodies)
                state.bodies.append({**body, "path": self.path})
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.ports.append(self.client_address[1])
                state.now += 1
                state.most = max(state.most, state.now)
            reply = answer(body, number)
            with lock:
                state.now -= 1
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = (
                reply if isinstance(reply, tuple) else (200, {}, completion(reply))
            )
            with contextlib.suppress(OSError):  # the client may have given up
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Server(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
