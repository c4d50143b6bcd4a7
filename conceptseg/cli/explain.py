"""conceptseg-explain image=photo.jpg concepts=[dragon,rock] extractor=naclip: where a method finds words in an image.

Alone it explains a drawn scene with three methods of the lab, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError, did_you_mean, guarded, real_number, whole_number
from conceptseg.logs import quiet_libraries
from conceptseg.reading import check_aliases
from conceptseg.types import check_distinct, checked_word

SETTINGS: dict[str, str] = {
    "image": "an image file or URL to explain, or",
    "prompt": "a sentence to make an image of; without both, a drawn scene",
    "concepts": "the words to look for: [dragon,rock]; class names for methods that explain a class",
    "background": "words that compete with those and are not shown: [sky,grass]",
    "extractor": "a sheet of conf/extractor, or several side by side: [naclip,gem] (concept_attention)",
    "model": "a sheet of conf/backbone, a hub repository, a folder, or lab:<name> (the extractor's own)",
    "out": "where pictures go: .png or .jpg (explained.png); the image of a prompt, alone, beside it; a video as .gif",
    "maps": "where the numbers go: .safetensors (nowhere)",
    "caption": 'what is said of the image ("a dragon and a rock")',
    "size": "[height,width] that the model is shown (the image's own proportions)",
    "ground": "the colour under transparent pixels: white (refused)",
    "device": "cpu, cuda, mps (cpu)",
    "download": "yes: fetch weights that are not on this machine (no)",
    "seed": "of the noise (0)",
    "steps": "for a prompt: denoising steps (4)",
    "guidance": "for a prompt: guidance strength (0)",
    "space": "what is scored, such as output, cross, value, words (as in the extractor's rows; so are those below)",
    "layers": '"14-17", "last 4", all',
    "timesteps": "for an image: noise levels in (0, 1]: [0.5]",
    "draws": "for an image: noise draws that are averaged",
    "softmax": "per_cell, of_mean, tokens, none (of one concept none)",
    "normalize": "none, linear, unit (none)",
    "blur": "sigma of a 3 x 3 Gaussian (0)",
}
OF_METHOD = """Any other key is a setting of the method, as in its sheet of conf/extractor: extractor=naclip sigma=3. Where the
name is taken above, write extractor.layers=6; settings of the model are extractor.backbone.dtype=bfloat16.
conceptseg --cfg job -p extractor extractor=naclip prints the settings of a method."""
VIEW = ("space", "layers", "timesteps", "draws", "softmax", "normalize", "blur")


FIRST = {
    "ConceptAttention": ("concept_attention", "lab_flux"),
    "DAAM": ("daam", "lab_sdxl"),
    "TextSpan": ("textspan", "lab_clip"),
}
"""Title -> method and model of the picture that is drawn without any setting."""
TEXTS = ("image", "prompt", "model", "out", "maps", "caption", "ground", "device", "space", "layers", "softmax", "normalize")
"""Settings taken as they are written; others are read as YAML."""
FOR_PROMPTS, FOR_IMAGES = ("steps", "guidance"), ("caption", "ground", "timesteps", "draws")
PASSED_ON = ("background", "caption", "ground", "size", "seed", "steps", "guidance")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Settings from "key=value" words. Raises ConfigError for a word that is no setting, or a value of another kind."""
    given: dict[str, Any] = {}
    of_method: dict[str, tuple[str, Any]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = "concepts" if key == "words" else key
        if not equals:
            near = f"Write image={word}." if Path(word).suffix else f"{did_you_mean(key, SETTINGS)} Write key=value."
            raise ConfigError(f'conceptseg-explain: can\'t read "{word}". {near}')
        if key in ("backbone", "extractor.backbone", "backbone@extractor.backbone", "extractor.backbone.path"):
            raise ConfigError(f"conceptseg-explain: {key} is not a setting here. Write model={value}.")
        if key not in SETTINGS:
            key = key.removeprefix("extractor.")
            if key in of_method:
                raise ConfigError(f'conceptseg-explain: {key} is given twice, the second time as "{value}". Leave one out.')
            of_method[key] = word, _yaml(f"conceptseg-explain: {key}", value)
            continue
        if key in given:
            raise ConfigError(f'conceptseg-explain: {key} is given twice, the second time as "{value}". Leave one out.')
        given[key] = value if key in TEXTS else _read(key, value)
        if value == "" and key != "caption":
            raise ConfigError(f"conceptseg-explain: {key} is empty; wanted {SETTINGS[key]}.")
    if "image" in given and "prompt" in given:
        raise ConfigError("conceptseg-explain: wanted one of image=photo.jpg and prompt='a dragon on a rock'.")
    if "image" not in given and "prompt" not in given:
        if others := sorted(given.keys() - {"out", "device", "download", "seed", "extractor", "model", "maps"}):
            raise ConfigError(
                f"conceptseg-explain: {others[0]} is given, and neither image=photo.jpg nor prompt='a dragon on a rock'. Name "
                f"one of them; without both, words of a drawn scene are explained."
            )
    elif "concepts" not in given and "extractor" in given:
        given["concepts"] = []  # some methods need no words
    elif "concepts" not in given:
        raise ConfigError("conceptseg-explain: wanted the words to look for, such as concepts=[dragon,rock].")
    if not isinstance(given.get("concepts", []), list):
        raise ConfigError("conceptseg-explain: wanted the words to look for, such as concepts=[dragon,rock].")
    unused, what = (FOR_IMAGES, "image=") if "prompt" in given else (FOR_PROMPTS, "prompt=")
    if useless := [key for key in unused if key in given]:
        raise ConfigError(f"conceptseg-explain: {useless[0]} changes nothing here, it goes with {what}. Leave it out.")
    if given.get("concepts") == [] and "extractor" not in given:
        raise ConfigError("conceptseg-explain: wanted a list of concepts, such as concepts=[dragon,rock].")
    for key in ("concepts", "background"):
        if not isinstance(given.get(key, []), list):
            raise ConfigError(f"conceptseg-explain: {key} is {given[key]}; wanted a list of words, such as [sky,grass].")
        words_of = [checked_word(word, f"{key}.{k}") for k, word in enumerate(given.get(key, []))]
        check_distinct(words_of, key, ConfigError)
        if key in given:
            given[key] = words_of
    chosen = given.get("extractor", [])
    given["extractor"] = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(given["extractor"], list) or not all(isinstance(name, str) for name in given["extractor"]):
        raise ConfigError(f"conceptseg-explain: extractor is {chosen}; wanted a name, or several: [concept_attention,naclip].")
    if "maps" in given and len(given["extractor"]) > 1:
        raise ConfigError("conceptseg-explain: maps holds the numbers of one method. Name one extractor, or leave maps out.")
    given["of_method"] = _checked_of_method(of_method, given["extractor"])
    return given


def _checked_of_method(settings: dict[str, tuple[str, Any]], extractors: Sequence[str]) -> dict[str, Any]:
    """Settings of the method, and of its model without their "backbone.". Raises ConfigError for one that it does not take.

    settings: name -> the word that was typed, and the value.
    """
    from conceptseg.extractors.sheets import extractor_sheet
    from conceptseg.targets import settings_of

    if not settings:
        return {}
    for name in extractors or ["concept_attention"]:
        sheet = extractor_sheet(name)
        known = [key for key in settings_of(sheet.kind) if key not in sheet.models]
        unknown = [key for key in settings if key not in known and not (key.startswith("backbone.") and sheet.models)]
        if unknown:
            raise ConfigError(
                f'conceptseg-explain: can\'t read "{settings[unknown[0]][0]}": a setting neither of this command nor of {name}. '
                f"{did_you_mean(unknown[0], {*known, *SETTINGS})}"
            )
    return {key.removeprefix("backbone."): value for key, (_, value) in settings.items()}


def _yaml(where: str, value: str) -> Any:
    import yaml

    check_aliases(value, where)
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f'{where}: "{value}" can\'t be read: {str(error).splitlines()[0]}. Is a bracket or quote open?'
        ) from error


def _read(key: str, value: str) -> Any:
    """A value read as YAML, checked against the type of its setting. Raises ConfigError."""
    where = f"conceptseg-explain: {key}"
    found = _yaml(where, value)
    if key in ("size", "timesteps"):
        if not isinstance(found, list) or (key == "size" and len(found) != 2):
            wanted = "[height,width], such as [512,768]" if key == "size" else "a list of noise levels, such as [0.5]"
            raise ConfigError(f"{where} is {value}; wanted {wanted}.")
        return [whole_number(where, one, 1) if key == "size" else real_number(where, one) for one in found]
    if key == "download":
        if not isinstance(found, bool):
            raise ConfigError(f"{where} is {value}; wanted yes or no.")
        return found
    if key in ("seed", "steps", "draws"):
        return whole_number(where, found, 0 if key == "seed" else 1)
    return real_number(where, found, 0) if key in ("guidance", "blur") else found


def explain(given: dict[str, Any]) -> list[Path]:
    """Do what the settings say; the files that were written."""
    from conceptseg.evaluation.weights import provide_weights_of
    from conceptseg.extractors.explanation import NUMBERS, PICTURES, Explanation, checked_place, side_by_side
    from conceptseg.extractors.loading import load_extractor

    out = checked_place(given.get("out", "explained.png"), PICTURES, "conceptseg-explain: out")
    if "prompt" in given:
        checked_place(_beside(out), PICTURES, "conceptseg-explain: the image of the prompt, beside out")
    if "maps" in given:
        checked_place(given["maps"], (NUMBERS,), "conceptseg-explain: maps")
    device, model = given.get("device", "cpu"), given.get("model")
    alone = "image" not in given and "prompt" not in given
    of_method = {"device": device, **given["of_method"]}
    if alone and not given["extractor"] and model is None and len(of_method) == 1:
        methods = {title: load_extractor(name, sheet, device=device) for title, (name, sheet) in FIRST.items()}
    else:
        names = given["extractor"] or ["concept_attention"]
        methods = {name: load_extractor(name, model, **of_method) for name in names}
    for method in methods.values():
        provide_weights_of(method, given.get("download", False))
    settings = {key: given[key] for key in (*VIEW, *PASSED_ON) if key in given}
    if alone:
        from conceptseg.data.scenes import example_scene

        scene = example_scene()
        about: dict[str, Any] = {"image": scene.image, "words": [placed.word for placed in scene.objects]}
    else:
        about = {"words": given["concepts"], **{key: given[key] for key in ("image", "prompt") if key in given}}
    found: dict[str, Explanation] = {}
    for title, method in methods.items():
        found[title] = method.explain(**about, **_for_scene(method, alone), **settings)
        for note in found[title].notes:
            print(f"{title}: {note}", file=sys.stderr)
    first = next(iter(found.values()))
    if len(found) == 1:
        written = [first.save(out)]
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        side_by_side(found).save(out)
        written = [out]
    if "prompt" in given:
        written.append(first.save_image(_beside(out)))
    if "maps" in given:
        written.append(first.save(given["maps"]))
    return written


def _beside(out: Path) -> Path:
    """Where the image of a prompt goes."""
    return out.with_stem(f"{out.stem}_image")


def _for_scene(method: Any, alone: bool) -> dict[str, Any]:
    """The drawn scene's ground competes with its objects where words compete."""
    from conceptseg.data.scenes import example_scene

    return {"background": [example_scene().ground]} if alone and method.comparable else {}


@guarded
def main() -> None:
    """conceptseg-explain key=value ...: see --help."""
    quiet_libraries()
    words = sys.argv[1:]
    if set(words) & {"-h", "--help"}:
        print(f"{__doc__}\n")
        print("\n".join(f"  {key + '=':12}{meaning}" for key, meaning in SETTINGS.items()))
        print(f"\n{OF_METHOD}")
        return
    if "--version" in words:
        from conceptseg import __version__

        print(f"conceptseg-explain {__version__}")
        return
    for path in explain(parse(words)):
        print(path)


if __name__ == "__main__":
    main()
