"""Chat completions from any OpenAI-compatible server, many requests at a time; no reply is lost or requested twice.

Time-outs, broken connections, 429, 5xx and replies that are malformed or larger than `max_reply_bytes` are retried
after a growing pause, or after the one that Retry-After names, which all requests observe. 400, 413 and 422 concern one
request, which is given up. 401, 403, 404 and the like would meet every request and end the run. A request that is given
up leaves nothing on disk: it is counted, and the next run sends it again.
"""

import email.utils
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import httpx2

from crpo_jax.config import Endpoint
from crpo_jax.errors import Fault, InputError

Request = TypeVar("Request")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds, doubled from one try to the next
LONGEST_CONNECT = 30.0  # seconds
LONGEST_RETRY_AFTER = 900.0  # seconds; a request whose server names a longer pause is given up
GIVEN_UP_IN_A_ROW = 20  # requests given up without a reply between them: the server is down, not unlucky
RETRYABLE_STATUSES = frozenset({408, 409, 425, 429})
REJECTED_STATUSES = frozenset({400, 413, 422})  # this request is at fault, others may succeed


@dataclass(frozen=True)
class Reply:
    """A chat completion; `reasoning` is empty unless the server sends it apart from the content."""

    content: str
    reasoning: str
    finish_reason: str
    usage: Mapping[str, Any]


@dataclass(frozen=True)
class GivenUp:
    """A request without a reply."""

    reason: str


STOPPED = GivenUp("stopped")  # not sent: no failure of the server's


class ServerError(Fault):
    """No request to this server can succeed: the run ends, and every reply so far stays on disk."""


class FailedTry(Exception):
    """A try that failed where the next may succeed; `retry_after` is the pause the server asks for, in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Client:
    """One endpoint: its URL, its key and the pause its rate limit imposes. A context manager; `ask` is thread-safe.

    The key comes from the environment variable that the settings name. It is sent in the Authorization header of
    requests to this URL and nowhere else: redirects are not followed, and a reply that repeats it has it removed.
    """

    def __init__(self, settings: Endpoint, section: str) -> None:
        self.settings, self.section = settings, section
        self.url = completions_url(settings.base_url, section)
        if not settings.model:
            raise InputError(f"{section}.model: expected the name of a model on {settings.base_url}, got none")
        self._key = os.environ.get(settings.key_variable, "").strip() if settings.key_variable else ""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._http = httpx2.Client(headers=headers, limits=limits, follow_redirects=False)
        self._stopped, self._lock, self._not_before = threading.Event(), threading.Lock(), 0.0

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._http.close()

    def stop(self) -> None:
        """Ends all pauses; no further try begins."""
        self._stopped.set()

    def ask(self, messages: Sequence[Mapping[str, str]], limit: float = math.inf) -> Reply | GivenUp:
        """The reply, after up to `retries` more tries within `limit` seconds; ServerError if no request can succeed."""
        body = json.dumps(request_parameters(self.settings) | {"messages": list(messages)}).encode()
        reason, deadline = "the server's rate limit", time.monotonic() + limit
        for attempt in range(self.settings.retries + 1):
            while (seconds := min(self._not_before, deadline) - time.monotonic()) > 0:
                if self._stopped.wait(seconds):
                    break
            if self._stopped.is_set():
                return STOPPED
            if (left := deadline - time.monotonic()) <= 0:
                return GivenUp(f"{reason}, given up after {limit:g} seconds")
            try:
                return self._send(body, left)
            except FailedTry as failure:
                reason, retry_after = str(failure), failure.retry_after
            if attempt < self.settings.retries:
                if retry_after is not None and retry_after > LONGEST_RETRY_AFTER:
                    return GivenUp(f"{reason}; the server asks to wait {retry_after:.0f} seconds")
                self._pause(attempt, retry_after, deadline)
        return GivenUp(f"{reason}, {self.settings.retries + 1} times")

    def _pause(self, attempt: int, retry_after: float | None, deadline: float) -> None:
        if retry_after is None:
            # With jitter: a server that recovers is not hit by all requests at once.
            seconds = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            self._stopped.wait(max(0.0, min(seconds, deadline - time.monotonic())))
        else:
            with self._lock:  # the rate limit is that of the key, not of this request
                self._not_before = max(self._not_before, time.monotonic() + retry_after)

    def _send(self, body: bytes, left: float) -> Reply | GivenUp:
        """One try, with limits on the whole reply, errors included: httpx2 only limits the time between two chunks."""
        limit = min(self.settings.timeout, left)
        name = f"{self.section}.timeout=" if limit < left else ""
        late = f"no whole reply within {name}{limit:.4g} seconds"
        deadline, timeout = time.monotonic() + limit, httpx2.Timeout(limit, connect=min(limit, LONGEST_CONNECT))
        data = bytearray()
        try:
            with self._http.stream("POST", self.url, content=body, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > self.settings.max_reply_bytes:
                        limit = f"{self.section}.max_reply_bytes={self.settings.max_reply_bytes}"
                        raise FailedTry(f"a reply of more than {limit} bytes")
                    if time.monotonic() > deadline:
                        raise FailedTry(late)
        except httpx2.TimeoutException:
            raise FailedTry(late) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            text = f"{type(error).__name__}: {error}"  # which quotes a key that is no valid header
            raise FailedTry(text.replace(self._key, "[key]") if self._key else text) from None
        reply = bytes(data).replace(self._key.encode(), b"[key]") if self._key else bytes(data)
        status = response.status_code
        if status == 200:
            return parse_completion(reply)
        text = f"HTTP {status}: {' '.join(reply[:300].decode('utf-8', 'replace').split())}"
        if status in RETRYABLE_STATUSES or status >= 500:
            raise FailedTry(text, parse_retry_after(response.headers.get("retry-after")))
        if status in REJECTED_STATUSES:
            return GivenUp(text)
        variable = self.settings.key_variable
        key = f"the key in {variable}" if self._key else f"no key in {variable or 'any variable'}"
        raise ServerError(f"{self.url}, model {self.settings.model}, {key}: {text}")


def completions_url(base_url: str, section: str) -> str:
    """Where requests go; base_url ends with /v1, as servers print it."""
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{section}.base_url: expected an address such as http://localhost:8000/v1, got {base_url!r}")
    if url.userinfo or url.query:
        expected = (
            f"no user, password or query in the address; a key belongs in the variable {section}.key_variable names"
        )
        raise InputError(f"{section}.base_url: expected {expected}")
    return base_url.rstrip("/") + "/chat/completions"


def request_parameters(settings: Endpoint) -> dict[str, Any]:
    """The settings that shape a reply; with the messages they identify a reply on disk."""
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.sampling == "send" else {}
    return {"model": settings.model, settings.limit_name: settings.max_tokens, **sampling}


def parse_completion(data: bytes) -> Reply:
    """The first choice of a chat completion; FailedTry if there is none or it has no text."""
    try:
        completion = json.loads(data)
        choice = completion["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise FailedTry(f"a reply that is no chat completion: {data[:120]!r}") from None
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise FailedTry(f"a reply whose text is no string: {data[:120]!r}")
    if not content and not reasoning:
        raise FailedTry("a reply without text")
    usage = completion.get("usage")
    return Reply(content, reasoning, str(choice.get("finish_reason") or ""), usage if isinstance(usage, dict) else {})


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait according to a Retry-After header, which holds a number or a date; None if it is unreadable."""
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
    requests: Sequence[Request],
    messages: Callable[[Request], Sequence[Mapping[str, str]]],
    on_reply: Callable[[Request, Reply | GivenUp], None],
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Sends every request, `concurrency` at a time, and calls `on_reply` in the caller's thread as each reply arrives.

    Once `stopping` returns true, or `on_reply` or the server fails, no new request is sent, and `on_reply` still gets
    the replies to those in flight: they are paid for. While `on_reply` blocks, on a full disk for instance, nothing new
    is sent. ServerError if the server refuses every request or has stopped replying.
    """
    width, remaining = client.settings.concurrency, iter(requests)
    failure: Exception | None = None
    given_up = 0
    with ThreadPoolExecutor(width, thread_name_prefix=client.section) as threads:
        in_flight: dict[Future[Reply | GivenUp], Request] = {}
        while True:
            if failure or stopping():
                client.stop()
            else:
                for request in islice(remaining, width - len(in_flight)):
                    in_flight[threads.submit(client.ask, messages(request))] = request
            if not in_flight:
                break
            for future in wait(in_flight, timeout=0.1, return_when=FIRST_COMPLETED).done:
                request = in_flight.pop(future)
                try:
                    reply = future.result()
                    if reply is STOPPED:
                        continue
                    on_reply(request, reply)
                    given_up = given_up + 1 if isinstance(reply, GivenUp) else 0
                    if given_up == GIVEN_UP_IN_A_ROW and isinstance(reply, GivenUp):
                        why = f"{given_up} requests in a row got no reply; the last: {reply.reason}"
                        raise ServerError(f"{client.url}: {why}")
                except Exception as error:  # noqa: BLE001 (raised below, once the requests in flight have ended)
                    failure = failure or error
    if failure:
        raise failure
