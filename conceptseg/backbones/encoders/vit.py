"""Vision transformers of timm: supervised, DINO, DINOv2 with and without registers, iBOT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.base import LOADING_ERRORS
from conceptseg.backbones.encoders.image_encoder import (
    Explained,
    ImageEncoder,
    checkpoint_json,
    checkpoint_weights,
    load_strictly,
)
from conceptseg.backbones.encoders.tower import Tower, TowerBlock, Weights, resized_positions
from conceptseg.backbones.encoders.transformers_vit import in_transformers_layout, timm_config, timm_weights
from conceptseg.backbones.planned_weights import check_plan
from conceptseg.errors import ConfigError, DataError, TapError, did_you_mean
from conceptseg.types import folded


class ViTBackbone(ImageEncoder):
    """A stock timm VisionTransformer: config.json and a file of weights, in timm's hub layout or in that of transformers' ViT.

    architecture: for a bare weights file (DINO's and iBOT's own), which has no config.json: a name that timm knows.
    file: the weights; .pth is read without running code.
    The model is built at `image_size`; position rows are resized before loading, so nothing is resized while it runs.
    """

    family = "vit"
    classifies = True

    def __init__(
        self, path: str, trained_on: str, architecture: str | None = None, file: str = "model.safetensors", **settings: Any
    ) -> None:
        super().__init__(path, trained_on, **settings)
        self.architecture, self.file = architecture, file

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "architecture": self.architecture, "file": self.file}

    @cached_property
    def config(self) -> dict[str, Any]:
        """timm's config.json, or what timm itself says of a bare file's architecture; read without loading weights."""
        if self.architecture is None:
            config = checkpoint_json(self.checkpoint, "config.json")
            if not in_transformers_layout(config):
                return config
            return timm_config(config, self._preprocessing, self.checkpoint.path)
        import timm

        known = timm.get_pretrained_cfg(self.architecture)
        if known is None:
            raise ConfigError(
                f'extractor.backbone.architecture "{self.architecture}": timm has no such model. '
                f"{did_you_mean(self.architecture, timm.list_models('vit_*', pretrained=True))}"
            )
        return {"architecture": self.architecture, "num_classes": 0, "pretrained_cfg": known.to_dict()}

    @property
    def _preprocessing(self) -> dict[str, Any]:
        """preprocessor_config.json of a checkpoint of transformers; empty where it lacks one."""
        try:
            return checkpoint_json(self.checkpoint, "preprocessor_config.json")
        except (ConfigError, OSError):
            return {}

    @property
    def native_size(self) -> tuple[int, int]:
        _, height, width = self.config["pretrained_cfg"]["input_size"]
        return int(height), int(width)

    @property
    def native_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.config["pretrained_cfg"]["mean"], self.config["pretrained_cfg"]["std"]

    @property
    def native_labels(self) -> Sequence[str] | None:
        return self.config["pretrained_cfg"].get("label_names") or self.config.get("label_names")

    @cached_property
    def model(self) -> nn.Module:
        import timm
        from timm.models.vision_transformer import VisionTransformer

        config = self.config
        # timm writes the number of classes there too, and the image's size is set here.
        set_here = ("img_size", "dynamic_img_size", "num_classes")
        arguments = {k: v for k, v in config.get("model_args", {}).items() if k not in set_here}
        state = checkpoint_weights(self.checkpoint, self.file)
        norm: dict[str, Any] = {}
        if "norm_eps" in config:
            state, norm = timm_weights(state), {"norm_layer": partial(nn.LayerNorm, eps=config["norm_eps"])}

        def build() -> nn.Module:
            return timm.create_model(
                config["architecture"], pretrained=False, num_classes=config["num_classes"], img_size=self.image_size,
                **arguments, **norm,
            )  # fmt: skip

        try:
            sizes = {"num_classes": config["num_classes"], **arguments}
            where = f'extractor.backbone.path "{self.checkpoint.path}": config.json'
            check_plan(where, sizes, [weight.shape for weight in state.values()], build)
            model = build()
        except LOADING_ERRORS as error:
            raise ConfigError(
                f'extractor.backbone.path "{self.checkpoint.path}": timm can\'t build "{config["architecture"]}" with '
                f"{arguments} at {self.image_size}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        if not isinstance(model, VisionTransformer):
            raise TapError(
                f'tapping "{config["architecture"]}": wanted a timm VisionTransformer, got a {type(model).__name__}, which has '
                f"no class token to read. Choose a plain ViT (backbone@extractor.backbone=vit_base_patch16_224)."
            )
        rows, columns = model.patch_embed.patch_size
        self.check_tiling(rows, columns)
        if "pos_embed" in state:
            # Without a position of its own (no_embed_class), a prefix token has no row to be kept.
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            count = state["pos_embed"].shape[1] - prefix
            old = (self.native_size[0] // rows, self.native_size[1] // columns)
            if old[0] * old[1] != count:
                old = (round(count**0.5),) * 2
            state["pos_embed"] = resized_positions(
                state["pos_embed"][0].float(), prefix, old, model.patch_embed.grid_size, self.position_resize
            )[None]
        if not config["num_classes"]:
            state = {k: v for k, v in state.items() if k in model.state_dict() or not k.startswith(("head.", "fc_norm."))}
        load_strictly(model, state, self.checkpoint, "config.json")
        return self.checkpoint.drawn(model).to(self.device, self.dtype).eval().requires_grad_(False)

    @cached_property
    def tower(self) -> Tower:
        model: Any = self.model
        if model.cls_token is None:
            raise TapError(
                f'tapping "{self.checkpoint.path}": this ViT has no class token, and the method reads that token\'s row. '
                f"Choose a backbone with one (backbone@extractor.backbone=vit_base_patch16_224 or lab_vit)."
            )
        blocks = []
        for number, block in enumerate(model.blocks):
            at = f"blocks.{number}"
            for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2"):
                _has(block, name, at, type(model).__name__)
            for name in ("q_norm", "k_norm", "norm"):
                if not isinstance(getattr(block.attn, name, nn.Identity()), nn.Identity):
                    raise TapError(
                        f"tapping {type(model).__name__}: {at}.attn.{name} normalises inside the attention, which "
                        f"the methods here don't read. Choose a plain ViT (backbone@extractor.backbone=vit_base_patch16_224)."
                    )
            blocks.append(
                TowerBlock(
                    at, f"{at}.norm1", f"{at}.attn", f"{at}.attn.qkv",
                    (f"{at}.norm2", f"{at}.mlp.fc1", f"{at}.mlp.act", f"{at}.mlp.fc2"), block.norm1,
                    _weights(block.attn.qkv), _weights(block.attn.proj), block.norm2,
                    _weights(block.mlp.fc1), block.mlp.act, _weights(block.mlp.fc2),
                    scaled=not isinstance(block.ls1, nn.Identity),
                )
            )  # fmt: skip
        return Tower(
            model, tuple(blocks), model.blocks[0].attn.num_heads, tuple(model.patch_embed.grid_size), model.num_prefix_tokens,
            _weights(model.patch_embed.proj), model.cls_token[0, 0], model.pos_embed[0], model.norm_pre, model.norm, (),
        )  # fmt: skip

    # ------------------------------------------------------------ outputs

    def _classifier(self) -> Weights:
        model: Any = self.model
        if isinstance(model.head, nn.Identity) or model.global_pool != "token":
            raise ConfigError(
                f'extractor.backbone "{self.checkpoint.path}" has no classifier on its class token, and this method explains a '
                f"class score. Choose one that has (backbone@extractor.backbone=vit_base_patch16_224 or lab_vit)."
            )
        return _weights(model.head)

    def predicted(self, output: Float[Tensor, "B k"]) -> Explained:
        index = output.argmax(1)
        return Explained(self._classifier().weight[index], index)

    def named(self, names: Sequence[str]) -> Explained:
        places: dict[str, int] = {}
        for place, label in enumerate(self.labels):
            places.setdefault(folded(label), place)
        for name in names:
            if folded(name) not in places:
                raise DataError(
                    f'the word "{name}" is none of the {len(self.labels)} classes of "{self.checkpoint.path}", so it has no '
                    f"score to explain. {did_you_mean(name, self.labels)} Or set extractor.explained_class=predicted."
                )
        index = torch.tensor([places[folded(name)] for name in names], device=self.device)
        return Explained(self._classifier().weight[index], index)

    def score(self, output: Float[Tensor, "B k"], explained: Explained) -> Float[Tensor, " B"]:
        assert explained.index is not None, "a classifier's outputs are chosen by index"
        return output.gather(1, explained.index[:, None])[:, 0]

    def class_logits(self, output: Float[Tensor, "B k"], words: Sequence[str] = ()) -> Float[Tensor, "B K"]:
        self._classifier()
        return output

    def class_of(self, word: str, words: Sequence[str]) -> int:
        index = self.named([word]).index
        assert index is not None, "a classifier's outputs are chosen by index"
        return int(index)


def _weights(module: Any) -> Weights:
    return Weights(module.weight, module.bias)


def _has(block: nn.Module, path: str, at: str, host: str) -> None:
    found: Any = block
    for name in path.split("."):
        if not hasattr(found, name):
            raise TapError(
                f'tapping {host}: wanted "{at}.{path}", but there is no "{name}". '
                f"{did_you_mean(name, [n for n, _ in found.named_children()])} Tested with timm 1.0.31; is this another block?"
            )
        found = getattr(found, name)
