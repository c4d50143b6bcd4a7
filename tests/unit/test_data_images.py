"""Reading one image and one mask."""

import io

import numpy as np
import pytest
from PIL import Image

from conceptseg.data.images import check_mask, read_image, read_mask, reading_problems, spread, unique_keys, voc_colour
from conceptseg.data.made import mask_png
from conceptseg.errors import DataError


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


LABELS = np.array([[0, 1, 15], [20, 255, 7]], np.uint8)


def test_the_voc_colours_are_the_published_ones():
    published = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {label: voc_colour(label) for label in published} == published


@pytest.mark.parametrize("encoding", ["index", "rgb"])
def test_both_codings_of_a_mask_give_the_same_indices(encoding):
    assert (read_mask(mask_png(LABELS, encoding), "k", encoding=encoding) == LABELS).all()


def test_an_l_mask_is_read_as_it_is():
    assert (read_mask(encoded(Image.fromarray(LABELS)), "k") == LABELS).all()


def test_an_rgb_coded_mask_names_the_setting_that_decodes_it():
    with pytest.raises(DataError, match=r"k: mask m\.png is RGB coded .*\s+Set dataset\.mask_encoding=rgb") as raised:
        read_mask(mask_png(LABELS, "rgb"), "k", "m.png")
    assert "VOC palette" in str(raised.value)


def test_an_index_mask_is_not_read_as_colours():
    with pytest.raises(DataError, match=r"mask_encoding=index"):
        read_mask(mask_png(LABELS), "k", encoding="rgb")


def test_an_unknown_colour_is_named_with_its_place():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[1, 2] = (1, 2, 3)
    with pytest.raises(DataError, match=r"1 pixels .* \(1, 2, 3\) at row 1, column 2"):
        read_mask(encoded(Image.fromarray(pixels)), "k", encoding="rgb")


def test_a_16_bit_mask_is_refused():
    with pytest.raises(DataError, match="8 bits were wanted"):
        read_mask(encoded(Image.fromarray(np.zeros((2, 2), np.uint16))), "k")


def test_a_grey_image_becomes_rgb():
    image = read_image(encoded(Image.fromarray(LABELS)), "k")
    assert image.shape == (2, 3, 3) and (image == LABELS[..., None]).all()


def test_an_image_with_alpha_is_refused():
    with pytest.raises(DataError, match="mode RGBA"):
        read_image(encoded(Image.new("RGBA", (4, 4))), "k")


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert read_image(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif), "k").shape == (4, 6, 3)


@pytest.mark.parametrize("keep", [0, 10, 700])
def test_a_truncated_image_names_file_and_key(tmp_path, keep):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(noise), "JPEG")[:keep])
    with pytest.raises(DataError, match=r"voc2012/x: image .*photo\.jpg can't be decoded"):
        read_image(path, "voc2012/x")


def test_a_missing_image_names_file_and_key(tmp_path):
    with pytest.raises(DataError, match=r"voc2012/x: image .*none\.jpg is missing"):
        read_image(tmp_path / "none.jpg", "voc2012/x")


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(DataError, match=r"3 x 2 .* 2 x 3"):
        check_mask(np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2), np.uint8), "k", (1,), "0, 1")


def test_a_value_that_is_no_class_is_refused():
    with pytest.raises(DataError, match=r"holds the values 7, 15, 20; 0, 1 and 255"):
        check_mask(np.zeros((2, 3, 3), np.uint8), LABELS, "k", (1,), "0, 1")


def test_a_spread_keeps_both_ends():
    assert spread(range(100), 20)[0] == 0 and spread(range(100), 20)[-1] == 99
    assert len(set(spread(range(100), 20))) == 20 and spread([1, 2], 20) == [1, 2]


def test_repeated_and_absent_keys_are_refused():
    with pytest.raises(DataError, match=r'1 samples more than once \(first: "a"'):
        unique_keys(["a", "b", "a"], "list.txt")
    with pytest.raises(DataError, match="names no sample"):
        unique_keys([], "list.txt")


def test_many_unreadable_samples_are_counted_and_not_all_spelt_out():
    def read(key):
        raise DataError(f"{key} is\n  broken")

    found = reading_problems([str(n) for n in range(30)], read)
    assert found[0] == "0 is broken" and len(found) == 4 and found[3].startswith("17 more of the 20 samples")
