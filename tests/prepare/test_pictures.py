"""Every kind of image file becomes a square array, or is refused with its reason."""

import io

import numpy as np
import pytest
from PIL import Image

from mpdit_jax.data.crop import center_crop, to_square
from mpdit_jax.errors import InputError


def stored(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_png(mode, channels):
    image = stored(Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode), "PNG")
    square = to_square(image, 16, channels)
    assert square.shape == (16, 16, channels)
    assert (square == 255).all()


def test_cmyk():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    square = to_square(stored(red, "JPEG"), 16, 3)
    assert np.abs(square.mean(axis=(0, 1)) - (255, 0, 0)).max() < 8


def test_sixteen_bits_keep_their_brightness():
    image = stored(Image.fromarray(np.full((16, 16), 32896, np.uint16)), "PNG")
    assert (to_square(image, 16, 1) == 128).all()


def test_transparent_lies_on_white():
    assert (to_square(stored(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG"), 16, 3) == 255).all()


def test_animated_is_refused():
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    with pytest.raises(InputError, match="3 frames"):
        to_square(stored(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8, 1)


def test_numbers_that_are_no_brightness_are_refused():
    with pytest.raises(InputError, match="floating-point"):
        to_square(stored(Image.new("F", (8, 8), 0.5), "TIFF"), 8, 1)


def test_crop_takes_the_centre_and_keeps_the_aspect():
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    assert (np.asarray(center_crop(Image.fromarray(wide), 8)) == 255).all()


def test_crop_halves_with_a_box_filter():
    checkered = np.indices((32, 32)).sum(axis=0) % 2 * 255
    # Four pixels of a checkerboard have one mean: only a box filter gives it everywhere.
    assert np.abs(np.asarray(center_crop(Image.fromarray(checkered.astype(np.uint8)), 8)).astype(int) - 128).max() <= 1


@pytest.mark.parametrize(
    ("size", "wanted", "halvings", "resized", "corner"),
    [
        ((150, 101), 24, [(75, 50), (37, 25)], (36, 24), (6, 0)),  # 37 · 24/25 = 35.52
        ((101, 150), 24, [(50, 75), (25, 37)], (24, 36), (0, 6)),
        ((64, 47), 24, [], (33, 24), (4, 0)),  # 64 · 24/47 = 32.68, and 9 columns to lose
        ((48, 48), 24, [(24, 24)], (24, 24), (0, 0)),
        ((10, 7), 16, [], (23, 16), (3, 0)),
    ],
)
def test_crop_is_adms(size, wanted, halvings, resized, corner):
    """The sizes are worked out by hand from ADM's rule: halve with a box, resize with bicubic, cut the centre."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    expected = image
    for half in halvings:
        expected = expected.resize(half, Image.Resampling.BOX)
    pixels = np.asarray(expected.resize(resized, Image.Resampling.BICUBIC))
    left, top = corner
    expected_square = pixels[top : top + wanted, left : left + wanted]
    np.testing.assert_array_equal(to_square(image, wanted, 3), expected_square)


def test_small_pictures_grow():
    assert to_square(Image.new("L", (5, 9), 7), 16, 1).shape == (16, 16, 1)
