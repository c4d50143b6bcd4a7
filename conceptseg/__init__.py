"""conceptseg: how well does a model know where a word is in a picture, without any training?"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"


def _own_folders() -> None:
    """Make `conceptseg.conf` and `conceptseg.benchmarks` those of this very tree, whatever else is installed.

    A wheel holds both inside the package. A checkout has them beside it, where an import alone would not look, or would find
    those of another checkout that is installed as editable. Where a tree lacks one, importing it fails.
    """
    package = Path(__file__).parent
    for name in ("conf", "benchmarks"):
        start = package.parent / name / "__init__.py"
        if (package / name).is_dir():
            continue
        if not start.is_file():
            sys.modules[f"{__name__}.{name}"] = None  # type: ignore[assignment]
            continue
        spec = spec_from_file_location(f"{__name__}.{name}", start, submodule_search_locations=[str(start.parent)])
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        globals()[name] = module


_own_folders()
