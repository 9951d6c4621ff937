"""An image set as arrays, cropped on the way: what a VAE is trained on."""

import dataclasses

import numpy as np

from mpdit_jax.data.crop import to_square
from mpdit_jax.data.image_sets import ImageSet
from mpdit_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class DecodedImages:
    """Batches of the same squares that `prepare` encodes."""

    images: ImageSet
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.images.keys)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` (n,): `x` float32 (n, H, W, C) in [-1, 1].

        Raises:
            DataError: a broken image, by name.
        """
        x = np.stack([self._square(int(index)) for index in indices]).astype(np.float32) / 127.5 - 1
        return {"x": x}

    def _square(self, index: int) -> np.ndarray:
        try:
            image, _ = self.images.open(index)
            with image:
                return to_square(image, self.image_size, self.channels)
        except Exception as error:  # what a broken file raises is up to its decoder
            raise DataError(
                f"image {self.images.keys[index]} cannot be used ({error}): repair or remove it."
            ) from error
