"""The table that `tools/shard.py` prints at its end."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from strata.format.schema import NO_LABEL, SAMPLES_NAME, Manifest
from strata.preprocess.datasets.listing import some_of

__all__ = ["closing_table"]

_SHOWN_NOTES = 10
"""Videos with a note that the table names."""


def closing_table(
    manifest: Manifest, folder: Path | str, seconds: float, notes: Sequence[str] = ()
) -> str:
    """Counts of written, absent and rejected sources with reasons and notes, as text.

    Args:
        manifest: Of the set.
        folder: The set's folder.
        seconds: Duration of the run; 0 leaves out the line.
        notes: Notes of the search for sources.
    """
    rows = manifest.rows
    count = Counter(row.status for row in rows)
    num_frames = sum(s.num_frames for s in manifest.shards)
    num_bytes = sum(s.num_bytes for s in manifest.shards)
    labelled = len({r.label for r in manifest.written} - {NO_LABEL})
    lines = [f"{manifest.dataset} {manifest.split} -> {folder}"]

    def add(name: str, value: int, remark: str = "") -> None:
        lines.append(f"  {name:<24}{value:>12,}  {remark}".rstrip())

    classes = f"{labelled} of {len(manifest.classes)} classes" if manifest.classes else "no labels"
    add("listed", len(rows))
    add("written", count["written"], f"{classes}, {len(manifest.shards)} shards")
    absent = [r.source for r in rows if r.status == "absent"]
    add("absent", len(absent), some_of(absent))
    rejected = [r for r in rows if r.status == "rejected"]
    add("rejected", len(rejected))
    for reason in sorted({r.reason or "" for r in rejected}):
        names = [r.source for r in rejected if r.reason == reason]
        add(f"  {reason}", len(names), some_of(names))
    per_frame = f"{num_bytes / num_frames:,.0f} a frame" if num_frames else ""
    noted = [r for r in rows if r.notes]
    if noted:
        add("written with a note", len(noted))
        lines.extend(
            f"    {some_of([r.source])}: {'; '.join(r.notes or ())}" for r in noted[:_SHOWN_NOTES]
        )
        if len(noted) > _SHOWN_NOTES:
            lines.append(f"    ... the others in {folder}/{SAMPLES_NAME}")
    add("frames", num_frames)
    add("bytes", num_bytes, per_frame)
    if seconds:
        rate = f"{(count['written'] + len(rejected)) / seconds:.1f} videos/s"
        lines.append(f"  {'seconds':<24}{seconds:>12,.1f}  {rate}")
    lines.extend(f"  note: {note}" for note in notes)
    return "\n".join(lines)
