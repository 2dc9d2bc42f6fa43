"""A `webdataset.WebDataset` of decoded clips and labels, for plain PyTorch without DALI."""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset import filters, shardlists
from webdataset.compat import WebDataset
from webdataset.handlers import reraise_exception
from webdataset.pipeline import DataPipeline
from webdataset.utils import pytorch_worker_info

from strata.counter_random import Stream, permutation, uniforms
from strata.dataload.clips import evaluation_clips, training_clip
from strata.dataload.decode_windows import read_windows
from strata.dataload.faults import SampleFaultError, UndecodableError
from strata.dataload.reader import ShardReader
from strata.dataload.storage import DownloadConfig
from strata.dataload.strip_decoder import StripDecoder
from strata.errors import ConfigError, ShardError, VideoFault
from strata.format.source_video import decode_frames

__all__ = ["ClipDataset", "webdataset"]

Sample = dict[str, Any]


class ClipDataset(WebDataset):
    """The pipeline that `webdataset` makes; `map`, `batched` and so on return such a pipeline.

    Samples are read by the shard's index and not member by member, so only the coded bytes of a
    clip are read, and every payload is grouped correctly (keys of others may have dots).

    Args:
        clips: Finds the samples of an epoch and decodes them.
        shuffle: Samples in the shuffle buffer; 0 for the order of the shards.
        handler: Of webdataset, for samples that do not decode.
    """

    def __init__(self, clips: "_Clips", shuffle: int, handler: Callable[[Exception], bool]) -> None:
        # Not by WebDataset's constructor, which would add the stages that read tars.
        DataPipeline.__init__(
            self,
            partial(clips.shards, shuffle > 0),
            shardlists.split_by_node,
            shardlists.split_by_worker,
            clips.samples,
            *([partial(clips.shuffled, shuffle)] if shuffle else []),
            filters.map(clips.decode, handler=handler),
        )
        self._clips = clips

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of samples and the places of clips of the next epoch.

        To be called before each epoch, as for torch's `DistributedSampler`; workers that persist
        see it too.

        Args:
            epoch: From 0 to 65,535.

        Raises:
            ConfigError: The number is out of range.
        """
        if not 0 <= epoch < 1 << 16:
            raise ConfigError(f"set_epoch: the epoch is {epoch}; use 0 to 65535")
        self._clips.epoch.fill_(epoch)


class _Clips:
    """The stages of the pipeline.

    Args:
        shards: Folder or URL.
        clip_frames: Frames of a clip, T.
        stride: Distance of its frames.
        random_place: Whether it is at a random place of the video.
        dtype: uint8 or a floating type.
        seed: Of orders and places.
        download: The local cache of a URL.
    """

    def __init__(
        self,
        shards: str | Path,
        *,
        clip_frames: int,
        stride: int,
        random_place: bool,
        dtype: torch.dtype,
        seed: int,
        download: DownloadConfig | None,
    ) -> None:
        self._shards, self._download = shards, download
        self._clip = {"clip_frames": clip_frames, "stride": stride}
        self._random_place, self._dtype, self._seed = random_place, dtype, seed
        # In shared memory: workers that persist over epochs see the number change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._reader: ShardReader | None = None
        self._process = 0
        self.reader()  # Opened here to report a faulty set at once.

    def __getstate__(self) -> dict[str, Any]:
        """Pickle for a worker, which opens the shards itself."""
        return {**vars(self), "_reader": None}

    def reader(self) -> ShardReader:
        """The shards, opened by each process for itself, also by one that was forked."""
        if self._reader is None or self._process != os.getpid():
            self._reader = ShardReader(self._shards, download=self._download)
            self._process = os.getpid()
        return self._reader

    def shards(self, shuffle: bool) -> Iterator[Sample]:
        """Each shard, in the same order on all ranks and workers."""
        names = [entry.name for entry in self.reader().manifest.shards]
        order = np.arange(len(names))
        if shuffle:
            order = permutation(self._seed, Stream.PLAIN_SHARDS, int(self.epoch), len(names))
        for number in order.tolist():
            yield {"url": names[number], "shard": number}

    def samples(self, shards: Iterator[Sample]) -> Iterator[Sample]:
        """Each sample of the shards, not yet read."""
        reader = self.reader()
        for shard in shards:
            for sample in reader.samples_of(shard["shard"]):
                yield {"__key__": reader.keys[sample], "__url__": shard["url"], "sample": sample}

    def shuffled(self, size: int, samples: Iterator[Sample]) -> Iterator[Sample]:
        """The samples in an order of this epoch, rank and worker."""
        generator = random.Random(f"{self._seed} {int(self.epoch)} {pytorch_worker_info()}")
        return filters.shuffle(size, initial=size, rng=generator)(samples)

    def decode(self, sample: Sample) -> Sample:
        """Read and decode the clip of a sample.

        Raises:
            ShardError: The sample is damaged, or its shard cannot be read.
        """
        reader, number = self.reader(), sample["sample"]
        length = reader.num_frames[[number]]
        if self._random_place:
            items = np.array([number])
            draws = uniforms(self._seed, Stream.PLAIN_CLIP, int(self.epoch), items, 0, 1)
            frames = training_clip(length, draws[:, 0], **self._clip)[0]
        else:
            frames = evaluation_clips(length, num_clips=1, **self._clip)[0, 0]
        try:
            pictures = _decode(reader, number, frames)
        except (SampleFaultError, VideoFault) as error:
            # A worker's error reaches the main process by its text alone.
            raise ShardError(f"{reader.location}: {error}") from error
        clip = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
        if self._dtype.is_floating_point:
            clip = clip.to(self._dtype).div_(255)
        label = int(reader.labels[number])
        return {k: sample[k] for k in ("__key__", "__url__")} | {"clip": clip, "label": label}


def _decode(reader: ShardReader, sample: int, frames: np.ndarray) -> np.ndarray:
    """The frames of a sample of any payload: `[T, height, width, 3]`, uint8, RGB."""
    form = reader.manifest.form
    windows = read_windows(reader, [sample], [frames])
    coded: Any = windows.coded[0]
    match form.payload:
        case "jpeg":
            try:
                return StripDecoder(len(frames), form.height, form.width).decode(coded)
            except UndecodableError as error:
                raise SampleFaultError([reader.fault(sample, str(error))]) from error
        case "mp4":
            key, count = reader.keys[sample], windows.num_frames
            chosen, again = np.unique(windows.places[0], return_inverse=True)
            return decode_frames(coded.tobytes(), key, count, chosen.astype(np.int64), form)[0][
                again
            ]
        case "foreign":
            return coded


def webdataset(
    shards: str | Path,
    *,
    clip_frames: int = 16,
    stride: int = 1,
    random_place: bool = False,
    dtype: torch.dtype = torch.uint8,
    shuffle: int = 0,
    seed: int = 0,
    download: DownloadConfig | None = None,
    handler: Callable[[Exception], bool] = reraise_exception,
) -> ClipDataset:
    """Read decoded clips and labels from a shard folder in plain PyTorch.

    Any folder that `tools/shard.py` wrote or indexed is read: payload `jpeg`, `mp4` (any codec, on
    the CPU) and `foreign`. DALI is not used. The result is a `webdataset.WebDataset`, so it is an
    `IterableDataset` for torch's `DataLoader` and has `map`, `to_tuple`, `batched` and so on:

        dataset = strata.dataload.webdataset("shards/ucf101/train01", shuffle=1000)
        loader = DataLoader(dataset, batch_size=32, num_workers=4)
        for epoch in range(10):
            dataset.set_epoch(epoch)
            for batch in loader:
                train(batch["clip"], batch["label"])

    Each sample is a dictionary:

    * `clip`: Tensor `[T, 3, height, width]` of `dtype`, RGB: 0 to 255 as uint8, 0 to 1 as a
      floating type. Height and width are those of the set's manifest.
    * `label`: int, an index into the manifest's classes; -1 without labels.
    * `__key__`, `__url__`: the sample's key and the name of its shard.

    Shards are split among ranks (`torch.distributed`, or RANK and WORLD_SIZE) and then among the
    loader's workers, so each sample occurs once in an epoch; workers beyond the number of shards
    have none. Ranks may get different numbers of samples: under DistributedDataParallel use
    webdataset's `repeat` and `with_epoch`.

    Args:
        shards: A shard folder, or the URL of one.
        clip_frames: Frames of a clip, T. A video that is too short repeats its last frame.
        stride: Distance of consecutive frames of a clip, in frames of the video.
        random_place: Whether the clip is at a random place of the video, by seed, epoch and
            sample; else at its centre.
        dtype: `torch.uint8` or a floating type.
        shuffle: Samples in the shuffle buffer, which holds their places and not their bytes. The
            order of shards is then random too. 0 keeps the order of the set.
        seed: Of orders and places, from 0.
        download: The local cache of shards from a URL.
        handler: What webdataset does with a sample that does not decode: `reraise_exception`, or
            for instance `webdataset.warn_and_continue`.

    Raises:
        ConfigError: An argument is out of its range, or the URL's protocol is not supported.
        ShardError: The folder is missing or its manifest is damaged; while iterating, a sample is
            damaged.
    """
    if clip_frames < 1 or stride < 1 or shuffle < 0 or seed < 0:
        raise ConfigError(
            f"webdataset: clip_frames is {clip_frames}, stride {stride}, shuffle {shuffle}, seed "
            f"{seed}; use 1 or more for the first two and 0 or more for the others"
        )
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise ConfigError(f"webdataset: dtype is {dtype}; use torch.uint8 or a floating type")
    clips = _Clips(
        shards,
        clip_frames=clip_frames,
        stride=stride,
        random_place=random_place,
        dtype=dtype,
        seed=seed,
        download=download,
    )
    return ClipDataset(clips, shuffle, handler)
