"""Name the samples that do not decode."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ["find_undecodable"]


def find_undecodable(strips: Sequence[np.ndarray]) -> list[tuple[int, str]]:
    """Which of a failed batch's strips are at fault, found by decoding each alone.

    Returns:
        Places in the batch with what the decoder said of them.
    """
    faults = []
    for place, strip in enumerate(strips):
        try:
            with Image.open(io.BytesIO(strip.tobytes())) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            faults.append((place, str(error)))
    return faults
