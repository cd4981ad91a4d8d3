"""What of a Keras model will train on a device, layer by layer, before anything is converted.

`lint` traces the model, and for every layer says `trains`, `frozen`, `only infers` or `cannot run`, why, and what to do
about it. It goes by the operations that a layer really makes, not by its class, so a layer that its author wrote counts
like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import tensorflow as tf

from models.gradients import LOOPS, RANDOM, CannotTrain, layer_of
from models.gradients_registry import GRADIENTS, SUBSTITUTES
from models.keras_tracing import Traced, every_layer, features_of, trace

keras = tf.keras
Verdict: TypeAlias = Literal["trains", "frozen", "has no weights", "only infers", "cannot run"]

_HARMLESS = frozenset(
    {
        *(
            "Const",
            "Placeholder",
            "Identity",
            "NoOp",
            "Shape",
            "Range",
            "Fill",
            "ZerosLike",
            "OnesLike",
            "Prod",
            "Rank",
        ),
        *("Greater", "GreaterEqual", "Less", "LessEqual", "Equal", "NotEqual", "FloorMod", "FloorDiv", "ArgMax"),
        *("LogicalAnd", "LogicalOr", "LogicalNot", "OneHot", "Any", "All", "Rank", "AddN", "Cumsum"),
        "StatelessRandomGetKeyCounter",
    }
)
"""Operations that devices have, and through which no gradient flows or TensorFlow's own is of built-ins."""
_CURES: Mapping[str, str] = {
    "ResizeBilinear": "replace UpSampling2D(interpolation='bilinear') by UpSampling2D (nearest) or Conv2DTranspose",
    "Conv3D": "replace Conv3D by Conv2D over one axis folded into the channels",
    "MaxPool3D": "replace pooling in 3D by MaxPooling2D",
    "FFT": "compute spectra before training, in the collection of examples",
    "Qr": "train without an orthogonal constraint",
    "StatelessRandomNormalV2": "replace GaussianNoise by Dropout",
    "StatelessRandomGammaV3": "replace AlphaDropout by Dropout",
    "StatelessTruncatedNormal": "replace random noise by Dropout",
    "NCHW": "set data_format='channels_last' and permute the examples",
    **dict.fromkeys(
        ("While", "StatelessWhile"),
        "replace the loop by a recurrent layer of Keras, which is unrolled, or by a fixed number of layers",
    ),
    **dict.fromkeys(("If", "StatelessIf"), "compute both branches and choose with keras.ops.where"),
    **dict.fromkeys(("PyFunc", "EagerPyFunc"), "write it with keras.ops; devices have no Python for programs"),
}
"""Operation type -> what to use in the layer's place."""
OTHERWISE = "replace the layer by ones of the list in docs/authoring-models.md, or freeze it and all before it"
"""The cure where none is known."""
NEVER = LOOPS | {"NCHW", "PyFunc", "EagerPyFunc"}
"""What a device cannot even run forward."""


_ARE = "cannot be differentiated with TFLite built-ins"


@dataclass(frozen=True, slots=True)
class Finding:
    """What becomes of one layer.

    Attributes:
        layer: Its name.
        kind: Its class.
        verdict: What it does on a device.
        parameters: Number of its weights, those of layers within it included.
        problem: Operations that stand in the way; empty where none does.
        cure: What to do about them.
    """

    layer: str
    kind: str
    verdict: Verdict
    parameters: int
    problem: str = ""
    cure: str = ""


def lint(model: Any) -> list[Finding]:
    """Return one finding for each layer of a Keras model, in its order.

    Raises:
        CannotTrain: The model has no weights yet, or cannot be traced with an unknown batch size.
    """
    return findings(trace(model, features_of(model)))


def findings(traced: Traced) -> list[Finding]:
    """Return what becomes of each layer of a traced model, in its order."""
    missing = _missing(traced)
    return [_finding(layer, missing.get(layer.name, ())) for layer in every_layer(traced.model) if _counts(layer)]


def _counts(layer: Any) -> bool:
    return not isinstance(layer, (keras.layers.InputLayer, keras.Sequential, keras.Model))


def _missing(traced: Traced) -> dict[str, tuple[str, ...]]:
    """Return for each layer the types of the operations that stand in the way.

    A gradient flows only through what depends on a trained weight; of what comes before, the converter judges later.
    """
    found: dict[str, set[str]] = {}
    graph = traced.graphs[True]
    known = GRADIENTS.keys() | SUBSTITUTES.keys() | _HARMLESS | RANDOM
    reached = {graph.inputs[name] for name in traced.trained}
    for op in graph.whole.get_operations():
        flows = any(tensor.name in reached for tensor in op.inputs)
        if flows:
            reached |= {tensor.name for tensor in op.outputs}
        random = "Random" in op.type or "TruncatedNormal" in op.type
        if ((flows or random) and op.type not in known) or op.type in NEVER:
            found.setdefault(layer_of(op.name), set()).add(op.type)
        if "data_format" in op.node_def.attr and op.get_attr("data_format") == b"NCHW":
            found.setdefault(layer_of(op.name), set()).add("NCHW")
    return {layer: tuple(sorted(kinds)) for layer, kinds in found.items()}


def _finding(layer: Any, missing: Sequence[str]) -> Finding:
    parameters = int(layer.count_params()) if layer.built else 0
    verdict: Verdict = "has no weights"
    if parameters:
        verdict = "trains" if layer.trainable_variables else "frozen"
    if missing:
        verdict = "cannot run" if NEVER & set(missing) else "only infers"
    cure = next((_CURES[kind] for kind in missing if kind in _CURES), OTHERWISE) if missing else ""
    return Finding(layer.name, type(layer).__name__, verdict, parameters, ", ".join(missing), cure)


def refuse(traced: Traced) -> None:
    """Raise CannotTrain for the first layer that stands in the way of training, or a constraint on a weight.

    Raises:
        CannotTrain: The text names the layer, the operations and the cure.
    """
    for variable in traced.trained.values():
        if getattr(variable, "constraint", None) is not None:
            raise CannotTrain(
                f"the weight {variable.path!r} has a constraint, which devices do not follow; leave it out"
            )
    for finding in findings(traced):
        if finding.problem:
            raise CannotTrain(
                f"layer {finding.layer!r} ({finding.kind}) {finding.verdict} on a device: {finding.problem} "
                f"{_ARE}; {finding.cure}"
            )


def table(found: Sequence[Finding]) -> list[str]:
    """Return the lines of a table of `found`, cures below it."""
    heads = ("layer", "class", "parameters", "on a device")
    rows = [(f.layer, f.kind, str(f.parameters), f.verdict) for f in found]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    cures = [f"{f.layer}: {f.problem} {_ARE}; {f.cure}" for f in found if f.problem]
    return [line.rstrip() for line in lines] + (["", *cures] if cures else [])
