"""Benchmarks: ratios against a peer measured in one process, never absolute promises."""
