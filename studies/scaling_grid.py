"""Which steps the study of scaling compiles."""

import dataclasses

FSDP = 16  # chips that share a copy of the state
SIZES = {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}  # of v5e slices, by their chips


@dataclasses.dataclass(frozen=True)
class Point:
    """One step to compile: a preset, chips of a v5e slice, the batch over all of them."""

    preset: str
    chips: int
    batch_size: int

    @property
    def name(self) -> str:
        """As the results are filed."""
        return f"{self.preset}/{self.chips}/{self.batch_size}"


# Sparse: what is the same on each chip (batch over chips) needs no second compilation at every size. First the sizes at
# the recipe's batch, then the batches' ends, then what lies between.
_SIZES_AND_BATCHES = (
    (16, 1024), (256, 1024), (64, 1024), (4, 256), (256, 8192), (64, 4096), (16, 256), (16, 512), (64, 2048),
)  # fmt: skip
GRID = tuple(
    Point(preset, chips, batch_size)
    for chips, batch_size in _SIZES_AND_BATCHES
    for preset in ("mpdit_xl", "mpdit_b", "dit_xl_2")
)
