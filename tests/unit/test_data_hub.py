"""Tables of `datasets`: saved folders, shards, image folders, and the Hub by a pinned commit."""

import io
import json
import os
import pickle
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from conceptseg.data.base import SegmentationDataset
from conceptseg.data.hub import HubTable
from conceptseg.data.made import made_scenes, voc_mask, write_hub, write_parquet
from conceptseg.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def scenes():
    return made_scenes(3, seed=5)


@pytest.fixture()
def saved(tmp_path, scenes):
    return write_hub(tmp_path / "saved", scenes)


@pytest.fixture()
def image_folder(tmp_path, scenes):
    """val/ with an image and a mask a row, and the metadata file that pairs them."""
    folder = tmp_path / "pictures" / "val"
    folder.mkdir(parents=True)
    rows = []
    for row, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(folder / f"{row}.png")
        Image.fromarray(voc_mask(scene)).save(folder / f"{row}_mask.png")
        rows.append(json.dumps({"file_name": f"{row}.png", "mask_file_name": f"{row}_mask.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder.parent


def test_every_local_layout_gives_the_same_masks(tmp_path, saved, image_folder, scenes):
    folders = (saved, write_parquet(tmp_path / "shards", scenes), image_folder)
    for folder in folders:
        table = HubTable(folder, "val")
        assert isinstance(table, SegmentationDataset) and table.problems() == [] and len(table.keys()) == 3
        for key, scene in zip(table.keys(), scenes, strict=True):
            assert (table.read(key).mask == voc_mask(scene)).all() and table.read(key).image.shape == (48, 64, 3)


def test_keys_are_made_of_ids_or_else_of_row_numbers(saved, image_folder):
    assert HubTable(saved, "val").keys()[2] == "saved/2012_000002"
    assert HubTable(image_folder, "val", name="mine").keys() == ("mine/000000", "mine/000001", "mine/000002")
    with pytest.raises(DataError, match=r'no column "idd"\. Did you mean "id"\?.*\s+Change dataset\.id_column'):
        HubTable(saved, "val", id_column="idd").keys()


def test_rgb_coded_masks_need_the_setting(tmp_path, scenes):
    folder = write_hub(tmp_path / "coloured", scenes, encoding="rgb")
    assert "dataset.mask_encoding=rgb" in HubTable(folder, "val").problems()[0]
    told = HubTable(folder, "val", mask_encoding="rgb")
    assert (told.read(told.keys()[0]).mask == voc_mask(scenes[0])).all()


@pytest.mark.parametrize("writer", [write_hub, write_parquet])
def test_an_absent_split_offers_those_that_are_there(tmp_path, scenes, writer):
    with pytest.raises(DataError, match=r'no split "validation"\. .*Choices: val\.\s+Change dataset\.split'):
        HubTable(writer(tmp_path / "t", scenes), "validation").keys()


def test_absent_columns_name_the_setting(saved):
    with pytest.raises(DataError, match=r'no column "masks"\. Did you mean "mask"\?.*\s+Change dataset\.mask_column'):
        HubTable(saved, "val", mask_column="masks").keys()
    with pytest.raises(DataError, match=r'column "id" holds .*\s+Change dataset\.image_column|can\'t be decoded|is missing'):
        table = HubTable(saved, "val", image_column="id")
        table.read(table.keys()[0])


def test_words_of_ones_own_bound_the_masks(saved):
    with pytest.raises(ConfigError, match=r'dataset\.words is "vok"\. Did you mean "voc"'):
        HubTable(saved, "val", words="vok")
    with pytest.raises(ConfigError, match="1 to 255"):
        HubTable(saved, "val", words={0: "background"})
    table = HubTable(saved, "val", words={"1": "kite"})
    with pytest.raises(DataError, match=r"1 \(dataset\.words\), 0 \(background\) and 255 \(void\) were wanted"):
        [table.read(key) for key in tuple(table.keys())]


def test_a_name_on_the_hub_needs_a_commit():
    with pytest.raises(ConfigError, match=r"nateraw/pascal-voc-2012.*\(none was given\).*\s+Set dataset\.revision"):
        HubTable("nateraw/pascal-voc-2012", "val").keys()
    with pytest.raises(ConfigError, match=r'got "main", and a branch or tag may move'):
        HubTable("nateraw/pascal-voc-2012", "val", revision="main").keys()
    assert HubTable("nateraw/pascal-voc-2012", "val").problems()[0].startswith("Reading the table nateraw/pascal-voc-2012")


def test_the_commit_is_handed_on_and_no_code_is_trusted(monkeypatch, saved):
    asked = {}

    def load(*names, **settings):
        asked.update(settings, names=names)
        return datasets.load_from_disk(str(saved))["val"]

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = HubTable("owner/table", "val", revision="65505ef", config="masks")
    assert table.keys()[0] == "owner_table/2012_000000"
    assert asked == {"names": ("owner/table", "masks"), "split": "val", "revision": "65505ef"}


def test_an_unreachable_hub_is_a_data_error(monkeypatch):
    def load(*names, **settings):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"owner/table@65505ef from the Hub failed: offline.*\s+Look at dataset\.path"):
        HubTable("owner/table", "val", revision="65505ef").keys()


def test_a_path_that_is_nothing_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        HubTable(tmp_path / "none", "val").keys()
    with pytest.raises(DataError, match=r"holds no dataset_dict\.json"):
        HubTable(tmp_path, "val").keys()


def test_a_truncated_shard_is_named(tmp_path, scenes):
    shard = next(write_parquet(tmp_path / "t", scenes).glob("data/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"can't be opened: .*\s+A shard is damaged"):
        HubTable(tmp_path / "t", "val").keys()


def test_an_empty_cell_is_counted(tmp_path, saved):
    table = datasets.load_from_disk(str(saved))["val"].cast_column("mask", datasets.Image(decode=False))
    table = table.map(lambda row: {"mask": None} if row["id"].endswith("1") else {}, features=table.features)
    table.save_to_disk(str(tmp_path / "holes"))
    holed = HubTable(tmp_path / "holes", "val")
    assert 'column "mask" is empty or missing for 1 of 3 rows (first: holes/2012_000001)' in holed.problems()[0]
    with pytest.raises(DataError, match='column "mask" is empty'):
        holed.read("holes/2012_000001")


def test_a_repeated_id_is_refused(tmp_path, saved):
    table = datasets.load_from_disk(str(saved))["val"]
    datasets.concatenate_datasets([table, table]).save_to_disk(str(tmp_path / "twice"))
    with pytest.raises(DataError, match="names 3 samples more than once"):
        HubTable(tmp_path / "twice", "val").keys()


def test_the_fingerprint_follows_the_content_and_not_the_folder(tmp_path, saved, scenes):
    def fingerprint(folder, **settings):
        return HubTable(folder, "val", name="t", **settings).fingerprint()

    before = fingerprint(saved)
    assert fingerprint(write_parquet(tmp_path / "shards", scenes)) == before
    changed = [*scenes[:2], made_scenes(1, seed=77)[0]]
    others = [
        fingerprint(write_hub(tmp_path / "b", changed)),
        fingerprint(saved, limit=2),
        fingerprint(saved, words="voc_official"),
    ]
    assert len({before, *others}) == 3
    assert fingerprint(saved, limit=2) == before  # so that a run can be continued with more rows


def test_a_copy_reads_the_same(saved):
    table = HubTable(saved, "val")
    key = table.keys()[0]
    assert np.array_equal(pickle.loads(pickle.dumps(table)).read(key).mask, table.read(key).mask)


def pairs_table(pictures):
    """A table of (image, mask) bytes or paths as `datasets` and other programs write it."""
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [
        [{"bytes": None, "path": one} if isinstance(one, str) else {"bytes": one, "path": None} for one in pair]
        for pair in pictures
    ]
    columns = {name: pa.array([pair[place] for pair in cells], kind) for place, name in enumerate(("image", "mask"))}
    return pa.table({"id": [str(row) for row in range(len(pictures))], **columns})


def shard(folder, pictures, name="val-00000-of-00001.parquet"):
    import pyarrow.parquet as parquet

    folder.mkdir(exist_ok=True)
    parquet.write_table(pairs_table(pictures), folder / name, compression="NONE")
    return folder


def png(pixels, tag=1):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = tag
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif, compress_level=0)
    return buffer.getvalue()


def as_shown(stored):
    """Decode an image cell with `datasets`."""
    return np.asarray(datasets.Image().decode_example({"bytes": stored, "path": None}))


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("layout", ["parquet", "imagefolder"])
def test_images_and_masks_are_read_as_datasets_shows_them(tmp_path, scenes, tag, layout):
    photo, mask = png(scenes[0].image, tag), png(voc_mask(scenes[0]), tag)
    if layout == "parquet":
        table = HubTable(shard(tmp_path / "t", [(photo, mask)]), "val")
    else:
        folder = tmp_path / "t" / "val"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(photo)
        (folder / "m.png").write_bytes(mask)
        (folder / "metadata.csv").write_text("file_name,mask_file_name\na.png,m.png\n")
        table = HubTable(tmp_path / "t", "val")
    sample = table.read(table.keys()[0])
    assert np.array_equal(sample.image, as_shown(photo)) and np.array_equal(sample.mask, as_shown(mask))
    assert sample.image.shape == ((64, 48, 3) if tag > 4 else (48, 64, 3))


def test_a_mask_drawn_on_the_stored_pixels_names_the_orientation(tmp_path, scenes):
    table = HubTable(shard(tmp_path / "t", [(png(scenes[0].image, 6), png(voc_mask(scenes[0])))]), "val")
    with pytest.raises(DataError, match="the image's EXIF orientation 6 is applied, as `datasets`"):
        table.read(table.keys()[0])


@pytest.mark.parametrize("layout", ["parquet", "saved", "imagefolder"])
def test_the_fingerprint_sees_a_mask_changed_in_place_with_the_same_size_and_time(tmp_path, scenes, image_folder, layout):
    """In the middle of the table: the first and the last mask were looked at before."""
    masks = [np.where(voc_mask(scene) > 0, 2, 0).astype(np.uint8) for scene in scenes]

    def write(masks):
        pairs = [(png(scene.image), png(mask)) for scene, mask in zip(scenes, masks, strict=True)]
        if layout == "parquet":
            return shard(tmp_path / "t", pairs)
        if layout == "saved":
            table = datasets.Dataset(pairs_table(pairs)).cast_column("mask", datasets.Image())
            shutil.rmtree(tmp_path / "t", ignore_errors=True)
            table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "t"))
            return tmp_path / "t"
        for row, (_, mask) in enumerate(pairs):
            (image_folder / "val" / f"{row}_mask.png").write_bytes(mask)
        return image_folder

    folder = write(masks)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".arrow", ".png"))
    states = [path.stat() for path in files]
    split = "val" if layout != "saved" else "all"
    before = HubTable(folder, split)
    first, seen = before.fingerprint(), before.read(before.keys()[1]).words
    masks[1] = np.where(masks[1] > 0, 15, 0).astype(np.uint8)
    write(masks)
    for path, state in zip(files, states, strict=True):
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert path.stat().st_size == state.st_size
    after = HubTable(folder, split)
    assert after.fingerprint() != first
    assert seen == {2: "bike"} and after.read(after.keys()[1]).words == {15: "person"}  # and no old copy is read


@pytest.mark.parametrize("name", ["absolute", "../secret.png", "/dev/zero", "a\0b"])
def test_a_row_that_names_a_file_elsewhere_is_refused(tmp_path, scenes, name):
    (tmp_path / "secret.png").write_bytes(png(scenes[0].image))
    path = str(tmp_path / "secret.png") if name == "absolute" else name
    table = HubTable(shard(tmp_path / "t", [(path, png(voc_mask(scenes[0])))]), "val")
    with pytest.raises(DataError, match="a table reads no files of other folders"):
        table.read(table.keys()[0])
    assert len(table.problems()) == 1 and table.fingerprint()


def test_a_row_that_names_a_file_of_the_folder_is_read(tmp_path, scenes):
    folder = shard(tmp_path / "t", [("a.png", png(voc_mask(scenes[0])))])
    (folder / "a.png").write_bytes(png(scenes[0].image))
    table = HubTable(folder, "val")
    assert (table.read(table.keys()[0]).image == scenes[0].image).all() and table.problems() == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["val-00000-of-00002.parquet"], r"incomplete: 1 of the 2 shards .*val-00001-of-00002\.parquet"),
        (["val-00001-of-00002-0123abcd.parquet"], r"incomplete: 1 of the 2 shards .*val-00000-of-00002-0123abcd"),
        (["val-00000-of-00002.parquet", "val-00001-of-00003.parquet"], "several sets of shards"),
        (["val-00000-of-00001.parquet", "val.parquet"], "several sets of shards"),
    ],
)
def test_a_split_whose_shards_are_not_all_there_is_refused(tmp_path, scenes, names, message):
    for name in names:
        shard(tmp_path / "t", [(png(scenes[0].image), png(voc_mask(scenes[0])))], name)
    with pytest.raises(DataError, match=message):
        HubTable(tmp_path / "t", "val").keys()
    assert len(HubTable(tmp_path / "t", "val").problems()) == 1


def test_an_incomplete_split_hinders_no_other(tmp_path, scenes):
    pair = [(png(scenes[0].image), png(voc_mask(scenes[0])))]
    shard(tmp_path / "t", pair, "train-00000-of-00002.parquet")
    assert HubTable(shard(tmp_path / "t", pair), "val").problems() == []


def test_pipes_are_refused_without_waiting(tmp_path, image_folder):
    (tmp_path / "t").mkdir()
    os.mkfifo(tmp_path / "t" / "val-00000-of-00001.parquet")
    assert "is no regular file" in HubTable(tmp_path / "t", "val").problems()[0]
    (image_folder / "val" / "1.png").unlink()
    os.mkfifo(image_folder / "val" / "1.png")
    assert "it is a named pipe" in HubTable(image_folder, "val").problems()[0]


def test_jpeg_masks_are_refused(tmp_path, scenes):
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 64), 15, np.uint8)).save(buffer, "JPEG", quality=95)
    table = HubTable(shard(tmp_path / "t", [(png(scenes[0].image), buffer.getvalue())]), "val")
    assert "compressed with loss" in table.problems()[0]
