"""What `python -m mpdit_jax.benchmark` runs, one module a benchmark."""
