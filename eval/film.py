"""Film strips: some frames of a stored video side by side, as one small JPEG."""

import io

import numpy as np
from PIL import Image

from strata.dataload.reader import ShardReader

__all__ = ["film_strip"]


def film_strip(
    reader: ShardReader, sample: int, *, num_frames: int = 6, height: int = 72, quality: int = 75
) -> bytes:
    """Frames evenly spaced along a video, side by side.

    Args:
        reader: The set.
        sample: Which video.
        num_frames: How many; all of them where the video has fewer.
        height: Rows of the picture; the width follows from the stored aspect.
        quality: Of the JPEG, 1 to 95.

    Returns:
        A JPEG.

    Raises:
        ShardError: The set's payload is not `jpeg`, or the sample is damaged.
    """
    count = int(reader.num_frames[sample])
    chosen = np.unique(np.linspace(0, count - 1, min(num_frames, count)).round().astype(np.int64))
    form = reader.manifest.form
    with Image.open(io.BytesIO(reader.strip(sample, chosen).tobytes())) as tall:
        rows = np.asarray(tall.convert("RGB"))
    frames = rows.reshape(len(chosen), form.height, form.width, 3)
    wide = Image.fromarray(np.concatenate(list(frames), axis=1))
    width = max(round(wide.width * height / wide.height), 1)
    out = io.BytesIO()
    wide.resize((width, height), Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
    return out.getvalue()
