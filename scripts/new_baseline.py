"""Write the two files that a new method needs: conceptseg/extractors/<name>.py and conf/extractor/<name>.yaml.

    python scripts/new_baseline.py edge_energy

The method then shows up in `conceptseg --help extractor`, runs with `conceptseg extractor=edge_energy`, and is covered by
the contract tests without further edits.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

CODE = '''"""{title}: say in one sentence what it measures, and cite its paper."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.extractors.base import OneView
from conceptseg.types import Batch


class {kind}(OneView):
    """One map per concept, larger where the concept is. Raise `version` whenever the numbers change."""

    version = 1
    told = "nothing"  # or "own prediction", "true name", "name and prompt"
    trained_on = "nothing"  # or "images", "class labels", "images and captions", "masks or boxes"

    def __init__(self, grid: int = 16) -> None:
        self.grid = grid

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        # task.image is float [H W 3] in 0..1, task.concepts.names the words. Replace this: it says the same everywhere.
        return torch.zeros(len(batch), len(batch.concepts[0]), self.grid, self.grid)
'''

SHEET = """# {title}: name the paper and the table this serves.
defaults:
  - /views@_global_.views: map
  - _self_
_target_: conceptseg.extractors.{name}.{kind}
grid: 16
"""


def write(name: str, root: Path) -> tuple[Path, Path]:
    """Both files' paths. Raises SystemExit for a name that is no module name or is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SystemExit(f'"{name}" is no module name: wanted lower-case letters, digits and underscores, such as edge_energy.')
    code, sheet = root / "conceptseg" / "extractors" / f"{name}.py", root / "conf" / "extractor" / f"{name}.yaml"
    for path in (code, sheet):
        if path.exists():
            raise SystemExit(f"{path} is there already: choose another name, or edit it.")
    words = {
        "name": name,
        "kind": "".join(part.title() for part in name.split("_")),
        "title": name.replace("_", " ").capitalize(),
    }
    code.write_text(CODE.format(**words), encoding="utf-8")
    sheet.write_text(SHEET.format(**words), encoding="utf-8")
    return code, sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    for written in write(parser.parse_args().name, Path(__file__).resolve().parent.parent):
        print(f"wrote {written}")
