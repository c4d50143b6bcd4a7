"""CogVideoX: a stock CogVideoXTransformer3DModel; maps are frames x height x width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.latents import spread_out
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.concept_stream import SPACES, ConceptCarrier, Heads, by_heads, normed
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import ConfigError, did_you_mean

SOLVERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Stock classes that a checkpoint may name as its own; the second looks one step back and draws noise at every step."""


class CogVideoXCarrier(ConceptCarrier):
    """Concepts beside text and video, which share one set of weights; concepts take the text's part of every modulation.

    The released code pads concepts with zeros to 226 tokens, which join its attention and its softmax; here there is no padding.
    Source: Helbling et al. 2025, arXiv:2502.04320, but for that as in
    helblazer811/ConceptAttention at db30c4d, concept_attention/cogvideox/dit_block.py.
    """

    def attach(self, taps: TapSet) -> None:
        taps.before("patch_embed", self.embed)
        for layer, path, block in self.wanted_blocks(taps, "transformer_blocks"):
            attention = block.attn1
            self.refuse_fused(f"{path}.attn1", attention)
            taps.before(path, self._inputs)
            # Queries and keys are rotated in place after these modules: what is kept must be a copy.
            for name, norm, projection in (("queries", "norm_q", "to_q"), ("keys", "norm_k", "to_k")):
                if getattr(attention, norm) is None:
                    taps.after(f"{path}.attn1.{projection}", self.keep(name, lambda x, a=attention: by_heads(x, a).clone()))  # type: ignore[misc]
                else:
                    taps.after(f"{path}.attn1.{norm}", self.keep(name, lambda x: x.transpose(1, 2).clone()))
            taps.after(f"{path}.attn1.to_v", self.keep("values", lambda x, a=attention: by_heads(x, a)))  # type: ignore[misc]
            taps.before(f"{path}.attn1.to_out.0", self.at_output(layer, block))

    def embed(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state["residual"] = module.text_proj(self.stream.concepts.to(args[0].dtype))

    def _inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state["temb"] = kwargs["temb"][self.stream.rows]
        self.state["rotary"] = kwargs["image_rotary_emb"]
        self.state["text"] = kwargs["encoder_hidden_states"].shape[1]

    def _rotate(self, x: Tensor) -> Tensor:
        from diffusers.models.embeddings import apply_rotary_emb

        rotary = self.state["rotary"]
        return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)

    def image_rows(self, outputs: Float[Tensor, "R n D"]) -> Float[Tensor, "R L D"]:
        return outputs[:, self.state["text"] :]

    def advance(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        state, attention, text = self.state, block.attn1, self.state["text"]
        residual = state["residual"]
        _, x, _, gate = block.norm1.forward(residual, residual, state["temb"])
        # forward(): the video's queries, keys and values are read at these very modules.
        concepts = Heads(
            normed(attention.norm_q, by_heads(attention.to_q.forward(x), attention)),
            normed(attention.norm_k, by_heads(attention.to_k.forward(x), attention)),
            by_heads(attention.to_v.forward(x), attention),
        )
        image = Heads(state["queries"][:, text:], state["keys"][:, text:], state["values"][:, text:], self._rotate)
        project = attention.to_out[0].forward
        prompt = Heads(state["queries"][:, :text], state["keys"][:, :text], state["values"][:, :text])
        outputs = self.attend(layer, concepts, image, image_outputs, prompt, project, project)
        residual = residual + gate * project(outputs)
        _, x, _, gate = block.norm2.forward(residual, residual, state["temb"])
        state["residual"] = residual + gate * block.ff(x)


class CogVideoXBackbone(MultiModalBackbone):
    """CogVideoX 2b and 5b. Reads videos of 4k + 1 frames in 0..1, makes videos of 8k + 1; levels are its timesteps over 1000.

    frames: of a video that is made; by default as many as the checkpoint was trained on. Videos are made by the solver that the
    checkpoint names, without dynamic guidance.
    """

    kind = "cogvideox"
    rotates_text = False
    spaces = tuple(s for s in SPACES if s != "gramcol")  # its anchor is one token of each frame
    transformer_class = "CogVideoXTransformer3DModel"
    carrier = CogVideoXCarrier
    autoencoders = ("AutoencoderKLCogVideoX",)
    classifier_free = True
    schedulers = SOLVERS

    def __init__(self, path: str, revision: str | None = None, frames: int | None = None, **settings: Any) -> None:
        super().__init__(path, revision, **settings)
        if frames is not None and frames % 8 != 1:
            raise ConfigError(
                f"extractor.backbone.frames is {frames}; its autoencoder makes eight frames at a time after the first, so 8k + 1 "
                f"is wanted, for example {8 * (frames // 8) + 1}."
            )
        self.frames = frames
        self._cleaned: Tensor | None = None

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self.part("tokenizer", AutoTokenizer)

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import T5EncoderModel

        return self.placed(self.part("text_encoder", T5EncoderModel, torch_dtype=self.stored_dtype))

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        positions = int(self.config["max_text_seq_length"])
        if not self.config.get("use_rotary_positional_embeddings") and self.text_tokens != positions:
            raise ConfigError(
                f"extractor.backbone.text_tokens is {self.text_tokens}; this checkpoint adds positions to texts of {positions} "
                f"tokens and to the video after them, so extractor.backbone.text_tokens={positions} is wanted."
            )
        ids = self.tokenizer(
            list(strings), padding="max_length", truncation=True, max_length=self.text_tokens, return_tensors="pt"
        ).input_ids
        end = self.tokenizer.eos_token_id
        for one, row in zip(self.text_encoder(input_ids=ids.to(self.device)).last_hidden_state, ids.tolist(), strict=True):
            yield {"tokens": one, "length": torch.tensor(row.index(end) if end in row else len(row))}

    @cached_property
    def scheduler(self) -> Any:
        """The checkpoint's own solver. Raises ConfigError for a class that is not one of `SOLVERS`."""
        import diffusers

        with self.checkpoint.loading("scheduler"):
            config = diffusers.CogVideoXDDIMScheduler.load_config(subfolder="scheduler", **self.checkpoint.source())
        kind = config["_class_name"]
        if kind not in SOLVERS:
            raise ConfigError(f'extractor.backbone.path: its scheduler is a "{kind}". {did_you_mean(kind, SOLVERS)}')
        return self.part("scheduler", getattr(diffusers, kind))

    def levels(self, steps: int, tokens: int) -> list[float]:
        self.scheduler.set_timesteps(steps)
        return [(int(t) + 1) / 1000 for t in self.scheduler.timesteps] + [0.0]

    def stepped(
        self,
        latents: Float[Tensor, "R f c h w"],
        answer: Float[Tensor, "R f c h w"],
        levels: Sequence[float],
        step: int,
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "R f c h w"]:
        """Take one step of the checkpoint's own solver from the model's velocity `answer`; levels are its timesteps / 1000."""
        times, scheduler = self.scheduler.timesteps, self.scheduler
        stepped: Tensor
        if type(scheduler).__name__ == "CogVideoXDDIMScheduler":
            stepped = scheduler.step(answer, times[step], latents, return_dict=False)[0]
            return stepped
        before = (self._cleaned, times[step - 1]) if step else (None, None)
        stepped, self._cleaned = scheduler.step(
            answer, before[0], times[step], before[1], latents, generator=list(generators), return_dict=False
        )
        return stepped

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, *sides = super().latent_shape(height, width)
        return (self._latent_frames + self._filling, channels, *sides)

    @property
    def _latent_frames(self) -> int:
        return ((self.frames or int(self.config["sample_frames"])) - 1) // 4 + 1

    @property
    def _filling(self) -> int:
        """Latent frames put before a video that is made, where tokens are several frames deep."""
        return -self._latent_frames % int(self.config.get("patch_size_t") or 1)

    def images(self, latents: Float[Tensor, "B f c h w"]) -> Float[Tensor, "B F 3 H W"]:
        with torch.inference_mode():
            z = latents[:, self._filling :].transpose(1, 2).to(self.vae_dtype) / self.vae.config["scaling_factor"]
            frames: Tensor = self.vae.decode(z, return_dict=False)[0].float().transpose(1, 2)
            return (frames / 2 + 0.5).clamp(0, 1)

    def latents(
        self, images: Float[Tensor, "B 3 *F H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B f c h w"]:
        """Encode videos in 0..1 as scaled latents: the posterior's mean, or one sample per video with its generator.

        Images without a frame axis F are videos of one frame.
        """
        self.check_size(images.shape[-2], images.shape[-1])
        images = images[:, :, None] if images.ndim == 4 else images
        with torch.inference_mode():
            z = spread_out(self.vae.encode((2 * images - 1).to(self.device, self.vae_dtype)).latent_dist, generators)
        return z.transpose(1, 2) * self.vae.config["scaling_factor"]

    def mix(self, noise: Float[Tensor, "*#n"], latents: Float[Tensor, "*#n"], level: float) -> Float[Tensor, "*#n"]:
        share = self.scheduler.alphas_cumprod[round(1000 * level) - 1].to(latents)
        return share.sqrt() * latents + (1 - share).sqrt() * noise

    def grid(self, latents: Float[Tensor, "R *c H W"]) -> tuple[int, ...]:
        patch, deep = int(self.config["patch_size"]), self.config.get("patch_size_t") or 1
        return latents.shape[1] // int(deep), latents.shape[-2] // patch, latents.shape[-1] // patch

    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        return self.transformer(
            hidden_states=noisy, encoder_hidden_states=prompts.hidden.to(self.dtype),
            timestep=(1000 * level).round().long() - 1, image_rotary_emb=self._rotary(self.grid(noisy)), return_dict=False,
        )[0]  # fmt: skip

    def _rotary(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """As CogVideoXPipeline makes it: None for the 2b model, which adds its positions to the tokens."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        frames, height, width = grid
        patch = int(self.config["patch_size"])
        base = int(self.config["sample_height"]) // patch, int(self.config["sample_width"]) // patch
        shared = {
            "embed_dim": self.config["attention_head_dim"], "grid_size": (height, width), "temporal_size": frames,
            "device": self.device,
        }  # fmt: skip
        if self.config.get("patch_size_t"):
            return get_3d_rotary_pos_embed(crops_coords=None, grid_type="slice", max_size=base, **shared)
        corners = get_resize_crop_region_for_grid((height, width), base[1], base[0])
        return get_3d_rotary_pos_embed(crops_coords=corners, **shared)
