"""Shards read by webdataset alone, without Strata: python examples/plain_webdataset.py SHARDS."""

import json
import sys
from pathlib import Path

import numpy as np
import webdataset

folder = Path(sys.argv[1])
height = json.loads((folder / "manifest.json").read_text())["form"]["height"]
tars = sorted(map(str, folder.glob("shard-*.tar")))
for sample in webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"):
    # Frames are stacked from top to bottom in pictures named 000.jpg, 001.jpg and so on.
    names = sorted(name for name in sample if name.endswith(".jpg"))
    strips = np.concatenate([sample[name] for name in names])
    frames = strips.reshape(-1, height, *strips.shape[1:])  # [F, height, width, 3], uint8
    print(sample["__key__"], frames.shape, sample["json"]["label"])
