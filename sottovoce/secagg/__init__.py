"""Secure aggregation after Bonawitz et al. 2017 (eprint 2017/281): both sides, sans-IO."""
