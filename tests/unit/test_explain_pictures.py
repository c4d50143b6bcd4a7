"""`explain` reads a picture by the rules of a run: the same pixels, or the same refusal."""

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from conceptseg.data.images import read_image
from conceptseg.errors import ConfigError, DataError
from conceptseg.extractors import explaining
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


def test_every_form_of_one_image_is_read_alike(tmp_path, monkeypatch):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    floats = torch.from_numpy(PHOTO).float() / 255
    opaque = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])
    forms = ["photo.png", tmp_path / "photo.png", PHOTO, PHOTO / 255, torch.from_numpy(PHOTO), floats, floats.movedim(-1, 0),
             PHOTO.transpose(2, 0, 1), Image.fromarray(PHOTO), opaque]  # fmt: skip
    assert [k for k, form in enumerate(forms) if not np.array_equal(read_picture(form), PHOTO)] == []
    for grey in (PHOTO[..., 0], PHOTO[..., :1], torch.from_numpy(PHOTO[..., 0])[None]):
        assert np.array_equal(read_picture(grey), np.repeat(PHOTO[..., :1], 3, -1))


def test_transparent_pixels_are_laid_on_the_colour_that_is_named(tmp_path):
    clear = np.zeros((6, 5, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    for form in (clear, clear / 255, Image.fromarray(clear), tmp_path / "clear.png"):
        assert np.array_equal(read_picture(form, "white"), np.full((6, 5, 3), 255))
        assert np.array_equal(read_picture(form, (1, 2, 3))[0, 0], [1, 2, 3])
        with pytest.raises(DataError, match="opaque"):
            read_picture(form)
    with pytest.raises(ConfigError, match="ground is 'whitish'"):
        read_picture(clear, "whitish")


@pytest.mark.parametrize("text", ["a kite on grass", "kite", "photo jpg"])
def test_a_text_that_is_neither_path_nor_url_is_refused_with_the_remedy(text):
    with pytest.raises(ConfigError, match=f'no file and no URL.*prompt="{text}"'):
        read_picture(text)


@pytest.mark.parametrize("shape", [(3, 8, 3), (4, 8, 4), (2, 5, 7, 4), (8, 8, 2), (8,), (1, 3, 5, 7)])
def test_arrays_whose_colours_cannot_be_told_are_refused(shape):
    with pytest.raises(DataError, match=r"explaining an array of shape \["):
        read_picture(np.zeros(shape, np.uint8))


def test_a_url_is_downloaded_within_limits(monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).save(buffer, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "none" in self.path else 200)
            self.end_headers()
            self.wfile.write(buffer.getvalue())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/photo"
    try:
        assert np.array_equal(read_picture(address), PHOTO)
        with pytest.raises(DataError, match="can't be downloaded"):
            read_picture(f"{address}/none")
        monkeypatch.setattr(explaining, "LARGEST_DOWNLOAD", 10)
        with pytest.raises(DataError, match="more than 10 bytes"):
            read_picture(address)
    finally:
        server.shutdown()
        server.server_close()
