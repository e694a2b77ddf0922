"""The chat client against a server that does everything wrong: no reply is lost, requested twice or made up."""

import email.utils
import json
import logging
import threading
import time
from collections import Counter
from typing import Any

import pytest
from chat_server import ChatServer, complete, prompt_of

from crpo_jax.chat import client as client_module
from crpo_jax.chat.client import Client, GivenUp, Reply, ServerError, ask_all, parse_retry_after
from crpo_jax.config import Endpoint
from crpo_jax.errors import InputError

KEY = "sk-a-very-secret-key"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def settings(server: ChatServer, **changed: Any) -> Endpoint:
    return Endpoint(**({"base_url": server.url, "model": "m", "timeout": 5.0, "retries": 3} | changed))


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask_texts(server: ChatServer, texts: list[str], **changed: Any) -> dict[str, Reply | GivenUp]:
    replies: dict[str, Reply | GivenUp] = {}
    with Client(settings(server, **changed), "judge") as client:
        ask_all(client, texts, turn, lambda text, reply: replies.__setitem__(text, reply))
    return replies


HUGE = b'{"choices": [' + b" " * 40_000
FAULTS = [
    (429, {"Retry-After": "0.05"}, b"{}"),
    (500, {}, b"<html>oops</html>"),
    (503, {"Retry-After": email.utils.formatdate(time.time() - 5)}, b""),
    (200, {}, b'{"choices": [{"mess'),
    (200, {}, b'{"error": "overloaded"}'),
    (200, {}, b'{"choices": []}'),
    (200, {}, b"[" * 5000),
    complete(""),
    complete(None),
    (200, {}, json.dumps({"choices": [{"message": {"content": ["a", "list"]}}]}).encode()),
    (200, {}, HUGE),
]


def test_every_fault_is_retried_and_every_reply_arrives_once():
    texts = [f"question {number}" for number in range(len(FAULTS))]

    def plan(request, times):
        return (
            FAULTS[texts.index(prompt_of(request))]
            if times < 2
            else complete(f"answer to {prompt_of(request)}", "because")
        )

    with ChatServer(plan) as server:
        replies = ask_texts(server, texts, max_reply_bytes=20_000)
        counts = Counter(map(prompt_of, server.requests))
    assert replies == {text: Reply(f"answer to {text}", "because", "stop", {"total_tokens": 7}) for text in texts}
    assert set(counts.values()) == {3}


def test_a_silent_server_times_out():
    def plan(request, times):
        if times == 0:
            time.sleep(1.5)
        return complete("late")

    with ChatServer(plan) as server:
        began = time.monotonic()
        assert ask_texts(server, ["a"], timeout=0.3, retries=1) == {"a": Reply("late", "", "stop", {"total_tokens": 7})}
        assert time.monotonic() - began < 1.4


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_that_never_ends_times_out(status):
    def dribble():
        while True:
            time.sleep(0.05)
            yield b" "

    with ChatServer(lambda request, times: (status, {}, dribble())) as server:
        began = time.monotonic()
        replies = ask_texts(server, ["a"], timeout=0.3, retries=0)
    assert replies == {"a": GivenUp("no whole reply within judge.timeout=0.3 seconds, 1 times")}
    assert time.monotonic() - began < 1.4


def test_a_rejected_request_is_given_up_alone():
    def plan(request, times):
        return (400, {}, b'{"error": "prompt too long"}') if prompt_of(request) == "b" else complete("fine")

    with ChatServer(plan) as server:
        replies = ask_texts(server, ["a", "b", "c"])
        assert replies["b"] == GivenUp('HTTP 400: {"error": "prompt too long"}')
        assert isinstance(replies["a"], Reply)
        assert isinstance(replies["c"], Reply)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_an_error_for_every_request_ends_the_run_and_hides_the_key(status, caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(
        lambda request, times: (status, {"Location": "http://elsewhere/"}, f"wrong key {KEY}".encode())
    ) as server:
        with pytest.raises(ServerError) as caught:
            ask_texts(server, [str(number) for number in range(50)], concurrency=2)
        assert len(server.requests) <= 4
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert "the key in OPENAI_API_KEY" in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text


def test_a_server_that_stops_replying_ends_the_run():
    with (
        ChatServer(lambda request, times: (500, {}, f"{'x' * 290} {KEY}".encode())) as server,
        pytest.raises(ServerError, match="20 requests in a row") as caught,
    ):
        ask_texts(server, [str(number) for number in range(500)], retries=0)
    assert KEY[:5] not in str(caught.value), "not even where the message is cut"
    with pytest.raises(ServerError, match="ConnectError"):
        ask_texts(server, [str(number) for number in range(500)], retries=0)


def test_the_rate_limit_of_one_request_holds_back_all():
    moments = []

    def plan(request, times):
        moments.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, b"") if len(moments) == 1 else complete("x")

    with ChatServer(plan) as server:
        ask_texts(server, [str(number) for number in range(6)], concurrency=1)
    assert moments[1] - moments[0] >= 0.39
    assert len(moments) == 7


def test_a_request_that_must_wait_for_hours_is_given_up():
    with ChatServer(lambda request, times: (429, {"Retry-After": "7200"}, b"quota")) as server:
        replies = ask_texts(server, ["a"])
        assert replies == {"a": GivenUp("HTTP 429: quota; the server asks to wait 7200 seconds")}


def test_a_stop_sends_nothing_new_and_keeps_the_replies_in_flight():
    started, replies = threading.Event(), {}

    def plan(request, times):
        started.set()
        time.sleep(0.3)
        return complete("x")

    with ChatServer(plan) as server, Client(settings(server, concurrency=4), "judge") as client:
        ask_all(
            client,
            [str(n) for n in range(40)],
            turn,
            lambda text, reply: replies.__setitem__(text, reply),
            started.is_set,
        )
        assert sorted(replies) == sorted(map(prompt_of, server.requests))
    assert 1 <= len(replies) <= 8
    assert all(isinstance(reply, Reply) for reply in replies.values())


def test_an_error_in_on_reply_is_raised_after_the_replies_in_flight():
    replies = []

    def on_reply(text, reply):
        replies.append(text)
        raise OSError("no room")

    with (
        ChatServer(lambda request, times: complete("x")) as server,
        Client(settings(server, concurrency=3), "judge") as client,
        pytest.raises(OSError, match="no room"),
    ):
        ask_all(client, [str(n) for n in range(40)], turn, on_reply)
    assert len(replies) < 12


def test_without_a_key_none_is_sent_and_parameters_are_as_configured(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer(lambda request, times: complete("x")) as server:
        ask_texts(server, ["\ud800 lone"], sampling="omit", limit_name="max_completion_tokens", max_tokens=5)
        assert "Authorization" not in server.headers[0]
        assert server.requests == [{"model": "m", "max_completion_tokens": 5, "messages": turn("\ud800 lone")}]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"base_url": "localhost:8000"}, "judge.base_url: expected an address such as"),
        ({"base_url": ""}, "judge.base_url: expected an address such as"),
        ({"base_url": "http://user:secret@host/v1"}, "judge.base_url: expected no user, password or query"),
        ({"model": ""}, "judge.model: expected the name of a model"),
    ],
)
def test_a_bad_address_is_named_before_anything_is_sent(changed, expected):
    with pytest.raises(InputError, match=expected) as caught:
        Client(Endpoint(**({"base_url": "http://h/v1", "model": "m"} | changed)), "judge")
    assert "secret" not in str(caught.value)


def test_retry_after_reads_seconds_and_dates():
    assert parse_retry_after("3") == 3
    assert 50 < (parse_retry_after(email.utils.formatdate(time.time() + 60)) or 0) <= 60
    assert [parse_retry_after(odd) for odd in (None, "", "soon", "-3")] == [None] * 4
