"""Features of a data set as a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from strata.dataload.reader import ShardReader
from strata.errors import ConfigError
from strata.eval.protocols.features import write_features
from strata.eval.session import open_session
from strata.eval.settings import Evaluation

__all__ = ["FeaturesExport", "run_features"]


@dataclass(frozen=True, kw_only=True)
class FeaturesExport(Evaluation):
    """Settings of `eval/main.py features`: features as an .npz file, for use elsewhere."""

    shards: Path
    """The data set."""
    weights: Literal["pretrained", "untrained"] = "pretrained"
    """untrained draws the weights of the same network from the seed."""
    seed: int = 0
    """Of the untrained weights."""


def run_features(config: FeaturesExport) -> None:
    """Export the features of a data set."""
    if config.out is None:
        raise ConfigError("features: give --out FILE.npz")
    reader = ShardReader(config.shards)
    with open_session(config) as session:
        seed = config.seed if config.weights == "untrained" else None
        features = session.encode(reader, seed)
        if session.world.is_first:
            write_features(features, config.out)
            print(
                f"features of {len(features.keys)} videos (listed {reader.num_listed}) written to "
                f"{config.out}",
                flush=True,
            )
