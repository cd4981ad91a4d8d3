"""What one update says about the pictures behind it: the analytic attack on a first dense layer, pure.

For one picture x the loss has, at the weights w and the bias b of a hidden unit, the gradients c * x and c with the
same factor c. So the change of the weights divided by the change of the bias is the picture itself, whatever the loss,
the learning rate and the number of steps; no guessing, no training. With several pictures a unit gives a blend of
those that activate it, and a unit that only one of them activates gives that one away.

Reference: Phong et al. 2017 (eprint 2017/715), section 3; Geiping et al. 2020 (arXiv 2003.14053), proposition 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sottovoce.types import Array

FloatMatrix = npt.NDArray[np.float64]

_AGREE = 0.998
"""Units whose pictures correlate at least so much show the same one; blends of pictures rarely agree by chance."""
_FALSE_ALARM = 1e-6


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What the attack makes of one update.

    Attributes:
        picture: The picture that the attacker believes in, float64 [pixels], in the layer's own units.
        unit: The hidden unit that shows it.
        of_every_unit: What every hidden unit shows, float64 [units, pixels].
    """

    picture: Array
    unit: int
    of_every_unit: FloatMatrix


def reconstruct(kernel_update: Array, bias_update: Array) -> Reconstruction:
    """Return the picture that the update of a first dense layer gives away, without having seen any picture.

    Every unit shows a picture or a blend. The one to believe in is shown by the most units; among these, and where no
    two units agree, the unit whose bias moved most is the least disturbed by rounding.

    Args:
        kernel_update: Change of the weights, shape (pixels, units).
        bias_update: Change of the biases, shape (units,). A unit whose bias did not move shows nothing: zeros.
    """
    bias = np.asarray(bias_update, np.float64)
    moved = bias != 0
    pictures = np.where(moved, np.asarray(kernel_update, np.float64) / np.where(moved, bias, 1.0), 0.0).T
    agreeing = (correlations(pictures, pictures) > _AGREE).sum(axis=1)
    unit = max(range(bias.size), key=lambda index: (int(agreeing[index]), abs(float(bias[index]))))
    return Reconstruction(pictures[unit], unit, pictures)


def correlations(left: Array, right: Array) -> FloatMatrix:
    """Return Pearson's correlation of every row of `left` with every row of `right`; 0 where a row is constant."""
    rows, columns = (_standardised(np.atleast_2d(values)) for values in (left, right))
    return rows @ columns.T


def largest_by_chance(length: int, *, attempts: int = 1) -> float:
    """Return the correlation that noise stays below: it is exceeded once in a million times.

    Student's t for Pearson's correlation of independent values, both signs, corrected for `attempts` (Bonferroni).

    Args:
        length: How many values are correlated, at least 3.
        attempts: Among how many correlations the largest is looked for.
    """
    from scipy import stats

    freedom = length - 2
    t = float(stats.t.isf(_FALSE_ALARM / (2 * attempts), freedom))
    return t / math.sqrt(freedom + t * t)


def _standardised(rows: Array) -> FloatMatrix:
    """Return every row less its mean, divided by its length."""
    centred = rows - rows.mean(axis=1, keepdims=True, dtype=np.float64)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.where(lengths > 0, lengths, 1.0), np.float64)
