"""conceptseg-lab: train, check and sweep the lab models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from conceptseg.config import plain, register
from conceptseg.errors import guarded
from conceptseg.logs import quiet_libraries


@guarded
def lab() -> int:
    """conceptseg-lab train | check | sweep <name>: train a lab model, measure what it can do, and where it keeps it."""
    import argparse

    from conceptseg import __version__

    parser = argparse.ArgumentParser(prog="conceptseg-lab", description=lab.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train, or continue from the last checkpoint, then write the model")
    training.add_argument("name", help="a recipe of conf/lab, for example flux")
    training.add_argument("overrides", nargs="*", help="recipe settings, for example steps=500")
    training.add_argument("--work", type=Path, default=Path("lab_runs"), help="folder of checkpoints and the loss curve")
    training.add_argument("--device", default="cpu")
    training.add_argument("--ship", action="store_true", help="copy the finished model into the package")
    training.add_argument("--stop-after", type=int, default=None, help="stop at this step, to continue later")
    checking = commands.add_parser("check", help="measure what a model can do, against chance and drawn scenes")
    sweeping = commands.add_parser(
        "sweep", help="layer x timestep x space of a diffusion model, on scenes of unseen combinations"
    )
    for command in (checking, sweeping):
        command.add_argument("name", help="a shipped model, for example flux")
        command.add_argument("--model", type=Path, default=None, help="its folder, if it is not the shipped one")
        command.add_argument("--write", action="store_true", help="write the findings and pictures into its card")
    checking.add_argument("--judge", type=Path, default=None, help="folder of the CLIP that judges generated scenes")
    sweeping.add_argument("overrides", nargs="*", help="settings of the evaluation, for example dataset.count=16")
    said, rest = parser.parse_known_args()
    if strange := [a for a in rest if a.startswith("-") or "=" not in a or said.command == "check"]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    said.overrides = [*getattr(said, "overrides", []), *rest]  # settings may stand behind options
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return {"train": _lab_train, "check": _lab_check, "sweep": _lab_sweep}[said.command](said)


def _lab_train(said: Any) -> int:
    from conceptseg.lab.cards import train_and_write
    from conceptseg.lab.recipes import load_recipe

    recipe = load_recipe(said.name, said.overrides, said.device)
    folder = train_and_write(recipe, said.work / said.name, said.device, said.stop_after)
    if folder:
        if said.ship:
            from conceptseg.lab.cards import ship

            print(f"shipped: {ship(folder, said.name)}")
        print(f"model: {folder}")
        print(f"what it can do: conceptseg-lab check {said.name} --model {folder}")
    return 0


def _lab_check(said: Any) -> int:
    from conceptseg.lab.cards import add_to_card, model_folder, read_card
    from conceptseg.lab.check import check

    folder = model_folder(said.name, said.model)
    judge = folder if said.name == "clip" else model_folder("clip", said.judge)
    found = check(read_card(folder), folder, (read_card(judge), judge), folder / "samples.png" if said.write else None)
    for finding in found:
        print(f"{said.name}: {finding}")
    if said.write:
        add_to_card(folder, "check", [finding.plain() for finding in found])
        print(f"written: {folder / 'card.json'}")
    return 0


def _lab_sweep(said: Any) -> int:
    from hydra import compose, initialize_config_module

    from conceptseg.lab.cards import add_to_card, model_folder, read_card
    from conceptseg.lab.sweep import heat_map, overrides_for, sweep

    folder = model_folder(said.name, said.model)
    register()
    overrides = [*overrides_for(said.name)]
    if said.model:
        side = read_card(folder)["recipe"]["image_size"]
        overrides += [f"extractor.backbone.path={folder}", f"extractor.backbone.image_size={side}"]
    overrides += said.overrides
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        found = sweep(plain(compose("evaluate", overrides=overrides)))
    for line in found.lines():
        print(line)
    if said.write:
        heat_map(found, folder / "sweep.png")
        add_to_card(folder, "sweep", found.plain())
        print(f"written: {folder / 'sweep.png'}")
    return 0
