"""Write a trained lab model with its card: what it was trained on, how long, and what it must not be used for."""

from __future__ import annotations

import json
import platform
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from conceptseg.assemble import versions
from conceptseg.data.scenes import DRAWING_VERSION, TINTS
from conceptseg.lab.captions import GLUE, NOUNS
from conceptseg.lab.models import save

WARNING = (
    "Trained with an auxiliary loss on the text stream (telling swapped words), which a large model does not need: lab numbers "
    "rank code paths and settings, never the papers' claims."
)


def write_model(parts: dict[str, Any], recipe: dict[str, Any], curve: Path, folder: Path, device: str) -> Path:
    """Save the parts as fp16 safetensors with card.json and README.md in `folder`; returns the folder."""
    if folder.exists():
        shutil.rmtree(folder)
    save(parts, folder)
    lines = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    seconds = sum(
        line["seconds"]
        for line, after in zip(lines, [*lines[1:], None], strict=True)
        if after is None or after["seconds"] < line["seconds"]
    )
    parameters = sum(p.numel() for part in parts.values() if hasattr(part, "parameters") for p in part.parameters())
    card = {
        "name": recipe["name"], "provenance": "lab", "data": f"drawn scenes, split train, drawing version {DRAWING_VERSION}",
        "scenes": recipe["scenes"], "steps": lines[-1]["step"], "seed": recipe["seed"], "parameters": parameters,
        "minutes": round(seconds / 60, 1), "device": device, "machine": f"{platform.machine()}, {device}",
        "versions": versions(), "warning": WARNING, "trained_words": [*GLUE, *NOUNS, *TINTS], "recipe": recipe,
        "losses": [{k: round(line[k], 4) for k in ("step", "flow", "swap")} for line in lines[:: max(1, len(lines) // 40)]],
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(card), encoding="utf-8")
    return folder


def _readme(card: dict[str, Any]) -> str:
    table = "\n".join(
        f"| {r['step']} | {r['flow']:.3f} | {r['swap']:.3f} |" for r in card["losses"][:: max(1, len(card["losses"]) // 12)]
    )
    return f"""# lab {card["name"]}

{card["warning"]}

| | |
|---|---|
| data | {card["data"]}, {card["scenes"]:,} scenes |
| steps, seed | {card["steps"]:,}, {card["seed"]} |
| parameters | {card["parameters"]:,} (fp16 safetensors) |
| training time | {card["minutes"]:g} min on {card["machine"]} |
| made with | torch {card["versions"].get("torch", "?")}, diffusers {card["versions"].get("diffusers", "?")} |
| again | `conceptseg-lab train {card["name"]}` |

{card["recipe"].get("history", "")}

Loss curve (flow matching; telling swapped words, chance is about 0.67):

| step | flow | swap |
|--:|--:|--:|
{table}
"""


def ship(folder: Path, name: str) -> Path:
    """Copy a trained model into the package, where "lab:<name>" finds it."""
    target = Path(str(resources.files("conceptseg.lab"))) / "weights" / name
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(folder, target)
    return target
