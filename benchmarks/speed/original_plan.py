"""The original's computing plan and ours on the same stock FluxTransformer2DModel: time of an image from pixels to maps.

The plan, restated from a description of the released code (arXiv:2502.04320): one image and one noise
draw at a time; in every draw a pass of the text encoder for the caption and one for each word; in every double block an
attention of concepts and image in which every query takes part and the image's rows are thrown away; keys, queries, values and
attention outputs of concepts, image and text copied to the host in every block; maps made there in the end. No early exit:
every block runs. (Reading real images, the release can leave out the single blocks; `--stop` times that plan.) What it also
does and this leaves out: the passes of CLIP whose result it discards, the matrix of all keys and queries, a third "null text"
stream, pictures at 300 dpi.

Ours: `ConceptAttention` as the benchmark runs it, all draws side by side. "new words" encodes every string of every image once,
as if no image shared a word with another; "known words" is the rule: ImageNet-Segmentation has 150 strings in 4,276 images.

    OMP_NUM_THREADS=1 python benchmarks/speed/original_plan.py --write             # cut down: real widths, few blocks
    python benchmarks/speed/original_plan.py --device cuda --geometry full         # FLUX.1-schnell at 1024 x 1024, bfloat16

Pairs alternate. On a processor with one thread the time is processor time, which other programs on the core do not lengthen.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from figures import record
from flux_geometry import GEOMETRIES, Geometry, random_backbone, random_task
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from conceptseg.backbones.base import sample_noise
from conceptseg.backbones.latents import image_ids, pack
from conceptseg.backbones.text_cache import TextCache
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Normalize, Softmax, View
from conceptseg.types import Batch, Task

LEVEL, DRAWS = 0.5, 5
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of two maps, which lie between 0 and 1. In bfloat16 a sum of 3,072 terms keeps two to three digits."""


class OriginalPlan:
    """Maps [C L] of one image by the original's plan."""

    def __init__(self, backbone: FluxBackbone, layers: tuple[int, ...], draws: int = DRAWS, stop: bool = False) -> None:
        self.backbone, self.layers, self.draws, self.stop = backbone, layers, draws, stop
        self.host_bytes = 0

    @torch.inference_mode()
    def maps(self, task: Task) -> Tensor:
        image = torch.from_numpy(task.image).permute(2, 0, 1)[None]
        latents = self.backbone.latents(image)
        kept: list[list[dict[str, Tensor]]] = []
        for draw in range(self.draws):
            caption = self.embedded(task.caption)
            words = torch.stack([self.embedded(word)[0, 0] for word in task.concepts.names])[None]
            noise = sample_noise(latents.shape[1:], 0, [task.key], draw).to(latents)
            noisy = (LEVEL * noise + (1 - LEVEL) * latents).to(self.backbone.dtype)
            kept.append(self.forward(noisy, caption, words))
        return self.folded(kept)

    def embedded(self, string: str) -> Tensor:
        """[1 N d]: one pass for one string, padding attended."""
        ids = self.backbone.tokenizer(
            [string], padding="max_length", truncation=True, max_length=self.backbone.text_tokens, return_tensors="pt"
        ).input_ids
        return self.backbone.text_encoder(input_ids=ids.to(self.backbone.device)).last_hidden_state

    def forward(self, noisy: Tensor, caption: Tensor, words: Tensor) -> list[dict[str, Tensor]]:
        """One draw through the whole model; vectors of every double block, on the host."""
        model, device = self.backbone.transformer, self.backbone.device
        x, p, c = model.x_embedder(pack(noisy)), model.context_embedder(caption), model.context_embedder(words)
        t = torch.tensor([LEVEL], device=device, dtype=self.backbone.dtype) * 1000
        pooled = self.backbone.zero_pooled(1)
        temb, concept_temb = model.time_text_embed(t, pooled), model.time_text_embed(t, pooled)
        h, w = (side // 2 for side in noisy.shape[-2:])
        zeros = torch.zeros(p.shape[1], 3, device=device)
        rotary = model.pos_embed(torch.cat([zeros, image_ids(h, w, device)]))
        concept_rotary = model.pos_embed(torch.cat([zeros[:1].expand(c.shape[1], 3), image_ids(h, w, device)]))
        kept = []
        for block in model.transformer_blocks:
            x, p, c, vectors = double_block(block, x, p, c, temb, concept_temb, rotary, concept_rotary)
            kept.append({name: self._to_host(tensor) for name, tensor in vectors.items()})
        if not self.stop:
            for block in model.single_transformer_blocks:
                p, x = block(hidden_states=x, encoder_hidden_states=p, temb=temb, image_rotary_emb=rotary)
            model.proj_out(model.norm_out(x, temb))
        return kept

    def _to_host(self, tensor: Tensor) -> Tensor:
        self.host_bytes += tensor.numel() * tensor.element_size()
        return tensor if tensor.device.type == "meta" else tensor.cpu()

    def folded(self, kept: list[list[dict[str, Tensor]]]) -> Tensor:
        """Linear normalisation over concepts, dot products, softmax over concepts, mean over layers and draws; in float32."""
        maps = []
        for draw in kept:
            for layer in self.layers:
                concepts, image = (draw[layer][name][0].float() for name in ("concept_outputs", "image_outputs"))
                raised = concepts - concepts.min(0).values
                total = raised.sum(0)
                shares = raised / torch.where(total == 0, 1.0, total)
                maps.append((shares @ image.T).softmax(0))
        return torch.stack(maps).mean(0)


def double_block(
    block: Any, x: Tensor, p: Tensor, c: Tensor, temb: Tensor, concept_temb: Tensor, rotary: Any, concept_rotary: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Image x, text p and concepts c through one double block."""
    a = block.attn
    x_in, *x_mod = block.norm1(x, emb=temb)
    p_in, *p_mod = block.norm1_context(p, emb=temb)
    c_in, *c_mod = block.norm1_context(c, emb=concept_temb)
    heads = (-1, a.head_dim)
    xq, xk, xv = (m(x_in).unflatten(-1, heads) for m in (a.to_q, a.to_k, a.to_v))
    xq, xk = a.norm_q(xq), a.norm_k(xk)
    text_weights = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
    (pq, pk, pv), (cq, ck, cv) = ([m(y).unflatten(-1, heads) for m in text_weights] for y in (p_in, c_in))
    pq, pk, cq, ck = a.norm_added_q(pq), a.norm_added_k(pk), a.norm_added_q(cq), a.norm_added_k(ck)

    joint = attention(torch.cat([pq, xq], 1), torch.cat([pk, xk], 1), torch.cat([pv, xv], 1), rotary)
    p_out, x_out = joint[:, : p.shape[1]], joint[:, p.shape[1] :]
    beside = attention(torch.cat([cq, xq], 1), torch.cat([ck, xk], 1), torch.cat([cv, xv], 1), concept_rotary)
    c_out = beside[:, : c.shape[1]]
    vectors = {
        "concept_outputs": c_out, "image_outputs": x_out, "concept_queries": cq, "concept_keys": ck, "concept_values": cv,
        "image_queries": xq, "image_keys": xk, "image_values": xv, "text_queries": pq, "text_keys": pk, "text_values": pv,
    }  # fmt: skip
    x = after_attention(x, a.to_out[0](x_out), x_mod, block.norm2, block.ff)
    p = after_attention(p, a.to_add_out(p_out), p_mod, block.norm2_context, block.ff_context)
    c = after_attention(c, a.to_add_out(c_out), c_mod, block.norm2_context, block.ff_context)
    return x, p, c, vectors


def attention(q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
    """[1 N A d] each -> [1 N A·d]."""
    q, k = (apply_rotary_emb(y, rotary, sequence_dim=1) for y in (q, k))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def after_attention(residual: Tensor, projected: Tensor, modulation: list[Tensor], norm: Any, mlp: Any) -> Tensor:
    gate, shift_mlp, scale_mlp, gate_mlp = (m[:, None] for m in modulation)
    residual = residual + gate * projected
    return residual + gate_mlp * mlp(norm(residual) * (1 + scale_mlp) + shift_mlp)


class OurPlan:
    """Maps [C L] of one image as the benchmark makes them."""

    def __init__(self, backbone: FluxBackbone, layers: tuple[int, ...], draws: int = DRAWS, new_words: bool = True) -> None:
        self.extractor, self.new_words = ConceptAttention(backbone), new_words
        self.view = View("output", layers, (LEVEL,), draws, Normalize.LINEAR, Softmax.PER_CELL)

    def maps(self, task: Task) -> Tensor:
        if self.new_words:
            self.extractor.backbone.texts = TextCache(None, dict)
        (found,) = self.extractor.stream(Batch((task,)), [self.view])
        return found.scores[0].flatten(1)


Plans = dict[str, OriginalPlan | OurPlan]


def plans(backbone: FluxBackbone, geometry: Geometry, draws: int = DRAWS, stop: bool = False) -> Plans:
    layers = geometry.layers_read
    return {
        "original": OriginalPlan(backbone, layers, draws, stop),
        "ours, new words": OurPlan(backbone, layers, draws, new_words=True),
        "ours, known words": OurPlan(backbone, layers, draws, new_words=False),
    }


def clock(device: str) -> Callable[[], float]:
    """Seconds that only this program's work lengthens, where there is such a clock."""
    if device == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def counted(geometry: Geometry, draws: int, stop: bool) -> dict[str, float]:
    """TFLOP an image of each plan, counted operator by operator on tensors without values."""
    found = {}
    for name, plan in plans(random_backbone(geometry, "meta"), geometry, draws, stop).items():
        if "known" in name:
            plan.maps(random_task(geometry, 0))  # so that its words are known
        found[name] = tflop(plan, geometry)
    return found


def tflop(plan: OriginalPlan | OurPlan, geometry: Geometry) -> float:
    """TFLOP an image, counted operator by operator."""
    with FlopCounterMode(display=False) as counter:
        plan.maps(random_task(geometry, 0))
    return float(counter.get_total_flops() / 1e12)


def compare(geometry: Geometry, device: str, dtype: str, pairs: int, draws: int, stop: bool) -> dict[str, Any]:
    """Seconds of every plan in alternating rounds, another image in each; raises where their maps differ."""
    compared, now = plans(random_backbone(geometry, device, dtype), geometry, draws, stop), clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    difference = 0.0
    for number in range(-1, pairs):  # the first round warms up
        task, made = random_task(geometry, number + 1), {}
        for name, plan in compared.items():
            started = now()
            made[name] = plan.maps(task).cpu()
            if number >= 0:
                seconds[name].append(now() - started)
        difference = max(difference, *(float((made["original"] - one).abs().max()) for one in made.values()))
        if number >= 0:
            print(f"pair {number + 1}: " + ", ".join(f"{name} {spent[-1]:.2f} s" for name, spent in seconds.items()), flush=True)
    if difference > TOLERANCE[dtype]:
        raise SystemExit(f"the plans' maps differ by {difference:.1e}; wanted at most {TOLERANCE[dtype]:.0e}")
    copied = compared["original"].host_bytes / (pairs + 1)  # type: ignore[union-attr]
    return {"seconds": seconds, "difference": difference, "host_megabytes": copied / 1e6}


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="cut")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="float32 on a processor, else bfloat16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--stop", action="store_true", help="the original leaves out the single blocks")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    said = parser.parse_args()
    geometry, dtype = GEOMETRIES[said.geometry], said.dtype or ("float32" if said.device == "cpu" else "bfloat16")
    print(
        f"{said.geometry} geometry on {said.device}, {dtype}: {geometry.double_blocks} double and "
        f"{geometry.single_blocks} single blocks, {geometry.tokens} image and {geometry.text_tokens} text tokens, "
        f"{said.draws} draws, 7 concepts" + (", single blocks left out of the original" if said.stop else "")
    )
    found = compare(geometry, said.device, dtype, said.pairs, said.draws, said.stop)
    unit = "processor seconds" if clock(said.device) is time.process_time else "seconds"
    original = found["seconds"]["original"]
    found["unit"], found["pairs"] = unit, said.pairs
    found["ratios"] = {
        name: spread([o / s for o, s in zip(original, spent, strict=True)]) for name, spent in found["seconds"].items()
    }
    found["seconds"] = {name: median(spent) for name, spent in found["seconds"].items()}
    print(f"maps differ by at most {found['difference']:.1e}; the original copies {found['host_megabytes']:.0f} MB to the host")
    for name, spent in found["seconds"].items():
        times = ", ".join(f"{k} {v:.2f}" for k, v in found["ratios"][name].items())
        print(f"{name:18} {spent:8.2f} {unit} an image; original / this: {times}")
    found["tflop"] = {}
    for which in dict.fromkeys([said.geometry, "full"]):
        found["tflop"][which] = flop = counted(GEOMETRIES[which], said.draws, said.stop)
        each = ", ".join(f"{name} {count:.3g} TFLOP ({flop['original'] / count:.2f})" for name, count in flop.items())
        print(f"counted, {which} geometry: {each}")
    if said.write:
        record(f"original_plan {said.geometry}" + (" stop" if said.stop else ""), found, said.device)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process alone: loaders and the lab warn of random weights
    main()
