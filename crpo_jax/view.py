"""Shows the responses of a run or an evaluation in a browser, and follows it while it goes on; no jax.

Serves WORKDIR/report/index.html as the files in the workdir are now, on this machine alone, and writes nothing. A page
that holds only some of the responses can here be asked for all of a step, or all to a question. For a run on another
machine, forward the port: ssh -L 8008:localhost:8008 HOST.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from crpo_jax.cli import Parser, path_of, run_command
from crpo_jax.errors import InputError
from crpo_jax.page.content import read_content
from crpo_jax.page.html import render_page
from crpo_jax.page.selection import Selection

HOST = "127.0.0.1"
LOCAL_NAMES = (HOST, "localhost")
SHOWN = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "report/held_out_*.jsonl",
    "responses/*.jsonl",
)


class Pages:
    """The pages of a workdir, each built once for every state of its files."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self._build = lru_cache(maxsize=4)(self._read)

    def state(self) -> str:
        """Changes whenever a file that the page shows does."""
        files = sorted(path for pattern in SHOWN for path in self.workdir.glob(pattern))
        stats = [(path.relative_to(self.workdir), path.stat()) for path in files]
        return " ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)

    def page(self, selection: Selection) -> bytes:
        return self._build(selection, self.state())

    def _read(self, selection: Selection, state: str) -> bytes:
        del state  # only tells apart what was built from other files
        return render_page(read_content(self.workdir, selection), served=True)


class Handler(BaseHTTPRequestHandler):
    """Answers / with the page and /state with a text that changes when the page would."""

    pages: Pages

    def do_GET(self) -> None:
        if (self.headers.get("Host") or "").rpartition(":")[0] not in LOCAL_NAMES:
            return self._send(HTTPStatus.FORBIDDEN, b"expected localhost as the host\n")  # a name of a stranger's
        address = urlsplit(self.path)
        try:
            if address.path == "/state":
                return self._send(HTTPStatus.OK, self.pages.state().encode("utf-8", "surrogateescape"))
            if address.path == "/":
                page = self.pages.page(read_selection(address.query))
                return self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        except (InputError, OSError) as problem:
            return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, f"{problem}\n".encode("utf-8", "replace"))
        self._send(HTTPStatus.NOT_FOUND, b"expected / or /state\n")

    def _send(self, status: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": "no-store"}
        for name, value in (headers | {"X-Content-Type-Options": "nosniff"}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line per request would hide the address."""


def open_server(workdir: Path, port: int) -> ThreadingHTTPServer:
    """A server of the workdir's pages on the loopback; OSError or OverflowError where the port is not to be had."""
    return ThreadingHTTPServer((HOST, port), type("Handler", (Handler,), {"pages": Pages(workdir)}))


def read_selection(query: str) -> Selection:
    """The `step` or `question` that the address asks for."""
    values = {name: texts[-1] for name, texts in parse_qs(query).items()}
    step = values.get("step")
    if step is not None and not step.isdecimal():
        raise InputError(f"step: expected a whole number, got {step!r}")
    return Selection(None if step is None else int(step), values.get("question"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("view", __doc__ or "", lambda model: None)
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.add_argument(
        "--workdir", metavar="DIR", type=path_of("--workdir"), required=True, help="folder of a run or an evaluation"
    )
    parser.add_argument("--port", type=int, default=8008, help="0: any that is free (default 8008)")
    args = parser.parse_args(arguments)
    workdir = Path(args.workdir)
    if not (workdir / "config.yaml").is_file():
        raise InputError(
            f"--workdir {workdir}: expected the folder of a run or an evaluation, got no config.yaml in it"
        )
    try:
        server = open_server(workdir, args.port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--port {args.port}: expected a free port, got: {reason}; 0 takes any") from None
    with server:
        print(f"{workdir}: http://{HOST}:{server.server_port}/  (Ctrl-C ends)", file=sys.stderr, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_command("view", main)
