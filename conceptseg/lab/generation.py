"""Scenes that a lab diffusion model makes from captions, to see whether it knows what the words look like."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from conceptseg.errors import ConfigError
from conceptseg.lab.captions import Caption
from conceptseg.lab.cards import GENERATING
from conceptseg.lab.denoising import UNetTrainer
from conceptseg.lab.flow_matching import FlowMatchingTrainer
from conceptseg.lab.train import Trainer, make_trainer

STEPS, GUIDANCE = 30, 3.0


def load_trained(card: dict[str, Any], folder: Path) -> Trainer:
    """The trainer of a written model's card, holding that model's weights in float32. Raises ConfigError for missing files."""
    trainer = make_trainer({**card["recipe"], "compile": False})
    trainer.step = card["steps"]
    trainer.finish()
    for name, part in trainer.parts.items():
        if not isinstance(part, nn.Module):
            continue
        files = sorted([*(folder / name).glob("*.safetensors"), *(folder.glob("*.safetensors") if name == "model" else ())])
        if len(files) != 1:
            raise ConfigError(f"conceptseg-lab: reading {name} of {folder} found {len(files)} weight files, wanted one.")
        held = {k: v.float() for k, v in load_file(files[0]).items()}
        absent, unknown = part.load_state_dict(held, strict=False)  # a tied matrix is saved once, under one of its names
        tied = {tensor.data_ptr() for key, tensor in part.state_dict().items() if key in held}
        if unknown or any(part.state_dict()[key].data_ptr() not in tied for key in absent):
            raise ConfigError(f"conceptseg-lab: {files[0]} lacks {absent} or holds unknown {unknown}; train the model again.")
        part.eval()
    return trainer


@torch.inference_mode()
def generate(
    trainer: Trainer, captions: Sequence[str], seed: int = 0, steps: int = STEPS, guidance: float = GUIDANCE
) -> UInt8[np.ndarray, "B H W 3"]:
    """Make one image per caption, with classifier-free guidance against the empty caption."""
    if not isinstance(trainer, FlowMatchingTrainer | UNetTrainer):
        raise ConfigError(
            f'conceptseg-lab: the lab\'s "{trainer.recipe["name"]}" makes no images. Choices: {", ".join(GENERATING)}.'
        )
    sizes = trainer.recipe["sizes"]
    side = trainer.recipe["image_size"] // sizes["codec_patch"]
    shape = (len(captions), 3 * sizes["codec_patch"] ** 2, side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    make = _by_flow if isinstance(trainer, FlowMatchingTrainer) else _by_denoising
    latents = make(trainer, latents, list(captions), steps, guidance)  # type: ignore[arg-type]
    pixels = trainer.codec.decode(latents / sizes["latent_scale"]).sample
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _by_flow(trainer: FlowMatchingTrainer, latents: Tensor, captions: list[str], steps: int, guidance: float) -> Tensor:
    """Euler steps along the velocity from t = 1 (noise) to 0, at the levels that the model's pipeline would take."""
    said = [Caption(tuple(c.split()), ()) for c in captions]
    nothing = [Caption((), ()) for _ in captions]
    scheduler = trainer.parts["scheduler"]
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    for now, then in pairwise(scheduler.sigmas.tolist()):
        t = torch.full((len(latents),), now)
        told, untold = trainer.velocity(latents, t, said), trainer.velocity(latents, t, nothing)
        latents = latents + (then - now) * (untold + guidance * (told - untold))
    return latents


def _by_denoising(trainer: UNetTrainer, latents: Tensor, captions: list[str], steps: int, guidance: float) -> Tensor:
    scheduler = trainer.parts["scheduler"]
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        levels, shown = step.expand(len(latents)), scheduler.scale_model_input(latents, step)
        told = trainer.predicted_velocity(shown, levels, captions)
        untold = trainer.predicted_velocity(shown, levels, [""] * len(captions))
        latents = scheduler.step(untold + guidance * (told - untold), step, latents).prev_sample
    return latents
