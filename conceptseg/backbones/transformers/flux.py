"""FLUX.1: a stock FluxTransformer2DModel with its T5 and CLIP encoders and autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from conceptseg.backbones.base import LoadedCheckpoint
from conceptseg.backbones.latents import image_ids, pack, unpack
from conceptseg.backbones.settings import token_count
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.concept_stream import ConceptStream, Heads, by_heads
from conceptseg.backbones.transformers.double_blocks import DoubleBlockCarrier
from conceptseg.backbones.transformers.encode_only import EncodeOnlyFlux
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import ConfigError, one_of


class FluxCarrier(DoubleBlockCarrier):
    """Concepts in the double blocks: text weights, the modulation of (t, the concepts' pooled vector), position 0.

    In single-stream blocks, where text and image share their weights, concepts go on as the text does (this project's choice).

    Source: Helbling et al. 2025, arXiv:2502.04320, section 4; helblazer811/ConceptAttention at db30c4d,
    concept_attention/flux/dit_block.py.
    """

    def attach(self, taps: TapSet) -> None:
        taps.after("time_text_embed", self._condition)
        taps.before("context_embedder", self.embed)
        self.tap_blocks(taps)
        self._tap_single_blocks(taps)

    def _tap_single_blocks(self, taps: TapSet) -> None:
        """Hook the single-stream blocks up to the last layer; their layers follow those of the double blocks."""
        first = len(list(taps.module("transformer_blocks").children()))
        for layer, path, block in self.wanted_blocks(taps, "single_transformer_blocks", first):
            self.refuse_fused(f"{path}.attn", block.attn)
            taps.before(path, self.before_block)
            for name in ("norm_q", "norm_k", "to_v"):
                taps.after(f"{path}.attn.{name}", self.keep(f"joint_{name}"))
            taps.before(f"{path}.proj_out", self._at_single_output(layer, block))

    def _at_single_output(self, layer: int, block: Any) -> Callable[..., None]:
        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            image_outputs = args[0][self.stream.rows][:, self.state["text"] :, : block.attn.inner_dim]
            self._advance_single(layer, block, image_outputs)

        return tap

    def _advance_single(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        state, attention, text = self.state, block.attn, self.state["text"]
        residual = state["residual"]
        shift, scale, gate = block.norm.linear(block.norm.silu(state["temb"]))[:, None].chunk(3, dim=-1)
        normed = block.norm.norm(residual) * (1 + scale) + shift
        # forward(): the host's own queries, keys and values are read at these very modules.
        concepts = Heads(
            attention.norm_q.forward(by_heads(attention.to_q(normed), attention)),
            attention.norm_k.forward(by_heads(attention.to_k(normed), attention)),
            by_heads(attention.to_v.forward(normed), attention),
        )
        queries, keys, values = state["joint_norm_q"], state["joint_norm_k"], by_heads(state["joint_to_v"], attention)
        image = Heads(queries[:, text:], keys[:, text:], values[:, text:], self.rotate_image)
        prompt = Heads(queries[:, :text], keys[:, :text], values[:, :text])

        def project(x: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
            """The part of the output projection that attention has; the MLP has the rest."""
            projected: Tensor = block.proj_out.forward(pad(x, (0, block.mlp_hidden_dim)))
            return projected

        outputs = self.attend(layer, concepts, image, image_outputs, prompt, project, project)
        both = torch.cat([outputs, block.act_mlp(block.proj_mlp(normed))], dim=-1)
        state["residual"] = residual + gate * block.proj_out.forward(both)

    def _condition(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        rows = self.stream.rows
        assert self.stream.pooled is not None
        # forward(), not a call: the module's own hooks (this one) must not run again.
        self.state["temb"] = module.forward(*(a[rows] for a in args[:-1]), self.stream.pooled.to(output.dtype))

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Concepts and text sit at position 0, where the rotary embedding is the identity; only image tokens are turned.
        text = self.state["text"] = kwargs["encoder_hidden_states"].shape[1]
        self.state["rotary"] = tuple(part[text:] for part in kwargs["image_rotary_emb"])

    def rotate_image(self, x: Float[Tensor, "R n A d"]) -> Float[Tensor, "R n A d"]:
        from diffusers.models.embeddings import apply_rotary_emb

        return apply_rotary_emb(x, self.state["rotary"], sequence_dim=1)

    def modulation(self, block: Any) -> tuple[Tensor, ...]:
        activated = block.norm1_context.silu(self.state["temb"])
        return block.norm1_context.linear(activated)[:, None].chunk(6, dim=-1)

    def norms(self, block: Any) -> tuple[Any, Any, Any]:
        return block.norm1_context.norm, block.norm2_context, block.ff_context


class FluxLike(MultiModalBackbone):
    """Parts that FLUX.1 and its relatives share: latents packed two by two, rotary positions, the transformer's inputs."""

    rotates_text = False

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // 4

    def text_places(self, count: int) -> Float[Tensor, "N 3"]:
        """Return rotary position ids of the prompt's N tokens: by default all at 0."""
        return torch.zeros(count, 3, device=self.device)

    def image_places(self, h: int, w: int) -> Float[Tensor, "L 3"]:
        """Return rotary position ids of the image's L = h·w tokens."""
        return image_ids(h, w, self.device)

    def further_inputs(self, rows: int, cells: int, prompts: Prompts, guidance: float) -> dict[str, Any]:
        """Inputs of the transformer that not every family has, for so many rows of so many image tokens."""
        return {}

    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        h, w = self.grid(noisy)
        return self.transformer(
            hidden_states=pack(noisy), encoder_hidden_states=prompts.hidden.to(self.dtype), timestep=level.to(self.dtype),
            img_ids=self.image_places(h, w), txt_ids=self.text_places(prompts.hidden.shape[1]), return_dict=False,
            **self.further_inputs(len(noisy), h * w, prompts, guidance),
        )[0]  # fmt: skip

    def as_latents(self, velocity: Float[Tensor, "R ..."], grid: tuple[int, ...]) -> Float[Tensor, "R *c H W"]:
        return unpack(velocity, (grid[0], grid[1]))


class FluxBackbone(FluxLike):
    """FLUX.1 (schnell, dev, or the lab's).

    text_tokens: 256 for schnell, 512 for dev. pooled: what modulates image and text when a real image is read: "zeros", as
    released, or "caption", the caption's CLIP vector, as the model was trained; concepts keep zeros either way. single_blocks:
    the single-stream blocks are further layers, after the double blocks.
    """

    kind = "flux"
    transformer_class = "FluxTransformer2DModel"
    carrier = FluxCarrier
    text_parts = ("text_encoder", "clip")

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        pooled: str = "zeros",
        load: str = "whole",
        single_blocks: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(path, revision, **settings)
        one_of("extractor.backbone.pooled", pooled, ("zeros", "caption"))
        one_of("extractor.backbone.load", load, ("whole", "encode_only"))
        if load == "encode_only" and pooled == "caption":
            raise ConfigError(
                "extractor.backbone.load is encode_only, which makes constants of the modulation, but extractor.backbone.pooled "
                "is caption, which makes it another for every caption. Use pooled=zeros or load=whole."
            )
        if load == "encode_only" and single_blocks:
            raise ConfigError(
                "extractor.backbone.load is encode_only, which never reads single-stream blocks, but "
                "extractor.backbone.single_blocks is true. Use single_blocks=false or load=whole."
            )
        self.pooled, self.load, self.single_blocks = pooled, load, single_blocks

    @property
    def layers(self) -> tuple[int, ...]:
        """Double blocks, and single-stream blocks after them if they are asked for."""
        count = int(self.config["num_layers"]) + (int(self.config["num_single_layers"]) if self.single_blocks else 0)
        return tuple(range(count))

    @cached_property
    def cut(self) -> EncodeOnlyFlux:
        """Reads and holds the cut transformer of load=encode_only."""
        return EncodeOnlyFlux(
            self.checkpoint, self.config, self.stored_dtype, self.device, self.weights, self.dtype, self.computing
        )

    def release(self, *parts: str) -> None:
        super().release(*parts, *(["cut"] if "transformer" in parts else []))

    def identity(self) -> dict[str, Any]:
        pooled = {} if self.pooled == "zeros" else {"pooled": self.pooled}
        return {**super().identity(), **pooled, **({"single_blocks": True} if self.single_blocks else {})}

    # ------------------------------------------------------------ text

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self.part("tokenizer_2", AutoTokenizer)

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import T5EncoderModel

        return self.placed(self.part("text_encoder_2", T5EncoderModel, torch_dtype=self.stored_dtype))

    @cached_property
    def clip_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self.part("tokenizer", AutoTokenizer)

    @cached_property
    def clip(self) -> Any:
        from transformers import CLIPTextModel

        return self.placed(self.part("text_encoder", CLIPTextModel, torch_dtype=self.stored_dtype))

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        tokens = self.tokenizer(
            list(strings), padding="max_length", truncation=True, max_length=self.text_tokens, return_tensors="pt"
        )
        # The mask is left out on purpose: Flux attends to the padding as if it were text.
        hidden = self.text_encoder(input_ids=tokens.input_ids.to(self.device)).last_hidden_state
        end = self.tokenizer.eos_token_id
        for one, ids in zip(hidden, tokens.input_ids.tolist(), strict=True):
            yield {"tokens": one, "length": torch.tensor(ids.index(end) if end in ids else len(ids))}

    def encode_pooled(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        """Yield one record per string with its CLIP vector, "pooled" [p]."""
        length = self.clip.config.max_position_embeddings
        ids = self.clip_tokenizer(list(strings), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        for vector in self.clip(input_ids=ids.input_ids.to(self.device)).pooler_output:
            yield {"pooled": vector}

    def caption_vectors(self, captions: Sequence[str]) -> Float[Tensor, "B p"]:
        """Return the captions' pooled CLIP vectors of width p; each string is encoded once."""
        for caption in captions:
            longest = int(self.clip_tokenizer.model_max_length)
            if (count := token_count(self.clip_tokenizer, caption)) > longest:
                self.warn_once(
                    "pooled", 'the caption "%s..." has %d CLIP tokens, of which the CLIP reads %d: the rest is in no pooled '
                    "vector, but the T5 reads it (reported once)", caption[:80], count, longest,
                )  # fmt: skip
        self.fill({f"pooled: {c}": c for c in captions}, self.encode_pooled)
        return self._stacked("pooled", [f"pooled: {c}" for c in captions])

    def encode_all(self, strings: Iterable[str]) -> None:
        strings = sorted(strings)
        super().encode_all(strings)
        if self.pooled == "caption":  # of words too: which of these are captions is not known here
            self.caption_vectors(strings)

    def prompts(self, captions: Sequence[str]) -> Prompts:
        hidden = super().prompts(captions).hidden
        return Prompts(hidden, self.caption_vectors(captions) if self.pooled == "caption" else None)

    def generation_prompts(self, captions: Sequence[str]) -> Prompts:
        """As the model was trained: with the captions' CLIP vectors where the checkpoint has a CLIP, zeros where it has none."""
        folder, checkpoint = self.checkpoint.folder(), self.checkpoint
        if isinstance(checkpoint, LoadedCheckpoint):
            has_clip = "text_encoder" in checkpoint.parts
        else:
            has_clip = folder is None or (folder / "text_encoder").exists()
        return Prompts(super().prompts(captions).hidden, self.caption_vectors(captions) if has_clip else None)

    def zero_pooled(self, rows: int) -> Float[Tensor, "R p"]:
        """Return the pooled vector that the reference uses for real images: zeros, for image, text and concepts."""
        return torch.zeros(rows, int(self.config["pooled_projection_dim"]), device=self.device, dtype=self.dtype)

    def concept_pooled(self, rows: int) -> Float[Tensor, "R p"]:
        return self.zero_pooled(rows)

    # ------------------------------------------------------------ the denoiser

    def denoise(
        self,
        noisy: Float[Tensor, "R *c H W"],
        level: float | Float[Tensor, " R"],
        prompts: Prompts,
        stream: ConceptStream | None = None,
        guidance: float = 0.0,
    ) -> Float[Tensor, "R ..."] | None:
        if self.load == "encode_only":
            if stream is None or not stream.stop or isinstance(level, Tensor):
                raise ConfigError(
                    "extractor.backbone.load is encode_only, so there is no output to make an image of. "
                    "Use load=whole to generate."
                )
            conditions = (float(level), guidance, len(noisy))
            self.transformer = self.cut.at(stream.last_layer, conditions, lambda model: self._conditioning(model, *conditions))
        return super().denoise(noisy, level, prompts, stream, guidance)

    @torch.inference_mode()
    def _conditioning(self, model: Any, level: float, guidance: float, rows: int) -> Float[Tensor, "R d"]:
        """Return the vector that every modulation of one forward pass is made of, as the stock model computes it."""
        scalars = [level, guidance] if self.config.get("guidance_embeds") else [level]
        scaled = [torch.full((rows,), value, dtype=torch.float64, device=self.device).to(self.dtype) * 1000 for value in scalars]
        return model.time_text_embed(*scaled, self.zero_pooled(rows))

    def further_inputs(self, rows: int, cells: int, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {
            "pooled_projections": self.zero_pooled(rows) if prompts.pooled is None else prompts.pooled.to(self.dtype),
            "guidance": torch.full((rows,), guidance, device=self.device) if self.config.get("guidance_embeds") else None,
        }
