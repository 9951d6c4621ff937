"""The steps that studies.scaling compiles."""

import dataclasses

FSDP = 16  # chips that share a copy of the state
SIZES = {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}  # v5e topologies by number of chips


@dataclasses.dataclass(frozen=True)
class Point:
    """One step to compile: a preset, the number of v5e chips, and the batch size on all of them."""

    preset: str
    chips: int
    batch_size: int

    @property
    def name(self) -> str:
        """Key of the point in the results."""
        return f"{self.preset}/{self.chips}/{self.batch_size}"


# The grid is sparse, because steps with the same batch size per chip are alike. The order is: all sizes at the recipe's
# batch size, the extreme batch sizes, the rest.
_SIZES_AND_BATCHES = (
    (16, 1024), (256, 1024), (64, 1024), (4, 256), (256, 8192), (64, 4096), (16, 256), (16, 512), (64, 2048),
)  # fmt: skip
GRID = tuple(
    Point(preset, chips, batch_size)
    for chips, batch_size in _SIZES_AND_BATCHES
    for preset in ("mpdit_xl", "mpdit_b", "dit_xl_2")
)
