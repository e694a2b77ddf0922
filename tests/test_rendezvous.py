"""Processes that meet: who is missing, who cannot take part, who has ended. Threads stand for the processes."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from pair import free_port

from crpo_jax.errors import Fault, InputError
from crpo_jax.parallel import rendezvous
from crpo_jax.parallel.agreement import difference
from crpo_jax.parallel.rendezvous import Connection, Member, Peers, meet


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.3)
    monkeypatch.setattr(rendezvous, "GRACE", 0.5)


def member(process: int, processes: int = 2, **facts: str) -> Member:
    return Member(process, processes, f"host{process}", 100 + process, facts)


def outcomes(*members: Member, seconds: float = 20, port: int | None = None) -> list[tuple[Any, list[str]]]:
    """What `meet` returns or raises in each process, and what it says there."""
    address = f"127.0.0.1:{port or free_port()}"

    def run(own: Member) -> tuple[Any, list[str]]:
        said: list[str] = []
        try:
            return meet(address, own, seconds, said.append), said
        except (InputError, Fault) as error:
            return error, said

    with ThreadPoolExecutor(len(members)) as threads:
        return list(threads.map(run, members))


def close(peers: Peers) -> None:
    for _, connection in peers._members.values():
        connection.channel.close()


# --- what differs -----------------------------------------------------------------------------------------------------


def test_a_difference_names_the_key_the_values_and_their_processes():
    same = {"jax": "0.10", "seed": "0"}
    assert difference([same, same, same]) is None
    assert difference([same, same | {"seed": "1"}, same, same | {"seed": "1"}]) == (
        "seed: expected the same in every process, got 0 in processes 0 and 2 and 1 in processes 1 and 3"
    )
    assert difference([same, {"jax": "0.10"}]) == (
        "seed: expected the same in every process, got 0 in process 0 and nothing in process 1"
    )
    many = [{str(key): str(process) for key in range(9)} for process in range(12)]
    assert difference([same, *[same | {"seed": "1"}] * 11]).endswith("1 in processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more")
    assert difference(many).endswith("; also different: 1, 2, 3 and 5 more")


def test_processes_with_other_facts_are_refused_alike():
    ended = outcomes(*(member(process, 3, jax="0.11" if process == 2 else "0.10") for process in range(3)))
    line = "jax: expected the same in every process, got 0.10 in processes 0 and 1 and 0.11 in process 2"
    assert [(type(error), str(error)) for error, _ in ended] == [(InputError, line)] * 3


def test_equal_processes_meet():
    met = [peers for peers, _ in outcomes(*(member(process, 3, jax="0.10") for process in range(3)))]
    assert [sorted(peers._members) for peers in met] == [[1, 2], [0], [0]]
    for peers in met:
        close(peers)


# --- who is missing ---------------------------------------------------------------------------------------------------


def test_a_missing_process_is_named_to_all_that_wait():
    ended = outcomes(member(0, 4), member(2, 4), seconds=1)
    for error, said in ended:
        assert isinstance(error, Fault)
        assert str(error).startswith("processes 1 and 3 of 4 did not start within 1 seconds")
        assert "--join-timeout" in str(error)
        assert said[0].startswith("waiting for processes 1 and 3 of 4; gives up in ")


def test_a_missing_process_0_is_named_with_its_address_and_the_reason():
    """Also what a process with a wrong port says."""
    port = free_port()
    [(error, said)] = outcomes(member(1), seconds=1, port=port)
    assert isinstance(error, Fault)
    assert str(error).startswith(f"process 0 did not start at 127.0.0.1:{port} within 1 seconds (Connection refused)")
    assert said[0].startswith(f"waiting for process 0 at 127.0.0.1:{port} (Connection refused); gives up in ")


def test_a_process_that_ends_while_the_others_start_is_named_and_may_come_back():
    port = free_port()

    def come_and_go() -> list[tuple[Any, list[str]]]:
        while True:
            try:
                channel = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                time.sleep(0.05)
        with closing(channel):
            hello = {"process": 2, "processes": 4, "host": "host2", "pid": 102, "facts": {}}
            channel.sendall(json.dumps({"member": hello}).encode() + b"\n")
            time.sleep(0.3)
        time.sleep(0.3)
        return outcomes(member(2, 4), member(3, 4), port=port)

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(come_and_go)
        met = [*outcomes(member(0, 4), member(1, 4), port=port), *future.result()]
    for _, said in met[:2]:
        assert any(
            line.startswith("process 2 (pid 102 on host2) has ended; waiting for processes 2 and 3 of 4")
            for line in said
        )
    for peers, _ in met:
        close(peers)


def test_process_0_that_ends_while_the_others_start_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def accept_and_end() -> None:
            channel, _ = server.accept()
            channel.recv(1000)
            server.close()
            channel.close()

        threading.Thread(target=accept_and_end).start()
        [(error, said)] = outcomes(member(1), seconds=1, port=port)
    assert isinstance(error, Fault)
    assert said[0].startswith(f"process 0 at 127.0.0.1:{port} has ended; waiting for process 0; gives up in ")


# --- who cannot take part ---------------------------------------------------------------------------------------------


def test_an_id_that_two_processes_have_is_refused():
    ended = outcomes(member(0, 3), member(1, 3), member(1, 3))
    line = "--process: expected another id for each process, got 1 twice: (pid 101 on host1) and (pid 101 on host1)"
    assert [(type(error), str(error)) for error, _ in ended] == [(InputError, line)] * 3


def test_two_processes_0_on_one_host_are_refused():
    ended = outcomes(member(0), member(0))
    line = "--process: expected another id for each process, got 0 twice: (pid 100 on host0) and (pid 100 on host0)"
    assert [(type(error), str(error)) for error, _ in ended] == [(InputError, line)] * 2


def test_another_number_of_processes_is_refused():
    ended = outcomes(member(0, 2), member(1, 3))
    line = (
        "--processes: expected the same in every process, got 2 in process 0 (pid 100 on host0) "
        "and 3 in process 1 (pid 101 on host1)"
    )
    assert [(type(error), str(error)) for error, _ in ended] == [(InputError, line)] * 2


def test_a_port_that_another_program_has_is_refused():
    def answer(server: socket.socket, reply: bytes) -> None:
        while True:
            try:
                channel, _ = server.accept()
            except OSError:
                return
            with closing(channel):
                channel.recv(1000)
                channel.sendall(reply)

    for reply in (b"HTTP/1.1 400 Bad Request\r\n", b"\x00\x00\x12\x04"):  # the second as of a gRPC server
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=answer, args=(server, reply), daemon=True).start()
            port = server.getsockname()[1]
            ended = [outcomes(member(process), seconds=2, port=port)[0][0] for process in (0, 1)]
            server.shutdown(socket.SHUT_RDWR)
        assert [type(error) for error in ended] == [InputError] * 2
        assert all(str(error).startswith(f"--coordinator 127.0.0.1:{port}: expected process 0 of a") for error in ended)


def test_a_stranger_is_turned_away_and_the_others_meet():
    port, lines = free_port(), []

    def knock() -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as channel:
                    channel.sendall(b"PRI * HTTP/2.0\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.02)

    def late() -> Any:
        knock()
        time.sleep(0.2)
        return outcomes(member(1), port=port)[0][0]

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(late)
        [(peers, lines)] = outcomes(member(0), port=port)
    assert lines == [
        "refused a connection from ::ffff:127.0.0.1 that is not from a process of this version of crpo_jax"
    ]
    close(peers)
    close(future.result())


# --- who has ended ----------------------------------------------------------------------------------------------------


def test_process_0_notices_how_each_process_ends_and_passes_it_on():
    """Process 1 says why it ends, process 2 is done, process 3 ends without a word; process 4 hears of process 1."""
    near, far = zip(*(socket.socketpair(socket.AF_UNIX) for _ in range(4)), strict=True)
    ends = [Connection.__new__(Connection) for _ in range(8)]
    for connection, channel in zip(ends, [*near, *far], strict=True):
        connection.channel, connection._unread = channel, b""
    first, others = ends[:4], ends[4:]
    peers = Peers(member(0, 5), {i + 1: (member(i + 1, 5), first[i]) for i in range(4)})
    ended, lost = [], []
    thread = threading.Thread(
        target=peers.watch, args=(lambda *what: ended.append(what), lambda who, why: lost.append((who.process, why)))
    )
    thread.start()
    others[0].send(ended="bad input", process=1, code=2)
    others[1].send(done=True)
    time.sleep(0.1)
    heard = others[3].receive()
    for connection in others:
        connection.channel.close()
    thread.join(10)
    assert ended == [(1, 2, "bad input")]
    assert heard == [{"ended": "bad input", "process": 1, "code": 2}]
    assert sorted(lost) == [(1, ""), (3, ""), (4, "")]
