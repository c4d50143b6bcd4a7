"""A data set: an ordered list of stable keys, a way to read one sample, and a fingerprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from conceptseg.types import Sample


class SegmentationDataset(ABC):
    """Images with masks and words. Reading is lazy: constructing one opens no image."""

    name: str

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """Every sample's key, in an order that is the same on every machine."""

    @abstractmethod
    def read(self, key: str) -> Sample:
        """One sample. Raises DataError if it is unreadable or its mask does not fit its image."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when any image, mask or word changes; goes into the run id. Contents are digested once: see `data.digests`."""

    @abstractmethod
    def problems(self) -> list[str]:
        """Return the problems of a folder or file, one sentence each with the remedy; empty if it is usable."""
