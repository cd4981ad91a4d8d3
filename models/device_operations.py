"""Which operations of TensorFlow a device has, beside those with a gradient here, and what to use instead of others."""

from __future__ import annotations

import re
from collections.abc import Mapping

from models.gradients import LOOPS

FLAT = frozenset({
    "ArgMax", "ArgMin", "Ceil", "Const", "Equal", "Fill", "Floor", "FloorDiv", "Greater",
    "GreaterEqual", "Less", "LessEqual", "NotEqual", "OneHot", "OnesLike", "Range", "Rank", "Rint", "Round",
    "Shape", "Sign", "Size", "StopGradient", "ZerosLike",
})  # fmt: skip
"""Operations that devices have and that no gradient passes."""
THROUGH = frozenset({
    "AddN", "Cumsum", "Identity",
})  # fmt: skip
"""Operations whose gradient in TensorFlow is made of built-ins."""
FORWARD = frozenset({
    "All", "Any", "Atan2", "BroadcastArgs", "Bucketize", "ComplexAbs", "Conv3D",
    "Conv3DBackpropInputV2", "DepthToSpace", "Div", "FloorMod", "FusedBatchNorm", "FusedBatchNormV3", "Gather",
    "GatherNd", "LRN", "LogicalAnd", "LogicalNot", "LogicalOr", "MatrixDiag", "MatrixDiagV3",
    "MatrixSetDiag", "MatrixSetDiagV3", "MirrorPad", "NoOp", "Placeholder", "PlaceholderWithDefault", "Prod",
    "RFFT", "RFFT2D", "Real", "Imag", "ResizeBilinear", "ResizeNearestNeighbor", "ReverseSequence", "ScatterNd",
    "SegmentSum", "SpaceToDepth", "SparseToDense", "TensorScatterUpdate", "TopKV2", "TruncateDiv",
    "UnsortedSegmentMax", "UnsortedSegmentMin", "UnsortedSegmentProd", "UnsortedSegmentSum", "Where",
})  # fmt: skip
"""Operations that devices have besides; they may stand before the first trained weight."""
UNSUITABLE = frozenset({
    "float64", "float16", "bfloat16", "complex128", "string", "variant", "resource",
})  # fmt: skip
"""Kinds of numbers that devices do not compute with."""
CURES: Mapping[str, str] = {
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
    "ReadVariableOp": "it reads a tf.Variable that Keras does not know; make it a weight (add_weight)",
    "LookupTableFindV2": "look words and numbers up before training, and feed their places in the vocabulary",
    "custom_gradient": "leave it out; what shall pass a gradient unchanged is x + keras.ops.stop_gradient(f(x) - x)",
    "AvgPool3D": "replace pooling in 3D by AveragePooling2D",
    "ResizeBicubic": "replace UpSampling2D(interpolation='bicubic') by UpSampling2D (nearest) or Conv2DTranspose",
    **dict.fromkeys(("RFFT", "RFFT2D", "IRFFT"), "compute spectra before training, in the collection of examples"),
}
"""Operation type -> what to use in the layer's place."""
NEVER = LOOPS | {"PyFunc", "EagerPyFunc", "ReadVariableOp", "LookupTableFindV2"}
"""What a device cannot even run on constants."""
DRAWS = re.compile("Random|Normal|Gamma|Poisson|Multinomial|Binomial")
"""Operations that make something new of nothing."""
