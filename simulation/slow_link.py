"""A slow link to the broker: a TCP forwarder on loopback that delivers what the broker sends only after a while.

A device behind it still has its question on the way when the coordinator has long asked, so whoever injects faults can
tell in which stage of a round the device is. What the device sends, and that it has gone, arrives at once.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from types import TracebackType
from typing import Self

from simulation.broker_process import HOST

_READ_BYTES = 1 << 16
_POLL_S = 0.1


class SlowLink:
    """A running forwarder, as a context manager.

    Attributes:
        port: Where devices connect, on loopback.
    """

    def __init__(self, broker_port: int, *, delay_s: float) -> None:
        """Prepare a link to the broker on loopback; what it says takes `delay_s` seconds to arrive."""
        self._broker_port = broker_port
        self._delay_s = delay_s
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port = 0

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._listener = socket.create_server((HOST, 0))
        self._listener.settimeout(_POLL_S)
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cut every connection."""
        self._closing.set()
        self._threads[0].join()  # The one that makes connections and threads: now there will be no more of them.
        for each in self._sockets:
            _cut(each)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()
        self._listener.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                device, _ = self._listener.accept()
            except TimeoutError:
                continue
            device.settimeout(None)
            try:
                broker = socket.create_connection((HOST, self._broker_port))
            except OSError:
                device.close()  # No broker now: the device will try again.
                continue
            self._sockets += [device, broker]
            late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            self._start(self._forward_at_once, device, broker)
            self._start(self._read_into, broker, late)
            self._start(self._forward_late, late, device)

    def _forward_at_once(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(_READ_BYTES):
                target.sendall(content)
        _cut(target)

    def _read_into(self, source: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        content = b"-"
        while content:
            try:
                content = source.recv(_READ_BYTES)
            except OSError:
                content = b""
            late.put((time.monotonic() + self._delay_s, content))

    def _forward_late(self, late: queue.SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            due_s, content = late.get()
            while content:
                self._closing.wait(max(0.0, due_s - time.monotonic()))
                target.sendall(content)
                due_s, content = late.get()
        _cut(target)


def _cut(connection: socket.socket) -> None:
    """End both directions; whoever waits for this connection wakes up."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
