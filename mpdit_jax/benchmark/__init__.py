"""Benchmarks of `python -m mpdit_jax.benchmark`, one module each."""
