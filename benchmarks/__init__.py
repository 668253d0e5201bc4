"""Benchmarks: what memcompile must reach on the real model, measured on a quiet machine."""
