"""SigLIP and SigLIP 2 of one image size: transformers' SiglipModel, which pools patches by attention and has no class token.

Source: Zhai et al. 2023 (arXiv:2303.15343), Tschannen et al. 2025 (arXiv:2502.14786), and transformers 5,
models/siglip/modeling_siglip.py (SiglipMultiheadAttentionPoolingHead).
"""

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
from conceptseg.backbones.settings import check_length
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError, TapError

PROMPTS = ("this is a photo of {}.",)
"""The prompt of transformers' documentation of SigLIP, in lower case."""
SHEETS = "backbone@extractor.backbone=siglip_b_16_384 or siglip2_b_16_224"


class SigLIPBackbone(ImageTextEncoder):
    """A stock SiglipModel in transformers' hub layout: config.json, model.safetensors, preprocessor and tokenizer files.

    Checkpoints of SigLIP 2 of one image size are SiglipModels too. Texts are put into lower case and padded to the length that
    the text tower was trained on, 64, without a mask: the text vector is read at the last position. templates: see
    `ImageTextEncoder`. file: the weights.
    The model is built at `image_size`; position rows are resized before loading, so nothing is resized while it runs.
    """

    family = "siglip"
    has_class_token = False

    def __init__(
        self,
        path: str,
        trained_on: str = "images and captions",
        templates: str | Sequence[str] = PROMPTS,
        file: str = "model.safetensors",
        **settings: Any,
    ) -> None:
        super().__init__(path, trained_on, templates, **settings)
        self.file = file

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "file": self.file}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; read without loading weights. Raises TapError for a model that is no SiglipModel with a pooling head."""
        config = checkpoint_json(self.checkpoint, "config.json")
        kind = config.get("model_type")
        if kind == "siglip2":
            raise TapError(
                f'tapping "{self.checkpoint.path}": it is a Siglip2Model (NaFlex), which is shown patches of any aspect, padded; '
                f"wanted a checkpoint of one image size. Choose one ({SHEETS})."
            )
        if kind != "siglip" or "vision_config" not in config:
            raise TapError(
                f'tapping "{self.checkpoint.path}": its config.json says model_type "{kind}"; wanted "siglip" with a '
                f"vision_config. Choose a SiglipModel ({SHEETS})."
            )
        if not config["vision_config"].get("vision_use_head", True):
            raise TapError(
                f'tapping "{self.checkpoint.path}": vision_use_head is false, so it has no image vector to compare with texts. '
                f"Choose a whole SiglipModel ({SHEETS})."
            )
        return config

    @cached_property
    def _stock_config(self) -> Any:
        from transformers import SiglipConfig

        try:
            return SiglipConfig.from_dict(dict(self.config))
        except LOADING_ERRORS as error:
            raise ConfigError(
                f'extractor.backbone.path "{self.checkpoint.path}": transformers can\'t read its config.json: {error}'
            ) from error

    @cached_property
    def _preprocessing(self) -> dict[str, Any]:
        return checkpoint_json(self.checkpoint, "preprocessor_config.json")

    @property
    def native_size(self) -> tuple[int, int]:
        size = self._stock_config.vision_config.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def native_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        return self._preprocessing["image_mean"], self._preprocessing["image_std"]

    @property
    def native_labels(self) -> Sequence[str] | None:
        return None

    @cached_property
    def siglip(self) -> nn.Module:
        """Both towers."""
        from transformers import SiglipConfig, SiglipModel

        patch = int(self._stock_config.vision_config.patch_size)
        height, width = self.image_size
        if height != width:
            raise ConfigError(
                f"extractor.backbone.image_size is {[height, width]}; a SiglipModel has a square of patches. Set one number."
            )
        self.check_tiling(patch, patch)
        described = self._stock_config.to_dict()
        described["vision_config"]["image_size"] = height
        state = checkpoint_weights(self.checkpoint, self.file)
        state = {name: weight for name, weight in state.items() if not name.endswith(".position_ids")}  # of older files

        def build() -> nn.Module:
            return SiglipModel(SiglipConfig.from_dict(described))

        try:
            where = f'extractor.backbone.path "{self.checkpoint.path}": config.json'
            check_plan(where, self.config, [weight.shape for weight in state.values()], build)
            model = build()
        except LOADING_ERRORS as error:
            raise ConfigError(
                f'extractor.backbone.path "{self.checkpoint.path}": transformers can\'t build its SiglipModel: {error}'
            ) from error
        name = "vision_model.embeddings.position_embedding.weight"
        if name in state:
            old, new = ((side[0] // patch, side[1] // patch) for side in (self.native_size, self.image_size))
            state[name] = resized_positions(state[name].float(), 0, old, new, self.position_resize)
        load_strictly(model, state, self.checkpoint, "config.json")
        return self.checkpoint.drawn(model).to(self.device, self.dtype).eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        visual: nn.Module = self.siglip.get_submodule("vision_model")
        return visual

    def run(self, images: Float[Tensor, "B 3 H W"], taps: TapSet | None = None) -> Float[Tensor, "B ..."]:
        """Run one forward pass on normalised images and return the pooling head's output, [B k].

        Taps that stop the pass early lose the output; [B 0] comes back.
        """
        self.forward_passes += 1
        output = self.model(images) if taps is None else taps.run(lambda: self.model(images))
        return images.new_zeros(len(images), 0) if output is None else output.pooler_output

    @cached_property
    def tower(self) -> Tower:
        """Its blocks, of which the last is the pooling head; queries, keys and values of other blocks are copied together."""
        model: Any = self.model
        blocks = []
        for number, layer in enumerate(model.encoder.layers):
            at = f"encoder.layers.{number}"
            maps = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
            qkv = Weights(torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps]))
            blocks.append(
                TowerBlock(
                    at, f"{at}.layer_norm1", f"{at}.self_attn", None, _mlp_paths(at, "layer_norm2"), layer.layer_norm1, qkv,
                    _weights(layer.self_attn.out_proj), layer.layer_norm2, _weights(layer.mlp.fc1), layer.mlp.activation_fn,
                    _weights(layer.mlp.fc2), scaled=False,
                )
            )  # fmt: skip
        head = model.head
        blocks.append(
            TowerBlock(
                "head", "post_layernorm", "head.attention", None, _mlp_paths("head", "layernorm"), model.post_layernorm,
                Weights(head.attention.in_proj_weight, head.attention.in_proj_bias), _weights(head.attention.out_proj),
                head.layernorm, _weights(head.mlp.fc1), head.mlp.activation_fn, _weights(head.mlp.fc2), scaled=False, pools=True,
            )
        )  # fmt: skip
        embeddings = model.embeddings
        side = self.image_size[0] // int(self._stock_config.vision_config.patch_size)
        return Tower(
            model, tuple(blocks), head.attention.num_heads, (side, side), 0, _weights(embeddings.patch_embedding), None,
            embeddings.position_embedding.weight, nn.Identity(), model.post_layernorm, (),
        )  # fmt: skip

    def pool(self, tokens: Float[Tensor, "B L d"]) -> tuple[Float[Tensor, "B 1 d"], Float[Tensor, "B d"]]:
        """Give tokens to the pooling head: what its attention gathers, and the image vector, which is a function of it."""
        head: Any = self.model.get_submodule("head")
        attended, _ = head.attention(head.probe.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        return attended, (attended + head.mlp(head.layernorm(attended)))[:, 0]

    def project(self, tokens: Float[Tensor, "B *L d"]) -> Float[Tensor, "B *L k"]:
        """Return the tokens: the pooling head, the last block here, is in the space of the texts already."""
        return tokens

    # ------------------------------------------------------------ text

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self.siglip.get_parameter("logit_scale").exp().squeeze()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the checkpoint's files."""
        from transformers import AutoTokenizer

        checkpoint_file(self.checkpoint, "tokenizer_config.json")
        with self.checkpoint.loading("tokenizer"):
            return AutoTokenizer.from_pretrained(**self.checkpoint.source())

    def token_ids(self, texts: Sequence[str]) -> Int[Tensor, "n N"]:
        """Return token ids of n texts in lower case, padded to N. Raises DataError for a longer text or unknown word."""
        length = int(self._stock_config.text_config.max_position_embeddings)
        lowered = [text.lower() for text in texts]
        check_length(self.tokenizer, lowered, length, "max_position_embeddings of text_config in its config.json")
        return padded_ids(self.tokenizer, lowered, length).to(self.device)

    def encode_tokens(self, ids: Int[Tensor, "n N"]) -> Float[Tensor, "n k"]:
        """Encode n texts, given as token ids, as vectors of width k, not of unit length."""
        model: Any = self.siglip
        with torch.no_grad():
            return torch.cat([model.get_text_features(input_ids=part).pooler_output for part in ids.split(TEXTS_AT_ONCE)])


def _mlp_paths(at: str, norm: str) -> tuple[str, str, str, str]:
    return f"{at}.{norm}", f"{at}.mlp.fc1", f"{at}.mlp.activation_fn", f"{at}.mlp.fc2"


def _weights(module: Any) -> Weights:
    return Weights(module.weight, module.bias)
