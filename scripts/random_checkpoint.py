"""Write checkpoints of random weights in the layout of real repositories: names, shapes, dtypes, shards, configs, vocabularies.

Every tensor is a piece of one pool of normal numbers, scaled by its fan-in, that begins where a digest of its name says. So no
tensor has a generator of its own, a file is written about as fast as the disk takes it, and the same layout gives the same bytes.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import string
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

POOL = (1 << 24) + 43
"""Numbers in the pool; odd, so that rows of a matrix differ."""
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32"}
"""Dtypes as safetensors names them."""
LIKE_ONE = ("norm", "ln_", "layrnorm", "gamma", "lambda", "running_var", "ls1", "ls2")
"""Parts of the names of vectors that multiply: their numbers lie around 1, those of others around 0."""
SPREAD = 0.02
"""Standard deviation of vectors."""
LOGIT_SCALE = 2.6592
"""Logarithm of the temperature that contrastive models begin with."""
GREATEST_FILE = 50.0
"""GB of a file where a layout names no shard."""


# ------------------------------------------------------------ numbers


@lru_cache(1)
def pool() -> np.ndarray:
    """Standard normal numbers, float32 [POOL]."""
    return np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)


@lru_cache(6)
def _scaled(mean: float, spread: float, dtype: torch.dtype) -> memoryview:
    numbers = torch.from_numpy(pool()).mul(spread).add_(mean).to(dtype)
    return memoryview(numbers.view(torch.uint8).numpy())


def values(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a tensor of floating-point numbers, piece by piece."""
    if not shape:
        yield memoryview(torch.tensor([LOGIT_SCALE], dtype=dtype).view(torch.uint8).numpy())
        return
    matrix = len(shape) > 1 and math.prod(shape[1:]) > 1
    one = not matrix and not name.endswith("bias") and any(part in name.lower() for part in LIKE_ONE)
    spread = 2.0 ** round(math.log2(math.prod(shape[1:])) / -2) if matrix else SPREAD  # a power of two: few are held
    source = _scaled(float(one), spread, dtype)
    at, left = zlib.crc32(name.encode()) % POOL * dtype.itemsize, math.prod(shape) * dtype.itemsize
    while left:
        piece = source[at : at + left]
        yield piece
        at, left = 0, left - len(piece)


# ------------------------------------------------------------ files of weights


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor [...] of all that a model stores; of tied weights the first."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    kept = set(first.values())
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def write_weights(folder: Path, stem: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype, shard: float) -> None:
    """Write safetensors files: one, or shards of at most so many GB with their index.

    state: tensors [...] by name; floating-point ones are drawn, others (positions in windows, counters) are written as they are.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in state.items():
        size = tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize
        if shards[-1] and held + size > shard * 1e9:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    files = [
        f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{place:05}-of-{len(shards):05}.safetensors"
        for place in range(1, len(shards) + 1)
    ]
    total = sum(
        _write_file(folder / file, {n: state[n] for n in names}, dtype) for file, names in zip(files, shards, strict=True)
    )
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _write_file(path: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in state.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * kind.itemsize
        header[name] = {"dtype": NAMES[kind], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    with path.open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for name, tensor in state.items():
            _write_tensor(file, name, tensor, dtype)
    return at


def _write_tensor(file: BinaryIO, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.is_floating_point():
        for piece in values(name, tuple(tensor.shape), dtype):
            file.write(piece)
    else:
        file.write(tensor.contiguous().numpy().tobytes())


def drawn(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers as tensors [...] by name, float32, for files of torch.save."""
    found = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            held = bytearray(b"".join(values(name, tuple(tensor.shape), torch.float32)))
            tensor = torch.frombuffer(held, dtype=torch.float32).view(tensor.shape)
        found[name] = tensor
    return found


def write_json(path: Path, held: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


# ------------------------------------------------------------ models


def write_model(folder: Path, about: Mapping[str, Any], dtype: str) -> None:
    """Write config.json and weights of one part, a stock class of diffusers or transformers."""
    package, _, name = about["model"].rpartition(".")
    kind = getattr(importlib.import_module(package), name)
    with torch.device("meta"):
        model = build(kind, about["config"])
    if any(not t.is_floating_point() for t in model.state_dict().values()):
        model = build(kind, about["config"])  # whole numbers are no weights, and have to be right
    folder.mkdir(parents=True, exist_ok=True)
    of_diffusers = package == "diffusers"
    if of_diffusers:
        config = {"_class_name": name, "_diffusers_version": "0.36.0", **_plain(dict(model.config))}
    else:
        config = {**model.config.to_dict(), "architectures": [name], "torch_dtype": dtype}
    write_json(folder / "config.json", config)
    state = {about.get("prefix", "") + key: tensor for key, tensor in state_of(model).items()}
    stem = "diffusion_pytorch_model" if of_diffusers else "model"
    write_weights(folder, stem, state, getattr(torch, dtype), about.get("shard", GREATEST_FILE))


def build(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A model by its class and the settings of its config.json."""
    if hasattr(kind, "load_config"):
        return kind.from_config(dict(config))
    return kind(kind.config_class.from_dict(dict(config)))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def write_timm(folder: Path, about: Mapping[str, Any]) -> None:
    """Write timm's hub layout, or a bare file of weights as DINO's and iBOT's authors publish."""
    import timm
    from timm.models._hub import save_config_for_hf

    model = timm.create_model(about["timm"], pretrained=False, **about.get("settings", {}))
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if "file" in about:
        numbers: Any = drawn(state)
        torch.save({about["wrapped"]: numbers} if "wrapped" in about else numbers, folder / about["file"])
        return
    save_config_for_hf(model, str(folder / "config.json"))
    write_weights(folder, "model", state, torch.float32, GREATEST_FILE)


def write_open_clip(folder: Path, about: Mapping[str, Any]) -> None:
    """Write open_clip's hub layout."""
    import open_clip
    from open_clip.model import CLIP

    config = about["config"] if "config" in about else open_clip.get_model_config(about["open_clip"])
    with torch.device("meta"):
        model = CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": about["preprocess"]})
    write_weights(folder, "open_clip_model", state_of(model), torch.float32, GREATEST_FILE)


# ------------------------------------------------------------ vocabularies


@lru_cache(1)
def clip_merges() -> tuple[str, ...]:
    """CLIP's byte pairs, which come with open_clip, in order."""
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        return tuple(file.read().split("\n")[1 : 49152 - 256 - 2 + 1])


def byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, in the order of CLIP's vocabulary.

    Source: Radford et al. 2019, openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    from open_clip.tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def words(count: int) -> list[str]:
    """Lower-case words, at most so many, the most frequent first: whole words of CLIP's vocabulary."""
    joined = ("".join(pair.split()) for pair in clip_merges())
    found = (one.removesuffix("</w>") for one in joined if one.endswith("</w>"))
    return [*dict.fromkeys(word for word in found if word.isascii() and word.isalpha())][:count]


def write_tokenizer(folder: Path, about: Mapping[str, Any]) -> None:
    """Write a tokenizer of the real class and vocabulary size."""
    folder.mkdir(parents=True, exist_ok=True)
    {"clip": _write_clip_tokens, "t5": _write_t5_tokens, "qwen": _write_qwen_tokens, "bert": _write_bert_tokens}[
        about["tokenizer"]
    ](folder, about)


def _write_clip_tokens(folder: Path, about: Mapping[str, Any]) -> None:
    """CLIP's own vocabulary."""
    letters, merges = byte_letters(), clip_merges()
    joined = ["".join(pair.split()) for pair in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: place for place, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    marks = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": about["pad"],
    }
    write_json(folder / "special_tokens_map.json", marks)
    about_it = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **marks}
    write_json(folder / "tokenizer_config.json", about_it)


def t5_pieces(count: int) -> list[tuple[str, float]]:
    """(piece, score) of a vocabulary of so many: marks, words, letters, and pieces of no text that pad it."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [*string.ascii_letters, *string.digits, *".,;:!?'\"-()/&%"]
    whole = [f"▁{word}" for word in words(count - len(marks) - len(letters) - 1)]
    texts = ["▁", *whole, *letters]
    texts += [f"▁<padding_{place}>" for place in range(count - len(marks) - len(texts))]
    return [*marks, *((text, -1.0 - place / 1000 - (20.0 if len(text) == 1 else 0.0)) for place, text in enumerate(texts))]


def _write_t5_tokens(folder: Path, about: Mapping[str, Any]) -> None:
    """As T5-XXL's: unigrams and 100 sentinels; `files: spiece` leaves the conversion of SentencePiece's file to the library."""
    pieces = t5_pieces(about["pieces"])
    sentinels = [f"<extra_id_{place}>" for place in range(100)]
    _write_spiece(folder / "spiece.model", pieces)
    if about.get("files") != "spiece":
        from transformers import T5Tokenizer

        ends = [(text, 0.0) for text in reversed(sentinels)]
        T5Tokenizer(vocab=[*pieces, *ends], extra_ids=100, model_max_length=512).save_pretrained(folder)
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", {**marks, "additional_special_tokens": sentinels})
    about_it = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100, **marks}
    write_json(folder / "tokenizer_config.json", {**about_it, "additional_special_tokens": sentinels})


def _write_spiece(path: Path, pieces: list[tuple[str, float]]) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    for text, score in pieces:
        model.pieces.add(piece=text, score=score, type=kinds.get(text, 1))
    model.trainer_spec.model_type = 1
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 2, -1
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 1, 0
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    path.write_bytes(model.SerializeToString())


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's chat template for messages without tools."""


def _write_qwen_tokens(folder: Path, about: Mapping[str, Any]) -> None:
    """As Qwen3's: byte pairs of words with a blank before them, 26 marks, padded with pairs of no text."""
    letters = sorted(byte_letters())
    merges: dict[tuple[str, str], None] = {}
    tokens = dict.fromkeys(letters)
    for word in words(20_000):
        for text in (word, f"Ġ{word}"):
            for end in range(1, len(text)):
                merges.setdefault((text[:end], text[end]))
                tokens.setdefault(text[: end + 1])
    tokens |= dict.fromkeys(f"<|padding_{place}|>" for place in range(about["pieces"] - len(tokens)))
    write_json(folder / "vocab.json", {token: place for place, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|mark_{place}|>" for place in range(23))]
    added = {
        str(about["pieces"] + place): {
            "content": mark, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
        }
        for place, mark in enumerate(marks)
    }  # fmt: skip
    about_it = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "bos_token": None, "add_prefix_space": False, "added_tokens_decoder": added, "chat_template": CHAT,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", about_it)


def _write_bert_tokens(folder: Path, about: Mapping[str, Any]) -> None:
    """As BERT's: whole words and single letters."""
    marks = ["[PAD]", *(f"[unused{place}]" for place in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.punctuation, *string.digits, *string.ascii_lowercase]
    tokens = [*marks, *letters, *(f"##{letter}" for letter in string.ascii_lowercase + string.digits)]
    tokens += [word for word in words(about["pieces"]) if len(word) > 1][: about["pieces"] - len(tokens)]
    tokens += [f"[padding{place}]" for place in range(about["pieces"] - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    )


# ------------------------------------------------------------ whole repositories


def write_repository(folder: Path, layout: Mapping[str, Any]) -> None:
    """Write a repository in a layout of rehearsal.yaml, with a card that says that its weights are random."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "card.json", {"provenance": "random"})
    try:
        _write_parts(folder, layout)
    finally:  # what is rehearsed next wants the memory
        pool.cache_clear()
        _scaled.cache_clear()


def _write_parts(folder: Path, layout: Mapping[str, Any]) -> None:
    if "timm" in layout:
        write_timm(folder, layout)
    elif "open_clip" in layout:
        write_open_clip(folder, layout)
    elif "pipeline" in layout:
        _write_pipeline(folder, layout)
    else:
        write_model(folder, layout, layout.get("dtype", "float32"))
        if "tokenizer" in layout:
            write_tokenizer(folder, layout["tokenizer"])


def _write_pipeline(folder: Path, layout: Mapping[str, Any]) -> None:
    index: dict[str, Any] = {"_class_name": layout["pipeline"], "_diffusers_version": "0.36.0"}
    for name, about in layout.items():
        if name in ("pipeline", "dtype"):
            continue
        if "tokenizer" in about:
            write_tokenizer(folder / name, about)
            held = json.loads((folder / name / "tokenizer_config.json").read_text(encoding="utf-8"))
            index[name] = ["transformers", held["tokenizer_class"]]
        elif "scheduler" in about:
            write_json(folder / name / "scheduler_config.json", {"_class_name": about["scheduler"], **about["config"]})
            index[name] = ["diffusers", about["scheduler"]]
        else:
            write_model(folder / name, about, about.get("dtype", layout.get("dtype", "float32")))
            package, _, kind = about["model"].rpartition(".")
            index[name] = [package, about.get("named", kind)]
    write_json(folder / "model_index.json", dict(sorted(index.items())))
