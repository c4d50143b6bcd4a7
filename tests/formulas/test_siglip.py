"""SigLIP: the stock model's numbers, and each reading of its pooling head against a literal version, on a tiny SiglipModel."""

import json
import math
from functools import partial

import pytest
import sentencepiece
import torch
from tiny_encoders import batch, one_by_one, tiny_siglip, tiny_vit, write_siglip
from torch.nn.functional import cosine_similarity, interpolate, linear
from transformers import SiglipImageProcessorPil, SiglipModel, SiglipProcessor, SiglipTokenizer

from conceptseg.backbones.encoders.siglip import SigLIPBackbone
from conceptseg.backbones.encoders.tower import tap_block, tap_normed
from conceptseg.backbones.in_memory import backbone_from
from conceptseg.backbones.sheets import backbone_of
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError, TapError
from conceptseg.extractors import sheets
from conceptseg.extractors.clearclip import ClearCLIP
from conceptseg.extractors.image_model import ImageModelMethod
from conceptseg.extractors.input_gradients import IntegratedGradients
from conceptseg.extractors.legrad import LeGrad
from conceptseg.extractors.lposs import LPOSS
from conceptseg.extractors.maskclip import MaskCLIP
from conceptseg.extractors.naclip import NACLIP
from conceptseg.extractors.osp import OSP, residual
from conceptseg.extractors.pearl import PEARL
from conceptseg.extractors.proxyclip import ProxyCLIP
from conceptseg.extractors.resclip import ResCLIP
from conceptseg.extractors.sclip import SCLIP

READ = {
    "clearclip", "integrated_gradients", "integrated_gradients_clip", "legrad", "lposs", "maskclip", "naclip", "osp", "pearl",
    "proxyclip", "resclip", "sclip", "smoothgrad", "smoothgrad_clip",
}  # fmt: skip
"""Sheets of methods that need no class token."""


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return tiny_siglip(tmp_path_factory.mktemp("siglip"), dtype="float64")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return tiny_vit(tmp_path_factory.mktemp("dino") / "images", dtype="float64", classes=0, labels=(), img_size=32)


# ---------------------------------------------------------------- the stock model


def test_hidden_states_attention_and_logits_are_those_of_the_stock_model(tmp_path):
    stock, ours, shown = write_siglip(tmp_path), SigLIPBackbone(str(tmp_path), templates=["{}"]), batch(2)
    eager = SiglipModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    images, seen, normed = ours.images(shown.tasks), {}, {}
    with TapSet(ours.model) as taps:
        for layer in range(3):
            tap_block(taps, ours.tower, layer, partial(seen.__setitem__, layer))
            tap_normed(taps, ours.tower, layer, partial(normed.__setitem__, layer))
        vectors = ours.run(images, taps)
    texts = ["Apple", "kite"]
    ids = ours.token_ids(texts)
    with torch.no_grad():
        found = stock(input_ids=ids, pixel_values=images)
        inside = eager.vision_model(images, output_hidden_states=True, output_attentions=True)
    for layer in range(3):
        torch.testing.assert_close(seen[layer], inside.hidden_states[layer + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.tower.attention(layer, normed[layer]), inside.attentions[layer], atol=1e-5, rtol=1e-5)
    cosines = torch.nn.functional.normalize(vectors, dim=-1) @ ours.text_vectors(texts).T
    torch.testing.assert_close(ours.logit_scale * cosines + stock.logit_bias, found.logits_per_image, atol=1e-5, rtol=1e-5)
    explained = ours.named(["kite", "apple"])
    torch.testing.assert_close(ours.score(vectors, explained), cosines[[0, 1], [1, 0]])
    _, pooled = ours.pool(eager.vision_model.post_layernorm(inside.hidden_states[3]))
    torch.testing.assert_close(pooled, vectors, atol=1e-5, rtol=1e-5)


def test_a_larger_image_gets_interpolated_position_rows(tmp_path):
    stock, ours, shown = write_siglip(tmp_path), SigLIPBackbone(str(tmp_path), image_size=48), batch(1, side=48)
    images = ours.images(shown.tasks)
    assert ours.tower.grid == (6, 6) and ours.siglip.vision_model.embeddings.num_positions == 36
    wanted = interpolate(
        stock.vision_model.embeddings.position_embedding.weight.T.view(1, 24, 3, 3).double(),
        size=(6, 6), mode="bicubic", antialias=True,
    )[0].flatten(1).T  # fmt: skip
    torch.testing.assert_close(ours.tower.positions.double(), wanted, atol=1e-6, rtol=1e-6)
    for model in (stock, ours.siglip):  # so that the two rules of interpolation agree
        model.vision_model.embeddings.position_embedding.weight.data.zero_()
    found = stock.vision_model(images, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(ours.run(images), found, atol=1e-5, rtol=1e-5)
    for side in (28, [24, 48]):
        with pytest.raises(ConfigError, match=r"extractor\.backbone\.image_size is"):
            SigLIPBackbone(str(tmp_path), image_size=side).siglip  # noqa: B018 - reading it is what is tested


def test_texts_are_prepared_as_transformers_processor_does(tmp_path):
    """Lower case, no punctuation, 64 tokens of padding, no mask: by the slow tokenizer of sentencepiece itself."""
    write_siglip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").unlink()
    words = tmp_path / "words.txt"
    words.write_text("a photo of a red kite\nthis is an apple on grass\nblue sky over the hills\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(tmp_path / "spiece"), vocab_size=60, model_type="unigram", hard_vocab_limit=False,
        pad_id=-1, bos_id=-1, eos_id=1, unk_id=2, user_defined_symbols=["x"], minloglevel=3, num_threads=1,
    )  # fmt: skip
    tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"), model_input_names=["input_ids"], model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    texts = ["A photo of a Red KITE.", "this is an apple, on grass!"]
    found = SigLIPBackbone(str(tmp_path)).token_ids(texts)
    processor = SiglipProcessor(SiglipImageProcessorPil(), tokenizer)
    wanted = processor(text=texts, padding="max_length", max_length=64, return_tensors="pt")
    assert set(wanted) == {"input_ids"} and found.shape == (2, 64)
    assert torch.equal(found, wanted.input_ids)
    assert torch.equal(found[0], SigLIPBackbone(str(tmp_path)).token_ids(["a photo of a red kite"])[0])


# ---------------------------------------------------------------- its pooling head, head by head and row by row


def pooling(siglip, shown):
    """The pooling head, the patches after the final norm, [9 d], and (q, k, v) of each of its heads, [9 k] each."""
    x = siglip.model(siglip.images(shown.tasks)).last_hidden_state[0]
    head = siglip.model.head
    parts = linear(x, head.attention.in_proj_weight, head.attention.in_proj_bias).chunk(3, -1)
    return head, x, [tuple(part[:, 8 * h : 8 * h + 8] for part in parts) for h in range(3)]


def share(row):
    weights = torch.tensor([math.exp(v) for v in row.tolist()], dtype=torch.float64)
    return weights / weights.sum()


def attended(scores, values):
    return torch.stack([share(row) @ values for row in scores])


def cosines(siglip, vectors, shape=(3, 3)):
    return cosine_similarity(vectors, siglip.text_vectors(["apple"]), dim=-1).view(shape)


def with_mlp(head, x):
    return x + head.mlp(head.layernorm(x))


def near(sigma):
    at = [(i // 3, i % 3) for i in range(9)]
    return torch.tensor(
        [[math.exp(-((a - c) ** 2 + (b - d) ** 2) / (2 * sigma**2)) for c, d in at] for a, b in at], dtype=torch.float64
    )


def test_maskclip_is_the_pooling_head_shown_one_patch_at_a_time(siglip):
    shown = batch(1)
    head, x, heads = pooling(siglip, shown)
    alone = torch.cat([head(patch[None, None]) for patch in x])  # a softmax over a single patch is 1
    torch.testing.assert_close(MaskCLIP(siglip).saliency(shown)[0, 0], cosines(siglip, alone))
    values = torch.cat([v for _, _, v in heads], -1)
    torch.testing.assert_close(with_mlp(head, head.attention.out_proj(values)), alone)


def test_sclip_clearclip_naclip_and_pearl_let_patches_attend_in_the_pooling_head(siglip):
    shown = batch(1)
    head, _, heads = pooling(siglip, shown)
    gathered = {name: [] for name in ("sclip", "clearclip", "naclip", "pearl")}
    for q, k, v in heads:
        qq, kk = q @ q.T / 8**0.5, k @ k.T / 8**0.5
        gathered["sclip"].append(attended(qq, v) + attended(kk, v))
        gathered["clearclip"].append(attended(qq, v))
        gathered["naclip"].append(attended(kk + near(5.0), v))
        qc, kc = q - q.mean(0), k - k.mean(0)
        left, _, right = torch.linalg.svd(kc.T @ qc)
        gathered["pearl"].append(attended((q @ (k @ left @ right).T + 0.08 * kc @ kc.T) / 8**0.5, v))
    out = {name: head.attention.out_proj(torch.cat(parts, -1)) for name, parts in gathered.items()}
    out["sclip"] = with_mlp(head, out["sclip"])
    methods = {"sclip": SCLIP(siglip), "clearclip": ClearCLIP(siglip), "naclip": NACLIP(siglip), "pearl": PEARL(siglip, steps=60)}
    for name, method in methods.items():
        torch.testing.assert_close(method.saliency(shown)[0, 0], cosines(siglip, out[name]), msg=lambda m, n=name: f"{n}: {m}")


def test_resclip_and_proxyclip_mix_the_values_of_the_pooling_head(siglip, dino):
    shown = batch(1)
    head, _, heads = pooling(siglip, shown)
    eager = [layer.self_attn for layer in siglip.model.encoder.layers]
    states = siglip.model(siglip.images(shown.tasks), output_hidden_states=True).hidden_states
    middle = []
    for layer in (1, 2):
        x = siglip.model.encoder.layers[layer].layer_norm1(states[layer][0])
        q, k = eager[layer].q_proj(x), eager[layer].k_proj(x)
        middle.append([torch.softmax(q[:, h : h + 8] @ k[:, h : h + 8].T / 8**0.5, -1) for h in (0, 8, 16)])
    mixed = [
        2.0 * (0.7 * torch.softmax(k @ k.T / 8**0.5 + near(2.0), -1) + 0.3 * (middle[0][h] + middle[1][h]) / 2) @ v
        for h, (_, k, v) in enumerate(heads)
    ]
    found = ResCLIP(siglip, (1, 2), (2.0, 0.3), None, sigma=2.0).saliency(shown)[0, 0]
    torch.testing.assert_close(found, cosines(siglip, head.attention.out_proj(torch.cat(mixed, -1))))
    values = torch.cat([v for _, _, v in heads], -1).T.view(1, -1, 3, 3)
    values = interpolate(values, size=(4, 4), mode="bilinear")[0].flatten(1).T
    patches = dino.model.forward_features(dino.images(shown.tasks))[0, 1:]
    cosine = cosine_similarity(patches[:, None], patches[None], dim=-1)
    score = 3 * (cosine - 1.2 * cosine.mean())
    weights = torch.where(score < 0, 0, score.exp())
    vectors = head.attention.out_proj((weights / weights.sum(-1, keepdim=True)) @ values)
    torch.testing.assert_close(ProxyCLIP(siglip, dino).saliency(shown)[0, 0], cosines(siglip, vectors, (4, 4)))


def pooled_gradients(siglip, shown, text):
    """LeGrad's map with the pooling head written out, attention by attention: [3 3]."""
    states = siglip.model(siglip.images(shown.tasks), output_hidden_states=True).hidden_states
    head, total = siglip.model.head, torch.zeros(9, dtype=torch.float64)
    for x in (states[2][0], states[3][0]):
        w, b = head.attention.in_proj_weight, head.attention.in_proj_bias
        q, (_, k, v) = linear(head.probe[0], w, b).chunk(3, -1)[0], linear(x, w, b).chunk(3, -1)
        parts = [slice(8 * h, 8 * h + 8) for h in range(3)]
        matrices = [torch.softmax(q[:, p] @ k[:, p].T / 8**0.5, -1).detach().requires_grad_() for p in parts]
        out = head.attention.out_proj(torch.cat([m @ v[:, p] for m, p in zip(matrices, parts, strict=True)], -1))
        score = cosine_similarity(with_mlp(head, out)[0], text, dim=0)
        total += torch.stack(torch.autograd.grad(score, matrices)).clamp(min=0).mean((0, 1))
    return total.view(3, 3)


def test_legrad_and_osp_give_each_block_to_the_pooling_head(siglip):
    shown = batch(1)
    word, *others = siglip.text_vectors(["apple", "grass", "sky"])
    found = LeGrad(siglip, layers=2).saliency(shown)
    torch.testing.assert_close(found[0, 0], pooled_gradients(siglip, shown, word))
    assert float(found[0, 0].std()) > 0 and not found[0, 1:].any()
    left = residual(word, torch.stack(others), 8)
    torch.testing.assert_close(OSP(siglip, most_alike=1.0).saliency(shown)[0, 0], pooled_gradients(siglip, shown, left))
    with pytest.raises(ConfigError, match="this model has 3 blocks"):
        LeGrad(siglip, layers=4).saliency(shown)


def test_integrated_gradients_sum_to_the_difference_of_two_scores(siglip):
    shown = batch(1)
    images, explained = siglip.images(shown.tasks), siglip.named(["apple"])
    method = IntegratedGradients(siglip, 40, "signed", "given")
    total = method.saliency(shown)[0, 0].sum()
    scores = [siglip.score(siglip.run(x), explained) for x in (images, siglip.black(images))]
    torch.testing.assert_close(total, (scores[0] - scores[1])[0], atol=1e-3, rtol=1e-2)


def test_a_batch_is_its_images_one_by_one(siglip, dino):
    methods = [MaskCLIP(siglip), SCLIP(siglip), NACLIP(siglip), LeGrad(siglip), LPOSS(siglip, dino, neighbours=5)]
    shown = batch(3)
    for method in methods:
        torch.testing.assert_close(method.saliency(shown), one_by_one(method, shown), msg=type(method).__name__)


# ---------------------------------------------------------------- what is refused, and how a model is found


def test_methods_that_read_a_class_token_are_refused_by_name(siglip, dino):
    refused, accepted = set(), set()
    for name in sheets.names():
        sheet = sheets.extractor_sheet(name)
        if not issubclass(sheet.kind, ImageModelMethod):
            continue
        settings = {key: value for key, value in sheet.settings.items() if key not in sheet.models}
        models = {key: {"backbone": siglip, "judge": siglip}.get(key, dino) for key in sheet.models}
        try:
            sheet.kind(**settings, **models)
            accepted.add(name)
        except ConfigError as error:
            assert "has no class token" in str(error) and sheet.kind.__name__ in str(error) and "maskclip" in str(error), name
            refused.add(name)
    assert accepted == READ
    assert {"textspan", "transinterp_clip", "raw_attention", "rollout", "gem", "grad_eclip", "clip_as_rnn"} <= refused


def test_naflex_and_towers_without_a_head_are_refused_by_name(tmp_path):
    write_siglip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    headless = {**config, "vision_config": {**config["vision_config"], "vision_use_head": False}}
    for about, said in (({**config, "model_type": "siglip2"}, "NaFlex"), (headless, "vision_use_head is false")):
        (tmp_path / "config.json").write_text(json.dumps(about))
        with pytest.raises(TapError, match=said):
            SigLIPBackbone(str(tmp_path)).native_size  # noqa: B018 - reading it is what is tested


def test_a_folder_and_a_model_in_memory_are_known_as_siglip(tmp_path):
    stock, shown = write_siglip(tmp_path), batch(1)
    read = backbone_of(str(tmp_path), templates=["a {}"])
    processor = SiglipProcessor(SiglipImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3), read.tokenizer)
    held = backbone_from((stock, processor))
    assert isinstance(read, SigLIPBackbone) and held.siglip is stock and held.image_size == (24, 24)
    torch.testing.assert_close(read.run(read.images(shown.tasks)), held.run(held.images(shown.tasks)))
