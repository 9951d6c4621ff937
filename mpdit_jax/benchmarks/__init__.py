"""What `python -m mpdit_jax.benchmark` can measure, one module each."""
