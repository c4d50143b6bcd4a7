"""Time the fingerprint of a VOC kit of random files, cold and warm.

    python benchmarks/speed/fingerprint.py 4276

The first reading digests every byte; the second finds the digests in the cache. Files are older than two seconds before the
first, since a younger file's digest is not kept.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from conceptseg.data.digests import SETTLED_SECONDS
from conceptseg.data.pascal_voc import PascalVOC

BYTES = {4276: 51_000, 100_000: 10_000}
"""Mean size of a file, by count: about 220 MB and 1 GB."""


def write_kit(root: Path, count: int) -> None:
    """Half of the files are photos, half masks; their content is noise, which a fingerprint does not decode."""
    kit = root / "VOC2012"
    random = np.random.default_rng(0)
    names = [f"{number:06d}" for number in range(count // 2)]
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (kit / folder).mkdir(parents=True)
        for name in names:
            (kit / folder / f"{name}.{ending}").write_bytes(random.bytes(BYTES.get(count, 10_000)))
    lists = kit / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names))


def main() -> None:
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONCEPTSEG_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "VOCdevkit"
        write_kit(root, count)
        time.sleep(SETTLED_SECONDS + 1)
        for which in ("cold", "warm"):
            started, cpu = time.perf_counter(), time.process_time()
            PascalVOC(str(root), split="val").fingerprint()
            print(f"{count} files, {which}: {time.perf_counter() - started:.2f} s, {time.process_time() - cpu:.2f} s of CPU")


if __name__ == "__main__":
    main()
