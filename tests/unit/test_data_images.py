"""Reading one image and one mask."""

import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from conceptseg.data.images import (
    MAX_PIXELS,
    as_rgb,
    check_mask,
    orientation_note,
    read_image,
    read_mask,
    read_opacity,
    reading_problems,
    spread,
    unique_keys,
    voc_colour,
)
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


def test_grey_values_are_not_read_as_colours():
    with pytest.raises(DataError, match=r"mode L, .*\s+Set dataset\.mask_encoding=index"):
        read_mask(encoded(Image.fromarray(LABELS)), "k", encoding="rgb")


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


PHOTO = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_where_all_is_opaque_and_refused_elsewhere(mode):
    opaque = Image.fromarray(PHOTO).convert(mode)
    assert (read_image(encoded(opaque), "k") == np.asarray(opaque.convert("RGB"))).all()
    opaque.putpixel((5, 3), (*opaque.getpixel((5, 3))[:-1], 254))
    with pytest.raises(DataError, match=f"mode {mode}, partly transparent"):
        read_image(encoded(opaque), "k")


def test_a_transparent_colour_is_refused_where_it_occurs():
    picture = Image.fromarray(PHOTO)
    with pytest.raises(DataError, match="partly transparent"):
        read_image(encoded(picture, transparency=tuple(int(v) for v in PHOTO[0, 0])), "k")
    assert (read_image(encoded(picture, transparency=(0, 0, 1)), "k") == PHOTO).all()


def wide_png(colour, depth, rows):
    """A PNG of any colour type and depth, which Pillow does not write."""
    height, width = rows.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    packed = np.pad(rows.reshape(height, -1).view(np.uint8), ((0, 0), (1, 0))).tobytes()
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


DEEP = {
    "grey of 16 bits": encoded(Image.fromarray(np.full((2, 2), 300, np.uint16))),
    "colours of 16 bits": wide_png(2, 16, np.full((2, 2, 3), 300, ">u2")),
    "colours and alpha of 16 bits": wide_png(6, 16, np.full((2, 2, 4), 65535, ">u2")),
    "32-bit integers": encoded(Image.fromarray(np.full((2, 2), 300, np.int32)), "TIFF"),
    "floats": encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_refused_and_never_clipped(kind):
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match="8 bits"):
            read(DEEP[kind], "k")


def test_cmyk_is_converted_and_not_clipped():
    grey = Image.fromarray(np.full((4, 4, 4), (0, 0, 0, 100), np.uint8), "CMYK")
    assert (read_image(encoded(grey, "TIFF"), "k") == 155).all()


TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_is_applied_or_kept_as_asked(tag, kind):
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = encoded(Image.fromarray(PHOTO), kind, exif=exif, lossless=True) if kind == "WEBP" else encoded(
        Image.fromarray(PHOTO), kind, exif=exif
    )  # fmt: skip
    assert np.array_equal(read_image(stored, "k"), TURNS[tag](PHOTO))
    if kind != "TIFF":  # Pillow turns these itself
        assert np.array_equal(read_image(stored, "k", upright=False), PHOTO)
    if kind == "PNG":
        labels = encoded(Image.fromarray(PHOTO[..., 0]), exif=exif)
        assert np.array_equal(read_mask(labels, "k"), TURNS[tag](PHOTO[..., 0]))
        assert np.array_equal(read_mask(labels, "k", upright=False), PHOTO[..., 0])


def test_a_mask_that_does_not_fit_names_the_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(Image.fromarray(PHOTO), exif=exif)
    note = orientation_note(stored, "k", "photo", applied=True)
    with pytest.raises(DataError, match=r"4 x 6 .* 6 x 4; the image's EXIF orientation 6 is applied"):
        check_mask(read_image(stored, "k"), np.zeros((4, 6), np.uint8), "k", (1,), "0, 1", lambda: note)


def renumbered(labels):
    """The same colours behind other indices, as an optimiser or `convert("P", palette=ADAPTIVE)` leaves them."""
    return Image.open(io.BytesIO(mask_png(labels, "rgb"))).convert("P", palette=Image.Palette.ADAPTIVE)


def test_a_renumbered_palette_is_refused_and_read_by_its_colours_when_asked():
    labels = np.zeros((20, 20), np.uint8)
    labels[:12] = 15
    stored = encoded(renumbered(labels))
    assert set(np.unique(np.asarray(Image.open(io.BytesIO(stored))))) <= set(range(21))  # so no value gives it away
    with pytest.raises(DataError, match=r"VOC's class 15; .*\s+Set dataset\.mask_encoding=rgb .*mask_encoding=stored"):
        read_mask(stored, "k")
    assert (read_mask(stored, "k", encoding="rgb") == labels).all()
    assert (read_mask(stored, "k", encoding="stored") == np.asarray(renumbered(labels))).all()


def test_a_palette_of_ones_own_is_refused_unless_it_is_grey_or_the_indices_are_asked_for():
    picture = Image.fromarray(LABELS)
    picture.putpalette([part for index in range(256) for part in (255 - index, index, 7)])
    with pytest.raises(DataError, match=r"shows index 0 as \(255, 0, 7\)"):
        read_mask(encoded(picture), "k")
    assert (read_mask(encoded(picture), "k", encoding="stored") == LABELS).all()
    picture.putpalette([part for index in range(256) for part in (index, index, index)])
    assert (read_mask(encoded(picture), "k") == LABELS).all()


def test_void_may_lie_beyond_the_palette_but_not_in_the_colour_of_a_class():
    colours = [part for index in range(21) for part in voc_colour(index)]
    picture = Image.fromarray(LABELS)
    picture.putpalette(colours)
    assert (read_mask(encoded(picture), "k") == LABELS).all()
    picture.putpalette(colours + [0] * 3 * 234 + list(voc_colour(15)))
    with pytest.raises(DataError, match="shows index 255"):
        read_mask(encoded(picture), "k")


@pytest.mark.parametrize("depth", [2, 4])
def test_a_grey_mask_of_few_bits_is_refused_as_shades_or_indices(depth):
    with pytest.raises(DataError, match=f"stores its values as L;{depth}"):
        read_mask(wide_png(0, depth, np.full((8 // depth, 1), 0x11, np.uint8)), "k")


@pytest.mark.parametrize("encoding", ["index", "rgb", "stored"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("WEBP", {"quality": 90}), ("TIFF", {"compression": "jpeg"})],
    ids=["JPEG", "WebP", "JPEG in TIFF"],
)
def test_a_mask_compressed_with_loss_is_refused_under_any_encoding(kind, options, encoding):
    with pytest.raises(DataError, match=r"compressed with loss.*\s+Take the mask as it was published"):
        read_mask(encoded(Image.fromarray(np.full((16, 16), 15, np.uint8)).convert("RGB"), kind, **options), "k", "", encoding)


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("PNG", {"optimize": True})])
def test_a_mask_in_another_lossless_format_is_read(kind, options):
    assert (read_mask(encoded(Image.fromarray(LABELS), kind, **options), "k") == LABELS).all()


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("GIF", {}), ("TIFF", {}), ("BMP", {})])
def test_a_mask_in_colours_is_read_in_any_lossless_format(kind, options):
    coloured = Image.open(io.BytesIO(mask_png(LABELS, "rgb")))
    assert (read_mask(encoded(coloured, kind, **options), "k", encoding="rgb") == LABELS).all()


def test_a_gif_renumbers_greys_and_is_refused():
    """Pillow writes the values 0, 1, 7, 15, 20, 255 as the indices 0 to 5, all of which are classes."""
    stored = encoded(Image.fromarray(LABELS), "GIF")
    assert np.asarray(Image.open(io.BytesIO(stored))).max() == 5
    with pytest.raises(DataError, match=r"shows index 2 as \(7, 7, 7\)|shows index 1 as \(1, 1, 1\)"):
        read_mask(stored, "k")


def test_opacity_is_a_mask_and_its_absence_is_refused():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, 1, 3] = 1
    assert read_opacity(encoded(Image.fromarray(rgba)), "k").tolist() == [[False, True, False], [False] * 3]
    with pytest.raises(DataError, match="compressed with loss"):
        read_opacity(encoded(Image.fromarray(rgba), "WEBP"), "k")
    with pytest.raises(DataError, match="opacity"):
        read_opacity(encoded(Image.new("RGB", (2, 2))), "k")


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    """EPS in a file called .jpg: Pillow would hand it to Ghostscript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "photo.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for read in (read_image, read_mask, read_opacity):
        with pytest.raises(DataError, match="in none of the formats"):
            read(tmp_path / "photo.jpg", "k")
    with pytest.raises(DataError, match="it is EPS; PNG, JPEG"):
        as_rgb(Image.open(tmp_path / "photo.jpg"), "it")
    assert not (tmp_path / "started").exists()


def test_several_frames_are_refused():
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 90)]
    for kind in ("GIF", "TIFF", "PNG"):
        with pytest.raises(DataError, match="several frames"):
            read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "k")


def test_a_picture_that_claims_to_be_huge_is_refused_before_memory_is_taken():
    head = wide_png(2, 8, np.zeros((1, 1, 3), np.uint8))
    claimed = struct.pack(">II", 30_000, 30_000) + head[24:29]
    bomb = head[:16] + claimed + struct.pack(">I", zlib.crc32(b"IHDR" + claimed)) + head[33:]
    tracemalloc.start()
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"claims 30,000 x 30,000|can't be decoded: .*900000000 pixels"):
            read(bomb, "k")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    just = np.zeros((1, 1), np.uint8)
    assert read_image(encoded(Image.fromarray(just)), "k").shape == (1, 1, 3) and MAX_PIXELS > 9000**2


def test_pipes_devices_loops_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, reason in {"pipe": "a named pipe", "loop": "symbolic links", "zero": "a device", ".": "a folder"}.items():
        with pytest.raises(DataError, match=f"k: image .* can't be read: .*{reason}"):
            read_image(tmp_path / name, "k")


def test_a_jpeg_whose_rest_is_zeros_is_refused_and_one_with_a_film_behind_it_is_read():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(DataError, match=r"end mark \(EOI\) is absent"):
        read_image(whole[:2000] + bytes(100_000), "k")
    film = whole + b"\0\0\0\x18ftypmp42\xff\xda" + bytes(100)  # a motion photo of a phone
    assert np.array_equal(read_image(film, "k"), read_image(whole, "k"))


def test_flipped_bits_of_a_png_are_noticed():
    whole = bytearray(encoded(Image.fromarray(LABELS)))
    for place in range(8, len(whole) - 12):
        whole[place] ^= 1
        with pytest.raises(DataError, match=r"can't be decoded|none of the formats|claims"):
            read_mask(bytes(whole), "k")
        whole[place] ^= 1


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
