"""Gradients of operations that move entries without changing them, and of matrix products."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from models.gradients_registry import (
    NoGradient,
    Operation,
    constant_of,
    gradient_of,
    is_constant,
    reshaped_like,
    unbroadcast,
)
from models.ops import Tensor


@gradient_of("Reshape", "ExpandDims")
def _reshape(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    return reshaped_like(dy, op.inputs[0]), None


@gradient_of("Squeeze")
def _squeeze(op: Operation, dy: Tensor) -> Tensor:
    return reshaped_like(dy, op.inputs[0])


@gradient_of("Transpose")
def _transpose(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    return tf.transpose(dy, np.argsort(constant_of(op.inputs[1]))), None


@gradient_of("ReverseV2")
def _reverse(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    # One axis at a time: tflite-runtime 2.14 is silently wrong with two.
    for axis in constant_of(op.inputs[1]).reshape(-1):
        dy = tf.reverse(dy, [int(axis)])
    return dy, None


@gradient_of("ConcatV2")
def _concat(op: Operation, dy: Tensor) -> list[Tensor | None]:
    parts, axis = op.inputs[:-1], int(constant_of(op.inputs[-1]))
    return [*tf.split(dy, [part.shape[axis] for part in parts], axis=axis), None]


@gradient_of("Pack")
def _pack(op: Operation, dy: Tensor) -> list[Tensor]:
    return list(tf.unstack(dy, num=len(op.inputs), axis=op.get_attr("axis")))


@gradient_of("Unpack")
def _unpack(op: Operation, *dys: Tensor) -> Tensor:
    return tf.stack(_filled(op, dys), axis=op.get_attr("axis"))


@gradient_of("Split")
def _split(op: Operation, *dys: Tensor) -> tuple[None, Tensor]:
    return None, tf.concat(_filled(op, dys), axis=int(constant_of(op.inputs[0])))


@gradient_of("SplitV")
def _split_v(op: Operation, *dys: Tensor) -> tuple[Tensor, None, None]:
    return tf.concat(_filled(op, dys), axis=int(constant_of(op.inputs[2]))), None, None


def _filled(op: Operation, dys: Sequence[Tensor | None]) -> list[Tensor]:
    return [tf.zeros_like(y) if dy is None else dy for y, dy in zip(op.outputs, dys, strict=True)]


@gradient_of("Pad", "PadV2")
def _pad(op: Operation, dy: Tensor) -> list[Tensor | None]:
    x, margins = op.inputs[0], constant_of(op.inputs[1])
    lengths = [-1 if length is None else length for length in x.shape.as_list()]
    return [tf.slice(dy, [int(before) for before, _ in margins], lengths), *[None] * (len(op.inputs) - 1)]


@gradient_of("Slice")
def _slice(op: Operation, dy: Tensor) -> tuple[Tensor, None, None]:
    x, begin = op.inputs[0], [int(i) for i in constant_of(op.inputs[1])]
    return tf.pad(dy, _margins(x, dy, begin)), None, None


def _margins(x: Tensor, part: Tensor, begin: Sequence[int]) -> list[list[int]]:
    """Return how much to add on both sides of `part`, which starts at `begin` in `x`; nothing along the batch."""
    lengths = zip(begin, x.shape.as_list(), part.shape.as_list(), strict=True)
    return [[start, 0 if whole is None else whole - start - length] for start, whole, length in lengths]


@gradient_of("StridedSlice")
def _strided_slice(op: Operation, dy: Tensor) -> tuple[Tensor, None, None, None]:
    """x[a:b:c] with constant bounds: zeros between and around what was taken. The batch must be taken whole."""
    x, lengths = op.inputs[0], op.inputs[0].shape.as_list()
    slices = _slices(op)
    dy = tf.reshape(dy, [-1 if length is None else len(range(length)[part]) for length, part in slices])
    margins = []
    for axis, (length, part) in enumerate(slices):
        if length is None:
            margins.append([0, 0])
            continue
        taken = range(length)[part]
        if taken.step < 0:
            dy, taken = tf.reverse(dy, [axis]), taken[::-1]
        dy = spaced(dy, axis, taken.step)
        margins.append([taken.start, length - taken.start - (len(taken) - 1) * taken.step - 1])
    assert len(margins) == len(lengths)
    padded = tf.pad(dy, margins) if np.any(margins) else dy
    return reshaped_like(padded, x), None, None, None


def _slices(op: Operation) -> list[tuple[int | None, slice]]:
    """Return (length, what is taken) for every axis of what StridedSlice reads."""
    begin, end, strides = (constant_of(tensor).tolist() for tensor in op.inputs[1:])
    masks = {name: op.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    lengths = op.inputs[0].shape.as_list()
    count = sum(not (masks["new_axis"] >> i & 1 or masks["ellipsis"] >> i & 1) for i in range(len(begin)))
    found: list[tuple[int | None, slice]] = []
    for i in range(len(begin)):
        if masks["ellipsis"] >> i & 1:
            whole = lengths[len(found) : len(found) + len(lengths) - count]
            found += [(length, slice(None)) for length in whole]
        elif not masks["new_axis"] >> i & 1:
            start, stop = begin[i], end[i]
            if masks["shrink_axis"] >> i & 1:
                part = slice(start, start + 1 if start != -1 else None)
            else:
                first, last = masks["begin"] >> i & 1, masks["end"] >> i & 1
                part = slice(None if first else start, None if last else stop, strides[i])
            found.append((lengths[len(found)], part))
    found += [(length, slice(None)) for length in lengths[len(found) :]]
    if any(length is None and part != slice(None) and part != slice(None, None, 1) for length, part in found):
        raise NoGradient(op, "takes a part of the batch", "treat every example alike, whatever its place")
    return found


def spaced(x: Tensor, axis: int, step: int) -> Tensor:
    """Return `x` with step - 1 zeros between neighbours along `axis`, whose length must be known."""
    if step == 1:
        return x
    lengths = [-1 if length is None else length for length in x.shape.as_list()]
    length, inner = lengths[axis], math.prod(lengths[axis + 1 :])
    wide = tf.pad(tf.reshape(x, [-1, length, 1, inner]), [[0, 0], [0, 0], [0, step - 1], [0, 0]])
    wide = tf.reshape(wide, [-1, length * step, inner])[:, : (length - 1) * step + 1]
    return tf.reshape(wide, [*lengths[:axis], (length - 1) * step + 1, *lengths[axis + 1 :]])


@gradient_of("Tile")
def _tile(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    """Split every repeated axis into (times, length) and add over the times."""
    before, after = op.inputs[0].shape.as_list(), op.outputs[0].shape.as_list()
    for axis, (length, tiled) in enumerate(zip(before, after, strict=True)):
        if length == 1 and tiled != 1:
            dy = tf.reduce_sum(dy, axis=axis, keepdims=True)
        elif length != tiled:
            if length is None or tiled is None:
                raise NoGradient(op, "repeats examples of the batch", "repeat along another axis")
            rest = [-1 if each is None else each for each in after[axis + 1 :]]
            first = [-1 if each is None else each for each in before[:axis]]
            dy = tf.reduce_sum(tf.reshape(dy, [*first, tiled // length, length, *rest]), axis=axis)
    return dy, None


@gradient_of("BroadcastTo")
def _broadcast_to(op: Operation, dy: Tensor) -> tuple[Tensor, None]:
    return unbroadcast(dy, op.inputs[0]), None


@gradient_of("GatherV2")
def _gather(op: Operation, dy: Tensor) -> tuple[Tensor, None, None]:
    """Rows of a table: every row gets the sum of the gradients of where it was used; or fixed places along an axis."""
    table, rows, axis = op.inputs[0], op.inputs[1], int(constant_of(op.inputs[2])) % op.inputs[0].shape.rank
    if op.get_attr("batch_dims") == 0 and axis != 0 and is_constant(rows):
        return _placed_back(table, constant_of(rows), axis, dy), None, None
    if axis != 0 or op.get_attr("batch_dims") != 0 or not table.shape.is_fully_defined():
        raise NoGradient(op, "gathers what depends on the batch", "use fixed places, or multiply by a one-hot mask")
    flat = tf.reshape(dy, [-1, math.prod(table.shape.as_list()[1:])])
    places = tf.reshape(tf.cast(rows, tf.int32), [-1, 1])
    summed = tf.scatter_nd(places, flat, [table.shape[0], flat.shape[1]])
    return tf.reshape(summed, table.shape), None, None


def _placed_back(x: Tensor, places: np.ndarray, axis: int, dy: Tensor) -> Tensor:
    """Return what `tf.gather(x, places, axis=axis)` leaves of dy at each place: a product with a table of ones."""
    lengths = x.shape.as_list()
    chosen = np.eye(lengths[axis], dtype=dy.dtype.as_numpy_dtype)[places.reshape(-1)]
    others = [-1 if length is None else length for length in (*lengths[:axis], *lengths[axis + 1 :])]
    last = [i for i in range(len(lengths)) if i != axis]
    flat = tf.reshape(dy, [*others[:axis], chosen.shape[0], *others[axis:]])
    rows = tf.reshape(tf.transpose(flat, [*last, axis]), [-1, chosen.shape[0]])
    return tf.transpose(tf.reshape(tf.matmul(rows, chosen), [*others, lengths[axis]]), np.argsort([*last, axis]))


@gradient_of("MatMul")
def _matmul(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    a, b = op.inputs
    return _product(a, b, dy, op.get_attr("transpose_a"), op.get_attr("transpose_b"))


@gradient_of("BatchMatMulV2", "BatchMatMul")
def _batch_matmul(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    a, b = op.inputs
    da, db = _product(a, b, dy, op.get_attr("adj_x"), op.get_attr("adj_y"))
    return unbroadcast(da, a), unbroadcast(db, b)


def _product(a: Tensor, b: Tensor, dy: Tensor, flip_a: bool, flip_b: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of op(a) @ op(b), where op transposes the last two axes or does nothing."""
    da = tf.matmul(b, dy, transpose_a=flip_b, transpose_b=True) if flip_a else tf.matmul(dy, b, transpose_b=not flip_b)
    db = tf.matmul(dy, a, transpose_a=True, transpose_b=flip_a) if flip_b else tf.matmul(a, dy, transpose_a=not flip_a)
    return da, db


@gradient_of("Einsum")
def _einsum(op: Operation, dy: Tensor) -> list[Tensor]:
    """Two operands without repeated letters: each gradient is an einsum of the other two."""
    inputs, output = _without_ellipsis(op).split("->")
    letters = inputs.split(",")
    if len(letters) != 2 or "." in inputs or any(len(set(part)) != len(part) for part in letters):
        raise NoGradient(op, f"{inputs}->{output} is not a product of two operands", "write it with matmul")
    (a, b), (left, right) = op.inputs, letters
    if not (set(left) <= set(right + output) and set(right) <= set(left + output)):
        raise NoGradient(op, f"{inputs}->{output} sums one operand alone", "use reduce_sum first")
    return [tf.einsum(f"{output},{right}->{left}", dy, b), tf.einsum(f"{left},{output}->{right}", a, dy)]


def _without_ellipsis(op: Operation) -> str:
    """Return the equation with a letter for each axis that an ellipsis of a single operand stands for."""
    equation = op.get_attr("equation").decode()
    parts = equation.split("->")[0].split(",")
    ranks = [x.shape.rank - len(part.replace("...", "")) for x, part in zip(op.inputs, parts, strict=True)]
    if sum("..." in part for part in parts) != 1:
        return str(equation)
    free = [letter for letter in string.ascii_uppercase if letter not in equation]
    return str(equation.replace("...", "".join(free[: max(ranks)])))
