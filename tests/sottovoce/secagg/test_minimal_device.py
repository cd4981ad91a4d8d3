"""A device written from docs/SPEC.md alone takes part beside real ones, under the real coordinator.

The device is `tests/vectors/spec_device.py`; it imports nothing of sottovoce. Every byte between it and the coordinator
goes through signed envelopes.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import by_the_spec as spec
import msgspec
import pytest
import vector_by_the_spec as vector_spec
from cryptography.hazmat.primitives.serialization import Encoding
from fleet_by_the_spec import FixedEntropy
from spec_device import SpecDevice

from sottovoce.errors import RoundAbandoned
from sottovoce.identity import SignedContext
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.segments import add_into, reduce
from sottovoce.secagg.server import STAGE_NAMES, ServerSession
from sottovoce.secagg.server_stages import Unmasked
from sottovoce.secagg.uploads import ExpectedVector
from sottovoce.wire.chunks import Assembly, assemble, decode_vector_chunk
from sottovoce.wire.codec import open_envelope, parse, seal
from sottovoce.wire.messages import AdvertiseKeysRequest, SecAggParameters

VECTORS = Path(__file__).parents[2] / "vectors"
SHAPES: dict[str, dict[str, Any]] = {
    "uint32 and uint64": {},
    "packed segments": {"packed": ((11, 64), (16, 64), (21, 64)), "vector_bytes": 424, "wide_bytes": 32},
}


def test_the_device_imports_nothing_of_ours() -> None:
    for name in ("by_the_spec", "shares_by_the_spec", "vector_by_the_spec", "spec_device"):
        tree = ast.parse((VECTORS / f"{name}.py").read_text(encoding="utf-8"))
        imports = {alias.name for one in ast.walk(tree) if isinstance(one, ast.Import) for alias in one.names}
        imports |= {str(one.module) for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
        assert not [module for module in imports if module.split(".")[0] in ("sottovoce", "edge_agent", "coordinator")]


@dataclass
class Choir:
    """Real devices, devices by the SPEC, and a real coordinator; a device may fall silent in some stage."""

    fleet: Any
    parameters: SecAggParameters
    real: int
    by_the_spec: int
    graph_rule: Any = None
    plain: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = sorted(self.fleet.identities)[: self.real + self.by_the_spec]
        length = vector_spec.memory_bytes(msgspec.to_builtins(self.parameters))
        self.plain = {name: spec.stream("chacha20", name.encode().ljust(32), length) for name in names}
        context = SignedContext("conductor", "all", "choir", 7, 1)
        digests: dict[str, Any] = {"plan": b"p" * 32, "state": b"s" * 32}
        self.server = ServerSession(
            context=context,
            **digests,
            parameters=self.parameters,
            expected=names,
            graph_rule=self.graph_rule,
            entropy=FixedEntropy("conductor"),
        )
        self.devices: dict[str, Any] = {}
        for index, name in enumerate(names):
            self.devices[name] = self._device(name) if index < self.by_the_spec else self._client(name)

    def _client(self, name: str) -> Any:
        return self.fleet.client(
            name, bytearray(self.plain[name]), parameters=self.parameters, upload_key=self.server.invitation.upload_key
        )

    def _device(self, name: str) -> SpecDevice:
        identity = self.fleet.identities[name]
        key, der = identity._key, identity.certificate.der
        settings = {"fleet": "choir", "coordinator": "conductor", "round": 7, "attempt": 1}
        digests = {"plan": b"p" * 32, "state": b"s" * 32}
        agreement = spec.Agreement(**settings, **digests, **self._told())  # type: ignore[arg-type]
        authority = self.fleet.anchor._ca.public_bytes(Encoding.DER)
        coordinator = self.fleet.coordinator.certificate.der
        entropy = FixedEntropy(name)
        return SpecDevice(
            spec.Signer(name, key, der), authority, coordinator, agreement, self.plain[name], entropy, 100
        )

    def _told(self) -> Any:
        """The parameters and the key as the coordinator's request tells them."""
        fields = msgspec.msgpack.decode(msgspec.msgpack.encode(self.server.invitation))
        return dict(zip(("parameters", "upload_key"), fields, strict=True))

    def perform(self, silent: dict[str, list[str]]) -> None:
        gone: set[str] = set()
        while not isinstance(self.server.stage, Unmasked):
            gone |= set(silent.get(STAGE_NAMES[type(self.server.stage)], ()))
            for reply in self.server.outstanding():
                if reply.device not in gone:
                    self._exchange(reply)
            self.server.close_stage()

    def _exchange(self, reply: Any) -> None:
        device = self.devices[reply.device]
        context = SignedContext("conductor", reply.device, "choir", 7, 1, reply.session)
        payload = seal(reply.message, self.fleet.coordinator, context)
        advertising = isinstance(reply.message, AdvertiseKeysRequest)
        if isinstance(device, SpecDevice):
            answer = device.advertise() if advertising else device.receive(payload)
        else:
            message = device.advertise() if advertising else device.receive(reply.message)
            session = bytes(32) if advertising else device.session_id
            answer = self.fleet.envelope(reply.device, message, session=session)
        certificate = self.fleet.identities[reply.device].certificate
        self.server.receive(open_envelope(parse(answer), certificate, answer))
        announced = self.server.expected_vector(reply.device)
        if announced is not None:
            by_the_spec = isinstance(device, SpecDevice)
            upload = self._carried(device, announced) if by_the_spec else assemble(announced, device.masked_vector)
            self.server.add_vector(reply.device, upload)

    def _carried(self, device: SpecDevice, announced: ExpectedVector) -> Assembly[ExpectedVector]:
        """The masked vector as its chunks' payloads bring it."""
        upload = Assembly(announced)
        for payload in device.upload():
            chunk = decode_vector_chunk(payload)
            assert chunk.session == self.server.session_id
            upload.add(chunk.index, chunk.content)
        return upload

    def plain_sum(self) -> bytes:
        total = bytearray(len(next(iter(self.plain.values()))))
        for name in self.server.survivors:
            add_into(total, self.plain[name], self.parameters)
        reduce(total, self.parameters)
        return bytes(total)


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_round_with_devices_by_the_spec_is_exact(fleet: Any, mode: str, cipher: str, shape: str) -> None:
    choir = Choir(fleet, fleet.parameters(mode=mode, cipher=cipher, **SHAPES[shape]), real=6, by_the_spec=4)
    by_the_spec, real = list(choir.devices)[:4], list(choir.devices)[4:]
    choir.perform({"share_keys": [real[0]], "masked_input": [by_the_spec[0]], "unmasking": [by_the_spec[1]]})
    assert choir.server.survivors == tuple(sorted({*by_the_spec[1:], *real[1:]}))
    assert bytes(choir.server.result) == choir.plain_sum()


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_round_of_devices_by_the_spec_alone_is_exact(fleet: Any, mode: str) -> None:
    choir = Choir(fleet, fleet.parameters(mode=mode), real=0, by_the_spec=7)
    choir.perform({"masked_input": list(choir.devices)[:1]})
    assert len(choir.server.survivors) == 6
    assert bytes(choir.server.result) == choir.plain_sum()


@pytest.mark.parametrize(
    ("mode", "k", "t"), [("curious", 24, 12), pytest.param("active", 44, 34, marks=pytest.mark.slow)]
)
def test_devices_by_the_spec_stand_on_a_ring_too(large_fleet: Any, mode: str, k: int, t: int) -> None:
    parameters = large_fleet.parameters(mode=mode, maximum_clients=201)
    choir = Choir(large_fleet, parameters, real=196, by_the_spec=5, graph_rule=lambda members: GraphParameters(k, t))
    names = list(choir.devices)
    choir.perform({"share_keys": names[100:101], "masked_input": [names[0], names[50]]})
    assert choir.server.survivors == tuple(name for name in names if name not in (names[100], names[0], names[50]))
    assert bytes(choir.server.result) == choir.plain_sum()
    assert len(choir.devices[names[1]].neighbours) == k


def test_a_lie_ends_the_session_of_a_device_by_the_spec_too(fleet: Any) -> None:
    choir = Choir(fleet, fleet.parameters(), real=5, by_the_spec=1)
    silent = list(choir.devices)[1:4]
    with pytest.raises(RoundAbandoned):
        choir.perform({"share_keys": silent})
    device = next(iter(choir.devices.values()))
    assert device.held == {}
    with pytest.raises(spec.Refused):
        device.mask_input([], b"")
    with pytest.raises(spec.Refused):
        device.share_keys(b"a" * 32 + b"a" * 32 + b"b" * 32, 2, 2, [])
