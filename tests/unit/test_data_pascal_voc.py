"""PascalVOC: folders, the tar, and what is wrong with either."""

import gzip
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from conceptseg.data.base import SegmentationDataset
from conceptseg.data.drawings import OBJECTS
from conceptseg.data.images import voc_colour
from conceptseg.data.made import VOC_CLASS, made_scenes, mask_png, voc_mask, write_hub, write_parquet, write_voc, write_voc_tar
from conceptseg.data.pascal_voc import PascalVOC
from conceptseg.data.words import VOC_WORDS
from conceptseg.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scenes():
    return made_scenes(4)


@pytest.fixture()
def kit(tmp_path, scenes):
    return write_voc(tmp_path, scenes)


@pytest.fixture()
def tar(tmp_path, scenes):
    return write_voc_tar(tmp_path / "voc.tar", scenes)


def image_of(kit, row=0):
    return kit / "VOC2012" / "JPEGImages" / f"2012_{row:06d}.jpg"


def mask_of(kit, row=0):
    return kit / "VOC2012" / "SegmentationClass" / f"2012_{row:06d}.png"


def list_of(kit):
    return kit / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"


def test_every_root_gives_the_same_samples(kit, tar, scenes):
    sets = [PascalVOC(root) for root in (kit, kit.parent, kit / "VOC2012", tar)]
    assert all(isinstance(one, SegmentationDataset) and one.problems() == [] for one in sets)
    assert {one.keys() for one in sets} == {tuple(f"voc2012/2012_{row:06d}" for row in range(4))}
    for key, scene in zip(sets[0].keys(), scenes, strict=True):
        for sample in [one.read(key) for one in sets]:
            assert sample.image.shape == (48, 64, 3) and (sample.mask == voc_mask(scene)).all()
            present = {VOC_CLASS[OBJECTS[label - 1]] for label in np.unique(scene.mask) if label not in (0, 255)}
            assert sample.words == {label: VOC_WORDS[label] for label in present}
            assert abs(sample.image.astype(int) - scene.image).mean() < 8  # JPEG
    assert len({one.fingerprint() for one in sets}) == 1


def test_the_folder_of_a_table_is_read_as_voc(tmp_path, scenes, table_cache):
    for folder in (write_hub(tmp_path / "saved", scenes), write_parquet(tmp_path / "shards", scenes)):
        table = PascalVOC(folder)
        assert table.keys()[1] == "voc2012/2012_000001" and table.problems() == []
        assert (table.read(table.keys()[1]).mask == voc_mask(scenes[1])).all()
        assert table.fingerprint() == PascalVOC(folder, limit=2).fingerprint() and len(PascalVOC(folder, limit=2).keys()) == 2


@pytest.fixture()
def table_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_rgb_coded_masks_need_the_setting(tmp_path, kit, scenes):
    coloured = write_voc(tmp_path / "coloured", scenes, encoding="rgb")
    plain, told = PascalVOC(coloured), PascalVOC(coloured, mask_encoding="rgb")
    with pytest.raises(DataError, match=r"000000\.png is RGB coded"):
        plain.read(plain.keys()[0])
    assert "dataset.mask_encoding=rgb" in plain.problems()[0]
    assert told.problems() == [] and (told.read(told.keys()[0]).mask == PascalVOC(kit).read(told.keys()[0]).mask).all()


def test_a_limit_takes_the_first_of_the_list(kit):
    assert PascalVOC(kit, limit=2).keys() == PascalVOC(kit).keys()[:2]


def test_another_year_is_another_folder_and_another_key(tmp_path, scenes):
    kit = write_voc(tmp_path, scenes, year="2007")
    assert PascalVOC(kit, year=2007).keys()[0] == "voc2007/2007_000000"
    with pytest.raises(DataError, match=r"has no VOC2012 .* Set dataset\.year for VOC2007"):
        PascalVOC(kit).keys()


def test_nothing_is_opened_before_it_is_asked_for(tmp_path):
    absent = PascalVOC(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere does not exist\.\s+Fetch it with scripts/fetch_voc\.py, or set dataset\.root"):
        absent.keys()
    assert len(absent.problems()) == 1 and "\n" not in absent.problems()[0]


def test_an_unfinished_download_is_noticed(tmp_path):
    (tmp_path / "voc.tar.partial").touch()
    assert "unfinished download" in PascalVOC(tmp_path / "voc.tar").problems()[0]


def test_a_folder_with_only_the_archive_says_to_read_that(tmp_path, scenes):
    write_voc_tar(tmp_path / "VOCtrainval_11-May-2012.tar", scenes)
    assert f"dataset.root={tmp_path / 'VOCtrainval_11-May-2012.tar'}" in PascalVOC(tmp_path).problems()[0]


def test_an_absent_list_offers_the_lists_that_are_there(kit, tar):
    for root in (kit, tar):
        with pytest.raises(DataError, match=r'Did you mean "val"\?.*\s+Change dataset\.split \(now vall\)'):
            PascalVOC(root, split="vall").keys()


def test_missing_files_are_counted_and_named(kit):
    image_of(kit, 0).unlink()
    mask_of(kit, 3).unlink()
    found = PascalVOC(kit).problems()
    assert len(found) == 2
    assert found[0].startswith("1 of the 4 files") and "2012_000000.jpg" in found[0] and "2012_000003.png" in found[1]
    with pytest.raises(DataError, match=r"voc2012/2012_000000: .*2012_000000\.jpg is missing"):
        PascalVOC(kit).read("voc2012/2012_000000")


def test_an_unreadable_image_is_named(kit):
    image_of(kit).write_bytes(image_of(kit).read_bytes()[:500])
    with pytest.raises(DataError, match=r"voc2012/2012_000000: image .*2012_000000\.jpg can't be decoded"):
        PascalVOC(kit).read("voc2012/2012_000000")
    assert len(PascalVOC(kit).problems()) == 1


def test_a_mask_of_another_size_is_named(kit):
    mask_of(kit).write_bytes(mask_png(np.zeros((64, 48), np.uint8)))
    with pytest.raises(DataError, match="voc2012/2012_000000: the mask is 64 x 48"):
        PascalVOC(kit).read("voc2012/2012_000000")


def test_a_value_beyond_the_classes_is_named(kit):
    mask_of(kit).write_bytes(mask_png(np.full((48, 64), 21, np.uint8)))
    with pytest.raises(DataError, match=r"holds the values 21; 0\.\.20 and 255"):
        PascalVOC(kit).read("voc2012/2012_000000")


def test_an_image_listed_twice_is_refused(kit):
    list_of(kit).write_text("2012_000000\n2012_000001\n2012_000000\n")
    with pytest.raises(DataError, match="more than once"):
        PascalVOC(kit).keys()


def test_an_unknown_key_offers_the_nearest(kit):
    with pytest.raises(DataError, match='Did you mean "voc2012/2012_000001"'):
        PascalVOC(kit).read("voc2012/2012_00001")


@pytest.mark.parametrize("keep", ["inside a file", "between two files", "inside a header"])
def test_a_truncated_tar_is_noticed_wherever_it_ends(tar, keep):
    whole = tar.read_bytes()
    start = whole.index(b"VOCdevkit/VOC2012/JPEGImages/2012_000002.jpg")  # where its header begins
    tar.write_bytes(whole[: start + {"inside a file": 700, "between two files": 0, "inside a header": 100}[keep]])
    with pytest.raises(DataError, match=r"not a tar, or is cut short.*\s+Fetch it with scripts/fetch_voc"):
        PascalVOC(tar).keys()
    assert len(PascalVOC(tar).problems()) == 1


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "voc.tar").write_bytes(b"<html>404 not found</html>")
    with pytest.raises(DataError, match="is not a tar"):
        PascalVOC(tmp_path / "voc.tar").keys()


def test_a_compressed_tar_has_to_be_unpacked(tar):
    packed = tar.with_suffix(".tgz")
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(DataError, match=r"is compressed.*\s+Unpack it"):
        PascalVOC(packed).keys()


def test_a_tar_is_read_by_many_threads_and_after_pickling(tar):
    voc = PascalVOC(tar)
    keys = voc.keys()
    alone = [voc.read(key).mask for key in keys]
    copy = pickle.loads(pickle.dumps(voc))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: copy.read(key).mask, keys * 8))
    assert all((mask == alone[n % len(keys)]).all() for n, mask in enumerate(together))


def test_the_fingerprint_follows_the_content(kit, scenes):
    before = PascalVOC(kit).fingerprint()
    assert PascalVOC(kit).fingerprint() == before
    mask_of(kit).write_bytes(mask_png(np.zeros((48, 64), np.uint8)))
    changed = PascalVOC(kit).fingerprint()
    list_of(kit).write_text("2012_000001\n2012_000000\n2012_000002\n2012_000003\n")
    reordered = PascalVOC(kit).fingerprint()
    assert len({before, changed, reordered}) == 3
    assert PascalVOC(kit, limit=2).fingerprint() == reordered  # so that a run can be continued with more images


def relabelled(kit, old, new):
    """Masks mended in place, with the same number of bytes: stored without compression, as a relabelling often leaves it."""
    for path in (kit / "VOC2012" / "SegmentationClass").iterdir():
        mask = np.array(Image.open(path))
        mask[mask == old] = new
        picture = Image.fromarray(mask)
        picture.putpalette([part for index in range(256) for part in voc_colour(index)])
        picture.save(path, compress_level=0)


def test_the_fingerprint_sees_a_mask_or_photo_changed_in_place_with_the_same_size(kit, tmp_path):
    relabelled(kit, 0, 0)
    held, sizes = PascalVOC(kit), [path.stat().st_size for path in sorted(kit.rglob("*.png"))]
    before, times = held.fingerprint(), mask_of(kit).stat()
    label = next(iter(held.read(held.keys()[0]).words))
    relabelled(kit, label, 19)
    os.utime(mask_of(kit), ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [path.stat().st_size for path in sorted(kit.rglob("*.png"))] == sizes
    after = PascalVOC(kit).fingerprint()
    photo = bytearray(image_of(kit, 2).read_bytes())
    photo[-30] ^= 1
    image_of(kit, 2).write_bytes(photo)
    assert len({before, after, PascalVOC(kit).fingerprint()}) == 3


def test_the_fingerprint_of_a_tar_sees_a_changed_byte_of_a_listed_member_and_of_no_other(tar):
    before, whole = PascalVOC(tar).fingerprint(), bytearray(tar.read_bytes())
    place = whole.index(b"VOCdevkit/VOC2012/SegmentationClass/2012_000002.png") + 512 + 60
    whole[place] ^= 1
    tar.write_bytes(whole)
    assert PascalVOC(tar).fingerprint() != before
    whole[place] ^= 1
    whole[-1] ^= 1  # behind the last member
    tar.write_bytes(whole)
    assert PascalVOC(tar).fingerprint() == before


@pytest.mark.parametrize("tag", range(1, 9))
def test_photos_of_a_kit_are_read_as_stored_whatever_their_orientation(kit, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.open(image_of(kit)).save(image_of(kit), exif=exif, quality=95)
    stored = np.asarray(Image.open(image_of(kit)))
    assert np.array_equal(PascalVOC(kit).read("voc2012/2012_000000").image, stored)
    turned = np.zeros((64, 48), np.uint8)
    mask_of(kit).write_bytes(mask_png(turned))
    named = "" if tag == 1 else f"; the image's EXIF orientation {tag} is not applied"
    with pytest.raises(DataError, match=f"the mask is 64 x 48 .* 48 x 64{named}"):
        PascalVOC(kit).read("voc2012/2012_000000")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_list_of_excel_or_notepad_is_read(kit, encoding):
    names = PascalVOC(kit).keys()
    list_of(kit).write_bytes(list_of(kit).read_text().replace("\n", "\r\n").encode(encoding))
    assert PascalVOC(kit).keys() == names and PascalVOC(kit).problems() == []


def test_a_list_in_another_encoding_is_refused_with_its_line(kit):
    list_of(kit).write_bytes(list_of(kit).read_bytes() + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"val\.txt, line 5: the byte 0xe9 is no UTF-8"):
        PascalVOC(kit).keys()


@pytest.mark.parametrize("name", ["../JPEGImages/2012_000000", "..", "/etc/passwd", "a/b", "..\\a", "C:a"])
def test_a_list_names_files_of_the_kit_and_no_paths(kit, name):
    list_of(kit).write_text(f"2012_000000\n{name}\n")
    with pytest.raises(DataError, match="in JPEGImages without its ending was wanted, and no path"):
        PascalVOC(kit).keys()
    with pytest.raises(ConfigError, match=r"dataset\.split is"):
        PascalVOC(kit, split=name)


def test_pipes_in_place_of_files_are_refused_without_waiting(kit, tmp_path):
    image_of(kit).unlink()
    os.mkfifo(image_of(kit))
    with pytest.raises(DataError, match=r"voc2012/2012_000000: .*can't be read: it is a named pipe"):
        PascalVOC(kit).read("voc2012/2012_000000")
    assert PascalVOC(kit).fingerprint() and "2012_000000.jpg" in PascalVOC(kit).problems()[0]
    os.mkfifo(tmp_path / "voc.tar")
    assert "neither a folder nor a regular file" in PascalVOC(tmp_path / "voc.tar").problems()[0]


@pytest.mark.parametrize(
    "settings", [{"year": "2021"}, {"mask_encoding": "RGB"}, {"limit": 0}], ids=["year", "mask_encoding", "limit"]
)
def test_a_wrong_setting_is_refused_at_once(kit, settings):
    with pytest.raises(ConfigError, match=f"dataset.{next(iter(settings))} is"):
        PascalVOC(kit, **settings)
