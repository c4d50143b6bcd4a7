"""Interface between a method and the harness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.base import Backbone
from conceptseg.saliency.views import Axes, View
from conceptseg.types import LEAST_KNOWN_FIRST, Batch, Provenance, SaliencyMaps, Task, Told, TrainedOn


class Extractor(ABC):
    """Turns a batch into saliency maps, one [B C h w] per view, from as few forward passes as the views allow."""

    version: ClassVar[int]
    """Raised whenever the numbers change; part of the run id."""
    comparable: bool = True
    """May channels be compared by argmax?"""
    needs_truth: ClassVar[bool] = False
    """True for controls that are shown the mask; never for a method."""
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
