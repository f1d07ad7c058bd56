"""A local endpoint that judges as it is told to, and can be dead."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer(ThreadingHTTPServer):
    """`script` holds what comes next: an answer, a number for an HTTP error, or a whole body; when empty, `answer`."""

    def __init__(self, answer: str = "It is. **Conclusion: True**") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.script: list[str | int | dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers.get("Authorization"))
        step = self.server.script.pop(0) if self.server.script else self.server.answer
        whole = {"choices": [{"message": {"content": step}}]} if isinstance(step, str) else step
        self.send_response(step if isinstance(step, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps(whole).encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def judge_server(**options: Any) -> Iterator[JudgeServer]:
    """The endpoint, running."""
    server = JudgeServer(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
