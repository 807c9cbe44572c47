"""Benchmarks behind `scripts/bench`: speed and memory, each side by side with what it is compared to, in one run."""
