"""Every family's concept stream against a slow restatement by stock blocks alone.

What the method does to concepts is what a block does to text when the text is the concepts: they attend to themselves and to the
image, with the text's weights, modulation and position; and the image's own stream is that of the plain run. So the oracle runs
the stock model once, keeps every block's inputs, and feeds each block again with the concepts in the text's place: what
attention gave their rows is the concepts' output, and what the block made of them goes on to the next block.
It shares no line with the taps; attention outputs are read off torch's attention function.
"""

from functools import cached_property

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from conceptseg.backbones import sheets
from conceptseg.backbones.transformers.chroma import ChromaBackbone
from conceptseg.backbones.transformers.cogvideox import CogVideoXBackbone
from conceptseg.backbones.transformers.concept_stream import SPACES, ConceptStream, ConceptTokens
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.flux2 import Flux2Backbone, Flux2KleinBackbone
from conceptseg.backbones.transformers.flux_relatives import LongCatImageBackbone, OvisImageBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.backbones.transformers.qwen_image import QwenImageBackbone
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.backbones.transformers.z_image import ZImageBackbone
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import View

ROWS, WORDS, TEXT, WIDTH, LEVEL = 2, 3, 6, 12, 0.5
# float32 on both sides; the oracle's attention sums the same keys in another order, through three blocks.
CLOSE = {"atol": 3e-5, "rtol": 1e-4}


def flux(double=3, single=1):
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=10, axes_dims_rope=(2, 4, 2),
    )  # fmt: skip
    return FluxBackbone("lab:none", single_blocks=double < 3), model, (4, 8, 6)


def sd3(qk_norm="rms_norm", dual=()):
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8, qk_norm=qk_norm,
        dual_attention_layers=dual,
    )  # fmt: skip
    return SD3Backbone("lab:none"), model, (4, 8, 6)


def chroma():
    model = ChromaTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 4, 2), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return ChromaBackbone("lab:none"), model, (4, 8, 6)


def unpooled(kind, backbone):
    model = kind(
        in_channels=16, num_layers=3, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 4, 2),
    )  # fmt: skip
    return backbone("lab:none", text_tokens=TEXT), model, (4, 8, 6)


def flux2(klein=False):
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=32, guidance_embeds=not klein,
    )  # fmt: skip
    backbone = Flux2KleinBackbone("lab:none", concept_position=4) if klein else Flux2Backbone("lab:none", concept_token=4)
    return backbone, model, (16, 4, 3)


def cogvideox(rotary=True):
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH,
        num_layers=3, sample_width=6, sample_height=8, sample_frames=5, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary, temporal_compression_ratio=4,
    )  # fmt: skip
    return CogVideoXBackbone("lab:none"), model, (2, 4, 8, 6)


def qwen_image():
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 4, 2),
    )  # fmt: skip
    return QwenImageBackbone("lab:none"), model, (4, 8, 6)


def z_image():
    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )  # fmt: skip
    return ZImageBackbone("lab:none"), model, (4, 8, 16)  # 32 tokens: nothing is appended


FAMILIES = {
    "flux": flux, "flux single": lambda: flux(1, 2), "sd3": sd3, "sd3 without norms": lambda: sd3(None),
    "sd3.5 medium": lambda: sd3(dual=(0, 1)), "flux2": flux2, "flux2 klein": lambda: flux2(True), "chroma": chroma,
    "longcat image": lambda: unpooled(LongCatImageTransformer2DModel, LongCatImageBackbone),
    "ovis image": lambda: unpooled(OvisImageTransformer2DModel, OvisImageBackbone),
    "cogvideox 5b": cogvideox, "cogvideox 2b": lambda: cogvideox(False), "qwen image": qwen_image, "z image": z_image,
}  # fmt: skip


class Case:
    """A family's tiny stock model with random weights, inputs, and what the taps find."""

    def __init__(self, build):
        torch.manual_seed(0)
        self.backbone, model, shape = build()
        for name, weight in model.named_parameters():
            spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3
            torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0, spread)
        self.backbone.transformer, self.backbone.config = model.eval(), dict(model.config)
        self.noisy = torch.randn(ROWS, *shape)
        pooled = torch.randn(ROWS, 10) if "sd3" in self.backbone.kind else None
        seen = torch.arange(TEXT) < torch.tensor([[4], [TEXT]]) if self.backbone.kind == "chroma" else None
        self.prompts = Prompts(torch.randn(ROWS, TEXT, WIDTH), pooled, seen)
        self.concepts = torch.randn(ROWS, WORDS, WIDTH)

    @cached_property
    def plain(self):
        """The model's answer without concepts, and what torch's attention was given and gave, call by call."""
        calls, original = [], torch.nn.functional.scaled_dot_product_attention

        def noted(*args, **kwargs):
            calls.append(([*args, *(kwargs[name] for name in ("query", "key") if name in kwargs)][:2], original(*args, **kwargs)))
            return calls[-1][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
            return self.backbone.denoise(self.noisy, LEVEL, self.prompts, guidance=1.5), calls

    @cached_property
    def beside(self):
        """The model's answer with the concepts beside it, and what the taps find. Read by many tests, changed by none."""
        return self.run()

    def run(self, concepts=None, rows=None, noisy=None, prompts=None, **options):
        found = []
        concepts = self.concepts if concepts is None else concepts
        pooled = self.backbone.concept_pooled(len(concepts))
        extra = {} if rows is None else {"rows": rows}
        stream = ConceptStream(
            concepts, pooled, lambda layer, block: found.append(block), 2, **{"stop": False, **options}, **extra
        )
        noisy = self.noisy if noisy is None else noisy
        answer = self.backbone.denoise(noisy, LEVEL, prompts or self.prompts, stream, guidance=1.5)
        return answer, found

    def blocks(self):
        host = self.backbone.transformer
        blocks = host.layers if hasattr(host, "layers") else host.transformer_blocks
        return [*blocks, *host.single_transformer_blocks] if getattr(self.backbone, "single_blocks", False) else blocks


def test_every_registered_family_has_an_oracle():
    held = {type(build()[0]) for build in FAMILIES.values()}
    assert {f"{kind.__module__}.{kind.__qualname__}" for kind in held} == set(sheets.FAMILIES.values())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return Case(FAMILIES[request.param])


# ---------------------------------------------------------------- the oracle


def inputs_of_blocks(case):
    """Return the inputs of every stock block in a plain run, in order."""
    calls, handles = [], []
    for block in case.blocks():
        handles.append(block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((m, args, kwargs)), with_kwargs=True))
    case.backbone.denoise(case.noisy, LEVEL, case.prompts, guidance=1.5)
    for handle in handles:
        handle.remove()
    return calls


def embedded(case):
    """The concepts as the family's text embedding makes tokens of them."""
    host, kind, concepts = case.backbone.transformer, case.backbone.kind, case.concepts
    if kind == "cogvideox":
        return host.patch_embed.text_proj(concepts)
    if kind == "qwen_image":
        return host.txt_in(host.txt_norm(concepts))
    if kind == "ovis_image":
        concepts = host.context_embedder_norm(concepts)
    if kind == "z_image":
        refined = host.cap_embedder(concepts)
        for block in host.context_refiner:
            refined = block(refined, None, host.rope_embedder(torch.tensor([[1, 0, 0]] * WORDS)).expand(ROWS, -1, -1))
        return refined
    return host.context_embedder(concepts)


def with_concepts(case, args, kwargs, concepts):
    """A block's inputs with the concepts in the text's place, and at the text position that concepts have."""
    kind, kwargs = case.backbone.kind, dict(kwargs)
    if kind == "z_image":
        image = case.noisy.shape[-2] * case.noisy.shape[-1] // 4
        sequence, freqs = args[0][:, :image], args[2][:, :image]
        here = case.backbone.transformer.rope_embedder(torch.tensor([[1, 0, 0]] * WORDS)).expand(ROWS, -1, -1)
        return (torch.cat([sequence, concepts], 1), None, torch.cat([freqs, here], 1), *args[3:]), kwargs
    kwargs["encoder_hidden_states"] = concepts
    if kind in ("flux", "flux2", "flux2_klein", "chroma", "longcat_image", "ovis_image"):
        place = 4 if kind.startswith("flux2") else 0
        both = kwargs["image_rotary_emb"]
        kwargs["image_rotary_emb"] = tuple(torch.cat([part[place : place + 1]] * WORDS + [part[TEXT:]]) for part in both)
    if kind == "chroma":  # all are seen
        kwargs["attention_mask"] = kwargs["attention_mask"][:, TEXT - WORDS :].clone().fill_(1)
    if kind == "qwen_image":
        image, text = kwargs["image_rotary_emb"]
        kwargs["image_rotary_emb"] = (image, torch.cat([text[:1]] * WORDS))
    return args, kwargs


def by_stock_blocks(case, monkeypatch):
    """Per layer, the concepts' attention outputs [R C A·d] and those of the image beside them [R L A·d]."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with torch.inference_mode():
        calls, concepts, found = inputs_of_blocks(case), embedded(case), []
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        for block, args, kwargs in calls:
            seen.clear()
            args, kwargs = with_concepts(case, args, kwargs, concepts)
            answer = block(*args, **kwargs)
            outputs = seen[0].transpose(1, 2).flatten(2)  # attn2 of SD3.5 comes after
            if case.backbone.kind in ("sd3", "z_image"):  # image first
                found.append((outputs[:, -WORDS:], outputs[:, :-WORDS]))
            else:
                found.append((outputs[:, :WORDS], outputs[:, WORDS:]))
            if case.backbone.kind == "z_image":
                concepts = answer[:, -WORDS:]
            else:
                concepts = answer[1 if case.backbone.kind == "cogvideox" else 0]
        monkeypatch.undo()
    return found


# ---------------------------------------------------------------- tests


def test_concepts_are_what_stock_blocks_make_of_them_in_the_texts_place(case, monkeypatch):
    wanted = by_stock_blocks(case, monkeypatch)
    _, found = case.beside
    assert len(found) == len(wanted) == 3
    for block, (concepts, image) in zip(found, wanted, strict=True):
        torch.testing.assert_close(block.concept_outputs, concepts, **CLOSE)
        torch.testing.assert_close(block.image_outputs_beside_concepts(), image, **CLOSE)
    assert (found[0].concept_outputs - found[2].concept_outputs).abs().max() > 0.1


def test_image_outputs_are_those_of_the_plain_run(case):
    _, found = case.beside
    count = found[0].image_outputs.shape[1]
    joined = [output.transpose(1, 2).flatten(2) for _, output in case.plain[1]]
    image_first = case.backbone.kind in ("sd3", "z_image")
    plain = [o[:, :count] if image_first else o[:, -count:] for o in joined if o.shape[1] > count]
    for block in found:
        assert any(torch.equal(block.image_outputs, one) for one in plain)


def test_the_answer_is_the_plain_one_bit_for_bit_whatever_the_concepts(case):
    for answer, _ in (case.beside, case.run(torch.randn(ROWS, 5, WIDTH))):
        assert torch.equal(answer, case.plain[0])


def test_keys_and_queries_are_kept_as_they_were_before_rotation(case):
    """Rotating what is kept gives what attention used: the keys that the space cross_query_key reads."""
    for block in case.beside[1]:
        turned = block.rotated_image_keys
        assert turned.shape == block.image_keys.shape
        torch.testing.assert_close(turned.norm(dim=-1), block.image_keys.norm(dim=-1), atol=1e-4, rtol=1e-4)
        rotates = case.backbone.kind not in ("sd3",) and case.backbone.config.get("use_rotary_positional_embeddings", True)
        assert torch.equal(turned, block.image_keys) is not rotates


def test_the_prompts_queries_and_keys_are_those_of_attention(case):
    """Rotation leaves lengths alone, so lengths tell: of every text token in every head and block."""
    lengths = [part.norm(dim=-1).transpose(1, 2) for given, _ in case.plain[1] for part in given]
    for block in case.beside[1]:
        for kept in (block.text_queries, block.text_keys):
            wanted, count = kept.norm(dim=-1), kept.shape[1]
            rows = [
                x[:, -count:] if case.backbone.kind in ("sd3", "z_image") else x[:, :count] for x in lengths if x.shape[1] > count
            ]
            assert any(row.shape == wanted.shape and torch.allclose(row, wanted, **CLOSE) for row in rows)
        assert not torch.allclose(block.text_queries, block.text_keys)


def test_the_conditional_half_alone_can_be_accompanied(case):
    """As in classifier-free guidance: rows 2 and 3 of four, beside two others."""
    prompts = case.prompts.after(Prompts(torch.randn(ROWS, TEXT, WIDTH), case.prompts.pooled))
    noisy = torch.cat([torch.randn_like(case.noisy), case.noisy])
    _, half = case.run(rows=slice(ROWS, None), noisy=noisy, prompts=prompts, stop=True)
    for one, two in zip(half, case.beside[1], strict=True):
        torch.testing.assert_close(one.concept_outputs, two.concept_outputs, **CLOSE)
        torch.testing.assert_close(one.image_outputs, two.image_outputs, **CLOSE)
        torch.testing.assert_close(one.text_keys, two.text_keys, **CLOSE)


def test_switches_leave_out_image_or_concepts(case):
    other = torch.cat([case.concepts[:, :1], torch.randn(ROWS, WORDS - 1, WIDTH)], 1)
    image_only = [case.run(c, self_attention=False, stop=True)[1][2].concept_outputs[:, 0] for c in (case.concepts, other)]
    torch.testing.assert_close(*image_only, **CLOSE)
    moved = torch.randn_like(case.noisy)
    own_only = [case.run(cross_attention=False, noisy=x, stop=True)[1][2].concept_outputs for x in (case.noisy, moved)]
    torch.testing.assert_close(*own_only, **CLOSE)
    neither = case.run(self_attention=False, cross_attention=False, stop=True)[1][0]
    assert torch.equal(neither.concept_outputs, neither.concept_values.flatten(2))


def test_padding_among_concepts_joins_no_attention(case):
    padded = torch.cat([case.concepts, torch.randn(ROWS, 2, WIDTH)], 1)
    present = torch.tensor([[True] * WORDS + [False] * 2] * ROWS)
    for one, two in zip(case.run(padded, present=present, stop=True)[1], case.beside[1], strict=True):
        torch.testing.assert_close(one.concept_outputs[:, :WORDS], two.concept_outputs, **CLOSE)


def test_nothing_runs_after_the_last_layer_and_no_hook_stays(case):
    host, ran = case.backbone.transformer, []
    handles = [block.register_forward_pre_hook(lambda m, args, k=k: ran.append(k)) for k, block in enumerate(case.blocks())]
    stream = ConceptStream(case.concepts, case.backbone.concept_pooled(ROWS), lambda layer, block: None, 1)
    assert case.backbone.denoise(case.noisy, LEVEL, case.prompts, stream) is None
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


def test_the_extractor_reads_every_space_in_the_shape_of_the_grid(case):
    """Two noise draws side by side, all spaces, from one forward pass a level; video maps are frames x height x width."""
    backbone = case.backbone
    if backbone.kind == "cogvideox":
        from diffusers import CogVideoXDDIMScheduler

        backbone.scheduler = CogVideoXDDIMScheduler()
    views = [View(space, (0, 2), (0.3, 0.6), draws=2, blur=1.0) for space in backbone.spaces]
    before = backbone.forward_passes
    cells = ConceptAttention(backbone, guidance=1.0).read_cells(
        case.noisy, case.prompts, ConceptTokens(case.concepts), ["a", "b"], views
    )
    assert backbone.forward_passes == before + 2
    grid = backbone.grid(case.noisy)
    assert len(grid) == (3 if backbone.kind == "cogvideox" else 2)
    for view in views:
        maps = cells.read(view, grid)
        assert maps.shape == (ROWS, WORDS, *grid) and torch.isfinite(maps).all()
    missing = {"sd3": {"output_projected"}, "cogvideox": {"gramcol"}}.get(backbone.kind, set())
    assert set(backbone.spaces) == set(SPACES) - missing
