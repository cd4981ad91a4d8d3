"""Ways to write the parts of a training step in TFLite built-ins, to be measured against one another.

The layer is the second convolution of McMahan's CNN: x [10, 14, 14, 32], kernel [5, 5, 32, 64], padding `same`; the
pooling is the one after the first. All formulations of a question compute the same, which `opened` checks. The ones in
use are those of `models.convolutions` and `models.gradients_windows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from models.conversion import flatbuffer_of
from models.convolutions import HEIGHT, WIDTH, Slide, WithGradient, halved, side_by_side, summed, whole
from models.gradients import built_in_gradients, slopes
from models.gradients_shapes import spaced
from models.ops import Tensor
from sottovoce.errors import ProgramError
from sottovoce.runtime import open_function
from sottovoce.types import Array, TensorType

BATCH, SIDE, TAPS, CHANNELS, FILTERS = 10, 14, 5, 32, 64
_TOLERANCE = 1e-2
_SLIDE = Slide(SIDE, SIDE, tuple(range(-(TAPS // 2), TAPS // 2 + 1)))
Formulation = Callable[..., Tensor]
Way = Callable[[Tensor, Tensor, Slide, Slide], WithGradient]


@dataclass(frozen=True, slots=True)
class Question:
    """What is computed, from what, and how it can be written.

    Attributes:
        what: In words.
        shapes: Of the arguments, in order; the batch of each but `kernel` is unknown to the converter.
        ways: Name -> function of the arguments; all return the same numbers.
    """

    what: str
    shapes: Mapping[str, tuple[int, ...]]
    ways: Mapping[str, Formulation]


def opened(question: Question) -> dict[str, Callable[[], Array]]:
    """Return every formulation ready to run on the same random arguments.

    Raises:
        BadBundle: One does not convert.
        ProgramError: One computes something else than the first.
    """
    random = np.random.default_rng(0)
    given = {name: random.normal(size=shape).astype(np.float32) for name, shape in question.shapes.items()}
    if "y" in given:
        # What a pooling returned, for its gradient.
        given["y"] = given["x"].reshape(BATCH, 2 * SIDE // 2, 2, 2 * SIDE // 2, 2, CHANNELS).max(axis=(2, 4))
    kinds = [
        (name, TensorType("float32", array.shape if name == "kernel" else (None, *array.shape[1:])))
        for name, array in given.items()
    ]
    runs: dict[str, Callable[[], Array]] = {}
    wanted: Array | None = None
    for name, way in question.ways.items():
        flatbuffer = flatbuffer_of(_named(way, [*given]), kinds, what=name)
        run = _running(flatbuffer, given)
        found = run()
        wanted = found if wanted is None else wanted
        if not np.allclose(found.reshape(wanted.shape), wanted, atol=_TOLERANCE):
            raise ProgramError(f"{name!r} does not compute what the first formulation does")
        runs[name] = run
    return runs


def _named(way: Formulation, order: Sequence[str]) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    return lambda tensors: {"result": way(*(tensors[name] for name in order))}


def _running(flatbuffer: bytes, given: Mapping[str, Array]) -> Callable[[], Array]:
    function = open_function(flatbuffer)
    return lambda: function(given)["result"]


def _rows(x: Tensor) -> Tensor:
    return tf.reshape(x, [-1, x.shape[-1]])


def _image(rows: Tensor) -> Tensor:
    return tf.reshape(rows, [-1, SIDE, SIDE, rows.shape[-1]])


def _summed(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


# --- Windows side by side (im2col).


def _cuts(x: Tensor) -> list[Tensor]:
    """Return the entries of every tap, cut out one by one."""
    margin = TAPS // 2
    padded = tf.pad(x, [[0, 0], [margin, margin], [margin, margin], [0, 0]])
    return [padded[:, i : i + SIDE, j : j + SIDE, :] for i in range(TAPS) for j in range(TAPS)]


def _at_once(x: Tensor) -> Tensor:
    return _rows(tf.concat(_cuts(x), axis=3))


def _in_two(x: Tensor) -> Tensor:
    return _rows(side_by_side(side_by_side(x, WIDTH, _SLIDE), HEIGHT, _SLIDE))


def _each_row(x: Tensor) -> list[Tensor]:
    """Return the windows along the width, once for every row of the kernel."""
    beside = side_by_side(x, WIDTH, _SLIDE)
    return [_rows(side_by_side(beside, HEIGHT, Slide(SIDE, SIDE, (shift,)))) for shift in _SLIDE.shifts]


# --- The convolution.


def _by_matmul(windows: Callable[[Tensor], Tensor]) -> Formulation:
    return lambda x, kernel: _image(tf.matmul(windows(x), _rows(kernel)))


def _by_rows(x: Tensor, kernel: Tensor) -> Tensor:
    parts = zip(_each_row(x), tf.unstack(kernel), strict=True)
    return _image(_summed([tf.matmul(windows, _rows(row)) for windows, row in parts]))


def _by_taps(x: Tensor, kernel: Tensor) -> Tensor:
    taps = tf.unstack(tf.reshape(kernel, [TAPS * TAPS, *kernel.shape[2:]]))
    return _image(_summed([tf.matmul(_rows(cut), tap) for cut, tap in zip(_cuts(x), taps, strict=True)]))


def _halved_by_height(x: Tensor, kernel: Tensor) -> Tensor:
    """Windows along the height side by side, the product, and its parts shifted along the width."""
    flat = tf.reshape(tf.transpose(kernel, [0, 2, 1, 3]), [TAPS * CHANNELS, TAPS * FILTERS])
    return summed(_image(tf.matmul(_rows(side_by_side(x, HEIGHT, _SLIDE)), flat)), WIDTH, _SLIDE)


# --- The gradient for the input.


def _turned(kernel: Tensor) -> Tensor:
    return tf.transpose(tf.reverse(tf.reverse(kernel, [0]), [1]), [0, 1, 3, 2])


def _transposed(dy: Tensor, kernel: Tensor) -> Tensor:
    sizes = tf.stack([tf.shape(dy)[0], SIDE, SIDE, CHANNELS])
    return tf.raw_ops.Conv2DBackpropInput(
        input_sizes=sizes, filter=kernel, out_backprop=dy, strides=[1, 1, 1, 1], padding="SAME"
    )


def _put_back(dy: Tensor, kernel: Tensor) -> Tensor:
    """The product first, then every tap's share is added where it was cut (col2im)."""
    shares = tf.matmul(_rows(dy), _rows(kernel), transpose_b=True)
    parts = tf.split(_image(shares), TAPS * TAPS, axis=3)
    margin = TAPS // 2
    put = [
        tf.pad(part, [[0, 0], [i, TAPS - 1 - i], [j, TAPS - 1 - j], [0, 0]])
        for part, (i, j) in zip(parts, np.ndindex(TAPS, TAPS), strict=True)
    ]
    return tf.add_n(put)[:, margin : margin + SIDE, margin : margin + SIDE, :]


def _input_slope(way: Way) -> Formulation:
    """Return the gradient for the input that belongs to a way to convolve; it reads only the shape of x."""
    nothing = tf.TensorShape([None, SIDE, SIDE, CHANNELS])

    def of(dy: Tensor, kernel: Tensor) -> Tensor:
        x = tf.ensure_shape(tf.zeros([tf.shape(dy)[0], SIDE, SIDE, CHANNELS]), nothing)
        return way(x, kernel, _SLIDE, _SLIDE)[1](dy)[0]

    return of


_LENGTH = 128
_ALONG = Slide(_LENGTH, _LENGTH, _SLIDE.shifts)
_STILL = Slide(1, 1, (0,))


def _col2im_of_a_row(dy: Tensor, kernel: Tensor) -> Tensor:
    shares = tf.matmul(_rows(dy), tf.reshape(tf.transpose(kernel, [3, 0, 1, 2]), [CHANNELS, TAPS * CHANNELS]))
    return summed(tf.reshape(shares, [-1, 1, _LENGTH, TAPS * CHANNELS]), WIDTH, _ALONG.back)


def _slope_of_a_row(dy: Tensor, kernel: Tensor) -> Tensor:
    x = tf.ensure_shape(tf.zeros([tf.shape(dy)[0], 1, _LENGTH, CHANNELS]), [None, 1, _LENGTH, CHANNELS])
    return whole(x, kernel, _STILL, _ALONG)[1](dy)[0]


# --- The gradient for the kernel.


def _by_columns(windows: Callable[[Tensor], Tensor]) -> Formulation:
    return lambda dy, x: tf.matmul(windows(x), _rows(dy), transpose_a=True)


def _turned_columns(dy: Tensor, x: Tensor) -> Tensor:
    return tf.transpose(tf.matmul(tf.transpose(_rows(dy)), _in_two(x)))


def _columns_by_row(dy: Tensor, x: Tensor) -> Tensor:
    turned = tf.transpose(_rows(dy))
    return tf.transpose(tf.concat([tf.matmul(turned, windows) for windows in _each_row(x)], axis=1))


def _columns_by_tap(dy: Tensor, x: Tensor) -> Tensor:
    turned = tf.transpose(_rows(dy))
    return tf.transpose(tf.concat([tf.matmul(turned, _rows(cut)) for cut in _cuts(x)], axis=1))


def _kernel_slope(way: Way) -> Formulation:
    return lambda dy, x: way(x, tf.zeros([TAPS, TAPS, CHANNELS, FILTERS]), _SLIDE, _SLIDE)[1](dy)[1]


# --- Pooling and rectifying.


def _pool_in_use(dy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    with built_in_gradients():
        pooled = tf.nn.max_pool2d(x, 2, 2, "VALID")
    return slopes(pooled, [x], upstream=dy)[0]


def _pool_by_steps(hit: Callable[[Tensor, Tensor], Tensor]) -> Formulation:
    """Cut with strides, and put back between zeros."""

    def of(dy: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts, rest = [], dy
        for i, j in np.ndindex(2, 2):
            left = rest - rest * hit(x[:, i::2, j::2, :], y)
            parts.append(rest - left)
            rest = left
        pairs = [tf.reshape(tf.stack(parts[k : k + 2], axis=3), [-1, SIDE, 2 * SIDE, CHANNELS]) for k in (0, 2)]
        return tf.reshape(tf.stack(pairs, axis=2), [-1, 2 * SIDE, 2 * SIDE, CHANNELS])

    return of


def _pool_by_tiles(missed: Callable[[Tensor, Tensor], Tensor]) -> Formulation:
    """Windows side by side: what is left of dy goes from tap to tap, and stops at the first maximum."""

    def of(dy: Tensor, x: Tensor, y: Tensor) -> Tensor:
        folded = tf.reshape(x, [-1, 2, SIDE, 2 * CHANNELS])
        highest, rest = (tf.reshape(each, [-1, 1, SIDE, CHANNELS]) for each in (y, dy))
        parts = []
        for i, j in ((0, 0), (0, 1), (1, 0)):
            left = rest * missed(highest, folded[:, i : i + 1, :, j * CHANNELS : (j + 1) * CHANNELS])
            parts.append(rest - left)
            rest = left
        pairs = [tf.concat(pair, axis=3) for pair in (parts[:2], [parts[2], rest])]
        return tf.reshape(tf.concat(pairs, axis=1), [-1, 2 * SIDE, 2 * SIDE, CHANNELS])

    return of


def _average_in_use(dy: Tensor, x: Tensor) -> Tensor:
    with built_in_gradients():
        pooled = tf.nn.avg_pool2d(x, 2, 2, "VALID")
    return slopes(pooled, [x], upstream=dy)[0]


def _average_between_zeros(dy: Tensor, x: Tensor) -> Tensor:
    """Every tap's share between zeros, and their sum."""
    share = spaced(spaced(dy * 0.25, HEIGHT, 2), WIDTH, 2)
    return _summed([tf.pad(share, [[0, 0], [i, 1 - i], [j, 1 - j], [0, 0]]) for i, j in np.ndindex(2, 2)])


# --- Sums, and what goes back from them.


def _product_with_ones(dy: Tensor) -> Tensor:
    rows = _rows(dy)
    return tf.matmul(rows[:, :1] * 0.0 + 1.0, rows, transpose_a=True)


def _in_two_sums(dy: Tensor) -> Tensor:
    return tf.reduce_sum(tf.reduce_sum(dy, axis=[1, 2]), axis=0, keepdims=True)


def _spread(dy: Tensor) -> Tensor:
    return tf.reshape(dy, [-1, 1, 1, FILTERS])


_X, _DY = (BATCH, SIDE, SIDE, CHANNELS), (BATCH, SIDE, SIDE, FILTERS)
_KERNEL = (TAPS, TAPS, CHANNELS, FILTERS)
_WIDE = (BATCH, 2 * SIDE, 2 * SIDE, CHANNELS)
_INPUTS, _OUTPUTS = 3136, 512

QUESTIONS: Mapping[str, Question] = {
    "forward": Question(
        "a convolution whose kernel is not constant",
        {"x": _X, "kernel": _KERNEL},
        {
            "CONV_2D": lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"),
            "im2col": _by_matmul(_at_once),
            "im2col, width then height": _by_matmul(_in_two),
            "a product for each row": _by_rows,
            "a product for each tap": _by_taps,
            "halved, height first": _halved_by_height,
            "halved, in use": lambda x, kernel: halved(x, kernel, _SLIDE, _SLIDE)[0],
        },
    ),
    "input gradient": Question(
        "dX of that convolution",
        {"dy": _DY, "kernel": _KERNEL},
        {
            "TRANSPOSE_CONV": _transposed,
            "CONV_2D, kernel turned": lambda dy, kernel: tf.nn.conv2d(dy, _turned(kernel), 1, "SAME"),
            "im2col, kernel turned": lambda dy, kernel: _by_matmul(_at_once)(dy, _turned(kernel)),
            "a product for each row": lambda dy, kernel: _by_rows(dy, _turned(kernel)),
            "col2im": _put_back,
            "whole": _input_slope(whole),
            "halved, in use": _input_slope(halved),
        },
    ),
    "input gradient, one axis": Question(
        "dX of a convolution of 5 taps over [10, 128, 32]",
        {"dy": (BATCH, 1, _LENGTH, CHANNELS), "kernel": (1, TAPS, CHANNELS, CHANNELS)},
        {"col2im": _col2im_of_a_row, "windows of dy, in use": _slope_of_a_row},
    ),
    "kernel gradient": Question(
        "dW of that convolution",
        {"dy": _DY, "x": _X},
        {
            "im2col": _by_columns(_at_once),
            "im2col, width then height": _by_columns(_in_two),
            "the same, dy turned": _turned_columns,
            "a product for each row": _columns_by_row,
            "a product for each tap": _columns_by_tap,
            "halved, in use": _kernel_slope(halved),
        },
    ),
    "pooling gradient": Question(
        "dX of a max pooling 2x2 over [10, 28, 28, 32]; the first maximum gets it",
        {"dy": _X, "x": _WIDE, "y": _X},
        {
            "cut with strides": _pool_by_steps(lambda cut, y: tf.cast(tf.equal(cut, y), y.dtype)),
            "tiles, NOT_EQUAL": _pool_by_tiles(lambda y, cut: tf.cast(tf.not_equal(cut, y), y.dtype)),
            "tiles, GREATER": _pool_by_tiles(lambda y, cut: tf.cast(y > cut, y.dtype)),
            "tiles, SIGN": _pool_by_tiles(lambda y, cut: tf.sign(y - cut)),
            "in use": _pool_in_use,
        },
    ),
    "average pooling gradient": Question(
        "dX of an average pooling 2x2 over [10, 28, 28, 32]",
        {"dy": _X, "x": _WIDE},
        {
            "shifted between zeros": _average_between_zeros,
            "RESIZE_NEAREST_NEIGHBOR": lambda dy, x: tf.image.resize(dy * 0.25, [2 * SIDE, 2 * SIDE], "nearest"),
            "tiles, in use": _average_in_use,
        },
    ),
    "bias gradient": Question(
        "the sum of dy [10, 14, 14, 64] over all but the last axis",
        {"dy": _DY},
        {
            "SUM over three axes": lambda dy: tf.reduce_sum(dy, axis=[0, 1, 2])[None],
            "SUM over rows, in use": lambda dy: tf.reduce_sum(_rows(dy), axis=0)[None],
            "SUM twice": _in_two_sums,
            "product with ones": _product_with_ones,
        },
    ),
    "mean gradient": Question(
        "dX of a global average pooling over [10, 14, 14, 64]",
        {"dy": (BATCH, FILTERS)},
        {
            "BROADCAST_TO": lambda dy: tf.broadcast_to(_spread(dy), [tf.shape(dy)[0], SIDE, SIDE, FILTERS]),
            "TILE": lambda dy: tf.tile(_spread(dy), [1, SIDE, SIDE, 1]),
            "MUL by constant ones": lambda dy: _spread(dy) * tf.ones([1, SIDE, SIDE, 1]),
            "ADD to constant zeros": lambda dy: _spread(dy) + tf.zeros([1, SIDE, SIDE, FILTERS]),
        },
    ),
    "rectifier gradient": Question(
        "dX of ReLU over [10, 28, 28, 32]",
        {"dy": _WIDE, "x": _WIDE},
        {
            "CAST of GREATER": lambda dy, x: dy * tf.cast(x > 0, x.dtype),
            "SIGN of ReLU": lambda dy, x: dy * tf.sign(tf.nn.relu(x)),
            "SELECT": lambda dy, x: tf.where(x > 0, dy, tf.zeros_like(dy)),
        },
    ),
    "dense gradient": Question(
        "dX of a dense layer 3136 -> 512",
        {"dy": (BATCH, _OUTPUTS), "kernel": (_INPUTS, _OUTPUTS)},
        {
            "FULLY_CONNECTED": lambda dy, kernel: tf.matmul(dy, kernel, transpose_b=True),
            "kernel on the left": lambda dy, kernel: tf.transpose(tf.matmul(kernel, tf.transpose(dy))),
        },
    ),
}
"""What is measured; the first formulation of each is what the others are held against."""
