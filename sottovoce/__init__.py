"""Sottovoce: what both sides of a federation share. The package is lazy: import the room you need."""
