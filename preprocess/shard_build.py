"""One shard in progress: samples arrive in any order and are written in the plan's order."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from strata.files import write_atomic
from strata.format.manifest import canonical_json
from strata.format.schema import NO_LABEL, ShardEntry, SourceRow
from strata.preprocess.datasets.folder import Source, sample_key
from strata.preprocess.parts import Rejected, Sent
from strata.preprocess.shards import ShardWriter, shard_name
from strata.preprocess.worker import Task

__all__ = ["Message", "ShardBuild", "ShardRecord", "Waiting", "record_path", "task_of"]


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """Facts of a finished shard, stored in the progress folder until the manifest is written."""

    plan: str
    """Digest of the plan that it belongs to."""
    entry: ShardEntry | None
    """None if all its videos were rejected."""
    rows: tuple[SourceRow, ...]


def record_path(progress_folder: Path, index: int) -> Path:
    """Path of the record of a finished shard."""
    return progress_folder / f"{shard_name(index)}.json"


Message = Sent | Rejected


@dataclass
class Waiting:
    """Count of the messages that the driver holds for samples that cannot be written yet.

    Args:
        most_bytes: Bytes from which no more videos are started.
        most_parts: Parts, each an open file, from which no more videos are started.
        num_bytes: Bytes held.
        num_parts: Parts held.
    """

    most_bytes: int
    most_parts: int
    num_bytes: int = 0
    num_parts: int = 0

    @property
    def is_full(self) -> bool:
        """Whether no more videos may be started."""
        return self.num_bytes >= self.most_bytes or self.num_parts >= self.most_parts

    def add(self, message: Message) -> None:
        """Count a message that must wait."""
        if isinstance(message, Sent):
            self.num_bytes += message.part.num_bytes
            self.num_parts += 1

    def remove(self, message: Message) -> None:
        """Count a message that waits no longer."""
        if isinstance(message, Sent):
            self.num_bytes -= message.part.num_bytes
            self.num_parts -= 1


def task_of(source: Source, classes: Sequence[str]) -> Task:
    """The worker's task for a source that is on the disk."""
    if source.path is None:
        raise AssertionError(f"{source.name} is not on disk")
    return Task(
        path=source.path,
        name=source.name,
        file_name=source.file or source.name,
        key=sample_key(source.name),
        label=source.label,
        class_name=classes[source.label] if source.label != NO_LABEL else None,
    )


class ShardBuild:
    """One shard in progress: takes messages in any order, writes samples in the plan's order.

    Args:
        folder: Where the shard goes.
        progress_folder: Where its record goes.
        index: Its number.
        sources: Its videos in the plan's order.
        classes: Class names by label.
        plan_digest: Of the plan, for the record.
        slice_name: For the temporary name.
    """

    def __init__(
        self,
        folder: Path,
        progress_folder: Path,
        index: int,
        sources: Sequence[Source],
        classes: Sequence[str],
        *,
        plan_digest: str,
        slice_name: str,
    ) -> None:
        self.index = index
        self._plan_digest = plan_digest
        self._slice_name = slice_name
        self._folder = folder
        self._progress_folder = progress_folder
        self._sources = sources
        self._classes = classes
        self._next = 0
        self._waiting: dict[int, list[Message]] = {}
        self._rows: list[SourceRow] = []
        self._num_frames = 0
        self._writer: ShardWriter | None = None

    @property
    def next(self) -> int:
        """The place whose messages are written immediately."""
        return self._next

    @property
    def is_complete(self) -> bool:
        """Whether every source was written or rejected, so that `seal` can be called."""
        return self._next == len(self._sources)

    def source_name(self, place: int) -> str:
        """The source at a place."""
        return self._sources[place].name

    def tasks(self) -> Iterator[tuple[int, Task | Rejected]]:
        """Each place with its task, or with the fault that was found before decoding."""
        for place, source in enumerate(self._sources):
            if source.fault is not None:
                yield place, Rejected(*source.fault)
            else:
                yield place, task_of(source, self._classes)

    def forget(self, place: int, waiting: Waiting) -> None:
        """Drop the messages that a worker sent for a place before it died."""
        if place == self._next and self._writer is not None:
            self._writer.drop_sample()
        for message in self._waiting.pop(place, []):
            waiting.remove(message)
            _close(message)

    def put(self, place: int, message: Message, waiting: Waiting) -> None:
        """Write or store a message for a place; then write the messages that waited for it."""
        if place != self._next:
            self._waiting.setdefault(place, []).append(message)
            waiting.add(message)
            return
        self._apply(message)
        while self._next in self._waiting:
            place = self._next
            for message in self._waiting.pop(place):
                waiting.remove(message)
                self._apply(message)
            if self._next == place:
                break  # More messages of this sample will come.

    def _apply(self, message: Message) -> None:
        source = self._sources[self._next]
        match message:
            case Sent(part=part):
                if self._writer is None:
                    self._writer = ShardWriter(self._folder, self.index, tag=self._slice_name)
                    self._writer.begin_sample()
                try:
                    self._writer.add(part.members, message.descriptor, part.num_bytes)
                finally:
                    message.close()
                if part.num_frames is None:
                    return
                position = self._writer.num_samples
                self._writer.end_sample()
                self._num_frames += part.num_frames
                row = SourceRow(
                    source=source.name,
                    status="written",
                    key=part.members[0][0].partition(".")[0],
                    label=source.label,
                    num_frames=part.num_frames,
                    position=position,
                    notes=list(part.notes) or None,
                )
            case Rejected(kind, detail):
                if self._writer is not None:
                    self._writer.drop_sample()
                row = SourceRow(
                    source=source.name,
                    status="rejected",
                    label=source.label,
                    reason=kind.value,
                    detail=detail,
                )
        self._rows.append(row)
        self._next += 1
        if not self.is_complete and self._writer is not None:
            self._writer.begin_sample()

    def seal(self) -> None:
        """Finish the shard under its final name, then write its record."""
        entry = None
        if self._writer is not None and self._writer.num_samples:
            num_bytes, sha256, index_sha256 = self._writer.finish()
            entry = ShardEntry(
                name=self._writer.path.name,
                num_samples=self._writer.num_samples,
                num_frames=self._num_frames,
                num_bytes=num_bytes,
                sha256=sha256,
                index_sha256=index_sha256,
            )
        else:
            self.discard()
        record = ShardRecord(plan=self._plan_digest, entry=entry, rows=tuple(self._rows))
        content = canonical_json(dataclasses.asdict(record))
        write_atomic(record_path(self._progress_folder, self.index), content)

    def discard(self) -> None:
        """Remove unfinished files and drop stored messages; a finished shard is kept."""
        if self._writer is not None:
            self._writer.discard()
        for messages in self._waiting.values():
            for message in messages:
                _close(message)
        self._waiting.clear()


def _close(message: Message) -> None:
    if isinstance(message, Sent):
        message.close()
