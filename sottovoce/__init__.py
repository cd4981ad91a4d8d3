"""Sottovoce: what both sides of a federation share, and the federated language: `import sottovoce as sv`.

The package is lazy: a name is imported when it is first used, so that a device which needs one room loads no other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sottovoce.language.arguments import collection as collection
    from sottovoce.language.arguments import latest as latest
    from sottovoce.language.builtins import cast as cast
    from sottovoce.language.builtins import clip as clip
    from sottovoce.language.client_programs import client_program as client_program
    from sottovoce.language.client_state import client_state as client_state
    from sottovoce.language.client_state import client_state_of as client_state_of
    from sottovoce.language.computations import Computation as Computation
    from sottovoce.language.computations import federated_computation as federated_computation
    from sottovoce.language.computations import server_computation as server_computation
    from sottovoce.language.computations import tf_computation as tf_computation
    from sottovoce.language.context import use as use
    from sottovoce.language.operators import federated_aggregate as federated_aggregate
    from sottovoce.language.operators import federated_broadcast as federated_broadcast
    from sottovoce.language.operators import federated_collect as federated_collect
    from sottovoce.language.operators import federated_eval as federated_eval
    from sottovoce.language.operators import federated_map as federated_map
    from sottovoce.language.operators import federated_max as federated_max
    from sottovoce.language.operators import federated_mean as federated_mean
    from sottovoce.language.operators import federated_min as federated_min
    from sottovoce.language.operators import federated_secure_sum as federated_secure_sum
    from sottovoce.language.operators import federated_select as federated_select
    from sottovoce.language.operators import federated_sum as federated_sum
    from sottovoce.language.operators import federated_value as federated_value
    from sottovoce.language.operators import federated_zip as federated_zip
    from sottovoce.language.programs import federated_program as federated_program
    from sottovoce.language.programs import read_releases as read_releases
    from sottovoce.language.reference import reference_executor as reference_executor
    from sottovoce.language.sequences import sequence_map as sequence_map
    from sottovoce.language.sequences import sequence_reduce as sequence_reduce
    from sottovoce.language.sequences import sequence_sum as sequence_sum
    from sottovoce.types import CLIENTS as CLIENTS
    from sottovoce.types import SERVER as SERVER
    from sottovoce.types import FederatedType as FederatedType
    from sottovoce.types import FunctionType as FunctionType
    from sottovoce.types import Placement as Placement
    from sottovoce.types import SequenceType as SequenceType
    from sottovoce.types import StructType as StructType
    from sottovoce.types import TensorType as TensorType
    from sottovoce.types import Type as Type
    from sottovoce.types import at_clients as at_clients
    from sottovoce.types import at_server as at_server
    from sottovoce.types import type_of as type_of
    from sottovoce.values import Record as Record

_NAMES = {
    "sottovoce.language.arguments": "collection latest",
    "sottovoce.language.builtins": "cast clip",
    "sottovoce.language.client_programs": "client_program",
    "sottovoce.language.client_state": "client_state client_state_of",
    "sottovoce.language.computations": "Computation federated_computation server_computation tf_computation",
    "sottovoce.language.context": "use",
    "sottovoce.language.operators": (
        "federated_aggregate federated_broadcast federated_collect federated_eval federated_map federated_max "
        "federated_mean federated_min federated_secure_sum federated_select federated_sum federated_value federated_zip"
    ),
    "sottovoce.language.programs": "federated_program read_releases",
    "sottovoce.language.reference": "reference_executor",
    "sottovoce.language.sequences": "sequence_map sequence_reduce sequence_sum",
    "sottovoce.types": (
        "CLIENTS SERVER FederatedType FunctionType Placement SequenceType StructType TensorType Type at_clients "
        "at_server type_of"
    ),
    "sottovoce.values": "Record",
}
"""Which module has which public names; the imports above say the same to type checkers."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"sottovoce has no {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
