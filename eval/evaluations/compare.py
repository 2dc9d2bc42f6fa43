"""Retrieval and the cached probe of one or more checkpoints beside untrained networks."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from strata.eval.evaluations.cached_probe import (
    Tested,
    cached_probe,
    cached_text,
    joined,
    refuse_cached,
)
from strata.eval.evaluations.retrieval import retrieval_details, retrieval_text
from strata.eval.networks import NamedNetwork, untrained_network
from strata.eval.output import write_result
from strata.eval.protocols.linear import LinearConfig
from strata.eval.protocols.named import ProtocolName
from strata.eval.protocols.retrieval import RetrievalConfig, chance_shares, recall_shares
from strata.eval.results import Kind, Measurement, PairResult, Retrieved, Row
from strata.eval.session import open_session
from strata.eval.sets import open_pair
from strata.eval.settings import Evaluation

__all__ = ["CompareEvaluation", "run_compare"]


@dataclass(frozen=True, kw_only=True)
class CompareEvaluation(Evaluation):
    """Settings of `eval/main.py compare`: retrieval and cached probe, beside untrained networks."""

    train: Path
    """Shards of the training set: the gallery, and what the probe learns from."""
    test: Path
    """Shards of the test set."""
    untrained_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the untrained networks."""
    others: tuple[Path, ...] = ()
    """Further runs or checkpoints of the same architecture, for instance of other seeds. The page
    then shows mean, lowest and highest."""
    remark: str = ""
    """A sentence that the page shows above the figures."""
    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md; the cached probe is ours."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Centring of the retrieval, and what the report shows."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """Of the cached linear probe."""

    def __post_init__(self) -> None:
        refuse_cached(self.protocol)


def run_compare(config: CompareEvaluation) -> None:
    """Both cached protocols on one or more checkpoints and on untrained networks."""
    pair = open_pair(config.train, config.test)
    networks = [
        NamedNetwork(row="pretrained", role="measured", which=None),
        *(
            NamedNetwork(row=f"pretrained, {other}", role="measured", which=other)
            for other in config.others
        ),
        *(untrained_network(seed) for seed in config.untrained_seeds),
    ]
    with open_session(config) as session:
        level, centre = session.features.level, config.retrieval.centre
        recalls: list[Row] = []
        probes: list[tuple[NamedNetwork, Tested]] = []
        details: Retrieved | None = None
        chance: dict[str, float] = {}
        for network in networks:
            train = session.encode(pair.train, network.which)
            test = session.encode(pair.test, network.which)
            shares = recall_shares(train, test, level, centre)
            recalls.append(Row(name=network.row, role=network.role, shares=shares))
            found = cached_probe(train, test, level, config.probe)
            probes.append((network, replace(found, training={})))
            if details is None:
                details = retrieval_details(train, test, level, config.retrieval)
                chance = chance_shares(train, test)
        recalls.append(Row(name="chance", role="chance", shares=chance))
        measured: dict[Kind, Measurement] = {
            "retrieval": Measurement(rows=tuple(recalls), details=details),
            "linear": joined(probes),
        }
        protocols: dict[Kind, str] = {
            "retrieval": retrieval_text(session, centre),
            "linear": cached_text(session),
        }
        result = PairResult(sets=pair, measured=measured)
        write_result(session, "compare", protocols, [result], remark=config.remark)
