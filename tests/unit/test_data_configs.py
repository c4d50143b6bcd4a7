"""conf/dataset/*.yaml: each builds its class, opens nothing, and writes out every setting."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from conceptseg.data.base import SegmentationDataset

SHEETS = sorted((Path(__file__).parents[2] / "conf" / "dataset").glob("*.yaml"))


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_a_sheet_builds_its_data_set_and_names_every_setting(sheet):
    config = OmegaConf.load(sheet)
    config.pop("defaults", None)  # what the sheet brings along in a full configuration
    assert isinstance(instantiate(config), SegmentationDataset)
    assert set(config) - {"_target_"} == set(inspect.signature(get_class(config._target_).__init__).parameters) - {"self"}
    assert sheet.read_text().startswith("# ")


def test_there_is_a_sheet_for_every_data_set():
    assert {"scenes", "pascal_voc", "imagenet_segmentation", "hub"} <= {path.stem for path in SHEETS}
