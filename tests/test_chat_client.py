"""The chat client against a server that does everything wrong: nothing lost, nothing asked twice, nothing made up."""

import email.utils
import json
import logging
import threading
import time
from collections import Counter
from typing import Any

import pytest
from chat_server import ChatServer, prompt_of, says

from crpo_jax.chat import client as module
from crpo_jax.chat.client import Client, GivenUp, Reply, ServerError, ask_all, parse_retry_after
from crpo_jax.config import Endpoint
from crpo_jax.errors import InputError

KEY = "sk-a-very-secret-key"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def settings(server: ChatServer, **changed: Any) -> Endpoint:
    return Endpoint(**({"base_url": server.url, "model": "m", "timeout": 5.0, "retries": 3} | changed))


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def asked(server: ChatServer, texts: list[str], **changed: Any) -> dict[str, Reply | GivenUp]:
    found: dict[str, Reply | GivenUp] = {}
    with Client(settings(server, **changed), "judge") as client:
        ask_all(client, texts, turn, lambda text, reply: found.__setitem__(text, reply))
    return found


HUGE = b'{"choices": [' + b" " * 40_000
FAULTS = [
    (429, {"Retry-After": "0.05"}, b"{}"),
    (500, {}, b"<html>oops</html>"),
    (503, {"Retry-After": email.utils.formatdate(time.time() - 5)}, b""),
    (200, {}, b'{"choices": [{"mess'),
    (200, {}, b'{"error": "overloaded"}'),
    (200, {}, b'{"choices": []}'),
    (200, {}, b"[" * 5000),
    says(""),
    says(None),
    (200, {}, json.dumps({"choices": [{"message": {"content": ["a", "list"]}}]}).encode()),
    (200, {}, HUGE),
]


def test_every_fault_is_tried_again_and_every_answer_arrives_once():
    texts = [f"question {number}" for number in range(len(FAULTS))]

    def plan(request, times):
        return (
            FAULTS[texts.index(prompt_of(request))] if times < 2 else says(f"answer to {prompt_of(request)}", "because")
        )

    with ChatServer(plan) as server:
        found = asked(server, texts, max_reply_bytes=20_000)
        counts = Counter(map(prompt_of, server.requests))
    assert found == {text: Reply(f"answer to {text}", "because", "stop", {"total_tokens": 7}) for text in texts}
    assert set(counts.values()) == {3}


def test_a_silent_or_dribbling_server_is_left_in_time():
    def plan(request, times):
        if times == 0:
            time.sleep(1.5)
        return says("late")

    with ChatServer(plan) as server:
        began = time.monotonic()
        assert asked(server, ["a"], timeout=0.3, retries=1) == {"a": Reply("late", "", "stop", {"total_tokens": 7})}
        assert time.monotonic() - began < 1.4


def test_what_one_request_did_wrong_costs_that_request_alone():
    def plan(request, times):
        return (400, {}, b'{"error": "prompt too long"}') if prompt_of(request) == "b" else says("fine")

    with ChatServer(plan) as server:
        found = asked(server, ["a", "b", "c"])
        assert found["b"] == GivenUp('HTTP 400: {"error": "prompt too long"}')
        assert isinstance(found["a"], Reply)
        assert isinstance(found["c"], Reply)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_what_every_request_would_meet_ends_the_run_and_never_shows_the_key(status, caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(
        lambda request, times: (status, {"Location": "http://elsewhere/"}, f"wrong key {KEY}".encode())
    ) as server:
        with pytest.raises(ServerError) as caught:
            asked(server, [str(number) for number in range(50)], concurrency=2)
        assert len(server.requests) <= 4
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert "the key in OPENAI_API_KEY" in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text


def test_a_server_that_is_gone_ends_the_run():
    with (
        ChatServer(lambda request, times: (500, {}, f"{KEY}".encode())) as server,
        pytest.raises(ServerError, match="20 requests in a row") as caught,
    ):
        asked(server, [str(number) for number in range(500)], retries=0)
    assert KEY not in str(caught.value)
    with pytest.raises(ServerError, match="ConnectError"):
        asked(server, [str(number) for number in range(500)], retries=0)


def test_the_rate_limit_of_one_request_holds_back_all():
    moments = []

    def plan(request, times):
        moments.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, b"") if len(moments) == 1 else says("x")

    with ChatServer(plan) as server:
        asked(server, [str(number) for number in range(6)], concurrency=1)
    assert moments[1] - moments[0] >= 0.39
    assert len(moments) == 7


def test_a_server_that_asks_for_hours_is_not_waited_for():
    with ChatServer(lambda request, times: (429, {"Retry-After": "7200"}, b"quota")) as server:
        found = asked(server, ["a"])
        assert found == {"a": GivenUp("HTTP 429: quota; the server asks to wait 7200 seconds")}


def test_a_stop_asks_nothing_new_and_loses_nothing_under_way():
    started, found = threading.Event(), {}

    def plan(request, times):
        started.set()
        time.sleep(0.3)
        return says("x")

    with ChatServer(plan) as server, Client(settings(server, concurrency=4), "judge") as client:
        ask_all(
            client,
            [str(n) for n in range(40)],
            turn,
            lambda text, reply: found.__setitem__(text, reply),
            started.is_set,
        )
        assert sorted(found) == sorted(map(prompt_of, server.requests))
    assert 1 <= len(found) <= 8
    assert all(isinstance(reply, Reply) for reply in found.values())


def test_an_error_of_the_caller_reaches_it_after_the_replies_under_way():
    found = []

    def answered(text, reply):
        found.append(text)
        raise OSError("no room")

    with (
        ChatServer(lambda request, times: says("x")) as server,
        Client(settings(server, concurrency=3), "judge") as client,
        pytest.raises(OSError, match="no room"),
    ):
        ask_all(client, [str(n) for n in range(40)], turn, answered)
    assert len(found) < 12


def test_no_key_is_sent_where_there_is_none_and_parameters_are_as_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer(lambda request, times: says("x")) as server:
        asked(server, ["\ud800 lone"], sampling="omit", limit_name="max_completion_tokens", max_tokens=5)
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
def test_a_bad_address_is_named_before_anything_is_asked(changed, expected):
    with pytest.raises(InputError, match=expected) as caught:
        Client(Endpoint(**({"base_url": "http://h/v1", "model": "m"} | changed)), "judge")
    assert "secret" not in str(caught.value)


def test_retry_after_reads_seconds_and_dates():
    assert parse_retry_after("3") == 3
    assert 50 < (parse_retry_after(email.utils.formatdate(time.time() + 60)) or 0) <= 60
    assert [parse_retry_after(odd) for odd in (None, "", "soon", "-3")] == [None] * 4
