"""MPDiT in JAX (the public API arrives with the modules that carry it)."""
