"""Protocols: named, versioned definitions of what is shown to the model and how its answer is scored."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from conceptseg.errors import ConfigError, DataError, in_range, one_of
from conceptseg.given_names import GivenNames
from conceptseg.metrics.average_precision import average_precision, minmax_scaled, two_channel_average_precision
from conceptseg.metrics.counts import count
from conceptseg.metrics.measured import map_metrics
from conceptseg.metrics.released import f1_over_rows
from conceptseg.segment.resize import nearest_centre, resize_image
from conceptseg.segment.segmenter import Segmenter
from conceptseg.types import BACKGROUND, VOID, Concepts, Prediction, Sample, Task, check_distinct, checked_word, folded
from conceptseg.windows import Windows


@dataclass(frozen=True, slots=True)
class Excluded:
    """A sample that the protocol leaves out, and why; recorded, so that n can be accounted for."""

    key: str
    reason: str


class SegmentationProtocol:
    """How samples become tasks and predictions become counts.

    task: "single" asks for one class word per image and scores foreground against the rest; "multi" asks for all classes
        that are present and scores each.
    select: "any" keeps images with at most one foreground class, "one_class" those with exactly one; "two_labels" keeps images
        with at most two labels, background included (the released VOC rule, after resizing), so that two classes that fill an
        image count as one object, as in the released code.
    image_size, image_resample: the protocol's own resizing of images, sides in pixels; None leaves them alone.
    image_fit: "squash" brings both sides to image_size; "centre_crop" brings the shorter one to it and cuts a square;
        "short_side" brings the shorter one to it and keeps the whole image.
    window, window_stride: side and stride in pixels of the squares in which the resized image is shown (`Windows`); None shows it
        whole. Maps of windows are averaged where they overlap.
    mask_size: the size truth is scored at, by Pillow's nearest rule; None scores at the truth's own size.
    background: words offered beside the class words; order: "target_first" or "background_first".
    ask: the former name of `names`, kept for the manifests of older runs: "present" is truth.
    names, names_total, names_seed, names_file: which class names a method is given; see `GivenNames`. What a map claims for a
        class that is absent is counted.
    background_rule: "words" offers background words, which compete with the class words; "threshold" offers none, and the
        segmenter's level leaves a pixel to the background; "words_and_threshold" does both, as SCLIP does on VOC21; "none" scores
        only pixels of classes, as VOC20 does (the truth's background becomes void).
    caption: with {word} for one class, joined by caption_join for several.
    segmenters: every decision that is scored; read-outs, so adding one costs no forward pass.
    f1_over_rows: record Chefer's F1 too.
    measures: names of metrics that are measured from maps (`metrics.measured`, and those of installed packages) and recorded too.
    """

    def __init__(
        self,
        name: str,
        version: int,
        task: str,
        background: Sequence[Any],
        segmenters: Iterable[Segmenter],
        caption: str = "a {word}",
        caption_join: str = " and ",
        order: str = "background_first",
        select: str = "any",
        image_size: int | None = None,
        image_resample: str = "bicubic",
        mask_size: int | None = None,
        variant: str = "standard",
        image_fit: str = "squash",
        f1_over_rows: bool = False,
        measures: Sequence[str] = (),
        names: str = "truth",
        names_total: int = 0,
        names_seed: int = 0,
        names_file: str | None = None,
        background_rule: str = "words",
        ask: str | None = None,
        window: int | None = None,
        window_stride: int | None = None,
    ) -> None:
        for value, key, choices in (
            (task, "task", ("single", "multi")),
            (order, "order", ("target_first", "background_first")),
            (select, "select", ("any", "one_class", "two_labels")),
            (image_resample, "image_resample", ("bicubic", "bilinear", "nearest")),
            (image_fit, "image_fit", ("squash", "centre_crop", "short_side")),
            (variant, "variant", ("standard", "released")),
            (background_rule, "background_rule", ("words", "threshold", "words_and_threshold", "none")),
        ):
            one_of(f"protocol.{key}", value, choices)
        if isinstance(background, str):
            raise ConfigError(f'protocol.background is the text "{background}"; wanted a list of words, such as [grass,sky].')
        background = tuple(checked_word(word, f"protocol.background.{k}") for k, word in enumerate(background))
        check_distinct(background, "protocol.background", ConfigError)
        self.name, self.version, self.task, self.variant = name, version, task, variant
        self.background, self.order, self.select = background, order, select
        self.caption, self.caption_join = _checked_template(caption), caption_join
        self.image_size, self.image_resample, self.mask_size = image_size, image_resample, mask_size
        self.image_fit, self.f1_over_rows = image_fit, f1_over_rows
        self.measures = map_metrics(measures, "protocol.measures")
        if ask is not None:
            one_of("protocol.ask", ask, ("present", "named"))
            names = "named" if ask == "named" else names
        self.names, self.background_rule = GivenNames(names, names_total, names_seed, names_file), background_rule
        in_range("protocol.image_size", image_size, 1, 16_384)
        in_range("protocol.mask_size", mask_size, 1, 16_384)
        if (window is None) != (window_stride is None):
            raise ConfigError(
                f"protocol.window is {window} and protocol.window_stride is {window_stride}; wanted both, such as 224 and 112, "
                "or neither."
            )
        in_range("protocol.window", window, 1, 16_384)
        self.windows = None if window is None or window_stride is None else Windows(window, window_stride)
        self.segmenters = tuple(segmenters)
        if not self.segmenters:
            raise ConfigError("protocol.segmenters is empty: name at least one decision, for example {decision: mean}.")
        if len({s.key for s in self.segmenters}) < len(self.segmenters):
            raise ConfigError("protocol.segmenters lists the same decision twice.")
        if background_rule in ("threshold", "none") and (background or task == "single"):
            raise ConfigError(
                f'protocol.background_rule "{background_rule}" goes with task "multi" and no background words, but task is '
                f'"{task}" and protocol.background is {list(background)}. Set protocol.background=[], or background_rule=words.'
            )
        cuts = {s.decision == "argmax_above" for s in self.segmenters}
        if cuts != {background_rule in ("threshold", "words_and_threshold")}:
            raise ConfigError(
                f'protocol.background_rule is "{background_rule}" and the segmenters decide by '
                f'{", ".join(s.decision for s in self.segmenters)}; "argmax_above" and background_rule=threshold or '
                f"words_and_threshold go together."
            )

    @property
    def label(self) -> str:
        """Name and version, printed with every number; the names given where they are neither truth nor look-alikes; windows."""
        given = f", names: {self.names.label}" if self.names.rule in ("distractors", "all", "file") else ""
        shown = f", {self.windows.label}" if self.windows else ""
        side = f" of an image of short side {self.image_size}" if self.windows and self.image_fit == "short_side" else ""
        return f"{self.name} v{self.version}{given}{shown}{side}"

    def identity(self) -> dict[str, Any]:
        """Return the settings of the protocol that change the model's input, and its measures. Segmenters are left out.

        Measures belong to it because rows that were written without them lack their numbers.
        """
        return {
            "name": self.name, "version": self.version, "task": self.task, "background": list(self.background),
            "order": self.order, "select": self.select, "caption": self.caption, "caption_join": self.caption_join,
            "image_size": self.image_size, "image_resample": self.image_resample, "mask_size": self.mask_size,
            **({"image_fit": self.image_fit} if self.image_fit != "squash" else {}),
            **({"measures": {m.name: m.version for m in self.measures}} if self.measures else {}),
            **self.names.identity(),
            **({"background_rule": self.background_rule} if self.background_rule != "words" else {}),
            **({"window": self.windows.side, "window_stride": self.windows.stride} if self.windows else {}),
        }  # fmt: skip

    def prepare(self, sample: Sample) -> Task | Excluded:
        """The task this sample sets, or why it is left out. Raises DataError for a sample that can't be asked about."""
        truth = sample.mask
        if self.mask_size is not None:
            truth = nearest_centre(truth, (self.mask_size, self.mask_size))
        labels = [int(v) for v in np.unique(truth) if v != VOID]
        present = [v for v in labels if v != BACKGROUND]
        if missing := [v for v in present if v not in sample.words]:
            raise DataError(
                f"{sample.key}: its mask holds class {missing[0]}, for which the data set has no word "
                f"(it has {', '.join(f'{k}: {w}' for k, w in sorted(sample.words.items()))}). Is the mask of another data set?"
            )
        words = {
            label: checked_word(word, f"{sample.key}: the data set's word for class {label}", DataError)
            for label, word in sample.words.items()
        }
        image = sample.image
        if self.image_size is not None:
            image = self._sized(image, self.image_size)
        image = image.astype(np.float32) / 255
        if self.task == "multi":
            if not present:
                return Excluded(sample.key, "no foreground class is present at the size that is scored")
            given = self.names.of(replace(sample, words=words), {v: words[v] for v in present})
            concepts = self._concepts(given, present, sample.key)
            caption = self.caption_join.join(self.caption.format(word=words[v]) for v in present)
            if self.background_rule == "none":
                truth = np.where(truth == BACKGROUND, VOID, truth).astype(np.uint8)
            classes = sorted({*present, *(label for _, label in given)} - {BACKGROUND})
            return Task(sample.key, image, truth, concepts, caption, (BACKGROUND, *classes))
        if self.select == "any" and len(present) > 1:
            named = ", ".join(words[v] for v in present)
            return Excluded(sample.key, f"{len(present)} foreground classes ({named}), wanted at most one")
        if self.select == "one_class" and len(present) != 1:
            return Excluded(sample.key, f"{len(present)} foreground classes, wanted exactly one")
        if self.select == "two_labels" and (len(labels) > 2 or not present):
            return Excluded(sample.key, f"{len(labels)} labels after resizing, wanted at most two with one foreground class")
        if not present and not sample.words:
            return Excluded(sample.key, "no foreground class is present, and the data set names no word")
        word = words[present[-1]] if present else next(iter(words.values()))
        truth = np.where((truth != BACKGROUND) & (truth != VOID), 1, truth).astype(np.uint8)
        given = self.names.of(replace(sample, words={1: word}), {1: word})
        if folded(word) not in (folded(w) for w, _ in given):
            return Excluded(
                sample.key, f'the names that are given lack its class "{word}", and a single-class protocol scores no other'
            )
        concepts = self._concepts([(w, int(folded(w) == folded(word))) for w, _ in given], [1], sample.key)
        return Task(sample.key, image, truth, concepts, self.caption.format(word=word), (BACKGROUND, 1))

    def _sized(self, image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "h w 3"]:
        if self.image_fit == "squash":
            return resize_image(image, (side, side), self.image_resample)
        height, width = image.shape[:2]
        if self.image_fit == "short_side":  # rounded as mmcv does it
            scale = side / min(height, width)
            return resize_image(image, (int(height * scale + 0.5), int(width * scale + 0.5)), self.image_resample)
        # The longer side is cut down to a whole number and the crop's corner rounded, as torchvision does it.
        size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
        resized = resize_image(image, size, self.image_resample)
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        return resized[top : top + side, left : left + side]

    def _concepts(self, given: Sequence[tuple[str, int]], present: Sequence[int], key: str) -> Concepts:
        # A class word that is also a background word (VOC's multi-class grounds, ImageNet's "person") is used once.
        classes = {folded(word) for word, _ in given}
        backgrounds = [(w, BACKGROUND) for w in self.background if folded(w) not in classes]
        check_distinct([word for word, _ in given], f"{key}: its data set")
        target_first = self.order == "target_first"
        ordered = [*given, *backgrounds] if target_first else [*backgrounds, *given]
        first = 0 if target_first else len(backgrounds)
        target = first + [label for _, label in given].index(1) if self.task == "single" else None
        distractors = tuple(first + place for place, (_, label) in enumerate(given) if label not in present)
        return Concepts(tuple(w for w, _ in ordered), tuple(v for _, v in ordered), target, distractors)

    def score(
        self, task: Task, maps: Float[np.ndarray, "C h w"], segmenters: Iterable[Segmenter] | None = None
    ) -> Iterator[tuple[Segmenter, dict[str, Any], Prediction]]:
        """Yield the counts and average precisions that rows record, one entry per segmenter.

        Ranking does not depend on a decision, so scores and their average precisions are formed once per way of enlarging.
        """
        size = (task.truth.shape[0], task.truth.shape[1])
        enlarged: dict[tuple[object, ...], tuple[np.ndarray, dict[str, float | None]]] = {}
        for segmenter in self.segmenters if segmenters is None else segmenters:
            if segmenter.way not in enlarged:
                scores = segmenter.scores(maps, size, task.image)
                enlarged[segmenter.way] = scores, self._average_precisions(task, maps, scores, segmenter)
            scores, precisions = enlarged[segmenter.way]
            prediction = segmenter(maps, scores, task.concepts, task.classes)
            counts = count(prediction.labels, task.truth, task.classes)
            record: dict[str, Any] = {name: _plain(getattr(counts, name)) for name in counts.__slots__}
            if self.f1_over_rows:
                rowwise = f1_over_rows(prediction.labels != BACKGROUND, (task.truth != BACKGROUND) & (task.truth != VOID))
                precisions = {**precisions, "f1_rowwise": rowwise}
            record["ap"] = precisions
            if self.measures:
                here = [m for m in self.measures if not m.asks_again]
                record["measured"] = {m.name: _number(m.measure(task, scores, prediction.labels)) for m in here}
            yield segmenter, record, prediction

    def _average_precisions(
        self, task: Task, maps: Float[np.ndarray, "C h w"], scores: Float[np.ndarray, "C H W"], segmenter: Segmenter
    ) -> dict[str, float | None]:
        valid = task.truth != VOID
        found: dict[str, float | None] = {}
        values = []
        for channel, label in enumerate(task.concepts.labels):
            if label == BACKGROUND:
                continue
            positive = task.truth[valid] == label
            if positive.any():
                values.append(float(average_precision(scores[channel][valid], positive)))
        found["foreground"] = float(np.mean(values)) if values else None
        if task.concepts.target is not None:
            target = scores[task.concepts.target]
            found["two_channel"] = float(two_channel_average_precision(target, task.truth, minmax=False))
            if segmenter.score_grid:  # which loses the map's extremes: it is scaled before, as released
                own = minmax_scaled(maps[task.concepts.target])[None]
                scaled = segmenter.scores(own, (task.truth.shape[0], task.truth.shape[1]))[0]
                found["two_channel_minmax"] = float(two_channel_average_precision(scaled, task.truth, minmax=False))
            else:
                found["two_channel_minmax"] = float(two_channel_average_precision(target, task.truth, minmax=True))
        return found


def _number(value: Any) -> float | None:
    """A measured number as JSON holds it; None where it is undefined."""
    return None if value is None or np.isnan(value) else float(value)


def _checked_template(caption: str) -> str:
    """The caption unchanged. Raises ConfigError for a field other than {word}."""
    try:
        fields = [(name, how, kind) for _, name, how, kind in string.Formatter().parse(caption) if name is not None]
    except ValueError as error:
        raise ConfigError(f'protocol.caption is "{caption}": {error}. Write {{word}} for the class, {{{{ for a brace.') from error
    if set(fields) - {("word", "", None)}:
        raise ConfigError(f'protocol.caption is "{caption}"; wanted no field but {{word}}, such as "a photo of a {{word}}".')
    return caption


def _plain(value: Any) -> Any:
    return [int(v) for v in value] if isinstance(value, tuple) else int(value)
