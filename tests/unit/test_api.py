"""The public functions and the examples, in a plain process without a launcher."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import strata
from strata import api
from strata.config import parse_config
from strata.dataload.clips import ClipSpec
from strata.dataload.loader import TrainLoader
from strata.distributed import World
from strata.errors import CheckpointError, ConfigError, ShardError
from strata.eval.evaluations.compare import CompareEvaluation
from strata.preprocess.options import parse_command
from strata.train.config import TrainConfig
from strata.train.export import ExportCommand, write_export
from strata.train.models.backbones import BackboneConfig
from strata.train.models.inputs import normalise
from tests.support.checkpoints import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL: dict[str, Any] = {"size": 32, "clips": ClipSpec(clip_frames=4), "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = BackboneConfig(width=8)
    return checkpoint(tmp_path_factory.mktemp("run") / "step-1", model, clip_frames=8)


def test_importing_takes_no_torch_and_every_name_is_there():
    code = "import sys, strata; assert not {'torch', 'numpy'} & set(sys.modules); strata.x"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "module 'strata' has no attribute 'x'" in done.stderr
    for name in strata.__all__:
        assert getattr(strata, name).__doc__ or name == "__version__", name
    assert {*api.__all__, "__version__"} == set(strata.__all__)


def test_every_module_says_what_is_public():
    for folder in ("strata", "preprocess", "dataload", "train", "eval", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            command = 'if __name__ == "__main__":' in text
            assert "\n__all__ = [" in text or command or path.name == "__init__.py", path


def test_batches_are_those_of_the_loader_and_continue_from_a_state(shards: Path):
    def made() -> strata.PretrainingBatches:
        return strata.pretraining_batches(
            shards / "train", batch_size=8, epochs=2, seed=3, long=True, **SMALL
        )

    batches = made()
    every = list(batches)
    assert len(every) == len(batches) == 6
    assert batches.state_dict()["epoch"] == 2
    assert list(batches) == []
    first = every[0]
    assert first.short.shape == (8, 2, 3, 4, 32, 32)
    assert first.long is not None
    assert first.long.shape == (8, 3, 8, 32, 32)
    loader = TrainLoader(
        batches._shards,
        batches._config,
        batches._plan,
        world=World(),
        device=torch.device("cpu"),
        epochs=(0, 1),
        recipe=batches._recipe,
    )
    with loader:
        raw = next(iter(loader))
    assert torch.equal(first.short[:, 1], normalise(raw.short[:, 1], 3))
    # A state taken after four batches continues with the fifth, in the second epoch.
    stopped, states = made(), []
    for _ in zip(range(4), stopped, strict=False):
        states.append(stopped.state_dict())
    resumed = made()
    resumed.load_state_dict(states[-1])
    for ours, theirs in zip(resumed, every[4:], strict=True):
        assert torch.equal(ours.short, theirs.short)
        assert torch.equal(ours.samples, theirs.samples)
    other = strata.pretraining_batches(shards / "train", batch_size=4, **SMALL)
    with pytest.raises(ConfigError, match="other shards, another batch_size or another seed"):
        other.load_state_dict(states[-1])


def test_clips_are_every_video_once(shards: Path):
    opened = strata.open_shards(shards / "test")
    found = list(strata.clips(opened, num_clips=2, videos_per_batch=5, **SMALL))
    assert torch.cat([b.samples for b in found]).tolist() == list(range(12))
    assert torch.cat([b.labels for b in found]).tolist() == opened.labels.tolist()
    assert found[0].clips.shape == (5, 2, 3, 4, 32, 32)


def test_an_encoder_gives_the_same_features_from_a_run_and_an_export(
    run: Path, shards: Path, tmp_path: Path
):
    out = write_export(ExportCommand(checkpoint=run, out=tmp_path / "out", names="strata"))
    ours = strata.load_encoder(run, device="cpu")
    theirs = strata.load_encoder(str(out), device="cpu")
    assert (theirs.size, theirs.frames, theirs.training) == (32, 8, False)
    clips = next(iter(strata.clips(shards / "test", **SMALL))).clips[:, 0]
    with torch.inference_mode():
        assert torch.equal(ours(clips), theirs(clips))
    train, test = (
        strata.extract_features(ours, shards / name, num_clips=1) for name in ("train", "test")
    )
    assert test.videos("high").shape == (12, 64)
    assert strata.retrieval(test, test)["R@1"] == 1
    assert 0 <= strata.knn(train, test) <= 1
    assert strata.linear_probe(test, test, epochs=60, learning_rate=0.1).accuracy.top1 > 0.5


def test_errors_are_those_of_the_commands(tmp_path: Path, shards: Path):
    with pytest.raises(ShardError, match="does not exist"):
        strata.open_shards(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="the folder of 2 shard folders"):
        strata.pretraining_batches(shards)
    with pytest.raises(ConfigError, match="no setting batchsize"):
        strata.pretraining_batches(shards / "train", batchsize=4)
    with pytest.raises(ConfigError, match="fewer than one batch"):
        strata.pretraining_batches(shards / "train", device="cpu")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint and no export"):
        strata.load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist; give the folder of a run"):
        strata.load_encoder("nowhere")


def test_the_snippets_of_the_readme_run_as_they_stand(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The one for torchvision is run by tests/unit/train/test_export.py."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, target in (("runs/a", run), ("shards/mine", shards)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    public, torchvision, plain = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "torchvision" in torchvision
    scope: dict[str, Any] = {}
    exec(public, scope)
    assert scope["clips"].shape == (16, 2, 3, 16, 112, 112)
    exec(plain.replace("num_workers=4", "num_workers=0"), scope)
    assert scope["clips"].shape == (24, 16, 3, 48, 64)
    (commands,) = re.findall(r"```\n(pip install.*?)```", text, flags=re.DOTALL)
    said = [line.split("    #")[0].split()[1:] for line in commands.splitlines()]
    assert [words[0] for words in said] == ["install", "shard", "pretrain", "evaluate", "export"]
    assert parse_command(said[1][1:]).test_fraction == 0.3
    for words, root in ((said[2], TrainConfig), (said[3][1:], CompareEvaluation)):
        parse_config(root, words[1:], prog="x", description="")
    parse_config(ExportCommand, said[4][1:], prog="x", description="")


def test_examples_run(run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = {
        "own_training_loop": [shards / "train", tmp_path / "state.pt"],
        "losses_on_torchvision": [shards / "train"],
        "features_to_knn": [run, shards / "train", shards / "test"],
        "plain_webdataset": [shards / "test"],
    }
    said = {}
    for path in sorted((ROOT / "examples").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 40, path
        for _ in range(1 + (path.stem == "own_training_loop")):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(sys, "argv", [str(path), *map(str, arguments[path.stem])])
                runpy.run_path(str(path), run_name="__main__")
            said[path.stem] = said.get(path.stem, "") + capsys.readouterr().out
    assert said.keys() == arguments.keys()
    # Twice four batches of four: the second call goes through other videos than the first.
    lines = said["own_training_loop"].splitlines()
    videos = [set(map(int, line.split("]")[0].split("[")[1].split(","))) for line in lines]
    assert len(lines) == 8
    assert len(set().union(*videos[:6])) == 24
    assert "prototype " in said["losses_on_torchvision"]
    assert said["features_to_knn"].count("%") == 3
    shapes = [line for line in said["plain_webdataset"].splitlines() if "48, 64, 3" in line]
    assert len(shapes) == 12
    assert np.isfinite(float(lines[0].split()[-1]))
