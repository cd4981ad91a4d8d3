"""Values that a device keeps from one round to the next: `slot.read()` and `slot.write(value)`."""

from __future__ import annotations

import numpy as np

from sottovoce.bundle import MAX_CLIENT_STATE_BYTES
from sottovoce.errors import ConfigError
from sottovoce.language.arguments import NAME_ON_DEVICES
from sottovoce.language.definition import Value, described, site
from sottovoce.language.expressions import ClientProgram, Slot
from sottovoce.language.operators import zipped
from sottovoce.language.relations import check_assignable
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import CLIENTS, FederatedType, StructType, type_of
from sottovoce.values import flatten, leaves, to_value, unflatten


class ClientState:
    """A slot of client state, for use in federated computations.

    A write takes effect on a device only with a committed round that counts the device among its survivors.

    Attributes:
        slot: Name, type, version, size and first value, as data.
    """

    def __init__(self, slot: Slot) -> None:
        """Made by `client_state` and `client_state_of`."""
        self.slot = slot

    def __repr__(self) -> str:
        return f"<client_state {self.slot.name} {self.slot.type}, version {self.slot.version}>"

    def read(self) -> Value:
        """Return what every client has kept, `{T}@CLIENTS`: the first value where it has written nothing yet."""
        return site("client_state_read").step(
            "client_state_read", [], FederatedType(self.slot.type, CLIENTS, all_equal=False), slot=self.slot
        )

    def write(self, value: object) -> None:
        """Let every client keep `value`, `{T}@CLIENTS` or a dict or tuple of such, until the next round.

        Raises:
            DefinitionError: `value` is not at CLIENTS, or the slot is written twice in one computation.
            TypeMismatch: Its type is not the slot's.
        """
        place = site("client_state_write")
        given = zipped(place, place.value(value))
        kind = given.type_signature
        if not isinstance(kind, FederatedType) or kind.placement is not CLIENTS:
            place.refuse(f"{described(given)} is not at CLIENTS; a slot keeps one value on every client")
        check_assignable(self.slot.type, kind.member, what=f"{place.where}: the new value of {self.slot.name!r}")
        place.step("client_state_write", [given], kind, slot=self.slot)


def client_state(
    name: str, type: object, *, version: int = 1, maximum_bytes: int | None = None, initial: object = None
) -> ClientState:
    """Return a named slot in which every device keeps a value between rounds.

    Args:
        name: 1 to 64 characters of A-Z a-z 0-9 _ -; computations that use the same name share the value.
        type: Tensors and structs of them, fully known shapes.
        version: Raise it when the value's meaning changes; devices start again from `initial`.
        maximum_bytes: Largest size a device must keep; by default what the value takes.
        initial: The first value; zeros by default.

    Raises:
        ConfigError: A name, number or type is impossible.
        TypeMismatch: `initial` is not of the type.
    """
    kind = type_of(type)
    what = f"client state {name!r}"
    if not NAME_ON_DEVICES.fullmatch(name):
        raise ConfigError(f"{what}: a slot's name must be 1 to 64 characters of A-Z a-z 0-9 _ -")
    if version < 1:
        raise ConfigError(f"{what}: its version must be at least 1, not {version}")
    if isinstance(kind, FederatedType) or any(None in t.shape or t.dtype == "str" for _, t in leaves(kind)):
        raise ConfigError(f"{what}: {kind} cannot be kept; declare numbers of fully known shapes, without a placement")
    if initial is None:
        shapes = [(tuple(d for d in t.shape if d is not None), t.numpy_dtype) for _, t in leaves(kind)]
        initial = unflatten(kind, [np.zeros(shape, dtype) for shape, dtype in shapes])
    value = flatten(kind, to_value(kind, initial, what=f"the initial value of {what}"))
    least = len(encode_tensors({str(at): np.atleast_1d(leaf) for at, leaf in enumerate(value)}))
    size = 2 * least if maximum_bytes is None else maximum_bytes
    if not least <= size <= MAX_CLIENT_STATE_BYTES:
        raise ConfigError(
            f"{what}: it takes {least} bytes, so maximum_bytes must be from there to {MAX_CLIENT_STATE_BYTES}, "
            f"not {size}"
        )
    return ClientState(Slot(name, kind, version, size, tuple(value)))


def client_state_of(program: ClientProgram) -> ClientState:
    """Return the slot that a client program keeps its state in.

    Raises:
        ConfigError: It keeps none.
    """
    kept = program.bundle.client_state
    if kept is None:
        raise ConfigError(f"the client program {program.name!r} keeps no client state")
    kind = StructType(tuple((port.name, port.tensor_type) for port in kept.ports))
    initial = decode_tensors(kept.initial)
    value = tuple(initial[port.name] for port in kept.ports)
    return ClientState(Slot(kept.slot, kind, kept.version, kept.maximum_bytes, value))
