"""Accelerators by their makers' published figures, and what a CPU reaches where there are none."""

import dataclasses
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError

GIB = 2**30
_SIDE = {"cpu": 2048}  # of the square matrices whose product is a machine's peak
_LARGE_SIDE = 8192  # elsewhere


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one TPU chip.

    Attributes:
        kind: as `jax.Device.device_kind` spells it.
        flops: bfloat16 matrix products a second, 2 for each multiply-add.
        hbm: bytes of memory that a program may use.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second out of one chip over all its links.
        dimensions: of a topology, such as 2 for 16x16.
        pod: chips of the largest slice there is.
    """

    kind: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dimensions: int
    pod: int

    def bounds(self, flops: float, moved: float, sent: float) -> dict[str, float]:
        """Seconds below which no program stays on this chip, by what limits it.

        Args:
            flops: operations of its matrix products.
            moved: bytes it reads and writes in the chip's memory.
            sent: bytes it sends to other chips.
        """
        return {
            "matrix products": flops / self.flops,
            "memory": moved / self.hbm_bandwidth,
            "links": sent / self.ici_bandwidth,
        }


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; of v5e's 16 GiB the runtime keeps 0.25.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, int(31.75 * GIB), 1228e9, 300e9, 3, 4096),
    "v5e": Chip("TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 2, 256),
    "v5p": Chip("TPU v5", 459e12, int(95.0 * GIB), 2765e9, 600e9, 3, 8960),
    "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1638e9, 400e9, 2, 256),
}

# bfloat16 without sparsity, from NVIDIA's data sheets; the first name that a device's kind starts with.
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


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:16x16 or v4:4x4x4.

    Raises:
        ConfigError: not of this form, an unknown chip, or more of them than there are.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    known = ", ".join(CHIPS)
    if match is None or match[1] not in CHIPS:
        raise ConfigError(f"--topology={topology}: expected CHIP:SIZE with a chip of {known}, such as v5e:16x16.")
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
    """bfloat16 floating-point operations a second of a device kind, without sparsity; None if it is not in the tables.

    Args:
        kind: `jax.Device.device_kind`, such as "TPU v4" or "NVIDIA H100 80GB HBM3".
    """
    for chip in CHIPS.values():
        if chip.kind == kind:
            return chip.flops
    return next((flops for name, flops in GPU_FLOPS.items() if kind.startswith(name)), None)


def matrix_product(device: jax.Device, dtype: str) -> tuple[Callable[[], None], float]:
    """A large square matrix times itself on a device: a function that computes it once, and its operations."""
    side = _SIDE.get(device.platform, _LARGE_SIDE)
    draw = np.random.default_rng(0)  # not by JAX, which would compile a program for it at the start of every training
    matrix = jax.device_put(draw.random((side, side), np.float32).astype(jnp.dtype(dtype)), device)
    with jax.set_mesh(jax.sharding.Mesh([device], ["alone"])):  # the caller may have set one of all devices
        product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    return lambda: product(matrix, matrix).block_until_ready(), 2.0 * side**3


def peak_flops(mesh: jax.sharding.Mesh, dtype: str, machines: int = 1) -> float | None:
    """Floating-point operations a second that all devices of a mesh could do; None if nobody has published theirs.

    On CPUs it is measured, as the best of up to four matrix products in half a second of this process, for each
    machine: processes and virtual devices share its processor. Accelerators count by their published bfloat16 peak,
    whatever `dtype` is.

    Args:
        mesh: the devices.
        dtype: of the matrices that are multiplied.
        machines: how many like this one the mesh's processes run on.
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
