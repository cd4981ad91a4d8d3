"""One port (base), two ways through it: mqtt for real, memory for tests and simulation."""
