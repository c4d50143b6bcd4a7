"""conceptseg-explain image=photo.jpg concepts=[dragon,rock]: maps of a photograph, or of an image made of a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError, did_you_mean, guarded, real_number, whole_number
from conceptseg.reading import check_aliases
from conceptseg.types import check_distinct, checked_word

SETTINGS: dict[str, str] = {
    "image": "an image file to explain, or",
    "prompt": "a sentence to make an image of",
    "concepts": "the words to look for: [dragon,rock]",
    "model": "a sheet of conf/backbone, a hub repository, a folder, or lab:<name> (lab_flux)",
    "out": "where pictures go: .png or .jpg (explained.png); the image of a prompt, alone, beside it; a video as .gif",
    "maps": "where the numbers go: .safetensors (nowhere)",
    "caption": 'what is said of the image ("a dragon and a rock")',
    "size": "[height,width] that the model is shown (the image's own proportions)",
    "device": "cpu, cuda, mps (cpu)",
    "seed": "of the noise (0)",
    "steps": "for a prompt: denoising steps (4)",
    "guidance": "for a prompt: guidance strength (0)",
    "space": "output, cross, value, ... (output)",
    "layers": '"14-17", "last 4", all (last half)',
    "timesteps": "for an image: noise levels in (0, 1] ([0.5])",
    "draws": "for an image: noise draws that are averaged (1)",
    "softmax": "per_cell, of_mean, tokens, none (per_cell, of one concept none)",
    "normalize": "none, linear, unit (none)",
    "blur": "sigma of a 3 x 3 Gaussian (0)",
}
VIEW = ("space", "layers", "timesteps", "draws", "softmax", "normalize", "blur")


TEXTS = ("image", "prompt", "model", "out", "maps", "caption", "device", "space", "layers", "softmax", "normalize")
"""Settings taken as they are written; others are read as YAML."""
FOR_PROMPTS, FOR_IMAGES = ("steps", "guidance"), ("caption", "timesteps", "draws")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Settings from "key=value" words. Raises ConfigError for a word that is no setting, or a value of another kind."""
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in SETTINGS:
            raise ConfigError(f'conceptseg-explain: can\'t read "{word}". {did_you_mean(key, SETTINGS)} Write key=value.')
        if key in given:
            raise ConfigError(f'conceptseg-explain: {key} is given twice, the second time as "{value}". Leave one out.')
        given[key] = value if key in TEXTS else _read(key, value)
        if value == "" and key != "caption":
            raise ConfigError(f"conceptseg-explain: {key} is empty; wanted {SETTINGS[key]}.")
    if ("image" in given) == ("prompt" in given):
        raise ConfigError("conceptseg-explain: wanted one of image=photo.jpg and prompt='a dragon on a rock'.")
    if not isinstance(given.get("concepts"), list):
        raise ConfigError("conceptseg-explain: wanted the words to look for, such as concepts=[dragon,rock].")
    unused, what = (FOR_IMAGES, "image=") if "prompt" in given else (FOR_PROMPTS, "prompt=")
    if useless := [key for key in unused if key in given]:
        raise ConfigError(f"conceptseg-explain: {useless[0]} changes nothing here, it goes with {what}. Leave it out.")
    given["concepts"] = [checked_word(word, f"concepts.{k}") for k, word in enumerate(given["concepts"])]
    check_distinct(given["concepts"], "concepts", ConfigError)
    return given


def _read(key: str, value: str) -> Any:
    """A value read as YAML and held against what its setting is. Raises ConfigError."""
    import yaml

    where = f"conceptseg-explain: {key}"
    check_aliases(value, where)
    try:
        found = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f'{where}: "{value}" can\'t be read: {str(error).splitlines()[0]}. Is a bracket or quote open?'
        ) from error
    if key in ("size", "timesteps"):
        if not isinstance(found, list) or (key == "size" and len(found) != 2):
            wanted = "[height,width], such as [512,768]" if key == "size" else "a list of noise levels, such as [0.5]"
            raise ConfigError(f"{where} is {value}; wanted {wanted}.")
        return [whole_number(where, one, 1) if key == "size" else real_number(where, one) for one in found]
    if key in ("seed", "steps", "draws"):
        return whole_number(where, found, 0 if key == "seed" else 1)
    return real_number(where, found, 0) if key in ("guidance", "blur") else found


def explain(given: dict[str, Any]) -> list[Path]:
    """Do what the settings say; the files that were written."""
    from conceptseg.extractors.concept_attention import ConceptAttention
    from conceptseg.extractors.explanation import NUMBERS, PICTURES, checked_place

    out = checked_place(given.get("out", "explained.png"), PICTURES, "conceptseg-explain: out")
    if "maps" in given:
        checked_place(given["maps"], (NUMBERS,), "conceptseg-explain: maps")
    method = ConceptAttention.from_pretrained(
        given.get("model", "lab_flux"), device=given.get("device", "cpu"), seed=given.get("seed", 0)
    )
    chosen = {key: given[key] for key in (*VIEW, "caption", "steps", "guidance") if key in given}
    size = tuple(given["size"]) if "size" in given else None
    about = Path(given["image"]) if "image" in given else given["prompt"]
    found = method.explain(about, given["concepts"], size=size, **chosen)
    written = [found.save(out)]
    if "prompt" in given:
        written.append(found.save_image(out.with_stem(f"{out.stem}_image")))
    if "maps" in given:
        written.append(found.save(given["maps"]))
    return written


@guarded
def main() -> None:
    """conceptseg-explain key=value ...: see --help."""
    words = sys.argv[1:]
    if not words or set(words) & {"-h", "--help"}:
        print(f"{__doc__}\n")
        print("\n".join(f"  {key + '=':12}{meaning}" for key, meaning in SETTINGS.items()))
        return
    for path in explain(parse(words)):
        print(path)


if __name__ == "__main__":
    main()
