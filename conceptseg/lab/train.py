"""Train a lab model on drawn scenes: the loop, its checkpoints, and what every kind of trainer shares.

What is learnt, and by which loss, is one file a kind: `flow_matching` (flux, sd3), `denoising` (sd, sdxl), `contrastive` (clip),
`classification` (vit) and `self_distillation` (dino).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptseg.backbones.base import stack_images
from conceptseg.data.scenes import DRAWING_VERSION, Layout, Placed, Scene, draw_hard_scene, draw_scene
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.files import write_atomically, written_aside
from conceptseg.keys import digest

log = logging.getLogger(__name__)

CURVE_EVERY = 50
"""Steps between two lines of the loss curve."""

TRAINERS = {
    "flux": "conceptseg.lab.flow_matching.FluxTrainer",
    "sd3": "conceptseg.lab.flow_matching.SD3Trainer",
    "sd": "conceptseg.lab.denoising.UNetTrainer",
    "sdxl": "conceptseg.lab.denoising.SDXLTrainer",
    "clip": "conceptseg.lab.contrastive.CLIPTrainer",
    "vit": "conceptseg.lab.classification.ViTTrainer",
    "dino": "conceptseg.lab.self_distillation.DINOTrainer",
}


class Trainer(ABC):
    """A model, its loss on a batch of scenes, and a state from which training goes on exactly.

    The averaged weights (an exponential moving average) are what is written at the end.
    """

    caveat: ClassVar[str]
    """A fact about the training that every number from the model must be read with; printed in its card."""

    def __init__(self, recipe: dict[str, Any], device: str = "cpu") -> None:
        torch.manual_seed(recipe["seed"])
        self.recipe, self.device = recipe, device
        self.parts: dict[str, Any] = self.build()
        self.trained = nn.ModuleDict(self.modules()).to(device)
        self.averaged = {k: v.detach().clone() for k, v in self.trained.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            [p for p in self.trained.parameters() if p.requires_grad],
            lr=recipe["learning_rate"], betas=(0.9, 0.99), weight_decay=recipe["weight_decay"],
        )  # fmt: skip
        self.step = 0
        self._single: np.ndarray | None = None

    @abstractmethod
    def build(self) -> dict[str, Any]:
        """The parts that are saved, by the sub-folder or name that a loader expects."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Return the trained modules: those of the parts, and heads that are discarded after training."""

    @abstractmethod
    def losses(self, scenes: list[Scene], rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        """Named losses of one batch; "total" is what is descended."""

    @abstractmethod
    def batch_size(self) -> int:
        """Scenes a step."""

    def looks_size(self) -> int:
        """How many scenes of a batch, its first ones, teach what words look like."""
        return self.batch_size()

    def write(self, folder: Path) -> None:
        """Save the parts in the layout that real checkpoints have."""
        from conceptseg.lab.models import save

        self.finish()
        save(self.parts, folder)

    def finish(self) -> None:  # noqa: B027  (most kinds keep all of it)
        """Take out of the parts what the written model does without."""

    def after_step(self) -> None:  # noqa: B027  (most kinds do nothing)
        """Update anything that follows the weights after a step, such as a teacher."""

    def settings(self) -> dict[str, Any]:
        """The recipe with the phases that have begun laid over it."""
        whole = dict(self.recipe)
        for phase in self.recipe.get("phases", ()):
            if self.step >= phase["from"]:
                whole |= phase
        return whole

    def choose(self, scenes: list[Scene], rng: np.random.Generator) -> Int[np.ndarray, " B"]:
        """Numbers of a batch's scenes: `single_share` of them from those with one object, which are drawn larger, and of those
        that teach looks `plain_share` from the scenes that show nothing else.
        """
        if self._single is None:
            self._single = np.array([i for i, scene in enumerate(scenes) if len(scene.objects) == 1])
        size, settings = self.batch_size(), self.settings()
        chosen = rng.integers(0, len(scenes), size)
        if len(self._single):
            lone = self._single[rng.integers(0, len(self._single), size)]
            chosen = np.where(rng.random(size) < settings["single_share"], lone, chosen)
        if share := settings["plain_share"]:
            plain = rng.integers(self.recipe["scenes"] + self.recipe["hard_scenes"], len(scenes), size)
            chosen = np.where((rng.random(size) < share) & (np.arange(size) < self.looks_size()), plain, chosen)
        return chosen

    def images(self, scenes: list[Scene]) -> Float[Tensor, "B 3 H W"]:
        """Scenes as the model is shown them, in -1..1."""
        pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
        return pixels.to(self.device).float() / 127.5 - 1

    def token_ids(self, captions: list[str], tokenizer: str = "tokenizer") -> Int[Tensor, "B T"]:
        """Captions as numbers of the named part's tokens, padded to `sizes.text_tokens`."""
        length = self.recipe["sizes"]["text_tokens"]
        tokens = self.parts[tokenizer](captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = tokens.input_ids.to(self.device)
        return ids

    def moved_images(self, scenes: list[Scene], rng: np.random.Generator) -> Float[Tensor, "B 3 H W"]:
        """Half of the images mirrored, all moved by up to `shift` pixels along both axes (what comes in is a reflection), so that
        patches meet objects anew: learning by heart which scene has which objects is then no way out.
        """
        shift, images = self.recipe["shift"], self.images(scenes)
        high, wide = images.shape[-2:]
        mirrored = torch.from_numpy(rng.random(len(scenes)) < 0.5).to(self.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        wider = nn.functional.pad(images, (shift,) * 4, mode="reflect")
        moves = rng.integers(0, 2 * shift + 1, (len(images), 2)).tolist()
        return torch.stack([image[:, y : y + high, x : x + wide] for image, (y, x) in zip(wider, moves, strict=True)])

    def rate(self) -> float:
        """Learning rate of the coming step: linear warm-up, then a cosine to zero at `horizon`; a phase may begin anew."""
        recipe = self.settings()
        if self.step < recipe["warmup"]:
            return float(recipe["learning_rate"]) * (self.step + 1) / recipe["warmup"]
        done = (self.step - recipe["warmup"]) / max(1, recipe["horizon"] - recipe["warmup"])
        return float(recipe["learning_rate"]) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def train_step(self, scenes: list[Scene]) -> dict[str, float]:
        """One step on scenes drawn by (seed, step): resuming at a step repeats exactly its batch, captions and noise."""
        seed = self.recipe["seed"]
        rng = np.random.default_rng([seed, 77, self.step])
        noise = torch.Generator().manual_seed(seed * 1_000_003 + self.step)
        torch.manual_seed(seed * 1_000_003 + self.step)
        chosen = [scenes[i] for i in self.choose(scenes, rng)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        losses = self.losses(chosen, rng, noise)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe["clip"])
        self.optimizer.step()
        self.step += 1
        self.after_step()
        keep = min(self.recipe["ema"], self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.trained.state_dict().items():
                if value.is_floating_point():
                    self.averaged[name].lerp_(value, 1 - keep)
        return {name: value.item() for name, value in losses.items() if name != "total"}

    def state(self) -> dict[str, Tensor]:
        state = {f"model.{k}": v for k, v in self.trained.state_dict().items()}
        state |= {f"averaged.{k}": v for k, v in self.averaged.items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in slot.items()}
        state["step"] = torch.tensor(self.step)
        return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        self.trained.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        self.averaged = {
            k.removeprefix("averaged."): v.to(self.device) for k, v in state.items() if k.startswith("averaged.")
        }  # fmt: skip
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                slots.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": slots, "param_groups": whole["param_groups"]})

    def take_averaged(self) -> None:
        """Put the averaged weights in place of the trained ones."""
        self.trained.load_state_dict(self.averaged)


def make_trainer(recipe: dict[str, Any], device: str = "cpu") -> Trainer:
    """The trainer that a recipe's `kind` names. Raises ConfigError for an unknown kind."""
    if recipe["kind"] not in TRAINERS:
        nearest = did_you_mean(recipe["kind"], TRAINERS)
        raise ConfigError(f'conf/lab/{recipe["name"]}.yaml: unknown kind "{recipe["kind"]}". {nearest}')
    module, name = TRAINERS[recipe["kind"]].rsplit(".", 1)
    made: Trainer = getattr(importlib.import_module(module), name)(recipe, device)
    return made


def draw_training_scenes(recipe: dict[str, Any], work: Path) -> list[Scene]:
    """The training split with hard and plain scenes, at the size the model is shown; drawn once, since that takes minutes.

    The drawings are kept beside the work folder, where the next model that asks for the same finds them.
    """
    keys = ("seed", "scenes", "hard_scenes", "plain_scenes", "scene_size", "image_size")
    wanted = {k: recipe[k] for k in keys} | {"drawing": DRAWING_VERSION}
    name = "scenes-" + "-".join(str(wanted[k]) for k in sorted(wanted))
    about, pixels = work.parent / f"{name}.json", work.parent / f"{name}.npy"
    if (held := _held_scenes(about, pixels, wanted)) is None:
        size, seed = recipe["scene_size"], recipe["seed"]
        scenes = [draw_scene("train", seed, i, size) for i in range(recipe["scenes"])]
        scenes += [
            draw_hard_scene("train", seed, i, size, ("tint", "part")[i % 2]).scene for i in range(recipe["hard_scenes"])
        ]  # fmt: skip
        after = recipe["scenes"]  # plain scenes are no barer copies of the others
        bare = Layout(distractors=(0, 0))
        scenes += [draw_scene("train", seed, after + i, size, objects=(1, 1), layout=bare) for i in range(recipe["plain_scenes"])]
        shown = (recipe["image_size"], recipe["image_size"])
        small = [stack_images([s.image / np.float32(255)], shown, "bicubic")[0].permute(1, 2, 0).numpy() for s in scenes]
        rows: list[dict[str, Any]] = [
            {"ground": s.ground, "objects": [[o.word, o.tint, list(o.box)] for o in s.objects]} for s in scenes
        ]
        with written_aside(pixels) as part, part.open("wb") as file:
            np.save(file, (np.stack(small) * 255).round().astype(np.uint8), allow_pickle=False)
        body = {"of": wanted, "scenes": rows, "pixels": _file_digest(pixels)}
        write_atomically(about, json.dumps({**body, "check": digest(body)}).encode())
        held = rows, np.load(pixels, mmap_mode="r", allow_pickle=False)
    rows, images = held
    return [
        Scene(
            image,
            np.zeros((0, 0), np.uint8),
            row["ground"],
            tuple(Placed(word, tint, tuple(box)) for word, tint, box in row["objects"]),
        )
        for image, row in zip(images, rows, strict=True)
    ]


def _held_scenes(about: Path, pixels: Path, wanted: dict[str, Any]) -> tuple[list[dict[str, Any]], np.ndarray] | None:
    """Scenes that were drawn before; None where there are none, or, with a warning, where their files are damaged."""
    if not about.exists() and not pixels.exists():
        return None
    try:
        body = json.loads(about.read_bytes())
        check = body.pop("check")
        if check != digest(body) or body["of"] != wanted or body["pixels"] != _file_digest(pixels):
            raise ValueError("their digests disagree")
        return body["scenes"], np.load(pixels, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
        log.warning("%s and %s are damaged or of an older version (%s): the scenes are drawn again.", about, pixels.name, error)
        return None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


HOW_FAR = ("steps", "checkpoint_every", "compile")
"""Settings of a recipe that say how far and how training is carried on, and change none of its steps."""


@dataclass
class Progress:
    """Progress of a training without its tensors: loss curve, losses since the curve's last line, and time."""

    curve: list[dict[str, float]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def line(self, trainer: Trainer) -> dict[str, float]:
        """Means of the recent losses, for the curve."""
        means = {k: round(float(np.mean([r[k] for r in self.recent])), 5) for k in self.recent[0]}
        return {"step": trainer.step, **means, "rate": trainer.rate(), "seconds": round(self.seconds, 1)}


def save_checkpoint(trainer: Trainer, progress: Progress, path: Path) -> None:
    """Write everything that training goes on from, with the recipe and a digest of it all."""
    state = trainer.state()
    about = {"recipe": json.dumps(trainer.recipe, sort_keys=True), "progress": json.dumps(asdict(progress))}
    with written_aside(path) as part:
        save_file(state, part, metadata={**about, "check": _state_digest(state, about)})


def read_checkpoint(path: Path, recipe: dict[str, Any]) -> tuple[dict[str, Tensor], Progress] | None:
    """The trainer's state and progress; None where there is no checkpoint, or, with a warning, where it is damaged.

    Raises ConfigError for the checkpoint of another recipe, or of a version that did not record its recipe.
    """
    if not path.exists():
        return None
    remedy = f"Choose another folder with --work, or delete {path.parent} to train from the start."
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        if "check" not in about:
            raise ConfigError(f"conceptseg-lab train: {path} does not name its recipe. {remedy}")
        check = about.pop("check")
        if check != _state_digest(state, about):
            raise ValueError("its digest disagrees")
        held, progress = json.loads(about["recipe"]), Progress(**json.loads(about["progress"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): training starts from the beginning.", path, error)
        return None
    asked = json.loads(json.dumps(recipe))
    differing = [k for k in sorted({*held, *asked}) if k not in HOW_FAR and held.get(k) != asked.get(k)]
    if differing:
        said = "; ".join(f"{k} is {held.get(k)!r} there and {asked.get(k)!r} here" for k in differing)
        raise ConfigError(f"conceptseg-lab train: {path} is of another recipe: {said}. {remedy}")
    return state, progress


def _state_digest(state: dict[str, Tensor], about: dict[str, str]) -> str:
    made = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    for name in sorted(state):
        tensor = state[name].contiguous()
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def write_curve(path: Path, lines: list[dict[str, float]]) -> None:
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _told_curve(path: Path, progress: Progress) -> None:
    """Warn where losses.jsonl lacks what the checkpoint knows to have been in it."""
    try:
        held = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError, RecursionError):
        held = []
    if held[: len(progress.curve)] != progress.curve:
        log.warning("%s is missing or damaged: it is written again from the checkpoint.", path)


def train(recipe: dict[str, Any], work: Path, device: str = "cpu", stop_after: int | None = None) -> Trainer:
    """Train to `recipe.steps`, or from the last checkpoint in `work`; the loss curve is written to work/losses.jsonl.

    Killed at any time and started again, it ends with the weights and the curve of a training that was not, but for its times.
    Raises ConfigError where `work` holds a checkpoint of another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, curve = work / "checkpoint.safetensors", work / "losses.jsonl"
    held = read_checkpoint(checkpoint, recipe)
    trainer, progress = make_trainer(recipe, device), Progress()
    if held is not None:
        trainer.restore(held[0])
        progress = held[1]
        log.info("resumed at step %d", trainer.step)
        _told_curve(curve, progress)
    started = time.monotonic()
    scenes = draw_training_scenes(recipe, work)
    log.info("drew or read %d scenes in %.0f s (drawing version %d)", len(scenes), time.monotonic() - started, DRAWING_VERSION)
    started = time.monotonic() - progress.seconds
    last = min(recipe["steps"], stop_after or recipe["steps"])
    while trainer.step < last:
        progress.recent.append(trainer.train_step(scenes))
        progress.seconds = time.monotonic() - started
        if trainer.step % CURVE_EVERY == 0:
            line = progress.line(trainer)
            progress.curve.append(line)
            progress.recent = []
            write_curve(curve, progress.curve)
            said = "  ".join(f"{k} {v:.4f}" for k, v in line.items() if k not in ("step", "rate", "seconds"))
            log.info("step %d  %s  %.0f s", trainer.step, said, line["seconds"])
        if trainer.step % recipe["checkpoint_every"] == 0 or trainer.step == last:
            save_checkpoint(trainer, progress, checkpoint)
    # Steps since the last line get one of their own here, which is not in the checkpoint: with more steps it becomes another.
    write_curve(curve, [*progress.curve, *([progress.line(trainer)] if progress.recent else [])])
    return trainer
