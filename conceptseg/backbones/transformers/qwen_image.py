"""Qwen-Image: a stock QwenImageTransformer2DModel; every block has a text and an image stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.latents import pack, spread_out, unpack
from conceptseg.backbones.settings import check_length
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.double_blocks import DoubleBlockCarrier
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts, padded
from conceptseg.errors import TapError

READ_BY_PIPELINE = 1024
"""Tokens of a prompt, without its template, that QwenImagePipeline of diffusers reads (tokenizer_max_length)."""


class QwenImageCarrier(DoubleBlockCarrier):
    """Concepts in the double blocks: text weights and the text's own modulation; all where the caption begins.

    This family has rotary positions for text, on the diagonal after the image's; concepts share the first of them. No published
    code covers this model: the stream is that of FLUX.1 (Helbling et al. 2025, arXiv:2502.04320, section 4) on its blocks.
    """

    def attach(self, taps: TapSet) -> None:
        if getattr(taps.model, "zero_cond_t", False):
            raise TapError(
                "tapping QwenImageTransformer2DModel: editing models (zero_cond_t) read two images; take a base model."
            )
        self.state["text_norm"] = taps.module("txt_norm")
        taps.before("txt_in", self.embed)
        self.tap_blocks(taps)

    def embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # forward(), not a call: the module's own hooks (this one) must not run again.
        self.state["residual"] = module.forward(self.state["text_norm"](self.stream.concepts.to(args[0].dtype)))

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state["temb"] = kwargs["temb"][self.stream.rows]
        image, text = kwargs["image_rotary_emb"]
        self.state["image_rotary"], self.state["concept_rotary"] = image, text[:1]

    def _rotate(self, x: Tensor, rotary: str) -> Tensor:
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        return apply_rotary_emb_qwen(x, self.state[rotary].expand(x.shape[1], -1), use_real=False)

    def rotate_image(self, x: Float[Tensor, "R n A d"]) -> Float[Tensor, "R n A d"]:
        return self._rotate(x, "image_rotary")

    def rotate_concepts(self, x: Float[Tensor, "R n A d"]) -> Float[Tensor, "R n A d"]:
        return self._rotate(x, "concept_rotary")

    def modulation(self, block: Any) -> tuple[Tensor, ...]:
        return block.txt_mod(self.state["temb"])[:, None].chunk(6, dim=-1)

    def norms(self, block: Any) -> tuple[Any, Any, Any]:
        return block.txt_norm1, block.txt_norm2, block.txt_mlp


class QwenImageBackbone(MultiModalBackbone):
    """Qwen-Image. Text goes through the checkpoint's own pipeline (Qwen2.5-VL under its template) without padding."""

    kind = "qwen_image"
    transformer_class = "QwenImageTransformer2DModel"
    carrier = QwenImageCarrier
    autoencoders = ("AutoencoderKLQwenImage",)
    text_encoder_name = "Qwen2.5-VL"
    text_parts = ("text_pipeline",)
    classifier_free = True

    def check_length(self, string: str) -> None:
        longest = min(self.text_tokens, READ_BY_PIPELINE)
        check_length(self.tokenizer, [string], longest, "extractor.backbone.text_tokens, and at most what its pipeline reads")

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        for string in strings:
            tokens, _ = self.text_pipeline.encode_prompt([string], max_sequence_length=self.text_tokens)
            own = len(self.tokenizer(string).input_ids)  # the pipeline drops what stands before them; the template's end follows
            yield {"tokens": tokens[0], "length": torch.tensor(min(own, len(tokens[0])))}

    def prompts(self, captions: Sequence[str]) -> Prompts:
        self.encode_text(captions)
        return padded([self.texts[caption]["tokens"].to(self.device) for caption in captions])

    def latents(
        self, images: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Encode images in 0..1 as latents, whitened by the autoencoder's published statistics."""
        self.check_size(images.shape[-2], images.shape[-1])
        with torch.inference_mode():
            given = (2 * images - 1).to(self.device, self.vae_dtype)[:, :, None]
            z = spread_out(self.vae.encode(given).latent_dist, generators)
        mean, spread = self._whitening(z)
        return (z[:, :, 0] - mean) / spread

    def images(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 3 H W"]:
        mean, spread = self._whitening(latents)
        with torch.inference_mode():
            z = (latents.float() * spread + mean).to(self.vae_dtype)[:, :, None]
            return (self.vae.decode(z, return_dict=False)[0][:, :, 0].float() / 2 + 0.5).clamp(0, 1)

    def _whitening(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, spread = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
        return mean.to(like), spread.to(like)

    @property
    def pixels_per_latent(self) -> int:
        return int(2 ** len(self.vae.config["temperal_downsample"]))

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // 4

    def guided(
        self, without: Float[Tensor, "R ..."], with_caption: Float[Tensor, "R ..."], guidance: float
    ) -> Float[Tensor, "R ..."]:
        """Combine the two outputs [R L d] as the pipeline does: rescale every token to its length with the caption."""
        mixed = super().guided(without, with_caption, guidance)
        return mixed * (with_caption.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))

    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        h, w = self.grid(noisy)
        return self.transformer(
            hidden_states=pack(noisy), encoder_hidden_states=prompts.hidden.to(self.dtype),
            encoder_hidden_states_mask=prompts.present, timestep=level.to(self.dtype),
            img_shapes=[[(1, h, w)]] * len(noisy), return_dict=False,
        )[0]  # fmt: skip

    def as_latents(self, velocity: Float[Tensor, "R ..."], grid: tuple[int, ...]) -> Float[Tensor, "R *c H W"]:
        return unpack(velocity, (grid[0], grid[1]))
