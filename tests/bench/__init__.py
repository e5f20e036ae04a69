"""Benchmarks. Most figures are ratios of two things measured side by side in one run. A figure that
misses its goal is printed like any other: it is not an error."""
