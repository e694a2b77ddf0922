"""A chat server on this machine that misbehaves by plan: what it answers to each request is a function of the request and its number."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def says(content: str | None, reasoning: str | None = None, **message: Any) -> Answer:
    """A chat completion as OpenAI-compatible servers send it."""
    told = {
        "role": "assistant",
        "content": content,
        **({"reasoning_content": reasoning} if reasoning is not None else {}),
        **message,
    }
    body = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": told, "finish_reason": "stop"}],
        "usage": {"total_tokens": 7},
    }
    return 200, {}, json.dumps(body).encode()


def prompt_of(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


class ChatServer:
    """Answers with `plan(request, times)`, `times` counting the requests with the same prompt; a context manager."""

    def __init__(self, plan: Callable[[dict[str, Any], int], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    times = sum(prompt_of(earlier) == prompt_of(request) for earlier in outer.requests)
                    outer.requests.append(request)
                    outer.headers.append(dict(self.headers))
                status, headers, body = plan(request, times)
                try:
                    self.send_response(status)
                    for name, value in {
                        "Content-Type": "application/json",
                        "Content-Length": str(len(body)),
                        **headers,
                    }.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # the client gave up waiting
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
