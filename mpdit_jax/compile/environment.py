"""What must be in the environment before JAX starts, for compiling on machines that are not here."""

import os

import jax

_DEFAULTS = {
    # libtpu is not to look for chips,
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # nor to warn that it finds none; --topology says which chips are meant.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # and may be loaded by several processes at once, for none uses any.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare(devices: int = 0) -> None:
    """Keep JAX on the CPU, with so many virtual devices if any, and let libtpu compile without chips."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")  # it has read the variable when it was imported
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if devices:
        flag = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
