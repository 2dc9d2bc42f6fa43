"""Shards read by webdataset alone, without Strata: python examples/plain_webdataset.py SHARDS."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.compat import WebDataset

folder = Path(sys.argv[1])
height = json.loads((folder / "manifest.json").read_text())["form"]["height"]
tars = sorted(map(str, folder.glob("shard-*.tar")))
samples: Any = WebDataset(tars, shardshuffle=False).decode("rgb8")
for sample in samples:
    # Frames are stacked from top to bottom in pictures named 000.jpg, 001.jpg and so on.
    names = sorted(name for name in sample if name.endswith(".jpg"))
    strips = np.concatenate([sample[name] for name in names])
    frames = strips.reshape(-1, height, *strips.shape[1:])  # [F, height, width, 3], uint8
    print(sample["__key__"], frames.shape, sample["json"]["label"])
