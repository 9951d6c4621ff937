"""TPU chips by their makers' published figures."""

import dataclasses
import re

from mpdit_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip.

    Attributes:
        flops: bfloat16 matrix products a second, 2 for each multiply-add.
        hbm: bytes of memory that a program may use.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second out of one chip over all its links.
        dimensions: of a topology, such as 2 for 16x16.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dimensions: int


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; of v5e's 16 GiB the runtime keeps a quarter.
CHIPS = {
    "v4": Chip(275e12, int(31.75 * GIB), 1228e9, 300e9, 3),
    "v5e": Chip(197e12, int(15.75 * GIB), 819e9, 200e9, 2),
    "v5p": Chip(459e12, int(95.0 * GIB), 2765e9, 600e9, 3),
    "v6e": Chip(918e12, int(31.25 * GIB), 1640e9, 448e9, 2),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:16x16 or v4:4x4x4.

    Raises:
        ConfigError: not of this form, or an unknown chip.
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
    return chip
