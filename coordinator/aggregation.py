"""Upload slots: which devices may upload their masked vector now, and the vectors that are being assembled.

A vector is held only while its device has a slot; when it is whole and verified it leaves this module for the
accumulator in one piece. The memory needed is `limit` vectors, whatever the cohort's size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from sottovoce.errors import RemoteProtocolError
from sottovoce.secagg.uploads import ExpectedVector
from sottovoce.wire.chunks import Assembly, Chunk
from sottovoce.wire.messages import UploadSlot


class NoSlot(RemoteProtocolError):
    """A chunk of a device that holds no upload slot."""

    reason = "no_slot"


@dataclass(slots=True)
class _Upload:
    assembly: Assembly[ExpectedVector]
    moved_ms: int


class UploadSlots:
    """First come, first served; a slot that stands still while others wait goes to the next in the queue.

    Args:
        limit: How many devices may upload at once.
        idle_ms: A slot without a new chunk for so long may be taken back.
    """

    def __init__(self, *, limit: int, idle_ms: int) -> None:
        self._limit = limit
        self._idle_ms = idle_ms
        self._waiting: OrderedDict[str, ExpectedVector] = OrderedDict()
        self._uploads: dict[str, _Upload] = {}
        self._done: dict[str, int] = {}

    def enqueue(self, device: str, ref: ExpectedVector) -> None:
        """Put `device` into the queue with the vector it announced; a repeat changes nothing."""
        if device not in self._uploads and device not in self._done:
            self._waiting.setdefault(device, ref)

    def grant(self, now_ms: int, *, offline: Callable[[str], bool]) -> list[str]:
        """Give free slots to the queue, connected devices first; return who got one."""
        free = self._limit - len(self._uploads)
        if free <= 0 or not self._waiting:
            return []
        # It looks no further into the queue than the slots reach: thousands may wait, and this runs for each of them.
        granted = list(islice((device for device in self._waiting if not offline(device)), free))
        if len(granted) < free:
            granted += islice((device for device in self._waiting if offline(device)), free - len(granted))
        for device in granted:
            ref = self._waiting.pop(device)  # Of the session's own size, which is the plan's, not the device's.
            self._uploads[device] = _Upload(Assembly(ref, max_bytes=ref.size), now_ms)
        return granted

    def add_chunk(self, device: str, index: int, content: Chunk, now_ms: int) -> Assembly[ExpectedVector] | None:
        """Put a chunk in its place; return the vector's assembly when this was the last one.

        A chunk that comes once more after its vector was complete changes nothing.

        Raises:
            NoSlot: The device holds no slot.
            BadBlob: The chunk does not match the tag that the device signed.
        """
        if device in self._done:
            return None
        upload = self._uploads.get(device)
        if upload is None:
            raise NoSlot(f"{device} holds no upload slot")
        missing = upload.assembly.missing_count
        if not upload.assembly.add(index, content):
            if upload.assembly.missing_count < missing:  # A chunk sent again is no progress.
                upload.moved_ms = now_ms
            return None
        del self._uploads[device]
        self._done[device] = upload.assembly.ref.chunk_count
        return upload.assembly

    def progress(self, device: str) -> UploadSlot | None:
        """Return what to tell `device`: which chunks are here, or None while it waits in the queue."""
        if device in self._done:
            return UploadSlot(received=_all_ones(self._done[device]), complete=True)
        upload = self._uploads.get(device)
        return UploadSlot(received=upload.assembly.bitmap(), complete=False) if upload else None

    def reclaim(self, now_ms: int, *, offline: Callable[[str], bool]) -> list[str]:
        """Take back idle slots, and slots of devices gone offline, while connected devices wait; return whose.

        Such a device goes to the end of the queue, and what it had uploaded is freed.
        """
        stuck = [d for d, u in self._uploads.items() if offline(d) or now_ms - u.moved_ms >= self._idle_ms]
        claims = sum(1 for _ in islice((device for device in self._waiting if not offline(device)), len(stuck)))
        taken = sorted(stuck, key=lambda device: self._uploads[device].moved_ms)[:claims]
        for device in taken:
            self._waiting[device] = self._uploads.pop(device).assembly.ref
        return taken

    def next_deadline_ms(self) -> int | None:
        """Return when the next slot may be taken back for standing still, None if nobody waits."""
        if not self._waiting or not self._uploads:
            return None
        return min(upload.moved_ms for upload in self._uploads.values()) + self._idle_ms

    def discard(self, device: str) -> None:
        """Forget a device that left, and free what it had uploaded."""
        self._waiting.pop(device, None)
        self._uploads.pop(device, None)

    def close(self) -> None:
        """Free everything unfinished: the survivor set is closed."""
        self._waiting.clear()
        self._uploads.clear()


def _all_ones(count: int) -> bytes:
    return ((1 << count) - 1).to_bytes(-(-count // 8), "little")
