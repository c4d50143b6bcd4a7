"""Flow matching for the transformers, with a loss that makes their text stream read the image.

The auxiliary ("swap") loss: some captions hold words that are not true of the scene, and a linear head on the text tokens
after the last block that has them must tell which. The head is thrown away. So small a model does not ground words without it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from conceptseg.backbones.latents import image_ids, pack, unpack
from conceptseg.backbones.transformers.sd3 import encode_prompts
from conceptseg.data.scenes import Scene
from conceptseg.lab import models
from conceptseg.lab.captions import GLUE, Caption, describe, question, swap_words
from conceptseg.lab.train import Trainer


class FlowMatchingTrainer(Trainer):
    """Velocity loss on scenes with true captions; swap loss on the rest, at low noise."""

    caveat: ClassVar[str] = (
        "Trained with an auxiliary loss on the text stream (telling swapped words), which a large model does not need: lab "
        "numbers rank code paths and settings, never the papers' claims."
    )
    last_text_block: ClassVar[int]
    """Index of the last joint block whose text stream goes on."""

    def __init__(self, recipe: dict[str, Any], device: str = "cpu") -> None:
        super().__init__(recipe, device)
        self.codec = self.parts["vae"].to(device)
        self._text_stream: Tensor | None = None
        self.parts["transformer"].transformer_blocks[self.last_text_block].register_forward_hook(self._keep_text_stream)
        if recipe["compile"]:
            for block in self.parts["transformer"].transformer_blocks:
                block.compile()

    def _keep_text_stream(self, _block: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._text_stream = output[0]

    @abstractmethod
    def velocity(self, noisy: Float[Tensor, "B c H W"], t: Float[Tensor, " B"], captions: list[Caption]) -> Tensor:
        """The model's velocity [B c H W]; the text stream is kept on the way."""

    @abstractmethod
    def word_places(self, word: int) -> tuple[int, ...]:
        """Where the caption's word number `word` stands in the text stream."""

    def batch_size(self) -> int:
        settings = self.settings()
        return int(settings["batch"] + settings["swap_batch"])

    def looks_size(self) -> int:
        return int(self.settings()["batch"])

    def losses(self, scenes: list[Scene], rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        recipe = self.settings()
        flow = recipe["batch"]
        captions = [describe(scene, rng) for scene in scenes]
        for place in range(flow, len(scenes)):
            if recipe["ask"] == "lists":
                captions[place] = question(scenes[place], rng, recipe["swap_share"])
            else:
                captions[place] = swap_words(captions[place], scenes[place], rng, recipe["swap_share"])
        latents = self.codec.encode(self.images(scenes)).latent_dist.mode() * recipe["sizes"]["latent_scale"]
        pure = torch.randn(latents.shape, generator=noise).to(self.device)
        mean, std = recipe["time_logit"]
        low, high = recipe["swap_times"]
        t = torch.cat(
            [
                torch.sigmoid(mean + std * torch.randn(flow, generator=noise)),
                low + (high - low) * torch.rand(len(scenes) - flow, generator=noise),
            ]
        ).to(self.device)
        noisy = t[:, None, None, None] * pure + (1 - t[:, None, None, None]) * latents
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=recipe["autocast"] == "bfloat16"):
            velocity = self.velocity(noisy, t, captions)
            assert self._text_stream is not None
            logits = self.trained["head"](self._text_stream[flow:])[..., 0].float()
        truth = torch.zeros_like(logits)
        counted = torch.zeros_like(truth, dtype=torch.bool)
        for row, caption in enumerate(captions[flow:]):
            for number, (word, swapped) in enumerate(zip(caption.words, caption.swapped, strict=True)):
                for place in self.word_places(number):
                    truth[row, place], counted[row, place] = float(swapped), word not in GLUE
        flow_loss = mse_loss(velocity[:flow].float(), (pure - latents)[:flow])
        swap_loss = binary_cross_entropy_with_logits(logits[counted], truth[counted])
        return {"flow": flow_loss, "swap": swap_loss, "total": flow_loss + recipe["swap_weight"] * swap_loss}


class FluxTrainer(FlowMatchingTrainer):
    """FLUX.1 in miniature: T5 tokens, zeros for the pooled vector, like the benchmark's Flux."""

    last_text_block = -1

    def build(self) -> dict[str, Any]:
        return models.build_flux(self.recipe["sizes"])

    def modules(self) -> dict[str, nn.Module]:
        transformer = self.parts["transformer"]
        return {
            "transformer": transformer, "text": self.parts["text_encoder_2"], "head": nn.Linear(transformer.inner_dim, 1),
        }  # fmt: skip

    def word_places(self, word: int) -> tuple[int, ...]:
        return (word,)

    def velocity(self, noisy: Float[Tensor, "B c H W"], t: Float[Tensor, " B"], captions: list[Caption]) -> Tensor:
        ids = self.token_ids([c.text for c in captions], "tokenizer_2")
        text = self.parts["text_encoder_2"](input_ids=ids).last_hidden_state
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        packed = self.parts["transformer"](
            hidden_states=pack(noisy), encoder_hidden_states=text, timestep=t,
            pooled_projections=torch.zeros(len(noisy), self.recipe["sizes"]["pooled_width"], device=self.device),
            img_ids=image_ids(height, width, self.device), txt_ids=torch.zeros(text.shape[1], 3, device=self.device),
            return_dict=False,
        )[0]  # fmt: skip
        return unpack(packed, (height, width))


class SD3Trainer(FlowMatchingTrainer):
    """Stable Diffusion 3.5 in miniature: two CLIP text encoders beside the T5, and a last block without a text stream."""

    last_text_block = -2

    def build(self) -> dict[str, Any]:
        return models.build_sd3(self.recipe["sizes"])

    def modules(self) -> dict[str, nn.Module]:
        transformer = self.parts["transformer"]
        encoders = {name: self.parts[name] for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        return {"transformer": transformer, **encoders, "head": nn.Linear(transformer.inner_dim, 1)}

    def word_places(self, word: int) -> tuple[int, ...]:
        return (word + 1, self.recipe["sizes"]["text_tokens"] + word)  # the CLIP tokens begin with one of their own

    def velocity(self, noisy: Float[Tensor, "B c H W"], t: Float[Tensor, " B"], captions: list[Caption]) -> Tensor:
        length = self.recipe["sizes"]["text_tokens"]
        names = ("", "_2", "_3")
        tokenizers, encoders = ([self.parts[f"{kind}{n}"] for n in names] for kind in ("tokenizer", "text_encoder"))
        text, pooled = encode_prompts([c.text for c in captions], tokenizers, encoders, length, length)
        found: Tensor = self.parts["transformer"](
            hidden_states=noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=t * 1000, return_dict=False
        )[0]
        return found
