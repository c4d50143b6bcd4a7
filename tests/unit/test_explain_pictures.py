"""`explain` reads a picture by the rules of a run: the same pixels, or the same refusal."""

import io

import numpy as np
import pytest
from PIL import Image

from conceptseg.data.images import read_image
from conceptseg.errors import DataError
from conceptseg.extractors.explaining import read_picture

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def phone(tag):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = tag
    Image.fromarray(PHOTO).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_photo_is_shown_upright_as_a_file_and_as_a_picture(tmp_path, tag):
    (tmp_path / "a.png").write_bytes(phone(tag))
    wanted = read_image(phone(tag), "k")
    assert wanted.shape == ((8, 6, 3) if tag > 4 else (6, 8, 3))
    assert np.array_equal(read_picture(tmp_path / "a.png"), wanted)
    assert np.array_equal(read_picture(Image.open(tmp_path / "a.png")), wanted)


BAD = {
    "16 bits": Image.fromarray(np.full((4, 4), 40_000, np.uint16)),
    "floats": Image.fromarray(np.full((4, 4), 0.5, np.float32)),
    "alpha": Image.new("RGBA", (4, 4)),
    "grey and alpha": Image.new("LA", (4, 4)),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_run_refuses_is_refused(tmp_path, kind):
    path = tmp_path / "a.tiff"
    BAD[kind].save(path)
    with pytest.raises(DataError) as of_a_run:
        read_image(path, "explaining")
    with pytest.raises(DataError) as of_explain:
        read_picture(path)
    assert str(of_explain.value) == str(of_a_run.value)
    for picture in (BAD[kind], Image.open(path)):
        with pytest.raises(DataError, match="explaining a picture: it is of mode"):
            read_picture(picture)


def test_a_cut_file_is_a_data_error_also_where_it_was_opened_before(tmp_path):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    for one in (path, Image.open(path)):
        with pytest.raises(DataError, match="can't be decoded"):
            read_picture(one)
    with pytest.raises(DataError, match=r"none\.jpg is missing"):
        read_picture(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    "array", [np.full((2, 2, 3), np.nan), np.zeros((0, 2, 3)), np.full((2, 2, 3), 2.0), np.zeros((2, 2, 3), np.int64)]
)
def test_arrays_that_are_no_image_are_refused(array):
    with pytest.raises(DataError, match="explaining an array"):
        read_picture(array)
