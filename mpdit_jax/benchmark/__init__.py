"""What `python -m mpdit_jax.benchmark` measures, one module each."""
