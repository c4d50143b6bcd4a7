"""CLIP models of open_clip: the visual tower, whose class token is the image vector, and the text tower."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from conceptseg.backbones.base import LOADING_ERRORS
from conceptseg.backbones.encoders.image_encoder import checkpoint_file, checkpoint_json, checkpoint_weights, load_strictly
from conceptseg.backbones.encoders.image_text import TEXTS_AT_ONCE, ImageTextEncoder, padded_ids
from conceptseg.backbones.encoders.tower import Tower, TowerBlock, Weights, resized_positions
from conceptseg.backbones.planned_weights import check_plan
from conceptseg.backbones.settings import check_length, too_long
from conceptseg.errors import ConfigError, TapError, one_of


class CLIPBackbone(ImageTextEncoder):
    """A stock open_clip CLIP in open_clip's hub layout: open_clip_config.json, open_clip_model.safetensors, tokenizer files.

    templates: see `ImageTextEncoder`.
    tokenizer: "bpe" is the byte-pair encoding that comes with open_clip and that OpenAI's and LAION's models use; "files" are
        the tokenizer files beside the weights.
    """

    family = "clip"

    def __init__(
        self,
        path: str,
        trained_on: str = "images and captions",
        templates: str | Sequence[str] = "openai_imagenet",
        tokenizer: str = "files",
        file: str = "open_clip_model.safetensors",
        **settings: Any,
    ) -> None:
        super().__init__(path, trained_on, templates, **settings)
        one_of("extractor.backbone.tokenizer", tokenizer, ("bpe", "files"))
        self._tokenizer, self.file = tokenizer, file

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "tokenizer": self._tokenizer, "file": self.file}

    @cached_property
    def config(self) -> dict[str, Any]:
        """open_clip_config.json; read without loading weights."""
        config = checkpoint_json(self.checkpoint, "open_clip_config.json")
        for part in ("model_cfg", "preprocess_cfg"):
            if part not in config:
                raise ConfigError(
                    f'extractor.backbone.path "{self.checkpoint.path}": its open_clip_config.json has no "{part}"; wanted the '
                    f"layout that open_clip saves to the hub."
                )
        return config

    @property
    def native_size(self) -> tuple[int, int]:
        size = self.config["model_cfg"]["vision_cfg"]["image_size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def native_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.config["preprocess_cfg"]["mean"], self.config["preprocess_cfg"]["std"]

    @property
    def native_labels(self) -> Sequence[str] | None:
        return None

    @cached_property
    def clip(self) -> nn.Module:
        """Both towers."""
        from open_clip.model import CLIP
        from open_clip.transformer import VisionTransformer

        config = dict(self.config["model_cfg"])
        vision = dict(config["vision_cfg"])
        refused = [k for k in ("timm_model_name", "attentional_pool") if vision.get(k)]
        if refused or isinstance(vision.get("layers"), list) or {"custom_text", "multimodal_cfg"} & set(config):
            raise TapError(
                f'tapping "{self.checkpoint.path}": wanted a CLIP whose towers are open_clip\'s own transformers, but its config '
                f"has {', '.join(refused) or 'another kind of tower'}. Choose a ViT of OpenAI or LAION "
                f"(backbone@extractor.backbone=clip_vit_b_16_laion2b)."
            )
        patch = vision["patch_size"]
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        self.check_tiling(rows, columns)
        state = checkpoint_weights(self.checkpoint, self.file)

        def build() -> nn.Module:
            return CLIP(**{**config, "vision_cfg": {**vision, "image_size": self.image_size}})

        try:
            where = f'extractor.backbone.path "{self.checkpoint.path}": model_cfg of open_clip_config.json'
            check_plan(where, config, [weight.shape for weight in state.values()], build)
            model = build()
        except LOADING_ERRORS as error:
            raise ConfigError(
                f'extractor.backbone.path "{self.checkpoint.path}": open_clip can\'t build its model_cfg: {error}'
            ) from error
        assert isinstance(model.visual, VisionTransformer)
        name = "visual.positional_embedding"
        if name in state:
            old = (self.native_size[0] // rows, self.native_size[1] // columns)
            state[name] = resized_positions(state[name].float(), 1, old, model.visual.grid_size, self.position_resize)
        load_strictly(model, state, self.checkpoint, "open_clip_config.json")
        return self.checkpoint.drawn(model).to(self.device, self.dtype).eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        visual: nn.Module = self.clip.get_submodule("visual")
        return visual

    @cached_property
    def tower(self) -> Tower:
        model: Any = self.model
        if model.pool_type != "tok" or model.final_ln_after_pool or model.proj is None:
            raise TapError(
                f'tapping "{self.checkpoint.path}": its image vector is not the projected class token (pool_type '
                f'"{model.pool_type}"), and the method reads that token. Choose a ViT of OpenAI or LAION '
                f"(backbone@extractor.backbone=clip_vit_b_16_laion2b)."
            )
        blocks = []
        for number, block in enumerate(model.transformer.resblocks):
            if not isinstance(block.attn, nn.MultiheadAttention):
                raise TapError(
                    f"tapping {type(model).__name__}: transformer.resblocks.{number}.attn is a {type(block.attn).__name__}; "
                    f"wanted torch's MultiheadAttention. Tested with open_clip 3.3."
                )
            at = f"transformer.resblocks.{number}"
            blocks.append(
                TowerBlock(
                    at, f"{at}.ln_1", f"{at}.attn", None,
                    (f"{at}.ln_2", f"{at}.mlp.c_fc", f"{at}.mlp.gelu", f"{at}.mlp.c_proj"), block.ln_1,
                    Weights(block.attn.in_proj_weight, block.attn.in_proj_bias),
                    Weights(block.attn.out_proj.weight, block.attn.out_proj.bias), block.ln_2,
                    Weights(block.mlp.c_fc.weight, block.mlp.c_fc.bias), block.mlp.gelu,
                    Weights(block.mlp.c_proj.weight, block.mlp.c_proj.bias), scaled=not isinstance(block.ls_1, nn.Identity),
                )
            )  # fmt: skip
        return Tower(
            model, tuple(blocks), model.transformer.resblocks[0].attn.num_heads, tuple(model.grid_size), 1,
            Weights(model.conv1.weight), model.class_embedding, model.positional_embedding, model.ln_pre, model.ln_post,
            (Weights(model.proj.T),),
        )  # fmt: skip

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self.clip.get_parameter("logit_scale").exp()

    def project(self, tokens: Float[Tensor, "B *L d"]) -> Float[Tensor, "B *L k"]:
        """Apply the final norm and projection to residual-stream tokens, as to the class token; k wide, not of unit length."""
        model: Any = self.model
        return model.ln_post(tokens) @ model.proj

    # ------------------------------------------------------------ text

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers from the checkpoint's files; None stands for open_clip's own byte pairs."""
        if self._tokenizer == "bpe":
            return None
        from transformers import AutoTokenizer

        try:
            folder = checkpoint_file(self.checkpoint, "tokenizer.json").parent
            checkpoint_file(self.checkpoint, "tokenizer_config.json")
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (ConfigError, OSError, ValueError) as error:
            raise ConfigError(
                f'extractor.backbone.tokenizer is "files", but the text tower of "{self.checkpoint.path}" has no '
                f"tokenizer that can be read: {str(error).splitlines()[0]}\n  Put tokenizer.json and tokenizer_config.json "
                f"beside the weights, or, for a model of OpenAI or LAION, set extractor.backbone.tokenizer=bpe."
            ) from error

    def token_ids(self, texts: Sequence[str]) -> Int[Tensor, "n N"]:
        """Return token ids of n texts, padded to the context length N. Raises DataError for a longer text or unknown word."""
        length = int(self.config["model_cfg"]["text_cfg"].get("context_length", 77))
        if self.tokenizer is None:
            from open_clip import SimpleTokenizer

            pairs = SimpleTokenizer(context_length=length)
            for text in texts:
                if (count := len(pairs.encode(text)) + 2) > length:  # start and end mark
                    raise too_long(text, count, length, "the context_length of its open_clip_config.json")
            return pairs(list(texts)).to(self.device)
        check_length(self.tokenizer, texts, length, "the context_length of its open_clip_config.json")
        return padded_ids(self.tokenizer, texts, length).to(self.device)

    def encode_tokens(self, ids: Int[Tensor, "n N"]) -> Float[Tensor, "n k"]:
        """Encode n texts, given as token ids, as vectors of width k, not of unit length."""
        model: Any = self.clip
        with torch.no_grad():
            return torch.cat([model.encode_text(part) for part in ids.split(TEXTS_AT_ONCE)])
