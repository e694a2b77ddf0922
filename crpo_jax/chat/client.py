"""Chat completions from any OpenAI-compatible server, many at a time; no answer is lost, asked for twice or made up.

What the server may do wrong, and what happens: a time-out, a broken connection, 429, 5xx, a reply that is no chat
completion or is larger than `max_reply_bytes` are asked again after a growing pause, or the one that Retry-After names,
which all requests keep; 400, 413 and 422 concern one request, which is given up; 401, 403, 404 and the like would meet
every request and end the run. A request given up has no reply: it is counted, and asked again by the next run.
"""

import email.utils
import json
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from crpo_jax.config import Endpoint
from crpo_jax.errors import InputError

Item = TypeVar("Item")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds, doubled from one try to the next
LONGEST_WAIT = 900.0  # a server that asks for more patience than this is not waited for
GIVEN_UP_IN_A_ROW = 20  # requests given up with no reply between them: the server is gone, not unlucky
AGAIN = frozenset({408, 409, 425, 429})
ONE_REQUEST = frozenset({400, 413, 422})


@dataclass(frozen=True)
class Reply:
    """A chat completion: its text, its reasoning where the server parts the two, why it ended, and the tokens used."""

    content: str
    reasoning: str
    finish_reason: str
    usage: Mapping[str, Any]


@dataclass(frozen=True)
class GivenUp:
    """Why a request got no reply."""

    why: str


STOPPED = GivenUp("stopped")  # before its turn came: no failure, only not asked


class ServerError(Exception):
    """The server cannot be worked with: the run ends here, with all replies so far kept."""


class _Again(Exception):
    """One try that failed; another may not. `wait` is what Retry-After asks for, in seconds."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class _Refused(Exception):
    """The server will not answer this request, however often it is asked."""


class Client:
    """One endpoint: its address, its key and the pauses it asked for. A context manager; `ask` may be called from many threads.

    The key is read from the environment variable that the settings name, goes into the Authorization header of requests to
    this address (redirects are not followed) and nowhere else: it is taken out of every message that is shown or kept.
    """

    def __init__(self, settings: Endpoint, section: str) -> None:
        self.settings, self.section = settings, section
        self.address = address(settings.base_url, section)
        if not settings.model:
            raise InputError(f"{section}.model: expected the name of a model on {settings.base_url}, got none")
        self._key = os.environ.get(settings.key_variable, "").strip() if settings.key_variable else ""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        timeout = httpx2.Timeout(settings.timeout, connect=min(settings.timeout, 30.0))
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._http = httpx2.Client(headers=headers, timeout=timeout, limits=limits, follow_redirects=False)
        self._stopped, self._lock, self._not_before = threading.Event(), threading.Lock(), 0.0

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._http.close()

    def stop(self) -> None:
        """Pauses end now and no new try begins."""
        self._stopped.set()

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Reply | GivenUp:
        """The reply, tried `retries` times after the first; ServerError where no request can succeed."""
        body = parameters(self.settings) | {"messages": list(messages)}
        why = ""
        for tried in range(self.settings.retries + 1):
            self._wait_for_turn()
            if self._stopped.is_set():
                return STOPPED
            try:
                return self._try(body)
            except _Refused as error:
                return GivenUp(self._without_key(str(error)))
            except _Again as error:
                why, wait = self._without_key(str(error)), error.wait
            if tried == self.settings.retries:
                break
            if wait is not None and wait > LONGEST_WAIT:
                return GivenUp(f"{why}; the server asks to wait {wait:.0f} seconds")
            if wait is not None:
                with self._lock:  # a limit on the rate is everybody's
                    self._not_before = max(self._not_before, time.monotonic() + wait)
            else:
                pause = min(FIRST_PAUSE * 2**tried, LONGEST_PAUSE)
                self._stopped.wait(
                    pause * random.uniform(0.5, 1.0)
                )  # apart, so that a server that comes back is not met by all at once
        return GivenUp(f"{why}, {self.settings.retries + 1} times")

    def _wait_for_turn(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0 and not self._stopped.wait(left):
            pass

    def _try(self, body: Mapping[str, Any]) -> Reply:
        deadline = time.monotonic() + self.settings.timeout
        try:
            with self._http.stream("POST", self.address, content=json.dumps(body).encode()) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > self.settings.max_reply_bytes:
                        raise _Again(
                            f"a reply of more than {self.section}.max_reply_bytes={self.settings.max_reply_bytes} bytes"
                        )
                    if time.monotonic() > deadline:  # the client's own limit is on the time between two pieces
                        raise _Again(f"no whole reply within {self.section}.timeout={self.settings.timeout:g} seconds")
        except httpx2.TimeoutException:
            raise _Again(f"no reply within {self.section}.timeout={self.settings.timeout:g} seconds") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Again(f"{type(error).__name__}: {error}") from None
        status = response.status_code
        if status == 200:
            return completion(bytes(data))
        said = f"HTTP {status}: {' '.join(bytes(data[:300]).decode('utf-8', 'replace').split())}"
        if status in AGAIN or status >= 500:
            raise _Again(said, retry_after(response.headers.get("retry-after")))
        if status in ONE_REQUEST:
            raise _Refused(said)
        key = (
            f"the key in {self.settings.key_variable}"
            if self._key
            else f"no key in {self.settings.key_variable or 'any variable'}"
        )
        raise ServerError(self._without_key(f"{self.address}, model {self.settings.model}, {key}: {said}"))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def address(base_url: str, section: str) -> str:
    """Where completions are asked for: base_url is the part up to and with /v1, as servers print it."""
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{section}.base_url: expected an address such as http://localhost:8000/v1, got {base_url!r}")
    if url.userinfo or url.query:
        raise InputError(
            f"{section}.base_url: expected no user, password or query in the address; a key belongs into {section}.key_variable's variable"
        )
    return base_url.rstrip("/") + "/chat/completions"


def parameters(settings: Endpoint) -> dict[str, Any]:
    """What of the settings shapes a reply; a kept reply is found again by these and the messages."""
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.sampling == "send" else {}
    return {"model": settings.model, settings.limit_name: settings.max_tokens, **sampling}


def completion(data: bytes) -> Reply:
    """The first choice of a chat completion; whatever lacks one, or holds no text at all, is malformed and worth another try."""
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        message = choice["message"]
        content, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Again(f"a reply that is no chat completion: {bytes(data[:120])!r}") from None
    if not isinstance(content or "", str) or not isinstance(reasoning or "", str):
        raise _Again(f"a reply whose text is no string: {bytes(data[:120])!r}")
    if not content and not reasoning:
        raise _Again("a reply without text")
    usage = answer.get("usage")
    return Reply(
        content or "", reasoning or "", str(choice.get("finish_reason") or ""), usage if isinstance(usage, dict) else {}
    )


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header: a number or a date."""
    if not value:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def ask_all(
    client: Client,
    items: Sequence[Item],
    messages: Callable[[Item], Sequence[Mapping[str, str]]],
    answered: Callable[[Item, Reply | GivenUp], None],
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Asks for every item, `concurrency` at a time, and hands each reply to `answered`, in the caller's thread, as it comes.

    Once `stopping` says so, or `answered` or the server fails, no new request begins, and the replies to those under way
    are still handed over: they are paid for. While `answered` is held up, by a full disk say, asking is held up too.
    ServerError where the server refuses every request, or gives nothing any more.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    width = max(1, min(client.settings.concurrency, len(items)))
    done: queue.Queue[tuple[Item, Reply | GivenUp | BaseException]] = queue.Queue(width)
    ending = threading.Event()

    def work() -> None:
        while not ending.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, client.ask(messages(item))))
            except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
                done.put((item, error))
                return

    def end() -> None:
        ending.set()
        client.stop()

    threads = [threading.Thread(target=work, name=f"{client.section}-{number}", daemon=True) for number in range(width)]
    for thread in threads:
        thread.start()
    failed: BaseException | None = None
    in_a_row = 0
    while any(thread.is_alive() for thread in threads) or not done.empty():
        if stopping() and not ending.is_set():
            end()
        try:
            item, reply = done.get(timeout=0.1)
        except queue.Empty:
            continue
        try:
            if isinstance(reply, BaseException):
                raise reply
            if reply is STOPPED:
                continue
            answered(item, reply)
            in_a_row = in_a_row + 1 if isinstance(reply, GivenUp) else 0
            if in_a_row == GIVEN_UP_IN_A_ROW and isinstance(reply, GivenUp):
                raise ServerError(f"{client.address}: {in_a_row} requests in a row got no reply; the last: {reply.why}")
        except Exception as error:  # noqa: BLE001 (raised below, once the requests under way have ended)
            failed = failed or error
            end()
    if failed:
        raise failed
