"""conceptseg: how well does a model know where a word is in a picture, without any training?"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"

_BESIDE = {f"{__name__}.{name}": Path(__file__).parents[1] / name for name in ("conf", "benchmarks")}


class _OwnFolders:
    """Finds `conceptseg.conf` and `conceptseg.benchmarks` beside this very package, whatever else is installed.

    A wheel holds both inside the package, where Python looks anyway. A checkout has them at its top level, where an import alone
    would look no further than another checkout that is installed as editable.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Raises ModuleNotFoundError where the tree lacks the folder: that of another tree belongs to other code."""
        folder = _BESIDE.get(name)
        if folder is None or (Path(__file__).parent / folder.name).is_dir():
            return None
        start = folder / "__init__.py"
        if not start.is_file():
            raise ModuleNotFoundError(f"{name}: {start} is not there. Copy {folder.name}/ beside conceptseg/.", name=name)
        return spec_from_file_location(name, start, submodule_search_locations=[str(folder)])


sys.meta_path.insert(0, _OwnFolders)


_LAZY = {
    "evaluate": "conceptseg.tables.single",
    "example_scene": "conceptseg.data.scenes",
    "load_extractor": "conceptseg.extractors.loading",
    "Explanation": "conceptseg.extractors.explanation",
    "side_by_side": "conceptseg.extractors.explanation",
    "trace": "conceptseg.trace",
    **{
        name: f"conceptseg.extractors.{module}"
        for name, module in {
            "AttentionGradCAM": "attention_gradcam", "CLIPasRNN": "clip_as_rnn", "CLIPSeg": "clipseg",
            "ConceptAttention": "concept_attention", "DAAM": "daam", "GEM": "gem", "GroundedSAM": "grounded_sam",
            "GroupViT": "groupvit", "LRP": "lrp", "LeGrad": "legrad", "MaskCLIP": "maskclip", "NACLIP": "naclip", "OVAM": "ovam",
            "PartialLRP": "partial_lrp", "PromptCrossAttention": "cross_attention", "ProxyCLIP": "proxyclip",
            "Rollout": "rollout", "SelfAttention": "self_attention", "TextSpan": "textspan", "TransInterp": "transinterp",
        }.items()
    },
}  # fmt: skip
"""Name -> the module that is imported when the name is first asked for: importing the package alone loads no torch."""
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return module if name == "trace" else getattr(module, name)  # the package `trace` can be called


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
