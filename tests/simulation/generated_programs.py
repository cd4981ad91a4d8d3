"""Programs drawn at random: client work over nested values, broadcasts, sums and means, nested results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

import sottovoce as sv
from sottovoce.language.computations import Computation
from sottovoce.values import Record, leaves

MEMBER = "<f=float32,v=float32[3],i=int32,b=bool,n=<x=float32,k=int32[2]>>"
"""What every device holds: real and whole numbers, vectors, a truth value, and a struct in the struct."""
LARGEST = 100


@sv.tf_computation("float32", "float32")
def exceeds(value, limit):  # type: ignore[no-untyped-def]
    return value > limit


@sv.tf_computation("float32", "float32")
def shifted(value, by):  # type: ignore[no-untyped-def]
    return 0.5 * value + by


@sv.tf_computation("int32")
def tripled(value):  # type: ignore[no-untyped-def]
    return 3 * value + 1


@sv.tf_computation("float32[3]")
def spread(vector):  # type: ignore[no-untyped-def]
    return {"largest": vector[0] * vector[1], "rest": vector[1:] - vector[2]}


@dataclass(frozen=True)
class Drawn:
    """One program with what it is called with.

    Attributes:
        program: (<values={MEMBER}@CLIENTS,limit=float32@SERVER> -> ...).
        limit: Its argument at SERVER.
        text: How it was made, for messages.
    """

    program: Computation
    limit: float
    text: str

    def __repr__(self) -> str:
        return self.text


def members() -> st.SearchStrategy[dict[str, Any]]:
    """One device's value."""
    real = st.floats(-LARGEST, LARGEST, width=32)
    whole = st.integers(-LARGEST, LARGEST)
    inner = st.fixed_dictionaries({"x": real, "k": st.lists(whole, min_size=2, max_size=2)})
    vector = st.lists(real, min_size=3, max_size=3)
    return st.fixed_dictionaries({"f": real, "v": vector, "i": whole, "b": st.booleans(), "n": inner})


_LEAVES = ("f", "v", "i", "b", "n.x", "n.k", "spread", "n")
_KINDS = ("plain", "mapped", "compared")
_SUMMARIES = ("sum", "mean", "weighted")


@st.composite
def programs(draw: st.DrawFn) -> Drawn:
    """One program: one to three aggregations of values that are themselves mapped, compared or cast."""
    chosen = draw(
        st.lists(
            st.tuples(st.sampled_from(_LEAVES), st.sampled_from(_KINDS), st.sampled_from(_SUMMARIES)),
            min_size=1,
            max_size=3,
        )
    )
    nested = draw(st.booleans())
    after = draw(st.booleans())

    def program(values, limit):  # type: ignore[no-untyped-def]
        """A program of a test."""
        found = [_aggregated(_worked(values, limit, *each[:2]), values, each[2]) for each in chosen]
        if after:
            found.append(sv.federated_map(shifted, (limit, limit)))
        return {"all": tuple(found), "limit": limit} if nested else found[0] if len(found) == 1 else tuple(found)

    made = sv.federated_computation(program, f"{{{MEMBER}}}@CLIENTS", "float32@SERVER")
    return Drawn(made, float(draw(st.integers(-LARGEST, LARGEST))), f"{chosen} nested={nested} after={after}")


def _leaf(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = getattr(values, part)
    return values


def _worked(values: Any, limit: Any, leaf: str, kind: str) -> Any:
    if leaf == "spread":
        return sv.federated_map(sv.clip(-1e4, 1e4), sv.federated_map(spread, values.v))
    value = _leaf(values, leaf)
    if kind == "plain" or leaf in ("b", "n", "n.k", "v"):
        return value
    if leaf == "i":
        return sv.federated_map(tripled, value)
    broadcast = sv.federated_broadcast(limit)
    return sv.federated_map(exceeds if kind == "compared" else shifted, (value, broadcast))


def _aggregated(value: Any, values: Any, summary: str) -> Any:
    kind = value.type_signature
    assert isinstance(kind, sv.FederatedType)
    dtypes = {leaf.dtype for _, leaf in leaves(kind.member)}
    if "bool" in dtypes:
        value = sv.federated_map(sv.cast("float32" if summary != "sum" else "int32"), value)
        return _summed(value, values, summary, bound=None)
    if dtypes == {"int32"}:
        return sv.federated_sum(value, bound=(-400, 400))
    if "int32" in dtypes and summary != "sum":
        value = sv.federated_map(sv.cast("float32"), value)
    return _summed(value, values, summary, bound=(-1e4, 1e4))


def _summed(value: Any, values: Any, summary: str, *, bound: tuple[float, float] | None) -> Any:
    match summary:
        case "sum":
            return sv.federated_sum(value, bound=bound)
        case "mean":
            return sv.federated_mean(value, bound=bound)
        case _:
            weight = sv.federated_map(sv.clip(1.0, 200.0), sv.federated_map(shifted, (values.f, values.f)))
            return sv.federated_mean(value, weight=weight, bound=bound)


def flat(value: Any) -> list[np.ndarray[Any, Any]]:
    """Return every array of a result in order."""
    if isinstance(value, Record | tuple):
        return [leaf for each in value for leaf in flat(each)]
    return [np.asarray(value)]
