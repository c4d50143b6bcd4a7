"""Headline configurations, resolved: a changed value that a number depends on shows in review as a diff of values.

To write the files again, after making sure that the change is meant:

    cd tests && python -m configs.test_config_golden
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from composing import plainly

GOLDEN = Path(__file__).parents[1] / "golden" / "configs"
FLUX = ("extractor=concept_attention", "backbone@extractor.backbone=flux_schnell")
HEADLINES: dict[str, tuple[str, ...]] = {
    "lab_scenes": (),
    "ca_imagenet_released": ("experiment=ca_imagenet_released",),
    "ca_voc_single_released": ("experiment=ca_voc_single_released",),
    "ca_voc_multi_released": ("experiment=ca_voc_multi_released",),
    "daam_sd2_imagenet_released": ("experiment=daam_sd2_imagenet_released",),
    "daam_sdxl_imagenet_released": ("experiment=daam_sdxl_imagenet_released",),
    "daam_sd2_imagenet_standard": ("experiment=daam_sd2_imagenet_standard",),
    "daam_sdxl_imagenet_standard": ("experiment=daam_sdxl_imagenet_standard",),
    "flux_imagenet_released": (*FLUX, "dataset=imagenet_segmentation", "protocol=imagenet_released", "views=released/imagenet"),
    "flux_voc_single_released": (*FLUX, "dataset=pascal_voc", "protocol=voc_single_released", "views=released/voc_single"),
    "flux_voc_multi_released": (*FLUX, "dataset=pascal_voc", "protocol=voc_multi_released", "views=released/voc_multi"),
    "flux_imagenet_standard": (*FLUX, "dataset=imagenet_segmentation", "protocol=imagenet_standard"),
    "flux_voc_single_standard": (*FLUX, "dataset=pascal_voc", "protocol=voc_single_standard"),
    "flux_voc_multi_standard": (*FLUX, "dataset=pascal_voc", "protocol=voc_multi_standard"),
}
HEADLINES |= {
    name: (f"experiment={name}",)
    for name in (
        "ca_imagenet_paper", "ca_imagenet_standard", "ca_voc_single_paper", "ca_voc_single_standard", "ca_voc_multi_paper",
        "ca_voc_multi_standard", "ca_table3", "ca_table4_both",
        "ca_table4_cross_only", "ca_table4_self_only", "ca_table4_neither", "ca_figure7_layers", "ca_figure7_timesteps",
        "ca_imagenet_int8",
    )
}  # fmt: skip
NUMBERS = ("extractor", "dataset", "protocol", "views")
"""Groups that a run id and its numbers depend on; how a run is carried out and printed is left out."""


def resolved(name: str) -> str:
    whole = plainly(*HEADLINES[name])
    return yaml.safe_dump({key: whole[key] for key in NUMBERS}, sort_keys=True, allow_unicode=True, width=120)


@pytest.mark.parametrize("name", HEADLINES)
def test_a_headline_configuration_resolves_to_what_it_was(name):
    assert resolved(name) == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")


def test_there_is_no_snapshot_without_a_headline():
    assert {p.stem for p in GOLDEN.glob("*.yaml")} == set(HEADLINES)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for headline in HEADLINES:
        (GOLDEN / f"{headline}.yaml").write_text(resolved(headline), encoding="utf-8")
        print(GOLDEN / f"{headline}.yaml")
