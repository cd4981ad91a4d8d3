"""Two identities of one fleet, and hypothesis strategies made from the message types themselves."""

from __future__ import annotations

import datetime
import random
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import strategies as st

from sottovoce.authority import create_authority, sign_request
from sottovoce.blobs import BlobRef, blob_ref
from sottovoce.identity import Identity, Role, TrustAnchor, new_key, signing_request
from sottovoce.wire.messages import Message, TaggedVector

AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
FLEET = "choir"


@dataclass(frozen=True)
class Fleet:
    device: Identity
    other: Identity
    coordinator: Identity


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    authority = create_authority(tmp_path_factory.mktemp("wire-ca"), fleet=FLEET, at=AT)
    anchor = TrustAnchor(authority.certificate)

    def identity(name: str, role: Role) -> Identity:
        key = new_key()
        request = signing_request(key, name=name, fleet=FLEET, role=role)
        issued = sign_request(authority, request, at=AT, role=role)
        der = x509.load_pem_x509_certificate(issued.pem).public_bytes(Encoding.DER)
        return Identity(key, anchor.verify(der, at=AT))

    return Fleet(identity("pi-1", "device"), identity("pi-2", "device"), identity("coordinator", "coordinator"))


def _blob_refs() -> st.SearchStrategy[BlobRef]:
    return st.builds(
        lambda content, step: blob_ref(content, chunk_bytes=step), st.binary(max_size=99), st.integers(1, 40)
    )


def _tagged_vectors() -> st.SearchStrategy[TaggedVector]:
    def vector(size: int, step: int, seed: int) -> TaggedVector:
        chunks = max(1, -(-size // step))
        return TaggedVector(size=size, chunk_bytes=step, tags=random.Random(seed).randbytes(16 * chunks))

    return st.builds(vector, st.integers(0, 200), st.integers(1, 40), st.integers(0, 2**32))


def values_of(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Return a strategy for every value of the type `kind`, so that a new field is tested without anybody's doing."""
    match kind:
        case msgspec.inspect.StructType(cls=cls) if cls is BlobRef:
            return _blob_refs()
        case msgspec.inspect.StructType(cls=cls) if cls is TaggedVector:
            return _tagged_vectors()
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values_of(field.type) for field in fields})
        case msgspec.inspect.BytesType():
            return st.binary(max_size=80)
        case msgspec.inspect.StrType():
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.IntType():
            return st.integers(-(2**63), 2**64 - 1)
        case msgspec.inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case msgspec.inspect.VarTupleType(item_type=item):
            return st.lists(values_of(item), max_size=4).map(tuple)
        case msgspec.inspect.TupleType(item_types=items):
            return st.tuples(*(values_of(item) for item in items))
    raise AssertionError(f"a message has a field of a new kind: {kind}")


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Return a strategy for messages of one type."""
    return values_of(msgspec.inspect.type_info(kind))


@pytest.fixture(scope="session")
def messages_of() -> Any:
    return messages
