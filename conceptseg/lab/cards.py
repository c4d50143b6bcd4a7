"""Write a trained lab model with its card: what it was trained on, how long, and what it must not be used for."""

from __future__ import annotations

import json
import logging
import platform
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from conceptseg.backbones.base import SHIPPED, Checkpoint, shipped_digests
from conceptseg.data.drawings import TINTS
from conceptseg.data.scenes import DRAWING_VERSION
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.files import write_atomically, written_aside
from conceptseg.keys import versions
from conceptseg.lab.captions import GLUE, NOUNS
from conceptseg.lab.train import Trainer, train

log = logging.getLogger(__name__)

GENERATING = ("flux", "sd3", "sd", "sdxl")
"""Models that make pictures; their cards show some."""


def write_model(trainer: Trainer, curve: Path, folder: Path) -> Path:
    """Save the trainer's parts as fp16 safetensors with card.json and README.md in `folder`; returns the folder."""
    lines = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    with written_aside(folder) as part:
        trainer.write(part)
        card = _card(trainer, lines)
        (part / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(_readme(card), encoding="utf-8")
    return folder


def _card(trainer: Trainer, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the contents of card.json for a trained model; lines: those of its loss curve."""
    recipe, device = trainer.recipe, trainer.device
    parameters = sum(p.numel() for part in trainer.parts.values() if hasattr(part, "parameters") for p in part.parameters())
    losses = [k for k in lines[-1] if k not in ("step", "rate", "seconds")]
    return {
        "name": recipe["name"], "provenance": "lab",
        "data": f"drawn scenes, split train, drawing version {DRAWING_VERSION}",
        "scenes": recipe["scenes"], "hard_scenes": recipe["hard_scenes"],
        "plain_scenes": recipe["plain_scenes"], "steps": lines[-1]["step"], "seed": recipe["seed"],
        "parameters": parameters, "minutes": round(lines[-1]["seconds"] / 60, 1), "machine": f"{platform.machine()}, {device}",
        "threads": torch.get_num_threads(), "versions": versions(), "warning": trainer.caveat,
        "trained_words": [*GLUE, *NOUNS, *TINTS], "recipe": recipe,
        "losses": [{k: round(line[k], 4) for k in ("step", *losses) if k in line} for line in lines[:: max(1, len(lines) // 40)]],
    }  # fmt: skip


def _readme(card: dict[str, Any]) -> str:
    kept = card["losses"][:: max(1, len(card["losses"]) // 12)]
    names = list(kept[-1])
    rows = "\n".join("| " + " | ".join(str(row.get(name, "–")) for name in names) + " |" for row in kept)
    plain = f", {card['plain_scenes']:,} with one object and nothing else" if card.get("plain_scenes") else ""
    text = f"""# lab {card["name"]}

{card["warning"]}

| | |
|---|---|
| data | {card["data"]}, {card["scenes"]:,} scenes and {card["hard_scenes"]:,} with look-alikes{plain} |
| steps, seed | {card["steps"]:,}, {card["seed"]} |
| parameters | {card["parameters"]:,} (fp16 safetensors) |
| training time | {card["minutes"]:g} min on {card["machine"]}, {card["threads"]} thread(s), other work beside it |
| made with | torch {card["versions"].get("torch", "?")}, diffusers {card["versions"].get("diffusers", "?")} |
| again | `conceptseg-lab train {card["name"]}` |
"""
    if "check" in card:
        text += f"\n## What it can do\n\n`conceptseg-lab check {card['name']}`, n = {card['check'][0]['n']}:\n\n"
        text += "| | found | chance | drawn scenes |\n|---|--:|--:|--:|\n"
        for finding in card["check"]:
            ceiling = "" if finding["drawn"] is None else f"{100 * finding['drawn']:.1f} %"
            what = finding["what"] + (f" (n = {finding['n']})" if finding["n"] != card["check"][0]["n"] else "")
            text += f"| {what} | {100 * finding['value']:.1f} % | {100 * finding['chance']:.1f} % | {ceiling} |\n"
        if card["name"] in GENERATING:
            text += "\n![scenes made from captions](samples.png)\n"
    if "sweep" in card:
        text += f"\n## Where it keeps it\n\n`conceptseg-lab sweep {card['name']}`: {card['sweep']['about']}.\n\n"
        text += "".join(f"- {line}\n" for line in card["sweep"]["best"])
        text += "\n![layer by timestep by space](sweep.png)\n"
    return f"""{text}
## Losses

| {" | ".join(names)} |
|{"--:|" * len(names)}
{rows}
"""


def model_folder(name: str, folder: Path | None = None) -> Path:
    """A written model's folder, or the shipped one of that name. Raises ConfigError where there is none."""
    shipped = Path(str(resources.files("conceptseg.lab"))) / "weights"
    found = folder or shipped / name
    if not (found / "card.json").exists():
        there = sorted(f.parent.name for f in shipped.glob("*/card.json"))
        raise ConfigError(f"conceptseg-lab: {found} has no card.json, so it is no written model. {did_you_mean(name, there)}")
    return found


def read_card(folder: Path) -> dict[str, Any]:
    """card.json of a written model."""
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return card


def add_to_card(folder: Path, key: str, finding: Any) -> None:
    """Put a finding into card.json and rewrite the readme."""
    card = {**read_card(folder), key: finding}
    write_atomically(folder / "card.json", (json.dumps(card, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", _readme(card).encode())


def ship(folder: Path, name: str) -> Path:
    """Copy a trained model into the package, where "lab:<name>" finds it, and note its digest there."""
    target = Path(str(resources.files("conceptseg.lab"))) / "weights" / name
    with written_aside(target) as part:
        shutil.copytree(folder, part)
        for file in part.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
    digests = {**shipped_digests(), name: Checkpoint(str(target)).digest()}
    write_atomically(target.parent / SHIPPED, (json.dumps(digests, indent=1, sort_keys=True) + "\n").encode())
    return target


def train_and_write(recipe: dict[str, Any], work: Path, device: str = "cpu", stop_after: int | None = None) -> Path | None:
    """Train, then write the averaged weights with their card to work/model; None if stopped before the end."""
    trainer = train(recipe, work, device, stop_after)
    if trainer.step < recipe["steps"]:
        log.info("stopped at step %d of %d; the same command goes on from here", trainer.step, recipe["steps"])
        return None
    trainer.take_averaged()
    return write_model(trainer, work / "losses.jsonl", work / "model")
