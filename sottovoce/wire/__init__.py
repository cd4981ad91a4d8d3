"""Typed messages, the only parser of untrusted bytes, and the only topic strings."""
