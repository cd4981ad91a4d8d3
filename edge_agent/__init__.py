"""What runs on the Raspberry Pi or phone. Installs and runs without TensorFlow."""
