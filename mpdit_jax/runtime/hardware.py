"""Peak performance of accelerators, from published figures, and of CPUs, by measurement."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak performance of one TPU chip."""

    kind: str  # `jax.Device.device_kind`
    flops: float  # bfloat16 operations per second, 2 per multiply-add
    hbm: int  # bytes of memory that a program may use
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second from one chip over all its links
    dimensions: int  # dimensions of a topology, such as 2 for 16x16
    pod: int  # chips of the largest slice
    network: float = math.inf  # bytes per second from one chip to other slices; inf where no figure is published

    def bounds(self, flops: float, moved: float, sent: float, crossed: float = 0.0) -> dict[str, float]:
        """Return a lower bound on a program's time, in seconds, for each resource of the chip.

        Args:
            flops: operations of matrix products.
            moved: bytes read from and written to the chip's memory.
            sent: bytes sent to other chips.
            crossed: bytes sent to other slices.
        """
        return {
            "matrix products": flops / self.flops,
            "memory": moved / self.hbm_bandwidth,
            "links": sent / self.ici_bandwidth,
            "network": crossed / self.network,
        }


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; less what the runtime reserves, such as 0.25 GiB on v5e.
# Network: that of a pod (6.4 Tbit/s on v5e, 25.6 on v6e) over its chips.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, int(31.75 * GIB), 1228e9, 300e9, 3, 4096),
    "v5e": Chip("TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 2, 256, 3.125e9),
    "v5p": Chip("TPU v5", 459e12, int(95.0 * GIB), 2765e9, 600e9, 3, 8960),
    "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1638e9, 400e9, 2, 256, 12.5e9),
}

# bfloat16 operations per second without sparsity, from NVIDIA's data sheets, by the beginning of the device kind.
GPU_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
}


def topology_chip(topology: str) -> Chip:
    """Return the chip of a TPU topology such as v5e:16x16. Raise ConfigError if there is no such topology."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    known = ", ".join(CHIPS)
    if match is None or match[1] not in CHIPS:
        raise ConfigError(
            f"--topology={topology}: expected CHIP:SIZE with a chip of {known}, such as v5e:16x16, or GPUs such as "
            "a100:8 (also a100-40gb, h100, h200, b200)."
        )
    chip = CHIPS[match[1]]
    if match[2].count("x") + 1 != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise ConfigError(
            f"--topology={topology}: {match[1]} has {chip.dimensions} dimensions, such as {match[1]}:{example}."
        )
    size = math.prod(map(int, match[2].split("x")))
    if not 0 < size <= chip.pod:
        raise ConfigError(
            f"--topology={topology}: {size:,} chips; expected 1 to {chip.pod:,}, a whole pod of {match[1]}."
        )
    return chip


def published_flops(kind: str) -> float | None:
    """Return the published bfloat16 operations per second of a `jax.Device.device_kind`; None if it is unknown."""
    for chip in CHIPS.values():
        if chip.kind == kind:
            return chip.flops
    return next((flops for name, flops in GPU_FLOPS.items() if kind.startswith(name)), None)


def matrix_product(device: jax.Device, dtype: str) -> tuple[Callable[[], None], float]:
    """Return a function that multiplies a large square matrix by itself on the device, and its operation count."""
    # Large enough for the peak, and small where it delays the start of every training: 30 ms a product on two cores.
    side = 8192 if device.platform != "cpu" else 1024 if (os.cpu_count() or 1) <= 8 else 2048
    random = np.random.default_rng(0)  # not JAX's, which would compile a program at the start of every training
    matrix = jax.device_put(random.random((side, side), np.float32).astype(jnp.dtype(dtype)), device)
    with jax.set_mesh(jax.sharding.Mesh([device], ["alone"])):  # the caller may have set a mesh of all devices
        product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    return lambda: product(matrix, matrix).block_until_ready(), 2.0 * side**3


def peak_flops(mesh: jax.sharding.Mesh, dtype: str, machines: int = 1) -> float | None:
    """Return the peak operations per second of all devices of a mesh; None if they are unknown.

    Accelerators have their published bfloat16 peak, whatever `dtype` is. A CPU's peak is measured, as the best of up to
    four matrix products of `dtype` in half a second, and multiplied by the number of machines, because all processes
    and virtual devices of a machine share its processor.
    """
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        published = published_flops(device.device_kind)
        return None if published is None else published * mesh.size
    multiply, operations = matrix_product(device, dtype)
    seconds: list[float] = []
    while len(seconds) < 4 and sum(seconds) < 0.5:
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return operations / min(seconds) * machines
