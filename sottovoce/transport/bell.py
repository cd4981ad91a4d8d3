"""How one thread wakes another that waits in a selector."""

from __future__ import annotations

import contextlib
import socket
import threading


class Bell:
    """A pair of sockets by which one thread wakes another out of a selector."""

    def __init__(self) -> None:
        self._listening, self._ringing = socket.socketpair()
        self._listening.setblocking(False)
        self._ringing.setblocking(False)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The file descriptor that becomes readable; for selectors."""
        return self._listening.fileno()

    def ring(self) -> None:
        """Make the bell readable; harmless when it already is, or is closed."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._ringing.fileno() >= 0:
                self._ringing.send(b"!")

    def clear(self) -> None:
        """Make the bell unreadable again."""
        with contextlib.suppress(BlockingIOError):
            while len(self._listening.recv(4096)) == 4096:
                pass

    def close(self) -> None:
        """Free both sockets."""
        with self._lock:
            self._listening.close()
            self._ringing.close()
