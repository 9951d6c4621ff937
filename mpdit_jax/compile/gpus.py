"""NVIDIA GPUs that programs are compiled for without one: what XLA has to know of a card, and what its links carry."""

import dataclasses
import re
from typing import TypeAlias

from mpdit_jax.errors import ConfigError
from mpdit_jax.runtime.hardware import published_flops

_POOL = 0.75  # of a card's memory that JAX takes at its start, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise

Version: TypeAlias = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Card:
    """One kind of GPU, in servers of up to `per_host`."""

    kind: str  # `jax.Device.device_kind`
    capability: Version  # CUDA's compute capability
    cores: int  # streaming multiprocessors
    fp_units: int  # float32 units of a core
    core_memory: int  # bytes of shared memory of a core
    block_memory: int  # bytes of it that a block may ask for
    l2: int  # bytes of the second-level cache
    clock: float  # GHz
    bandwidth: float  # bytes per second of the card's memory
    memory: int  # bytes
    nvlink: float  # bytes per second that a card sends to those of its host
    network: float  # bytes per second that a card sends to other hosts, by its share of the host's adapters
    per_host: int = 8

    @property
    def flops(self) -> float:
        """Published bfloat16 operations per second, without sparsity."""
        flops = published_flops(self.kind)
        assert flops is not None
        return flops

    @property
    def hbm(self) -> int:
        """Bytes of memory that JAX's pool has by default."""
        return int(_POOL * self.memory)

    def bounds(self, flops: float, moved: float, sent: float, crossed: float) -> dict[str, float]:
        """Return a lower bound on a program's time, in seconds, for each resource of the card; see `Chip.bounds`.

        `crossed` are the bytes sent to other hosts, which are not among `sent`.
        """
        return {
            "matrix products": flops / self.flops,
            "memory": moved / self.bandwidth,
            "NVLink": sent / self.nvlink,
            "network": crossed / self.network,
        }


# Cores, clocks, memory and NVLink: NVIDIA's data sheets and architecture papers, where NVLink's figures are the sum of
# both directions. Caches, shared memory and bytes of memory: what CUDA reports for the card. Network: the adapters of a
# DGX server, one a card, of 200 Gbit/s for the A100 and of 400 from the H100 on.
CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 41943040, 1.41, 2039e9, 85100068864, 300e9, 25e9
    ),
    "a100-40gb": Card(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 167936, 166912, 41943040, 1.41, 1555e9, 42331013120, 300e9, 25e9
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 52428800, 1.98, 3352e9, 84942979072, 450e9, 50e9
    ),
    "h200": Card("NVIDIA H200", (9, 0), 132, 128, 233472, 232448, 62914560, 1.98, 4800e9, 150754820096, 450e9, 50e9),
    "b200": Card("NVIDIA B200", (10, 0), 148, 128, 233472, 232448, 132644864, 1.965, 8000e9, 191510126592, 900e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, the same number in every host."""

    card: Card
    hosts: int
    per_host: int

    @property
    def size(self) -> int:
        """The number of GPUs."""
        return self.hosts * self.per_host


def parse_cluster(topology: str) -> Cluster | None:
    """Return the GPUs of a topology such as a100:8, h100:64 (eight to a host) or h100:2x4; None for other names.

    Raises:
        ConfigError: a known card with an impossible number.
    """
    name, _, size = topology.partition(":")
    if name not in CARDS:
        return None
    card = CARDS[name]
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)", size)
    if match is None:
        raise ConfigError(f"--topology={topology}: expected {name}:GPUS or {name}:HOSTSxGPUS, such as {name}:2x8.")
    hosts, count = int(match[1] or 1), int(match[2])
    if match[1] is None and count > card.per_host:
        if count % card.per_host:
            raise ConfigError(
                f"--topology={topology}: hosts have up to {card.per_host} GPUs; expected at most {card.per_host} or a "
                f"multiple of {card.per_host}, or say how many each has, such as {name}:2x6."
            )
        hosts, count = count // card.per_host, card.per_host
    if not 1 <= count <= card.per_host or hosts < 1:
        raise ConfigError(
            f"--topology={topology}: {hosts} hosts of {count} GPUs; expected 1 host or more of 1 to {card.per_host}."
        )
    return Cluster(card, hosts, count)


def target_config(card: Card, cuda: Version) -> str:
    """Return a card's `GpuTargetConfigProto` in text form, from which XLA compiles for it; `cuda` is its version."""
    major, minor = card.capability
    accelerated = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    version = f'"{cuda[0]}.{cuda[1]}.0"'
    return f"""
gpu_device_info {{
  name: "{card.kind}"
  device_vendor: "NVIDIA"
  cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
  core_count: {card.cores}
  fpus_per_core: {card.fp_units}
  clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory}
  memory_bandwidth: {int(card.bandwidth)}
  l2_cache_size: {card.l2}
  shared_memory_per_core: {card.core_memory}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {card.block_memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  pcie_bandwidth: 32000000000
  ecc_enabled: true
  driver_version: {version}
  runtime_version: {version}
  compile_time_toolkit_version: {version}
  dnn_version: "9.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{card.kind}"
"""
