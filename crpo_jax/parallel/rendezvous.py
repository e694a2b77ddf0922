"""Where the processes of a run meet before jax.distributed connects them, and how they notice that one has ended.

Process 0 listens at the coordinator's address until every process has come and said who it is; then it leaves the
address to JAX's own service, which can say neither who is missing nor what differs, and aborts. The connections stay
open for the whole run: the kernel closes those of a process that ends, however it ends, at once.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from crpo_jax.errors import Fault, InputError
from crpo_jax.parallel.agreement import difference, process_names

PATIENCE = 8  # seconds of waiting until a line says for whom
REPEAT = 60  # seconds until it is said again
GRACE = 3  # seconds for the others to come and be refused as well, once it is clear that the run cannot start
LONGEST_MESSAGE = 1_000_000  # bytes
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 2}
"""A host that lost its power or its network closes nothing: after nine seconds without an answer it counts as gone."""

Message = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Member:
    """Who a process says it is, and what must be equal in all processes."""

    process: int
    processes: int
    host: str
    pid: int
    facts: Mapping[str, str]

    def __str__(self) -> str:
        return f"process {self.process} (pid {self.pid} on {self.host})"


class Connection:
    """Messages over a socket: JSON objects, one on a line."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # Linux
                channel.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.channel, self._unread = channel, b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the other end is gone, which `receive` reports
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """The messages that have arrived whole; EOFError where the other end is closed, ValueError for other bytes."""
        data = self.channel.recv(2**16)
        if not data:
            raise EOFError
        *lines, self._unread = (self._unread + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        readable = self._unread[:1] in (b"", b"{") and len(self._unread) < LONGEST_MESSAGE
        if not readable or not all(isinstance(message, dict) for message in messages):
            raise ValueError("expected JSON objects")
        return messages


class Wait:
    """Says for whom this process waits: after PATIENCE, and again after every REPEAT."""

    def __init__(self, seconds: float) -> None:
        self._deadline, self._next = time.monotonic() + seconds, time.monotonic() + PATIENCE

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def shorten(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def line(self, missing: str) -> str:
        return f"waiting for {missing}; gives up in {max(self.left, 0):.0f} seconds (--join-timeout)"

    def due(self) -> bool:
        due = time.monotonic() >= self._next
        self._next += REPEAT * due
        return due


# --- process 0 --------------------------------------------------------------------------------------------------------


class Reception:
    """Process 0 until all have come: who is there, and what is wrong with those who cannot take part."""

    def __init__(self, own: Member, say: Say) -> None:
        self._own, self._say, self._selector = own, say, selectors.DefaultSelector()
        self.members: dict[int, tuple[Member, Connection]] = {}
        self._problem, self._strangers = "", set[str]()

    def receive_all(
        self, listener: socket.socket, address: str, seconds: float
    ) -> dict[int, tuple[Member, Connection]]:
        """Every other process by its id, once all have come and have the same facts; InputError and Fault otherwise,
        in those that have come as well."""
        wait = Wait(seconds)
        with listener, self._selector as selector:
            selector.register(listener, selectors.EVENT_READ)
            while len(self.members) < self._own.processes - 1 and wait.left > 0:
                for key, _ in selector.select(min(max(wait.left, 0), 0.5)):
                    if key.fileobj is listener:
                        connection = Connection(listener.accept()[0])
                        selector.register(connection.channel, selectors.EVENT_READ, connection)
                    else:
                        self._receive(key.data, wait)
                if self._problem:
                    wait.shorten(GRACE)
                elif wait.due():
                    self._announce(wait.line(self._missing()))
            if self._problem:
                self._refuse(InputError(self._problem), 2)
            if missing := self._missing():
                hint = f"see the log there, and whether {address} can be reached; --join-timeout SECONDS waits longer"
                self._refuse(Fault(f"{missing} did not start within {seconds:g} seconds: {hint}"), 1)
            if different := difference([self._own.facts, *(self.members[i][0].facts for i in sorted(self.members))]):
                self._refuse(InputError(different), 2)
            for _, connection in self.members.values():
                connection.send(start=dataclasses.asdict(dataclasses.replace(self._own, facts={})))
        return self.members

    def _receive(self, connection: Connection, wait: Wait) -> None:
        try:
            for message in connection.receive():
                self._enter(Member(**message["member"]), connection)
        except (OSError, EOFError):
            self._selector.unregister(connection.channel)
            for process, (member, of_member) in list(self.members.items()):
                if of_member is connection:
                    del self.members[process]
                    self._announce(f"{member} has ended; {wait.line(self._missing())}")
        except (ValueError, KeyError, TypeError):  # not a process of this version of the package
            self._selector.unregister(connection.channel)
            host = connection.channel.getpeername()[0]
            if host not in self._strangers:  # it may try again every second
                self._say(f"refused a connection from {host} that is not from a process of this version of crpo_jax")
            self._strangers.add(host)
            connection.channel.close()

    def _enter(self, member: Member, connection: Connection) -> None:
        present, own = self.members, self._own
        other = own if member.process == 0 else present[member.process][0] if member.process in present else None
        if member.processes != own.processes:
            self._problem = (
                f"--processes: expected the same in every process, got {own.processes} in {own} "
                f"and {member.processes} in {member}"
            )
        elif other:
            where = f"(pid {other.pid} on {other.host}) and (pid {member.pid} on {member.host})"
            self._problem = f"--process: expected another id for each process, got {member.process} twice: {where}"
        else:
            present[member.process] = (member, connection)

    def _missing(self) -> str:
        numbers = [number for number in range(1, self._own.processes) if number not in self.members]
        return f"{process_names(numbers)} of {self._own.processes}" if numbers else ""

    def _announce(self, line: str) -> None:
        """To this process's log, and to those of all that have come."""
        self._say(line)
        for _, connection in self.members.values():
            connection.send(line=line)

    def _refuse(self, error: Exception, code: int) -> NoReturn:
        for key in self._selector.get_map().values():
            if key.data:
                key.data.send(refused=str(error), code=code)
        raise error


def listen(address: str) -> socket.socket:
    """A socket on the address's port, where JAX's service will listen too: on all interfaces, or where
    JAX_COORDINATOR_BIND_ADDRESS says."""
    host, port = split_address(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{split_address(address)[1]}")
    dual = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host and (dual or host != "::") else socket.AF_INET
    return socket.create_server(("" if host == "::" else host, port), family=family, backlog=1024, dualstack_ipv6=dual)


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


# --- the other processes ----------------------------------------------------------------------------------------------


def report_to_first(own: Member, address: str, seconds: float, say: Say) -> tuple[Member, Connection]:
    """Process 0 and the connection to it, once it says that all have come; InputError and Fault as it has them."""
    wait, reason = Wait(seconds), ""
    while wait.left > 0:
        try:
            channel = socket.create_connection(split_address(address), timeout=min(PATIENCE, wait.left))
            connection = Connection(channel)
            connection.send(member=dataclasses.asdict(own))
            channel.settimeout(1)
            first = await_start(connection, wait, address, say)
            channel.settimeout(None)
            return first, connection
        except EOFError:
            reason = "it has ended"
            say(f"process 0 at {address} has ended; {wait.line('process 0')}")
        except ValueError:
            raise InputError(
                f"--coordinator {address}: expected process 0 of a run that starts, got another program, or a run "
                "that has started without this process"
            ) from None
        except OSError as error:  # not there yet, or its name is not known yet
            reason = error.strerror or str(error)
        if wait.due():
            say(wait.line(f"process 0 at {address} ({reason})"))
        time.sleep(0.2)
    raise Fault(
        f"process 0 did not start at {address} within {seconds:g} seconds ({reason}): see its log, and whether that is "
        "its address; --join-timeout SECONDS waits longer"
    )


def await_start(connection: Connection, wait: Wait, address: str, say: Say) -> Member:
    """Process 0, once it says that the run starts. It says itself for whom it waits and when it gives up; where nothing
    is heard of it, this process gives up as well."""
    while wait.left > -PATIENCE:
        try:
            messages = connection.receive()
        except TimeoutError:
            continue
        for message in messages:
            if "start" in message:
                return Member(**message["start"])
            if "refused" in message:
                raise InputError(message["refused"]) if message["code"] == 2 else Fault(message["refused"])
            say(str(message.get("line")))
    raise Fault(f"process 0 at {address} answers, but says nothing; is it of another version of crpo_jax?")


# --- all of them, while the run goes on -------------------------------------------------------------------------------


def meet(address: str, own: Member, seconds: float, say: Say) -> "Peers":
    """The connections to the other processes, once all have come and have the same facts.

    Raises InputError where they cannot be one run, and Fault where some have not come in time, in all that have come.
    """
    if own.process:
        return Peers(own, {0: report_to_first(own, address, seconds, say)})
    try:
        listener = listen(address)
    except OSError as error:
        with contextlib.suppress(Fault):  # nobody is there who says which other process has this id
            report_to_first(own, address, GRACE, say)
        reason = error.strerror or error
        raise InputError(
            f"--coordinator {address}: process 0 cannot listen there: {reason}; take another port"
        ) from None
    return Peers(own, Reception(own, say).receive_all(listener, address, seconds))


class Peers:
    """The other processes as this one sees them: process 0 is connected to all, the others to process 0, which passes
    on what one of them says."""

    def __init__(self, own: Member, members: Mapping[int, tuple[Member, Connection]]) -> None:
        self.own, self._members = own, members

    def send(self, **message: Any) -> None:
        for _, connection in self._members.values():
            connection.send(**message)

    def watch(self, ended: Callable[[int, int, str], None], lost: Callable[[Member, str], None]) -> None:
        """Calls `ended` with process id, exit code and line when a process says why it ends, and `lost` when one ends
        without a word or cannot be reached; returns when all are done."""
        with selectors.DefaultSelector() as selector:
            for process, (_, connection) in self._members.items():
                selector.register(connection.channel, selectors.EVENT_READ, process)
            done: set[int] = set()
            while selector.get_map():
                for key, _ in selector.select():
                    member, connection = self._members[key.data]
                    try:
                        for message in connection.receive():
                            if message.get("done"):
                                done.add(member.process)
                            elif "ended" in message:
                                if self.own.process == 0:
                                    self.send(**message)
                                ended(message["process"], message["code"], message["ended"])
                    except (EOFError, OSError, ValueError) as error:
                        selector.unregister(connection.channel)
                        if member.process not in done:
                            lost(member, "" if isinstance(error, EOFError | ConnectionResetError) else str(error))
