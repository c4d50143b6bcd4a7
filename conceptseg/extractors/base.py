"""Interface between a method and the harness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.base import Backbone
from conceptseg.backbones.sheets import backbone_of
from conceptseg.errors import ConfigError, DataError, whole_number
from conceptseg.extractors.explaining import (
    Picture,
    check_no_prompt,
    checked_size,
    checked_words,
    progress_bar,
    python_names,
    read_picture,
    refuse,
)
from conceptseg.extractors.explanation import Explanation, remarks_on
from conceptseg.extractors.sheets import lab_view, sheet_of_class
from conceptseg.saliency.views import Axes, Normalize, Softmax, View, expand_views
from conceptseg.targets import check_types, settings_of
from conceptseg.types import (
    BACKGROUND,
    LEAST_KNOWN_FIRST,
    Batch,
    Concepts,
    Provenance,
    SaliencyMaps,
    Task,
    Told,
    TrainedOn,
    check_distinct,
)

Method = TypeVar("Method", bound="Extractor")
WITHOUT_WORDS: dict[Told, str] = {"nothing": "the image", "own prediction": "the predicted class"}
"""The name of the one map of a method that is asked for no words."""


class Extractor(ABC):
    """Turns a batch into saliency maps, one [B C h w] per view, from as few forward passes as the views allow."""

    version: ClassVar[int]
    """Raised whenever the numbers change; part of the run id."""
    comparable: bool = True
    """May channels be compared by argmax?"""
    needs_truth: ClassVar[bool] = False
    """True for controls that are shown the mask; never for a method."""
    windowed: ClassVar[bool] = False
    """Have maps of parts of an image one scale, so that sliding windows may be averaged (`protocol.window`)?"""
    shown_by_word: ClassVar[bool] = False
    """Is an image shown to `backbone` once for each word, all in one batch? For the plan of memory."""
    told: Told
    """Information about the image that is shown to the model. No default: a row without it can't be compared."""
    trained_on: TrainedOn
    """Supervision of the method's model. No default either."""

    @abstractmethod
    def axes(self) -> Axes:
        """Spaces, layers and timesteps on offer; views are checked against it before anything runs."""

    @abstractmethod
    def stream(self, batch: Batch, views: Sequence[View]) -> Iterator[SaliencyMaps]:
        """Maps of every view, in the order of `views`."""

    def encode_texts(self, tasks: Iterable[Task]) -> None:  # noqa: B027 - doing nothing is what most methods do
        """Called once, before the first batch, with all that will be asked: here a method may encode every text of a run at once.

        Reading `tasks` opens every image, so a method does so only where that spares it more.
        """

    def held_bytes(self, images: int, views: Sequence[Mapping[str, Any]]) -> int:
        """Bytes that a batch of so many images holds beside the model and its activations; 0 unless it is much.

        views: their settings. For the plan, so nothing is fetched: an estimate where the checkpoint is not on this machine.
        """
        return 0

    def parts(self) -> dict[str, Backbone]:
        """The models that the method holds, by the attribute that holds each; attributes are named as their settings are."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Backbone)}

    @property
    def provenance(self) -> Provenance:
        """Return the provenance of the numbers: of several models, the one about which least is known."""
        return min((part.provenance for part in self.parts().values()), key=LEAST_KNOWN_FIRST.index, default="control")

    def identity(self) -> dict[str, Any]:
        """Return the settings of this method that change numbers: class, version, and the identities of its models.

        Plain settings are added to it by the run. A key given here stands in place of the setting of that name: the digest of a
        file in place of its path.
        """
        return {
            "class": type(self).__name__, "version": self.version,
            **{name: part.identity() for name, part in self.parts().items()},
        }  # fmt: skip

    # ------------------------------------------------------------ for people

    family: ClassVar[str | None] = None
    """Class of the backbone of a hub repository that no sheet names; None where its files tell."""

    @property
    def reads_caption(self) -> bool:
        """Whether maps depend on what a caption says of the image, beside the words."""
        return False

    @classmethod
    def from_pretrained(
        cls: type[Method], path: str, revision: str | None = None, device: str = "cpu", **settings: Any
    ) -> Method:
        """This method on a hub repository, a local folder, "lab:<name>", or a sheet of conf/backbone ("flux_schnell").

        settings: of this class or of the backbone; what is not given is as in the method's sheet of conf/extractor. A repository
        that a sheet of conf/backbone names needs no revision. No weights are read yet. Raises ConfigError for a setting that
        neither takes, and for a checkpoint of no known family.
        """
        sheet = sheet_of_class(cls)
        plain, models = ({}, {}) if sheet is None else (sheet.settings, sheet.models)
        with python_names():
            known = [key for key in settings_of(cls) if key != "backbone"]
            own = {key: settings.pop(key) for key in list(settings) if key in known}
            check_types(own, cls, "extractor")
            _, changed = models.pop("backbone", ("", {}))
            model = backbone_of(path, revision, device, cls.family, known, **{**changed, **settings})
            given = {**plain, **own, "backbone": model}
            for name, (option, others) in models.items():
                if name not in own:
                    given[name] = backbone_of(option, device=device, **others)
            return cls(**given)

    def asked_for_words(self) -> Extractor:
        """This method as it explains given words; methods that can also explain their own prediction set that aside."""
        return self

    def default_view(self) -> dict[str, Any]:
        """Settings of the view that is read unless others are given: the first one of the method's sheet of conf/extractor.

        Of the lab's models the space, layers and noise level that were best on development scenes (conf/views/lab).
        """
        sheet, backbone = sheet_of_class(type(self)), self.parts().get("backbone")
        chosen = {} if backbone is None else lab_view(backbone.checkpoint.path, self.axes().spaces)
        return chosen or ({} if sheet is None else dict(sheet.view))

    @overload
    def explain(self, image: list[Any], words: Sequence[Any] = ..., **settings: Any) -> list[Explanation]: ...
    @overload
    def explain(self, image: Picture | None = ..., words: Sequence[Any] = ..., **settings: Any) -> Explanation: ...
    def explain(
        self,
        image: Any = None,
        words: Sequence[Any] = (),
        *,
        prompt: Any = None,
        background: Sequence[Any] = (),
        caption: Any = None,
        ground: Any = None,
        size: Any = None,
        seed: Any = None,
        steps: Any = None,
        guidance: Any = None,
        batch_size: Any = 8,
        progress: bool | None = None,
        **view: Any,
    ) -> Explanation | list[Explanation]:
        """Where the model finds each word in an image, or in the image that it makes of a prompt.

        image: a PIL image, path, URL, array or tensor (see `read_picture`); a list of them gives a list of explanations. For a
            video model also frames [F H W 3], whose maps are [C f h w].
        prompt: a sentence to make an image of, in place of `image`.
        words: what to look for; class names for methods that explain a class score. Without words, methods that need none give
            the one map they have: of the image, or of the class that the model predicts.
        background: words that compete with those and are not shown, such as ["sky", "grass"].
        caption: what is said of the image ("a x and a y" of the words). ground: the colour under transparent pixels (refused).
        size: (height, width) that the model is shown; by default of the image's proportions, at the area of the backbone's own.
        seed: of the noise. steps, guidance: for prompts (ConceptAttention: 4 and 0; DAAM: the pipeline's own).
        batch_size: images that go through the model together.
        progress: whether a bar is shown; by default for several images and in a terminal.
        view: settings of the view, over those of `default_view`: space, layers, timesteps, draws, normalize, softmax,
            temperature, fold, blur.
        Raises ConfigError or ViewError for a setting that is wrong or would change nothing, before the model runs; DataError for
        an image or word that can't be explained, and for maps that hold NaN or are the same number everywhere.
        """
        with python_names():
            if (image is None) == (prompt is None):
                raise ConfigError('explain: wanted one of image=... and prompt="a dragon on a rock".')
            for each in image if isinstance(image, list | tuple) else [image]:
                check_no_prompt(each)
            method, names, competing = self._asked(words, background)
            if seed is not None:
                if not hasattr(method, "seed"):
                    refuse(type(self).__name__, {"seed": seed}, "draws nothing at random")
                method = copy(method)
                method.seed = whole_number("seed", seed, -(2**63))
            one, notes = method._view(names, competing, view)
            for key, text in (("prompt", prompt), ("caption", caption)):
                if text is not None and not isinstance(text, str):
                    raise ConfigError(f"explain: {key} is {text!r}; wanted a text.")
            if prompt is not None:
                if not prompt.strip():
                    raise ConfigError(f"explain: prompt is {prompt!r}; wanted a sentence to make an image of.")
                refuse("a prompt", {"caption": caption, "ground": ground}, "is all that is said of an image that is made")
                if "timesteps" in view or "draws" in view:
                    refuse(
                        "a prompt", {key: view.get(key) for key in ("timesteps", "draws")}, "is read at the steps that are taken"
                    )
                return method._explained_prompt(prompt, names, competing, size, steps, guidance, one, notes)
            refuse("an image", {"steps": steps, "guidance": guidance}, "is read, not made")
            if caption is not None and not method.reads_caption:
                refuse(type(self).__name__, {"caption": caption}, "is told the words alone")
            whole_number("batch_size", batch_size, 1)
            given = list(image) if isinstance(image, list | tuple) else [image]
            if not given:
                raise DataError("explain: the list of images is empty.")
            pictures = [read_picture(each, ground) for each in given]
            found = method._explained(pictures, names, competing, caption, size, one, notes, batch_size, progress)
        return found if isinstance(image, list | tuple) else found[0]

    def _asked(self, words: Sequence[Any], background: Sequence[Any]) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
        """This method as it is asked, the words, and the background words. Raises ConfigError for words that it can't use."""
        name = type(self).__name__
        if self.needs_truth:
            raise ConfigError(f"explain: {name} is a control that is shown the mask; a picture alone has none. Choose a method.")
        if not len(words) and self.told in WITHOUT_WORDS:
            refuse(name, {"background": background}, "is asked for no words")
            return self, (WITHOUT_WORDS[self.told],), ()
        if self.told == "nothing":
            raise ConfigError(
                f"explain: {name} reads no words: its map would be the same whatever is asked for. Leave words out, or choose "
                f"a method that takes words, such as concept_attention, daam or naclip."
            )
        method, names = self.asked_for_words(), checked_words(words)
        competing = checked_words(background, "background") if len(background) else ()
        check_distinct((*names, *competing), "words and background", ConfigError)
        if competing and not method.comparable:
            refuse(name, {"background": list(competing)}, "gives every word a scale of its own, so that no other word competes")
        return method, names, competing

    def _view(self, names: Sequence[str], competing: Sequence[str], view: Mapping[str, Any]) -> tuple[View, list[str]]:
        """The view that is read, and notes on it. Raises ConfigError or ViewError for a setting that is wrong."""
        axes, notes = self.axes(), []
        settings = {"layers": axes.layers, "timesteps": axes.has_timesteps, "draws": axes.has_timesteps}
        for key, offered in settings.items():
            if key in view and not offered:
                refuse(type(self).__name__, {key: view[key]}, f"has no {key}")
        chosen = {**self.default_view(), **view}
        alone = len(names) + len(competing) == 1
        if alone and "softmax" not in view and chosen.get("softmax", "none") not in ("none", "tokens"):
            chosen["softmax"] = "none"
            notes.append(
                f'"{names[0]}" is the only word, so its score is shown without a softmax over words. Name words that compete '
                f"with it for shares: background=[...]."
            )
        views = list(expand_views({"explained": chosen}, axes).values())
        if len(views) != 1:
            raise ConfigError(f"explain: {len(views)} views were asked for; name one space, and leave out each.")
        (one,) = views
        whole_number("explain: draws", one.draws, 1, 10_000)
        compares = one.softmax not in (Softmax.NONE, Softmax.TOKENS) or one.normalize is Normalize.LINEAR
        if alone and compares:
            raise ConfigError(
                f'explain: "{names[0]}" is the only concept, and softmax={one.softmax}, normalize={one.normalize} compare '
                f"concepts: its map would be the same everywhere. Name words that compete with it (background=[...]), or set "
                f"softmax=none and normalize=none."
            )
        return one, notes

    def _explained(
        self,
        pictures: Sequence[np.ndarray],
        names: tuple[str, ...],
        competing: tuple[str, ...],
        caption: str | None,
        size: Any,
        view: View,
        notes: Sequence[str],
        batch_size: int,
        progress: bool | None,
    ) -> list[Explanation]:
        concepts = Concepts((*names, *competing), (*range(1, len(names) + 1), *(BACKGROUND for _ in competing)))
        said = (" and ".join(f"a {name}" for name in names) if caption is None else caption) if self.reads_caption else ""
        shown = [self._shown_size(picture, size) for picture in pictures]
        about = self._about(view, **({"caption": said} if said else {}), **({"background": list(competing)} if competing else {}))
        found: list[Explanation] = []
        with progress_bar(len(pictures), progress) as advance:
            while len(found) < len(pictures):
                start = len(found)
                same = next((k for k in range(start, len(pictures)) if shown[k] != shown[start]), len(pictures))
                some = pictures[start : min(same, start + batch_size)]
                for picture, scores in zip(some, self._scores(some, concepts, said, shown[start], view), strict=True):
                    maps = scores.detach().float().cpu()
                    said_of = remarks_on(concepts.names, maps)
                    others = maps[len(names) :] if competing else None
                    found.append(
                        Explanation(names, maps[: len(names)], picture, about, None, self.comparable, (*notes, *said_of), others)
                    )
                advance(len(some))
        return found

    def _about(self, view: View, **more: Any) -> dict[str, Any]:
        """Return the method and its settings as an explanation keeps them. shares: whether the words' maps sum to one."""
        shares = view.softmax not in (Softmax.NONE, Softmax.TOKENS)
        known = {"method": type(self).__name__, "view": view.key, "provenance": self.provenance, **self.identity()}
        return {**known, "shares": shares, **more}

    def _shown_size(self, picture: np.ndarray, size: Any) -> tuple[int, int] | None:
        """(height, width) that the model is shown, or None where the model has one of its own."""
        backbone: Any = self.parts().get("backbone")
        if backbone is None or not backbone.denoises:
            if size is not None:
                refuse(type(self).__name__, {"size": size}, "shows every image at the size of its model (image_size)")
            return None
        if size is None:
            fitting: tuple[int, int] = backbone.fitting_size(picture.shape[-3], picture.shape[-2])
            return fitting
        backbone.check_size(*checked_size(size))
        return checked_size(size)

    def _scores(
        self, pictures: Sequence[np.ndarray], concepts: Concepts, caption: str, size: tuple[int, int] | None, view: View
    ) -> Float[Tensor, "B C *f h w"]:
        """Maps of one view, read as a run reads them."""
        if any(picture.ndim == 4 for picture in pictures):
            raise DataError("explain: frames of a video were given, but this model reads single images. Give a list of images.")
        tasks = tuple(
            Task(
                "explained", picture.astype(np.float32) / 255, np.zeros(picture.shape[:2], np.uint8), concepts, caption,
                tuple(sorted({BACKGROUND, *concepts.labels})),
            )
            for picture in pictures
        )  # fmt: skip
        backbone: Any = self.parts().get("backbone")
        with backbone.shown_at(size) if size and backbone is not None and backbone.denoises else nullcontext():
            (maps,) = self.stream(Batch(tasks), [view])
        return maps.scores

    def _explained_prompt(
        self,
        prompt: str,
        names: tuple[str, ...],
        competing: tuple[str, ...],
        size: Any,
        steps: Any,
        guidance: Any,
        view: View,
        notes: Sequence[str],
    ) -> Explanation:
        """Make an image of the prompt and read it on the way."""
        raise ConfigError(
            f"explain: {type(self).__name__} reads images and makes none. Give image=..., or choose a method that makes images "
            f"(concept_attention, daam)."
        )


class OneView(Extractor):
    """A method with a single read-out: implement `saliency` and nothing else.

    >>> class Bright(OneView):
    ...     version = 1
    ...     def saliency(self, batch):
    ...         ...
    """

    def axes(self) -> Axes:
        return Axes(spaces=("map",))

    @abstractmethod
    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        """Return one map per image and concept, larger where the concept is; h x w is any grid, the scale the method's own."""

    def stream(self, batch: Batch, views: Sequence[View]) -> Iterator[SaliencyMaps]:
        scores = self.saliency(batch).float()
        for view in views:
            yield SaliencyMaps(view.key, scores, self.comparable)
