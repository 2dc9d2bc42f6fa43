"""Maps of pixels where an encoder stands, against loops over places."""

from pathlib import Path

import numpy as np
import pytest
import torch

from strata.errors import ConfigError
from strata.eval.evaluations.classify import FinetuneEvaluation, run_finetune
from strata.eval.networks import network_name
from strata.eval.protocols.pixels import PixelMaps
from strata.train.models.inputs import normalise
from strata.train.representation.encode import encode_levels

CPU = torch.device("cpu")


@pytest.fixture
def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 1, 5, 16, 16, 3), generator=generator, dtype=torch.uint8)


def test_maps_are_means_over_places(clips: torch.Tensor):
    pixels = normalise(clips[:, 0], 3).numpy()
    for kind, width in (("thumbnails", 192), ("motion", 64)):
        maps = PixelMaps(kind)  # pyright: ignore[reportArgumentType]
        assert maps.widths.high == width
        found = encode_levels(maps, CPU)(clips)["high"]
        assert found.shape == (2, 1, width)
        expected = []
        for clip in pixels:
            if kind == "motion":
                of = np.abs(clip[:, 1:] - clip[:, :-1]).mean(axis=(0, 1))[None]
            else:
                of = clip.mean(axis=1)
            expected.append(
                [
                    plane[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean()
                    for plane in of
                    for row in range(8)
                    for column in range(8)
                ]
            )
        np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_there_is_nothing_to_finetune():
    config = FinetuneEvaluation(checkpoint=Path("run"), weights="motion")
    with pytest.raises(ConfigError, match="--weights motion has no network to finetune"):
        run_finetune(config)


def test_a_still_clip_has_no_motion(clips: torch.Tensor):
    still = clips[:, :, :1].expand_as(clips)
    assert not encode_levels(PixelMaps("motion"), CPU)(still)["high"].any()
    assert [network_name(each) for each in (None, 3, "motion")] == [
        "pretrained",
        "untrained-3",
        "motion",
    ]
