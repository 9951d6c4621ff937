"""The environment that libtpu needs to compile without chips."""

import os

import jax

_DEFAULTS = {
    # Do not search for chips,
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # do not warn that there are none (--topology names the chips),
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # and let several processes load libtpu at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare(devices: int = 0) -> None:
    """Keep JAX on the CPU and let libtpu compile without chips; with `devices`, make that many virtual CPU devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")  # JAX read the variable when it was imported
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if devices:
        flag = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
