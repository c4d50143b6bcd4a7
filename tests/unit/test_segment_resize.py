"""Two nearest rules half a pixel apart, bilinear scores and Pillow's image resizing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from conceptseg.segment.resize import bilinear, nearest_centre, nearest_floor, resize_image

SIZES = (1, 2, 3, 7, 8, 14, 16, 24, 32, 37, 47, 48, 64, 97, 100, 128, 180, 199, 224, 256, 301, 333, 375, 500, 512, 1024)


def torch_nearest(array, size):
    return interpolate(torch.from_numpy(array)[None, None], size=size, mode="nearest")[0, 0].numpy()


@pytest.mark.parametrize("old", SIZES)
def test_nearest_floor_is_torchs_nearest(old):
    row = np.arange(old, dtype=np.float32)[None]  # torch's rule for float64 is another, in float64
    for new in SIZES:
        assert np.array_equal(nearest_floor(row, (1, new)), torch_nearest(row, (1, new)))
        assert np.array_equal(nearest_floor(row.T, (new, 1)), torch_nearest(row.T, (new, 1)))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 1100), st.integers(1, 1100))
def test_nearest_floor_is_torchs_nearest_at_any_size(old, new):
    row = np.arange(old, dtype=np.float32)[None]
    assert np.array_equal(nearest_floor(row, (1, new)), torch_nearest(row, (1, new)))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 700), st.integers(1, 700))
def test_nearest_centre_reads_the_pixel_under_the_centre(old, new):
    column = (np.arange(old) % 251).astype(np.uint8)[:, None]
    got = nearest_centre(column, (new, 1))[:, 0]
    for i, value in enumerate(got):
        # In integers: floor((i + 0.5) · old / new). Where that falls between two pixels, Pillow's rounding may take either.
        index, rest = divmod((2 * i + 1) * old, 2 * new)
        assert value == column[min(index, old - 1), 0] or (rest == 0 and value == column[index - 1, 0])


@pytest.mark.parametrize(
    ("old", "new"), [((57, 83), (224, 224)), ((375, 500), (224, 224)), ((8, 8), (3, 3)), ((64, 64), (224, 512))]
)
def test_nearest_centre_is_pillows_nearest(old, new):
    array = np.random.default_rng(0).integers(0, 256, old).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(array).resize((new[1], new[0]), Image.Resampling.NEAREST))
    assert np.array_equal(nearest_centre(array, new), wanted) and nearest_centre(array, new).dtype == np.uint8


def test_the_two_rules_pick_the_pixels_that_the_spec_lists():
    eight = np.arange(8, dtype=np.uint8)[None]
    assert nearest_centre(eight, (1, 3)).tolist() == [[1, 4, 6]]
    assert nearest_floor(eight, (1, 3)).tolist() == [[0, 2, 5]]


def test_nearest_floor_keeps_leading_axes_and_dtype():
    maps = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    enlarged = nearest_floor(maps, (6, 8))
    assert enlarged.shape == (2, 6, 8) and enlarged.dtype == np.uint8
    assert np.array_equal(enlarged, maps.repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize("rule", [nearest_floor, nearest_centre])
def test_the_same_size_changes_nothing(rule):
    array = np.random.default_rng(0).integers(0, 256, (9, 5)).astype(np.uint8)
    assert np.array_equal(rule(array, (9, 5)), array)


def test_bilinear_enlarging_weighs_by_distance_between_pixel_centres():
    maps = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    got, (height, width) = bilinear(maps, (7, 10)), (7, 10)
    for y in range(height):
        for x in range(width):
            sy, sx = max((y + 0.5) * 3 / height - 0.5, 0), max((x + 0.5) * 4 / width - 0.5, 0)
            y0, x0 = int(sy), int(sx)
            y1, x1, dy, dx = min(y0 + 1, 2), min(x0 + 1, 3), sy - int(sy), sx - int(sx)
            top = (1 - dx) * maps[:, y0, x0] + dx * maps[:, y0, x1]
            bottom = (1 - dx) * maps[:, y1, x0] + dx * maps[:, y1, x1]
            assert np.allclose(got[:, y, x], (1 - dy) * top + dy * bottom, atol=1e-6)  # float32


def test_bilinear_shrinking_averages_instead_of_skipping():
    stripes = np.tile(np.array([0.0, 1.0], np.float32), 16)[None, None].repeat(32, 1)
    assert np.abs(bilinear(stripes, (4, 4)) - 0.5).max() < 0.05


def test_an_image_is_resized_by_pillow():
    image = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    for resample, rule in (("bicubic", Image.Resampling.BICUBIC), ("nearest", Image.Resampling.NEAREST)):
        assert np.array_equal(resize_image(image, (16, 8), resample), np.asarray(Image.fromarray(image).resize((8, 16), rule)))


def test_equal_scores_are_equal_after_bilinear_resizing():
    """In float32 the weights of a flat region's pixels don't sum to 1, and ties are broken as the processor rounds."""
    flat = np.float32([0.1, 0.3, 0.7, 0.9])[:, None, None].repeat(32, 1).repeat(32, 2)
    for size in ((64, 64), (48, 80), (20, 20)):
        assert np.array_equal(bilinear(flat, size), np.broadcast_to(flat[:, :1, :1], (4, *size)))
