"""A stock transformer cut down to what reading a real image needs: some blocks, and their modulation as constants.

With zeros for the pooled vector every modulation of FLUX.1 depends on the noise level alone, so the matrices that make it (a
third of the double blocks) are read from disk once a level, multiplied out, and let go. Single-stream blocks and the output are
never reached and never read. Nothing of the arithmetic that is left changes.
The result equals the whole model's to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from conceptseg.announcing import announced
from conceptseg.backbones.base import Checkpoint
from conceptseg.backbones.transformers.quantized_weights import is_rounded, stored_bytes, to_eight_bits
from conceptseg.errors import ConfigError

Conditions = tuple[float, float, int]
"""Inputs of a modulation: noise level, embedded guidance, and (for bit equality) the number of rows multiplied together."""


class FoldedModulation(nn.Module):
    """Stands where a modulation's matrix stood and gives what it would give under the conditions that are set."""

    def __init__(self) -> None:
        super().__init__()
        self.constants: dict[Conditions, Float[Tensor, "R D"]] = {}
        self.conditions: Conditions = (0.0, 0.0, 0)

    def forward(self, activated: Float[Tensor, "R d"]) -> Float[Tensor, "R D"]:
        """Return the modulation for the current conditions; the input is not read."""
        return self.constants[self.conditions]


class WeightFiles:
    """The safetensors files of one part of a checkpoint, opened tensor by tensor; of a hub repository only those needed."""

    def __init__(self, checkpoint: Checkpoint, part: str) -> None:
        self.checkpoint, self.part = checkpoint, part
        self._places: dict[str, str] | None = None

    def _file(self, name: str) -> Path:
        folder = self.checkpoint.folder()
        if folder is not None:
            return folder / self.part / name
        from huggingface_hub import hf_hub_download

        source = self.checkpoint.source()
        return Path(hf_hub_download(source["pretrained_model_name_or_path"], f"{self.part}/{name}", revision=source["revision"]))

    @property
    def places(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if self._places is None:
            from huggingface_hub.errors import EntryNotFoundError

            stem = "diffusion_pytorch_model.safetensors"
            with self.checkpoint.loading(self.part):
                try:
                    index = self._file(f"{stem}.index.json").read_text(encoding="utf-8")
                    self._places = dict(json.loads(index)["weight_map"])
                except (FileNotFoundError, EntryNotFoundError):  # one file, no index
                    with safe_open(self._file(stem), "pt") as opened:
                        self._places = dict.fromkeys(opened.keys(), stem)
        return self._places

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor [...]) of each, one in memory at a time, file by file. Raises ConfigError for an unknown name."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.places:
                raise ConfigError(f'extractor.backbone.path "{self.checkpoint.path}": its {self.part} has no weight "{name}".')
            by_file.setdefault(self.places[name], []).append(name)
        for file, wanted in by_file.items():
            with self.checkpoint.loading(self.part):
                path = self._file(file)
            for name in wanted:  # opened for each: while a file is mapped, the pages of all that was read of it stay in memory
                with self.checkpoint.loading(self.part), safe_open(path, "pt") as opened:
                    tensor = opened.get_tensor(name)
                yield name, tensor
                del tensor


def cut_flux(config: dict[str, Any], last_layer: int) -> nn.Module:
    """A FluxTransformer2DModel on the meta device with the blocks up to `last_layer` and no weight that nothing reads.

    The last block keeps its attention (with its projections, which the space output_projected reads) and loses its MLPs.
    """
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config({**config, "num_layers": last_layer + 1, "num_single_layers": 0})
    for block in model.transformer_blocks:
        block.norm1.linear, block.norm1_context.linear = FoldedModulation(), FoldedModulation()
    last = model.transformer_blocks[last_layer]
    last.ff, last.ff_context = nn.Identity(), nn.Identity()
    model.norm_out, model.proj_out = nn.Identity(), nn.Identity()
    return model


def planned_bytes(
    config: dict[str, Any], last_layer: int, dtype: torch.dtype, levels: int = 1, rows: int = 1, weights: str = "full"
) -> int:
    """Bytes of weights and constants kept for reading images up to `last_layer`, so many rows at so many levels."""
    model = nn.Module.to(cut_flux(config, last_layer), dtype)
    if weights == "int8":
        to_eight_bits(model)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    constants = 12 * width * (last_layer + 1) * levels * rows
    return dtype.itemsize * constants + sum(stored_bytes(weight) for weight in model.parameters())


class EncodeOnlyFlux:
    """Gives the cut model for a last layer and a level, reading what it lacks.

    dtype: of the weights; compute_dtype: of arithmetic. computing: makes a model of those weights compute in that dtype.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        weights: str = "full",
        compute_dtype: torch.dtype | None = None,
        computing: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        self.files = WeightFiles(checkpoint, "transformer")
        self.config, self.dtype, self.device, self.weights = config, dtype, device, weights
        self.compute_dtype, self.computing = compute_dtype or dtype, computing
        self.model: nn.Module | None = None

    def at(self, last_layer: int, conditions: Conditions, conditioning: Callable[[nn.Module], Float[Tensor, "R d"]]) -> nn.Module:
        """Return a model for layers up to `last_layer` under these conditions. conditioning: computes SiLU's input, [R d]."""
        if self.model is None or len(self.model.transformer_blocks) <= last_layer:  # type: ignore[arg-type]
            self.model = self._read(last_layer)
        folded = {name: m for name, m in self.model.named_modules() if isinstance(m, FoldedModulation)}
        if any(conditions not in m.constants for m in folded.values()):
            with self._announced(f"modulations of the transformer at noise level {conditions[0]:g}"):
                self._fold(folded, conditions, torch.nn.functional.silu(conditioning(self.model)))
        for module in folded.values():
            module.conditions = conditions
        return self.model

    def _read(self, last_layer: int) -> nn.Module:
        with self._announced(f"blocks 0 to {last_layer} of the transformer"):
            return self.computing(self._filled(cut_flux(self.config, last_layer)).eval())

    def _filled(self, model: nn.Module) -> nn.Module:
        for name, tensor in self.files.tensors([n for n, _ in model.named_parameters()]):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, leaf, nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False))
            if self.weights == "int8" and leaf == "weight" and is_rounded(module, path):
                to_eight_bits(module, path, self.compute_dtype)
        return model

    def _announced(self, what: str) -> AbstractContextManager[None]:
        checkpoint = self.files.checkpoint
        return announced(f"reading {what} of {checkpoint.path}", checkpoint.path.startswith("lab:"))

    def _fold(self, folded: dict[str, FoldedModulation], conditions: Conditions, activated: Float[Tensor, "R d"]) -> None:
        weights: dict[str, Tensor] = {}
        for name, tensor in self.files.tensors([f"{path}.{leaf}" for path in folded for leaf in ("weight", "bias")]):
            weights[name] = tensor.to(self.device, self.dtype).to(self.compute_dtype)
            path = name.rpartition(".")[0]
            if {f"{path}.weight", f"{path}.bias"} <= weights.keys():
                matrix, bias = weights.pop(f"{path}.weight"), weights.pop(f"{path}.bias")
                folded[path].constants[conditions] = torch.nn.functional.linear(activated, matrix, bias)
