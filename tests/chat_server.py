"""A local chat server that misbehaves as planned: each response is a function of the request and of its repetition."""

import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Response = tuple[int, dict[str, str], bytes | Iterable[bytes]]  # status, headers, body or its chunks


def complete(content: str | None, reasoning: str | None = None, **message: Any) -> Response:
    """A chat completion as OpenAI-compatible servers send it."""
    answer = {
        "role": "assistant",
        "content": content,
        **({"reasoning_content": reasoning} if reasoning is not None else {}),
        **message,
    }
    body = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": answer, "finish_reason": "stop"}],
        "usage": {"total_tokens": 7},
    }
    return 200, {}, json.dumps(body).encode()


def prompt_of(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


class ChatServer:
    """Responds with `plan(request, times)`; `times` counts earlier requests with the same prompt. A context manager."""

    def __init__(self, plan: Callable[[dict[str, Any], int], Response]) -> None:
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
                    length = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {"Connection": "close"}
                    for name, value in ({"Content-Type": "application/json"} | length | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    for chunk in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(chunk)
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
