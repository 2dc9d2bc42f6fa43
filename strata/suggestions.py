"""Suggest the known name that a mistyped one probably means."""

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]

_CUTOFF = 0.6
"""Lowest similarity of a suggestion, difflib's own; below it names have little in common."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remark for an error message about an unknown name.

    A dotted name is compared in full and by its last part, so that `--batch_size` suggests
    `data.batch_size`.

    Args:
        word: What the user wrote.
        known: The names that exist.

    Returns:
        ` (did you mean NAME?)`, or nothing if no name is similar.
    """
    lower = word.lower()
    best: tuple[float, str] = (_CUTOFF, "")
    for name in known:
        pairs = [(lower, name), (lower.rpartition(".")[2], name.rpartition(".")[2])]
        if "." in word:
            # The part before the dot counts too.
            ratios = [difflib.SequenceMatcher(None, *pairs[0]).ratio()]
        else:
            ratios = [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]
        best = max(best, (max(ratios), name), key=lambda scored: scored[0])
    return f" (did you mean {best[1]}?)" if best[1] else ""
