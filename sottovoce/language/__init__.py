"""The federated language: typed computations as data, checked when they are defined, run by an executor.

The package is lazy; `import sottovoce as sv` reaches everything an author needs.
"""
