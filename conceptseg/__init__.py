"""conceptseg: how well does a model know where a word is in a picture, without any training?"""

from __future__ import annotations

import sys
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
