"""Gradients of convolutions and pooling: whatever slides a window over height and width, format NHWC.

Every window position (i, j) is a slice of the padded input, one entry for each output: `_cut` takes it, `_put_back` is
its transpose. A convolution's dW is one matrix product of all cuts, at any batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from models.gradients_registry import NoGradient, Operation, constant_of, gradient_of
from models.gradients_shapes import spaced
from models.ops import Tensor

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class _Axis:
    """How a window slides along one axis; all in entries."""

    length: int
    window: int
    stride: int
    dilation: int
    outputs: int
    before: int

    @property
    def padded(self) -> int:
        """Entries after padding, up to the last that a window can need."""
        return (self.outputs - 1) * self.stride + (self.window - 1) * self.dilation + 1

    @property
    def margins(self) -> tuple[int, int]:
        """Padding before and after; the latter is negative where the last entries are never read."""
        return self.before, self.padded - self.before - self.length

    def offset(self, tap: int) -> int:
        """Return where the first output's entry of `tap` lies."""
        return tap * self.dilation


@dataclass(frozen=True, slots=True)
class _Windows:
    """A window that slides over height and width."""

    height: _Axis
    width: _Axis

    def taps(self) -> Iterator[tuple[int, int]]:
        """Every position within the window, row by row."""
        return ((i, j) for i in range(self.height.window) for j in range(self.width.window))

    @property
    def count(self) -> int:
        """Positions within the window."""
        return self.height.window * self.width.window

    @property
    def tiles(self) -> bool:
        """Whether the windows lie side by side and cover the input: no padding, no overlap, nothing left over."""
        both = (self.height, self.width)
        return all(axis.window == axis.stride and axis.outputs * axis.stride == axis.length for axis in both)


def _windows(op: Operation, x: Tensor, y: Tensor, size: tuple[int, int]) -> _Windows:
    """Return how `op` slides a window of `size` over x [b, h, w, c] to make y."""
    kind = {attribute.name for attribute in op.op_def.attr}
    dilations = op.get_attr("dilations") if "dilations" in kind else [1, 1, 1, 1]
    if op.get_attr("data_format") != b"NHWC":
        raise NoGradient(op, "has its channels first", "set data_format='channels_last'")
    if op.get_attr("padding") == b"EXPLICIT":
        raise NoGradient(op, "pads by given numbers", "use 'same', 'valid' or a padding layer")
    same = op.get_attr("padding") == b"SAME"
    axes = []
    for axis in (1, 2):
        length, outputs, window = x.shape[axis], y.shape[axis], size[axis - 1]
        stride, dilation = op.get_attr("strides")[axis], dilations[axis]
        missing = max((outputs - 1) * stride + (window - 1) * dilation + 1 - length, 0)
        axes.append(_Axis(length, window, stride, dilation, outputs, missing // 2 if same else 0))
    return _Windows(*axes)


def _padded(x: Tensor, windows: _Windows, value: float = 0.0) -> Tensor:
    """Return x padded as the windows need it, and without the entries that none of them reads."""
    margins = [(0, 0), windows.height.margins, windows.width.margins, (0, 0)]
    added = [[max(before, 0), max(after, 0)] for before, after in margins]
    padded = tf.pad(x, added, constant_values=value) if np.any(added) else x
    return padded[:, : windows.height.padded, : windows.width.padded, :]


def _unpadded(dx: Tensor, windows: _Windows) -> Tensor:
    """The transpose of `_padded`."""
    cut = [0, max(windows.height.before, 0), max(windows.width.before, 0), 0]
    height, width = windows.height, windows.width
    missing = [[0, 0], [0, max(-height.margins[1], 0)], [0, max(-width.margins[1], 0)], [0, 0]]
    grown = tf.pad(dx, missing) if np.any(missing) else dx
    return tf.slice(grown, cut, [-1, height.length, width.length, -1])


def _cut(padded: Tensor, windows: _Windows, tap: tuple[int, int]) -> Tensor:
    """Return the entry of `tap` for every output: [b, outputs, outputs, c]."""
    rows, columns = _reach(windows.height, tap[0]), _reach(windows.width, tap[1])
    return padded[:, rows, columns, :]


def _reach(axis: _Axis, tap: int) -> slice:
    start = axis.offset(tap)
    return slice(start, start + (axis.outputs - 1) * axis.stride + 1, axis.stride)


def _put_back(part: Tensor, windows: _Windows, tap: tuple[int, int]) -> Tensor:
    """The transpose of `_cut`: [b, outputs, outputs, c] -> [b, padded, padded, c]."""
    margins = [[0, 0]]
    for axis, along, at in ((1, windows.height, tap[0]), (2, windows.width, tap[1])):
        part = spaced(part, axis, along.stride)
        start = along.offset(at)
        margins.append([start, along.padded - start - (along.outputs - 1) * along.stride - 1])
    return tf.pad(part, [*margins, [0, 0]])


def _tiles(x: Tensor, windows: _Windows) -> list[Tensor]:
    """Return what `_cut` would for every tap of windows side by side, without strides: those take ten times as long."""
    rows, columns, channels = windows.height, windows.width, x.shape[3]
    folded = tf.reshape(x, [-1, rows.window, columns.outputs, columns.window * channels])
    shape = [-1, rows.outputs, columns.outputs, channels]
    taps = [(i, j * channels) for i, j in windows.taps()]
    # i : i + 1, not i: XNNPACK drops no axis.
    return [tf.reshape(folded[:, i : i + 1, :, j : j + channels], shape) for i, j in taps]


def _from_tiles(parts: Sequence[Tensor], windows: _Windows) -> Tensor:
    """The transpose of `_tiles`."""
    rows, columns, channels = windows.height, windows.width, parts[0].shape[3]
    narrow = [tf.reshape(part, [-1, 1, columns.outputs, channels]) for part in parts]
    across = [tf.concat(narrow[i : i + columns.window], axis=3) for i in range(0, len(narrow), columns.window)]
    return tf.reshape(tf.concat(across, axis=1), [-1, rows.length, columns.length, channels])


def _patches(x: Tensor, windows: _Windows) -> Tensor:
    """Return every window's entries: [b, h, w, c] -> [b * outputs * outputs, taps * c]."""
    padded = _padded(x, windows)
    cuts = [_cut(padded, windows, tap) for tap in windows.taps()]
    return tf.reshape(tf.concat(cuts, axis=3), [-1, windows.count * x.shape[3]])


@gradient_of("Conv2D")
def _conv2d(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, kernel = op.inputs
    windows = _windows(op, x, op.outputs[0], (kernel.shape[0], kernel.shape[1]))
    if kernel.shape[2] != x.shape[3]:
        raise NoGradient(op, "convolves in groups", "use DepthwiseConv2D, SeparableConv2D or groups=1")
    rows = tf.reshape(dy, [-1, kernel.shape[3]])
    dw = tf.reshape(tf.matmul(_patches(x, windows), rows, transpose_a=True), kernel.shape)
    if windows.height.stride == windows.width.stride == 1:
        return _reversed(kernel, dy, windows), dw
    if windows.height.dilation == windows.width.dilation == 1:
        return _transposed(op, x, kernel, dy), dw
    parts = tf.matmul(rows, tf.reshape(kernel, [-1, kernel.shape[3]]), transpose_b=True)
    shape = [-1, windows.height.outputs, windows.width.outputs, windows.count * x.shape[3]]
    return _all_back(tf.split(tf.reshape(parts, shape), windows.count, axis=3), windows), dw


def _reversed(kernel: Tensor, dy: Tensor, windows: _Windows) -> Tensor:
    """Return the input's gradient at stride 1: a convolution of dy with the kernel turned around."""
    # One axis at a time: tflite-runtime 2.14 is silently wrong with two.
    turned = tf.transpose(tf.reverse(tf.reverse(kernel, [0]), [1]), [0, 1, 3, 2])
    dilations = [windows.height.dilation, windows.width.dilation]
    return tf.nn.conv2d(tf.pad(dy, _reach_back(windows)), turned, 1, "VALID", dilations=dilations)


def _reach_back(windows: _Windows) -> list[list[int]]:
    """Return how dy is padded so that every input gets what all windows over it have, at stride 1."""
    margins = [[0, 0]]
    for axis in (windows.height, windows.width):
        reach = (axis.window - 1) * axis.dilation
        margins.append([reach - axis.before, axis.length - axis.outputs + axis.before])
    return [*margins, [0, 0]]


def _transposed(op: Operation, x: Tensor, kernel: Tensor, dy: Tensor) -> Tensor:
    strides, padding = op.get_attr("strides"), op.get_attr("padding").decode()
    dx = tf.raw_ops.Conv2DBackpropInput(
        input_sizes=tf.shape(x), filter=kernel, out_backprop=dy, strides=strides, padding=padding
    )
    return tf.ensure_shape(dx, x.shape) if dx.shape.as_list() != x.shape.as_list() else dx


@gradient_of("Conv2DBackpropInput")
def _conv2d_transpose(op: Operation, dy: Tensor) -> tuple[None, Tensor, Tensor]:
    """y = conv^T(x): dx is the convolution of dy, dW that of dy with x in the place of its gradient."""
    _, kernel, x = op.inputs
    if max(op.get_attr("dilations")) > 1:
        raise NoGradient(op, "transposes a convolution with a dilation", "use strides, or a larger kernel")
    strides, padding = op.get_attr("strides"), op.get_attr("padding").decode()
    windows = _windows(op, op.outputs[0], x, (kernel.shape[0], kernel.shape[1]))
    rows = tf.reshape(x, [-1, kernel.shape[3]])
    dw = tf.reshape(tf.matmul(_patches(dy, windows), rows, transpose_a=True), kernel.shape)
    return None, dw, tf.nn.conv2d(dy, kernel, strides=strides, padding=padding)


@gradient_of("DepthwiseConv2dNative")
def _depthwise(op: Operation, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, kernel = op.inputs
    windows = _windows(op, x, op.outputs[0], (kernel.shape[0], kernel.shape[1]))
    channels, multiplier = kernel.shape[2], kernel.shape[3]
    padded, rows = _padded(x, windows), tf.reshape(dy, [-1, channels, multiplier])
    cuts = [tf.reshape(_cut(padded, windows, tap), [-1, channels, 1]) for tap in windows.taps()]
    dw = tf.reshape(tf.stack([tf.reduce_sum(cut * rows, axis=0) for cut in cuts]), kernel.shape)
    if multiplier == windows.height.stride == windows.width.stride == 1:
        turned = tf.reverse(tf.reverse(kernel, [0]), [1])
        dilations = [windows.height.dilation, windows.width.dilation]
        grown = tf.pad(dy, _reach_back(windows))
        return tf.nn.depthwise_conv2d(grown, turned, [1, 1, 1, 1], "VALID", dilations=dilations), dw
    shape = [-1, windows.height.outputs, windows.width.outputs, channels]
    weighted = [rows * kernel[i, j] for i, j in windows.taps()]
    return _all_back([tf.reshape(tf.reduce_sum(part, axis=2), shape) for part in weighted], windows), dw


@gradient_of("MaxPool")
def _max_pool(op: Operation, dy: Tensor) -> Tensor:
    """The first maximum of a window, row by row, gets the gradient, as in TensorFlow."""
    x, y = op.inputs[0], op.outputs[0]
    windows = _windows(op, x, y, tuple(op.get_attr("ksize")[1:3]))
    padded = x if windows.tiles else _padded(x, windows, _LOWEST)
    cuts = _tiles(x, windows) if windows.tiles else [_cut(padded, windows, tap) for tap in windows.taps()]
    # What is left of dy goes from tap to tap and stops at the first maximum; ones to begin with would take as long.
    rest, shares = dy, []
    for cut in cuts[:-1]:
        left = rest * tf.cast(y > cut, y.dtype)
        shares.append(rest - left)
        rest = left
    shares.append(rest)
    return _all_back(shares, windows)


@gradient_of("AvgPool")
def _average_pool(op: Operation, dy: Tensor) -> Tensor:
    """Padding does not count: a window at the edge shares its gradient among fewer entries."""
    x = op.inputs[0]
    windows = _windows(op, x, op.outputs[0], tuple(op.get_attr("ksize")[1:3]))
    counts = np.outer(_entries(windows.height), _entries(windows.width))[None, :, :, None]
    share = dy * tf.constant(1.0 / counts, dy.dtype)
    return _all_back([share] * windows.count, windows)


def _all_back(parts: Sequence[Tensor], windows: _Windows) -> Tensor:
    """Return the sum of every tap's part where it was cut: the gradient of the input."""
    if windows.tiles:
        return _from_tiles(parts, windows)
    put = [_put_back(part, windows, tap) for part, tap in zip(parts, windows.taps(), strict=True)]
    return _unpadded(tf.add_n(put), windows)


def _entries(axis: _Axis) -> np.ndarray:
    """Return for every output how many of its window's entries lie within the input."""
    starts = np.arange(axis.outputs) * axis.stride - axis.before
    return np.minimum(starts + axis.window, axis.length) - np.maximum(starts, 0)


@gradient_of("SpaceToBatchND")
def _space_to_batch(op: Operation, dy: Tensor) -> tuple[Tensor, None, None]:
    block, margins = constant_of(op.inputs[1]), constant_of(op.inputs[2])
    dx = tf.batch_to_space(dy, block, margins)
    return tf.ensure_shape(dx, op.inputs[0].shape), None, None


@gradient_of("BatchToSpaceND")
def _batch_to_space(op: Operation, dy: Tensor) -> tuple[Tensor, None, None]:
    block, crops = constant_of(op.inputs[1]), constant_of(op.inputs[2])
    return tf.space_to_batch(dy, block, crops), None, None
