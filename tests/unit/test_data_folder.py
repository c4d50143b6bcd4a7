"""conceptseg/data/folder.py: pairs of a photo and a mask, words from four places, and what each value of a mask means."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from conceptseg.data.folder import ImageFolder
from conceptseg.data.hub import HubTable
from conceptseg.errors import ConfigError, DataError

PHOTO = np.zeros((4, 6, 3), np.uint8)


def mask(*values: int) -> np.ndarray:
    """4 x 6, the values from left to right, the last one to the end."""
    rows = np.full((4, 6), values[-1], np.uint8)
    rows[:, : len(values)] = values
    return rows


@pytest.fixture
def folder(tmp_path):
    """Writes a folder of photos: stem -> mask."""

    def write(masks, **files):
        for stem, values in masks.items():
            for part, content in (("images", PHOTO), ("masks", values)):
                path = tmp_path / part / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if content is not None:
                    Image.fromarray(content).save(path)
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        return tmp_path

    return write


def labels_and_words(data):
    samples = [data.read(key) for key in data.keys()]  # noqa: SIM118 - a method, no mapping's
    return [s.mask[0].tolist() for s in samples], [dict(s.words) for s in samples]


def test_words_come_from_each_of_the_four_places(folder):
    root = folder({"cat/1": mask(0, 1), "a dog/2": mask(1, 0)})
    assert labels_and_words(ImageFolder(root, words="folder")) == (
        [[1, 0, 0, 0, 0, 0], [0, 2, 2, 2, 2, 2]],
        [{1: "a dog"}, {2: "cat"}],
    )
    (root / "metadata.csv").write_text("file_name,word,more\ncat/1.png, kitten ,x\nimages/a dog/2.png,dog,y\n")
    assert labels_and_words(ImageFolder(root))[1] == [{1: "dog"}, {2: "kitten"}]
    assert labels_and_words(ImageFolder(root, classes={1: "animal"}))[1] == [{1: "animal"}] * 2
    (root / "classes.txt").write_text("background\nthing\n")
    with pytest.raises(DataError, match=r"classes.txt and metadata.csv.*\n.*dataset.words=classes"):
        ImageFolder(root).keys()
    assert labels_and_words(ImageFolder(root, words="classes"))[1] == [{1: "thing"}] * 2
    named = folder({f"n/{stem}": mask(0, 1) for stem in ("traffic_light_01", "traffic light (2)")})
    found = labels_and_words(ImageFolder(named, images="images/n", masks="masks/n", words="file_name"))
    assert found[1] == [{1: "traffic light"}] * 2


def test_words_that_are_nowhere_are_asked_for_and_never_guessed(folder):
    with pytest.raises(DataError, match=r'no classes.txt.*\n.*dataset.words=file_name \(IMG_7 would be asked for "IMG"\)'):
        ImageFolder(folder({"IMG_7": mask(0, 1)})).keys()


@pytest.mark.parametrize(
    ("values", "settings", "row"),
    [
        (mask(0, 255), {"classes": {255: "cat"}}, [0, 1, 1, 1, 1, 1]),
        (mask(0, 1, 255), {"classes": {255: "cat", 1: "dog"}}, [0, 1, 2, 2, 2, 2]),
        (mask(0, 255), {"words": "file_name", "foreground": [255]}, [0, 1, 1, 1, 1, 1]),
        (mask(1, 2, 3), {"words": "file_name", "background": [2], "void": [3]}, [1, 0, 255, 255, 255, 255]),
        (mask(0, 128, 255), {"words": "file_name", "foreground": [255], "void": [128]}, [0, 255, 1, 1, 1, 1]),
        (mask(0, 7, 255), {"classes": {7: "cat"}}, [0, 7, 255, 255, 255, 255]),
        (mask(0, 255), {"classes": {7: "cat"}, "void": [255]}, [0, 255, 255, 255, 255, 255]),
    ],
    ids=["black and white", "255 beside 1", "a word an image", "Oxford pets", "matting", "void at 255", "void that is said"],
)
def test_values_mean_what_the_settings_say(folder, values, settings, row):
    assert labels_and_words(ImageFolder(folder({"cat_1": values}), **settings))[0] == [row]


@pytest.mark.parametrize(
    ("values", "settings", "remedy"),
    [
        (mask(0, 255), {"classes": {1: "cat"}}, r"holds 0, 255 .*\n.*'dataset.classes=\{255: cat\}'.*dataset.void=\[255\]"),
        (mask(0, 255), {"words": "file_name"}, r"holds 0, 255 .*\n.*set dataset.foreground=\[255\]"),
        (mask(0, 128, 255), {"words": "file_name", "foreground": [255]}, r"the values 128.*\n.*dataset.void"),
        (mask(0, 9), {"classes": {1: "cat"}}, r"the values 9; 1 \(dataset.classes\), 0 \(background\) and 255 \(void\)"),
    ],
)
def test_a_mask_that_would_score_nothing_is_refused_with_the_setting_that_mends_it(folder, values, settings, remedy):
    data = ImageFolder(folder({"cat_1": values}), **settings)
    with pytest.raises(DataError, match=remedy):
        data.read(data.keys()[0])
    assert len(data.problems()) == 1 and "cat_1" in data.problems()[0]


def test_a_table_s_black_and_white_mask_is_refused_or_read_alike(folder, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    columns = {"image": [Image.fromarray(PHOTO)], "mask": [Image.fromarray(mask(0, 255))]}
    Dataset.from_dict(columns, Features({"image": Picture(), "mask": Picture()})).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(DataError, match=r"'dataset.words=\{255: cat\}'"):
        HubTable(tmp_path / "table", "all", words={1: "cat"}).read("table/000000")
    assert labels_and_words(HubTable(tmp_path / "table", "all", words={255: "cat"})) == ([[0, 1, 1, 1, 1, 1]], [{1: "cat"}])
    columns = {"image": [Image.fromarray(PHOTO)] * 2, "mask": [Image.fromarray(mask(0, 255))] * 2, "noun": ["dog", "Cat "]}
    features = Features({"image": Picture(), "mask": Picture(), "noun": Value("string")})
    Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "named"))
    named = HubTable(tmp_path / "named", "all", word_column="noun", foreground=[255])
    assert labels_and_words(named) == ([[0, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1]], [{2: "dog"}, {1: "Cat"}])
    others = [HubTable(tmp_path / "named", "all", **more).fingerprint() for more in ({}, {"void": [99]}, {"word_column": "noun"})]
    assert len({named.fingerprint(), *others}) == 4
    with pytest.raises(DataError, match=r'"nouns"\. Did you mean "noun"'):
        HubTable(tmp_path / "named", "all", word_column="nouns").keys()


def test_classes_txt_numbers_its_lines_or_is_numbered(folder):
    root = folder({"a": mask(0, 2)}, classes_txt="# mine\ncat\ndog\n")
    assert labels_and_words(ImageFolder(root))[1] == [{2: "dog"}]
    (root / "classes.txt").write_text("7: cat\n2 = big dog\n")
    assert labels_and_words(ImageFolder(root))[1] == [{2: "big dog"}]
    (root / "classes.txt").write_text("7: cat\ndog\n")
    with pytest.raises(DataError, match='line 2: "dog" has no value'):
        ImageFolder(root).keys()
    (root / "classes.txt").write_text("0: background\n2: dog\n255: void\n")
    assert labels_and_words(ImageFolder(root))[1] == [{2: "dog"}]


def test_lines_of_other_formats_in_classes_txt_are_refused(folder):
    root = folder({"a": mask(0, 2)}, classes_txt="")
    read = []
    for text in (
        "1,cat\n2,dog", "id,name\n1,cat\n2,dog", "1 cat\n2 dog", "cat: 1\ndog: 2", "cat 1\ndog 2", "1. cat\n2. dog", "1\n2",
        "cat:128,0,0::\ndog:0,128,0::", '["cat", "dog"]', "- cat\n- dog", '"cat"\n"dog"', "x\tcat\ny\tdog", "cat\nCat ",
        "__ignore__\n_background_\ncat\ndog", "0: cat\n1: dog\n2: car", "unlabeled\ncat\ndog", "3: background\n2: dog",
    ):  # fmt: skip
        (root / "classes.txt").write_text(text)
        try:
            read.append((text, ImageFolder(root).keys()))
        except DataError as error:
            assert "classes.txt" in str(error)
    assert not read
    for text in ("tench, Tinca tinca\n2D map", "cat\nhot dog", "no\nyes"):
        (root / "classes.txt").write_text(text)
        assert labels_and_words(ImageFolder(root))[1] == [{2: text.partition("\n")[2]}]


def test_what_does_not_pair_is_said_and_not_left_out(folder):
    root = folder({"a": mask(0, 1), "b": None}, classes_txt="cat")
    Image.fromarray(mask(0, 1)).save(root / "masks" / "c.png")
    data = ImageFolder(root)
    first, second = data.problems()
    assert "1 of 2 images lack a mask" in first and "/b)" in first and "1 of 2 masks lack an image" in second and "(c)" in second
    with pytest.raises(DataError, match=r"has no mask.*\n.*mask_suffix"):
        data.read(data.keys()[1])
    (root / "masks" / "b_mask.png").write_bytes((root / "masks" / "a.png").read_bytes())
    (root / "masks" / "a_mask.png").write_bytes((root / "masks" / "a.png").read_bytes())
    assert len(labels_and_words(ImageFolder(root, mask_suffix="_mask"))[0]) == 2
    for name in ("a", "a_mask", "gas_mask", "gas_mask_mask", "lone_mask"):
        (root / "both").mkdir(exist_ok=True)
        Image.fromarray(mask(0, 1) if name.endswith("k_mask") or name == "a_mask" else PHOTO).save(root / "both" / f"{name}.png")
    found = ImageFolder(root, "both", "both", "_mask", name="x")
    assert found.keys() == ("x/a", "x/gas_mask", "x/lone_mask") and found.read("x/gas_mask").mask[0, 1] == 1
    with pytest.raises(DataError, match="lone_mask_mask"):
        found.read("x/lone_mask")
    (root / "images" / "d.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"d\.heic is no picture"):
        ImageFolder(root).keys()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "b.png", "a.png"])
def test_a_table_names_each_image_of_the_folder_once_and_none_elsewhere(folder, name):
    root = folder({"a": mask(0, 1)}, metadata_csv=f"file_name,word\na.png,cat\n{name},dog\n")
    with pytest.raises(
        DataError, match="line 3: " + ("a.png is named a second time" if name == "a.png" else "there is no image")
    ):
        ImageFolder(root).keys()


def test_links_are_followed_and_a_loop_is_refused(folder, tmp_path):
    root = folder({"a": mask(0, 1)}, classes_txt="cat")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "b.png").write_bytes((root / "images" / "a.png").read_bytes())
    (root / "images" / "more").symlink_to(root / "elsewhere")
    assert [key.rpartition("/")[2] for key in ImageFolder(root).keys()] == ["a", "b"]  # noqa: SIM118
    (root / "elsewhere" / "back").symlink_to(root / "images")
    with pytest.raises(DataError, match="reached twice"):
        ImageFolder(root).keys()


def test_the_fingerprint_changes_with_words_values_and_pixels_and_not_with_the_limit(folder):
    root = folder({"cat_1": mask(0, 1), "cat_2": mask(0, 1)})
    settings = [{"words": "file_name"}, {"classes": {1: "dog"}}, {"words": "file_name", "void": [9]}, {"classes": {1: "cat"}}]
    found = [ImageFolder(root, **one).fingerprint() for one in settings]
    assert len({*found}) == 4 and ImageFolder(root, words="file_name", limit=1).fingerprint() == found[0]
    Image.fromarray(mask(1, 0)).save(root / "masks" / "cat_2.png")
    assert ImageFolder(root, words="file_name").fingerprint() != found[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": {1: "cat"}, "words": "folder"}, "would not read it"),
        ({"classes": {0: "cat"}}, "1 to 255"),
        ({"classes": {1: "cat"}, "void": [1]}, "which dataset.classes names too"),
        ({"words": "names"}, "dataset.words: unknown"),
        ({"images": ".", "masks": "."}, "mask_suffix"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageFolder(tmp_path, **settings)
