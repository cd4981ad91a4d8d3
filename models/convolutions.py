"""Convolutions in TFLite built-ins that XNNPACK takes, forward and backward, for kernels that training changes.

XNNPACK has no convolution whose kernel is not a constant, and TFLite's own kernels run at a third of the speed. So a
convolution becomes one matrix product between two cheap rearrangements, chosen by how much they move. With k x k taps,
C channels and F filters:

- *halved*: windows along the width side by side, [.., k C], times the kernel as [k C, k F], then the k results are
  shifted along the height and added. k C + k F numbers are moved for each place instead of k k C. Its gradients are the
  same two rearrangements transposed, and share both operands: dX = D K', dW = c' D, where c are the windows of x and
  D the shifted copies of dy.
- *whole*: all windows side by side (im2col), [.., k k C] times [k k C, F]; for few channels, as in a first layer, or
  windows along one axis. Its dX is transposed likewise (col2im), but along one axis it is the windows of dy times the
  kernel, all copies, in half of the time.

A stride is folded into the channels first, because slices with a stride are ten times slower. `scripts/bench_step
--formulations` measures these against what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from models.gradients_registry import Operation, substitute_of
from models.ops import Tensor

HEIGHT, WIDTH = 1, 2


@dataclass(frozen=True, slots=True)
class Slide:
    """How a window slides along one axis with stride 1: output l reads entry l + shift for every shift."""

    length: int
    outputs: int
    shifts: tuple[int, ...]

    @property
    def back(self) -> Slide:
        """The transpose: which outputs an entry goes to."""
        return Slide(self.outputs, self.length, tuple(-shift for shift in self.shifts))


def side_by_side(x: Tensor, axis: int, slide: Slide) -> Tensor:
    """Return the entries of every window one after another in the channels, zero outside of x.

    Args:
        x: [b, h, w, c].
        axis: HEIGHT or WIDTH, of slide.length entries.
        slide: Gives the outputs along `axis`; channels become len(slide.shifts) * c.
    """
    padded, low = _reaching(x, axis, slide)
    cuts = [_cut(padded, axis, low + shift, slide.outputs) for shift in slide.shifts]
    return cuts[0] if len(cuts) == 1 else tf.concat(cuts, axis=3)


def summed(parts: Tensor, axis: int, slide: Slide) -> Tensor:
    """Return the sum over the slide's shifts, each of its own share of the channels; `side_by_side` transposed.

    Args:
        parts: [b, h, w, len(slide.shifts) * c].
        axis: HEIGHT or WIDTH, of slide.length entries.
        slide: Gives the outputs along `axis`; c channels are left.
    """
    padded, low = _reaching(parts, axis, slide)
    each = parts.shape[3] // len(slide.shifts)
    total = None
    for at, shift in enumerate(slide.shifts):
        part = _cut(padded, axis, low + shift, slide.outputs, channels=slice(at * each, (at + 1) * each))
        # One sum of many terms (ADD_N) is not an operation of XNNPACK.
        total = part if total is None else total + part
    return total


def _reaching(x: Tensor, axis: int, slide: Slide) -> tuple[Tensor, int]:
    """Return x with zeros wherever a window reaches out of it, and how many of them come first."""
    low = max(0, -min(slide.shifts))
    high = max(0, max(slide.shifts) + slide.outputs - slide.length)
    margins = [[0, 0], [0, 0], [0, 0], [0, 0]]
    margins[axis] = [low, high]
    return (tf.pad(x, margins) if low or high else x), low


def _cut(x: Tensor, axis: int, start: int, length: int, channels: slice = slice(None)) -> Tensor:
    part = slice(start, start + length)
    if channels == slice(None) and start == 0 and x.shape[axis] == length:
        return x
    return x[:, part, :, channels] if axis == HEIGHT else x[:, :, part, channels]


def convolved(x: Tensor, kernel: Tensor, height: Slide, width: Slide) -> Tensor:
    """Return the convolution of stride 1 with its gradients.

    Args:
        x: [b, height.length, width.length, c].
        kernel: [len(height.shifts), len(width.shifts), c, filters].
        height: How the kernel slides.
        width: Likewise.
    """
    rows, columns, channels, filters = kernel.shape
    moves_less = columns * channels + rows * filters < rows * columns * channels
    function = halved if moves_less else whole
    result: Callable[[Tensor, Tensor], Tensor] = tf.custom_gradient(lambda x, k: function(x, k, height, width))
    return result(x, kernel)


WithGradient: TypeAlias = tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]
"""A convolution, and from its gradient to those of x and the kernel."""


def halved(x: Tensor, kernel: Tensor, height: Slide, width: Slide) -> WithGradient:
    """Return the convolution with windows along the width only; the arguments are those of `convolved`."""
    rows, columns, channels, filters = kernel.shape
    flat = tf.reshape(tf.transpose(kernel, [1, 2, 0, 3]), [columns * channels, rows * filters])
    windows = _rows(side_by_side(x, WIDTH, width))
    parts = tf.reshape(tf.matmul(windows, flat), [-1, height.length, width.outputs, rows * filters])

    def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
        shifted = _rows(side_by_side(dy, HEIGHT, height.back))
        dw = tf.reshape(tf.matmul(windows, shifted, transpose_a=True), [columns, channels, rows, filters])
        back = _product(shifted, kernel, [0, 3, 1, 2])
        back = tf.reshape(back, [-1, height.length, width.outputs, columns * channels])
        return summed(back, WIDTH, width.back), tf.transpose(dw, [2, 0, 1, 3])

    return summed(parts, HEIGHT, height), gradient


def whole(x: Tensor, kernel: Tensor, height: Slide, width: Slide) -> WithGradient:
    """Return the convolution with all windows side by side; the arguments are those of `convolved`."""
    rows, columns, channels, filters = kernel.shape
    taps = rows * columns * channels
    windows = _rows(side_by_side(side_by_side(x, WIDTH, width), HEIGHT, height))
    y = tf.matmul(windows, tf.reshape(kernel, [taps, filters]))

    def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
        flat = _rows(dy)
        dw = tf.reshape(tf.matmul(windows, flat, transpose_a=True), kernel.shape)
        if 1 in (rows, columns):
            # Every entry's readers side by side: copies, where the windows' shares would have to be added.
            readers = _rows(side_by_side(side_by_side(dy, WIDTH, width.back), HEIGHT, height.back))
            turned = tf.reshape(tf.transpose(kernel, [0, 1, 3, 2]), [-1, channels])
            return tf.reshape(tf.matmul(readers, turned), [-1, height.length, width.length, channels]), dw
        back = tf.reshape(_product(flat, kernel, [3, 0, 1, 2]), [-1, height.outputs, width.outputs, taps])
        return summed(summed(back, HEIGHT, height.back), WIDTH, width.back), dw

    return tf.reshape(y, [-1, height.outputs, width.outputs, filters]), gradient


def _product(left: Tensor, kernel: Tensor, order: Sequence[int]) -> Tensor:
    """Return left [n, m] times the kernel with its axes in `order`, as [m, ...].

    The kernel is transposed for itself: a product that transposes its right side becomes TFLite's FULLY_CONNECTED,
    which XNNPACK does not take when the weights are no constants.
    """
    return tf.matmul(left, tf.reshape(tf.transpose(kernel, order), [left.shape[1], -1]))


def _rows(x: Tensor) -> Tensor:
    return tf.reshape(x, [-1, x.shape[-1]])


@substitute_of("Conv2D")
def _conv2d(op: Operation, inputs: Sequence[Tensor]) -> Tensor:
    """A float32 kernel that does not change stays with CONV_2D, which XNNPACK then takes."""
    x, kernel = inputs
    strides, dilations = op.get_attr("strides")[1:3], op.get_attr("dilations")[1:3]
    same, y = op.get_attr("padding") == b"SAME", op.outputs[0]
    known = None not in [*x.shape[1:], *kernel.shape] and kernel.shape[2] == x.shape[3]
    plain = op.get_attr("data_format") == b"NHWC" and op.get_attr("padding") != b"EXPLICIT"
    if not (known and plain) or _is_constant(kernel):
        settings = {name: op.get_attr(name) for name in ("strides", "dilations", "explicit_paddings")}
        form = {name: op.get_attr(name).decode() for name in ("padding", "data_format")}
        return tf.raw_ops.Conv2D(input=x, filter=kernel, name=op.name, **settings, **form)
    slides = []
    for axis, stride, dilation in zip((HEIGHT, WIDTH), strides, dilations, strict=True):
        length, outputs, taps = x.shape[axis], y.shape[axis], kernel.shape[axis - 1]
        missing = max((outputs - 1) * stride + (taps - 1) * dilation + 1 - length, 0)
        before = missing // 2 if same else 0
        if stride > 1:
            x, kernel = _without_stride(x, kernel, axis, stride, before=before, outputs=outputs)
            before, taps = 0, kernel.shape[axis - 1]
        slides.append(Slide(x.shape[axis], outputs, tuple(tap * dilation - before for tap in range(taps))))
    return convolved(x, kernel, *slides)


def _is_constant(tensor: Tensor) -> bool:
    # A frozen int8 kernel is none: it becomes float32 when the program runs, and XNNPACK takes only its product.
    while tensor.op.type in ("Identity", "Reshape", "ExpandDims", "Squeeze"):
        tensor = tensor.op.inputs[0]
    return tf.get_static_value(tensor) is not None


def _without_stride(
    x: Tensor, kernel: Tensor, axis: int, stride: int, *, before: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Return x and the kernel, both with `stride` neighbours along `axis` folded into the channels; no dilation.

    Taps of zero are added where their number is no multiple of the stride. What lies beyond the last window is cut off.
    """
    taps = kernel.shape[axis - 1]
    groups = -(-taps // stride)
    x = _fitted(x, axis, before, (outputs - 1 + groups) * stride)
    grown = [[0, 0] for _ in range(4)]
    grown[axis - 1][1] = groups * stride - taps
    if taps == 1:
        return _folded(x, axis, stride)[..., : x.shape[3]], kernel
    kernel = tf.pad(kernel, grown) if groups * stride != taps else kernel
    return _folded(x, axis, stride), _folded_kernel(kernel, axis, stride)


def _fitted(x: Tensor, axis: int, before: int, length: int) -> Tensor:
    """Return x with `before` zeros in front along `axis`, then padded or cut to `length`."""
    after = length - before - x.shape[axis]
    margins = [[0, 0] for _ in range(4)]
    margins[axis] = [before, max(after, 0)]
    return _cut(tf.pad(x, margins) if np.any(margins) else x, axis, 0, length)


def _folded(x: Tensor, axis: int, stride: int) -> Tensor:
    """Return [b, h, w, c] with `stride` neighbours along `axis` side by side in the channels."""
    _, height, width, channels = x.shape
    if axis == WIDTH:
        return tf.reshape(x, [-1, height, width // stride, stride * channels])
    apart = tf.transpose(tf.reshape(x, [-1, height // stride, stride, width, channels]), [0, 1, 3, 2, 4])
    return tf.reshape(apart, [-1, height // stride, width, stride * channels])


def _folded_kernel(kernel: Tensor, axis: int, stride: int) -> Tensor:
    """Return [rows, columns, c, filters] folded as `_folded` folds what it is multiplied with."""
    rows, columns, channels, filters = kernel.shape
    if axis == WIDTH:
        return tf.reshape(kernel, [rows, columns // stride, stride * channels, filters])
    apart = tf.transpose(tf.reshape(kernel, [rows // stride, stride, columns, channels, filters]), [0, 2, 1, 3, 4])
    return tf.reshape(apart, [rows // stride, columns, stride * channels, filters])
