"""From Keras to client programs; the only package that imports TensorFlow."""

import os

# A conversion logs ten lines of C++ notes to a program's own output; warnings of importance come as Python errors.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
