"""The cache of blobs on the device's disk."""

from __future__ import annotations

import os

import pytest

from edge_agent.blobs import BlobCache
from sottovoce.blobs import digest_of
from sottovoce.errors import BadBlob


def put(cache: BlobCache, content: bytes, *, at_s: int | None = None) -> bytes:
    digest = digest_of(content)
    cache.put(digest, content)
    if at_s is not None:
        os.utime(cache._folder / digest.hex(), (at_s, at_s))
    return digest


def test_what_was_put_is_there_also_for_the_next_process(tmp_path):
    digest = put(BlobCache(tmp_path / "blobs"), b"content")
    assert BlobCache(tmp_path / "blobs").get(digest) == b"content"
    assert BlobCache(tmp_path / "blobs").get(bytes(32)) is None


def test_content_of_another_digest_is_refused(tmp_path):
    with pytest.raises(BadBlob):
        BlobCache(tmp_path).put(bytes(32), b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_torn_file_is_a_miss_and_is_removed(tmp_path):
    cache = BlobCache(tmp_path)
    digest = put(cache, b"content")
    (tmp_path / digest.hex()).write_bytes(b"cont")
    assert cache.get(digest) is None
    assert list(tmp_path.iterdir()) == []
    put(cache, b"content")
    assert cache.get(digest) == b"content"


def test_what_an_interrupted_write_has_left_is_removed(tmp_path):
    (tmp_path / "x.partial").write_bytes(b"half")
    digest = put(BlobCache(tmp_path), b"content")
    BlobCache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [digest.hex()]


def test_the_longest_unused_make_room(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=30)
    first, second, third = (put(cache, letter * 10, at_s=at_s) for at_s, letter in ((1, b"a"), (2, b"b"), (3, b"c")))
    assert cache.get(first) == b"a" * 10  # Used just now, so the second is the longest unused.
    put(cache, b"d" * 15)
    assert [cache.get(digest) is not None for digest in (first, second, third)] == [True, False, False]
    assert cache.size_bytes() == 25


def test_the_same_blob_again_costs_nobody_a_place(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=20)
    first, second = put(cache, b"a" * 10), put(cache, b"b" * 10)
    put(cache, b"b" * 10)
    assert (cache.get(first), cache.get(second)) == (b"a" * 10, b"b" * 10)


def test_a_blob_larger_than_the_cache_pushes_nothing_out(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=20)
    first = put(cache, b"a" * 10)
    assert cache.get(put(cache, b"b" * 21)) is None
    assert cache.get(first) is not None
