"""conceptseg-explain image=photo.jpg concepts=[dragon,rock]: maps of a photograph, or of an image made of a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conceptseg.errors import ConceptSegError, ConfigError, did_you_mean

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
    "softmax": "per_cell, of_mean, tokens, none (per_cell)",
    "normalize": "none, linear, unit (none)",
    "blur": "sigma of a 3 x 3 Gaussian (0)",
}
VIEW = ("space", "layers", "timesteps", "draws", "softmax", "normalize", "blur")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Settings from "key=value" words, values read as YAML. Raises ConfigError for an unknown key or one that is needed."""
    import yaml

    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in SETTINGS:
            raise ConfigError(f'conceptseg-explain: can\'t read "{word}". {did_you_mean(key, SETTINGS)} Write key=value.')
        given[key] = (
            str(value) if key in ("image", "prompt", "caption", "model", "out", "maps", "layers") else yaml.safe_load(value)
        )
    if ("image" in given) == ("prompt" in given):
        raise ConfigError("conceptseg-explain: wanted one of image=photo.jpg and prompt='a dragon on a rock'.")
    if not isinstance(given.get("concepts"), list):
        raise ConfigError("conceptseg-explain: wanted the words to look for, such as concepts=[dragon,rock].")
    given["concepts"] = [str(word) for word in given["concepts"]]
    return given


def explain(given: dict[str, Any]) -> list[Path]:
    """Do what the settings say; the files that were written."""
    from conceptseg.extractors.concept_attention import ConceptAttention

    method = ConceptAttention.from_pretrained(
        given.get("model", "lab_flux"), device=given.get("device", "cpu"), seed=given.get("seed", 0)
    )
    chosen = {key: given[key] for key in (*VIEW, "caption", "steps", "guidance") if key in given}
    size = tuple(given["size"]) if "size" in given else None
    about = Path(given["image"]) if "image" in given else given["prompt"]
    found = method.explain(about, given["concepts"], size=size, **chosen)
    out = Path(given.get("out", "explained.png"))
    written = [found.save(out)]
    if "prompt" in given:
        written.append(found.save_image(out.with_stem(f"{out.stem}_image")))
    if "maps" in given:
        written.append(found.save(given["maps"]))
    return written


def main() -> None:
    """conceptseg-explain key=value ...: see --help."""
    words = sys.argv[1:]
    if not words or set(words) & {"-h", "--help"}:
        print(f"{__doc__}\n")
        print("\n".join(f"  {key + '=':12}{meaning}" for key, meaning in SETTINGS.items()))
        return
    try:
        for path in explain(parse(words)):
            print(path)
    except ConceptSegError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
