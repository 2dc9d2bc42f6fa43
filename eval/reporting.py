"""Reports a finished evaluation: the figures on the terminal, report.json and its page."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from strata import commands
from strata.config import plain
from strata.eval.report import write_page
from strata.eval.results import EvaluationResult, Kind, Measurement, PairResult, write_json
from strata.eval.session import OneNetwork, Session
from strata.eval.sets import SetPair
from strata.eval.summary import full_text

__all__ = ["report", "report_one", "report_path"]


def report_path(session: Session, name: str, sets: Sequence[SetPair]) -> Path:
    """The path of report.json: `out`, or in a folder of its own."""
    facts = [pair.facts() for pair in sets]
    default = session.folder(name, [session.settings(), facts]) / "report.json"
    return session.config.out or default


def report(
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
        session: What was evaluated.
        name: Of the evaluation.
        protocols: Each protocol in words.
        pairs: One result for each pair of sets.
        path: The file; by default `report_path`.
        remark: What the page says above the figures.
    """
    if not session.world.is_first:
        return
    config = session.config
    result = EvaluationResult(
        name=name,
        protocols=protocols,
        is_untrained=isinstance(config, OneNetwork) and config.weights == "untrained",
        checkpoint=session.found,
        checkpoint_digest=hashlib.sha256(session.identity.encode()).hexdigest(),
        step=session.state.step,
        settings=session.settings(),
        num_ranks=session.world.size,
        device=session.device.type,
        pretraining=plain(session.state.config),
        pretraining_manifest_digest=session.state.manifest_digest,
        pairs=tuple(pairs),
        remark=remark,
    )
    path = path or report_path(session, name, [pair.sets for pair in pairs])
    write_json(result, path)
    print(full_text(result))
    # Last: a video that can no longer be read costs the page and not the figures.
    page = path.with_suffix(".html")
    write_page(result, page)
    print(f"  written to {path} and {page}\nto use the encoder elsewhere:")
    words = ("--checkpoint", config.checkpoint, "--out", "exported")
    print(f"  {commands.line('export', *words)}", flush=True)


def report_one(
    session: Session,
    name: str,
    kind: Kind,
    text: str,
    pairs: Sequence[SetPair],
    measured: Sequence[Measurement],
    *,
    path: Path | None = None,
) -> None:
    """Report an evaluation by a single protocol; the arguments are those of `report`."""
    results = [
        PairResult(sets=pair, measured={kind: found})
        for pair, found in zip(pairs, measured, strict=True)
    ]
    report(session, name, {kind: text}, results, path=path)
