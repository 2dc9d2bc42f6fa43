"""Output of an evaluation: printed figures, report.json and its page."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from strata import commands
from strata.config import plain
from strata.eval.report import write_page
from strata.eval.results import EvaluationResult, Kind, PairResult, write_json
from strata.eval.session import Session
from strata.eval.settings import OneNetwork
from strata.eval.summary import full_text

__all__ = ["write_result"]


def write_result(
    session: Session,
    name: str,
    protocols: Mapping[Kind, str],
    pairs: Sequence[PairResult],
    *,
    path: Path | None = None,
    remark: str = "",
) -> None:
    """Print the figures, and write report.json and its page. Rank 0 does.

    Args:
        session: The evaluation.
        name: Of the evaluation.
        protocols: Each protocol in words.
        pairs: One result for each pair of sets.
        path: The file; by default `report_path`.
        remark: A sentence of the page, above the figures.
    """
    if not session.world.is_first:
        return
    config = session.config
    result = EvaluationResult(
        name=name,
        protocols=protocols,
        is_untrained=isinstance(config, OneNetwork) and config.weights == "untrained",
        checkpoint=session.checkpoint,
        checkpoint_digest=hashlib.sha256(session.networks.identity.encode()).hexdigest(),
        step=session.state.step,
        settings=session.settings(),
        num_ranks=session.world.size,
        device=session.device.type,
        pretraining=plain(session.state.config),
        pretraining_manifest_digest=session.state.manifest_digest,
        pairs=tuple(pairs),
        remark=remark,
    )
    path = path or session.report_path(name, [pair.sets for pair in pairs])
    write_json(result, path)
    print(full_text(result))
    # Last: a video that cannot be read any more costs the page and not the figures.
    page = path.with_suffix(".html")
    write_page(result, page)
    print(f"  written to {path} and {page}\nto use the encoder elsewhere:")
    words = ("--checkpoint", config.checkpoint, "--out", "exported")
    print(f"  {commands.line('export', *words)}", flush=True)
