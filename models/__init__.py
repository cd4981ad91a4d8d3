"""From Keras to client programs; the only package that imports TensorFlow."""
