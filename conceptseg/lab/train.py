"""Train a lab model on drawn scenes: flow matching, plus a loss that makes the text stream read the image.

The auxiliary loss: some captions get words that are not true of the scene, and a linear head on the text tokens after the
last double block must tell which. The head is thrown away. A model of this size does not ground words without it (see the
card), so lab numbers rank code paths and settings, not the papers' claims.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from conceptseg.backbones.latents import image_ids, pack
from conceptseg.data.scenes import DRAWING_VERSION, Placed, Scene, draw_scene
from conceptseg.lab import models
from conceptseg.lab.captions import GLUE, Caption, describe, question, swap_words

log = logging.getLogger(__name__)


class FluxTrainer:
    """Everything a training step needs; `state()` and `restore()` make it resumable at any checkpoint."""

    def __init__(self, recipe: dict[str, Any], device: str = "cpu") -> None:
        torch.manual_seed(recipe["seed"])
        self.recipe, self.device = recipe, device
        self.parts = models.build_flux(recipe["sizes"])
        self.transformer, self.text = self.parts["transformer"].to(device), self.parts["text_encoder_2"].to(device)
        self.codec, self.tokenizer = self.parts["vae"].to(device), self.parts["tokenizer_2"]
        self.head = nn.Linear(self.transformer.inner_dim, 1).to(device)
        self.trained = nn.ModuleDict({"transformer": self.transformer, "text": self.text, "head": self.head})
        self.averaged = {k: v.detach().clone() for k, v in self.trained.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=recipe["learning_rate"], betas=(0.9, 0.99), weight_decay=recipe["weight_decay"]
        )
        self.step = 0
        self._text_stream: torch.Tensor | None = None
        self.transformer.transformer_blocks[-1].register_forward_hook(self._keep_text_stream)
        if recipe["compile"]:
            self.transformer.compile_repeated_blocks()

    def _keep_text_stream(self, _block: nn.Module, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._text_stream = output[0]

    def settings(self) -> dict[str, Any]:
        """The recipe with the phases that have begun laid over it."""
        whole = dict(self.recipe)
        for phase in self.recipe["phases"]:
            if self.step >= phase["from"]:
                whole |= phase
        return whole

    def tokens(self, captions: list[Caption]) -> torch.Tensor:
        ids = self.tokenizer(
            [c.text for c in captions], padding="max_length", truncation=True,
            max_length=self.recipe["sizes"]["text_tokens"], return_tensors="pt",
        ).input_ids  # fmt: skip
        return ids.to(self.device)

    def losses(
        self, images: torch.Tensor, captions: list[Caption], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow loss on the first `batch` scenes, swap loss on the rest. images: float [B 3 H W] in -1..1."""
        recipe = self.settings()
        flow = recipe["batch"]
        latents = self.codec.encode(images).latent_dist.mode() * recipe["sizes"]["latent_scale"]
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        mean, std = recipe["time_logit"]
        low, high = recipe["swap_times"]
        t = torch.cat(
            [
                torch.sigmoid(mean + std * torch.randn(flow, generator=generator)),
                low + (high - low) * torch.rand(len(images) - flow, generator=generator),
            ]
        ).to(self.device)
        noisy = t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * latents
        ids = self.tokens(captions)
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=recipe["autocast"] == "bfloat16")
        with autocast:
            text = self.text(input_ids=ids).last_hidden_state
            velocity = self.transformer(
                hidden_states=pack(noisy), encoder_hidden_states=text, timestep=t,
                pooled_projections=torch.zeros(len(images), recipe["sizes"]["pooled_width"], device=self.device),
                img_ids=image_ids(latents.shape[-2] // 2, latents.shape[-1] // 2, self.device),
                txt_ids=torch.zeros(ids.shape[1], 3, device=self.device), return_dict=False,
            )[0]  # fmt: skip
            assert self._text_stream is not None
            logits = self.head(self._text_stream[flow:])[..., 0]
        flow_loss = mse_loss(velocity[:flow].float(), pack(noise - latents)[:flow])
        truth = torch.zeros_like(logits, dtype=torch.float32)
        counted = torch.zeros_like(truth, dtype=torch.bool)
        for row, caption in enumerate(captions[flow:]):
            for position, (word, swapped) in enumerate(zip(caption.words, caption.swapped, strict=True)):
                truth[row, position] = float(swapped)
                counted[row, position] = word not in GLUE
        swap_loss = binary_cross_entropy_with_logits(logits.float()[counted], truth[counted])
        return flow_loss, swap_loss

    def rate(self) -> float:
        """Learning rate of the coming step: linear warm-up, then cosine to zero."""
        recipe = self.recipe
        if self.step < recipe["warmup"]:
            return float(recipe["learning_rate"]) * (self.step + 1) / recipe["warmup"]
        done = (self.step - recipe["warmup"]) / max(1, recipe["steps"] - recipe["warmup"])
        return float(recipe["learning_rate"]) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def train_step(self, scenes: list[Scene]) -> dict[str, float]:
        """One step on scenes drawn by (seed, step): resuming at a step repeats exactly its batch, captions and noise."""
        recipe = self.settings()
        rng = np.random.default_rng([recipe["seed"], 77, self.step])
        generator = torch.Generator().manual_seed(recipe["seed"] * 1_000_003 + self.step)
        chosen = [scenes[i] for i in rng.integers(0, len(scenes), recipe["batch"] + recipe["swap_batch"])]
        captions = [describe(scene, rng) for scene in chosen]
        for place in range(recipe["batch"], len(chosen)):
            if recipe["ask"] == "lists":
                captions[place] = question(chosen[place], rng, recipe["swap_share"])
            else:
                captions[place] = swap_words(captions[place], chosen[place], rng, recipe["swap_share"])
        images = torch.from_numpy(np.stack([s.image for s in chosen])).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        flow_loss, swap_loss = self.losses(images, captions, generator)
        self.optimizer.zero_grad(set_to_none=True)
        (flow_loss + recipe["swap_weight"] * swap_loss).backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), recipe["clip"])
        self.optimizer.step()
        self.step += 1
        keep = min(recipe["ema"], self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.trained.state_dict().items():
                if value.is_floating_point():
                    self.averaged[name].lerp_(value, 1 - keep)
        return {"step": self.step, "flow": flow_loss.item(), "swap": swap_loss.item(), "rate": self.rate()}

    def state(self) -> dict[str, torch.Tensor]:
        state = {f"model.{k}": v for k, v in self.trained.state_dict().items()}
        state |= {f"averaged.{k}": v for k, v in self.averaged.items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in slot.items()}
        state["step"] = torch.tensor(self.step)
        return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.step = int(state["step"])
        self.trained.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        self.averaged = {k.removeprefix("averaged."): v for k, v in state.items() if k.startswith("averaged.")}
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                slots.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": slots, "param_groups": whole["param_groups"]})

    def averaged_parts(self) -> dict[str, Any]:
        """The model's parts with averaged weights, in training precision, ready to save."""
        self.trained.load_state_dict(self.averaged)
        return self.parts


def draw_training_scenes(recipe: dict[str, Any], work: Path) -> list[Scene]:
    """The training split, drawn once and kept in the work folder, since drawing takes minutes."""
    wanted = {k: recipe[k] for k in ("seed", "scenes", "scene_size")} | {"drawing": DRAWING_VERSION}
    about, pixels = work / "scenes.json", work / "scenes.npy"
    if about.exists() and pixels.exists() and json.loads(about.read_text())["of"] == wanted:
        images = np.load(pixels, mmap_mode="r", allow_pickle=False)
        rows = json.loads(about.read_text())["scenes"]
        return [
            Scene(
                image,
                np.zeros((0, 0), np.uint8),
                row["ground"],
                tuple(Placed(word, tint, tuple(box)) for word, tint, box in row["objects"]),
            )
            for image, row in zip(images, rows, strict=True)
        ]
    scenes = [draw_scene("train", recipe["seed"], i, recipe["scene_size"]) for i in range(recipe["scenes"])]
    np.save(pixels, np.stack([s.image for s in scenes]), allow_pickle=False)
    rows = [{"ground": s.ground, "objects": [[o.word, o.tint, list(o.box)] for o in s.objects]} for s in scenes]
    about.write_text(json.dumps({"of": wanted, "scenes": rows}))
    return scenes


def train(recipe: dict[str, Any], work: Path, device: str = "cpu", stop_after: int | None = None) -> FluxTrainer:
    """Train to `recipe.steps`, or from the last checkpoint in `work`; the loss curve is appended to work/losses.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    trainer = FluxTrainer(recipe, device)
    checkpoint = work / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.restore(load_file(checkpoint))
        log.info("resumed at step %d", trainer.step)
    started = time.monotonic()
    scenes = draw_training_scenes(recipe, work)
    log.info("drew or read %d scenes in %.0f s (drawing version %d)", len(scenes), time.monotonic() - started, DRAWING_VERSION)
    curve = work / "losses.jsonl"
    recent: list[dict[str, float]] = []
    started = time.monotonic()
    last = min(recipe["steps"], stop_after or recipe["steps"])
    while trainer.step < last:
        recent.append(trainer.train_step(scenes))
        if trainer.step % 50 == 0 or trainer.step == last:
            means = {k: float(np.mean([r[k] for r in recent])) for k in ("flow", "swap")}
            line = {"step": trainer.step, **means, "rate": recent[-1]["rate"], "seconds": time.monotonic() - started}
            recent = []
            with curve.open("a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("step %(step)d  flow %(flow).4f  swap %(swap).3f  %(seconds).0f s", line)
        if trainer.step % recipe["checkpoint_every"] == 0 or trainer.step == last:
            save_file(trainer.state(), checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    return trainer


def train_and_write(recipe: dict[str, Any], work: Path, device: str = "cpu", stop_after: int | None = None) -> Path | None:
    """Train, then write the averaged weights with their card to work/model; None if stopped before the end."""
    from conceptseg.lab.cards import write_model

    trainer = train(recipe, work, device, stop_after)
    if trainer.step < recipe["steps"]:
        log.info("stopped at step %d of %d; the same command goes on from here", trainer.step, recipe["steps"])
        return None
    return write_model(trainer.averaged_parts(), recipe, work / "losses.jsonl", work / "model", device)
