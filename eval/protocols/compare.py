"""Retrieval and the cached linear probe at once, of checkpoints beside untrained networks."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from strata.eval.linear_probe import LinearConfig
from strata.eval.nearest_videos import RetrievalConfig
from strata.eval.protocols.linear import cached_text, measure_cached_probe, refuse_cached
from strata.eval.protocols.named import ProtocolName
from strata.eval.protocols.retrieval import measure_retrieval, retrieval_text
from strata.eval.reporting import report
from strata.eval.results import Kind, Measurement, PairResult
from strata.eval.session import Evaluation, NamedNetwork, open_session, untrained_network
from strata.eval.sets import open_pair

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
        """Check the protocol.

        Raises:
            ConfigError: It has no cached probe.
        """
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
        # Features are encoded for the first protocol; the second one finds them in the cache.
        recall = measure_retrieval(session, networks, pair, config.retrieval, variants=False)
        probe = measure_cached_probe(session, networks, pair, config.probe)
        rows = tuple(row for row in probe.rows if row.role != "training")
        measured: dict[Kind, Measurement] = {
            "retrieval": recall,
            "linear": replace(probe, rows=rows),
        }
        protocols: dict[Kind, str] = {
            "retrieval": retrieval_text(session, config.retrieval.centre),
            "linear": cached_text(session),
        }
        result = PairResult(sets=pair, measured=measured)
        report(session, "compare", protocols, [result], remark=config.remark)
