"""Grids as they are given: what is shipped, what is refused, what a command looks like."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from strata.config import parse_config
from strata.errors import ConfigError
from strata.tools.ablation import following, gpu_shares, main
from strata.tools.ablation_grid import AblateConfig, pretraining
from strata.tools.ablation_page import write_tables
from strata.tools.ablation_table import read_json
from strata.tools.launchers import program
from strata.train.config import TrainConfig
from tests.support.commands import ROOT

GRIDS = sorted((ROOT / "configs" / "ablate").glob("*.yaml"))


def load(path: Path) -> AblateConfig:
    return parse_config(AblateConfig, ["--config", str(path)], prog="grid", description="")


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_shipped_grids_are_understood(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    assert main(["--config", str(path), "--plan_only", "true"]) == 0
    config, lines = load(path), capsys.readouterr().out.splitlines()
    rows = config.rows.values()
    commands = [line for line in lines if line.startswith((config.launcher, "OMP"))]
    splits, seeds, columns = len(config.splits) or 1, len(config.seeds), len(config.evaluations)
    trained = sum(not row.untrained for row in rows)
    drawn = sum(bool(row.untrained) and not row.pixels for row in rows)
    pixels = sum(bool(row.pixels) for row in rows)
    runs = splits * ((trained + drawn) * seeds + pixels)
    assert len(commands) == splits * seeds * trained + columns * runs
    assert sum("--weights untrained" in line for line in lines) == splits * seeds * columns * drawn
    assert sum("--weights motion" in line for line in lines) <= splits * columns
    assert (commands != lines) == bool(config.rates.stage_1)
    assert not (ROOT / config.out).exists()


def test_a_student_waits_for_its_teacher_of_the_same_split_and_seed():
    config = load(ROOT / "configs" / "ablate" / "ucf101_small.yaml")
    cells = config.cells()
    student = next(c for c in cells if (c.row, c.split, c.seed) == ("distilled", 2, 1))
    teacher = next(c for c in cells if (c.row, c.split, c.seed) == ("difference-stage1", 2, 1))
    assert cells.index(teacher) < cells.index(student)
    words = pretraining(config, student)
    assert words[words.index("--method.teacher") + 1] == str(teacher.run)
    other = next(c for c in cells if c.row == "paper")
    waiting = [(1, student), (2, other)]
    assert following(waiting, [(0, teacher)]) == (2, other)
    assert following(waiting, []) == (1, student)
    assert not student.can_start()


def test_table_3_has_its_four_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    config = load(ROOT / "configs" / "ablate" / "table3.yaml")
    terms = {}
    for cell in config.cells():
        if not config.rows[cell.row].untrained:
            words = pretraining(config, cell)
            built = parse_config(TrainConfig, words, prog="train", description="")
            assert built.seed == cell.seed
            weights = vars(built.method.weights)
            active = {name for name, weight in weights.items() if weight}
            terms.setdefault(cell.row, set()).add(frozenset(active))
    both = {"augmentation_low", "augmentation_mid"} | {
        f"retrieval_{level}" for level in ("low", "mid", "high")
    }
    shared = {"instance", "prototype", "graph_low", "graph_mid"}
    assert terms == {
        "neither": {frozenset(shared)},
        "L_aug": {frozenset(shared | {"augmentation_low", "augmentation_mid"})},
        "L_ret": {frozenset(shared | both - {"augmentation_low", "augmentation_mid"})},
        "L_aug+L_ret": {frozenset(shared | both)},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, "rows is empty"),
        ({"rows": {"a b": {}}}, "the name 'a b' becomes that of a folder"),
        ({"rows": {"a": {"set": {"seed": 1}}}}, "a row sets seed, which the grid decides"),
        ({"rows": {"a": {"untrained": "b"}}}, "untrained is 'b'; name a row that is pretrained"),
        ({"rows": {"a": {"set": {"method.tau": 1}}}}, "row a: train/main.py: .*method.tau"),
        ({"rows": {"a": {"set": {"method.num_prototypes": 0}}}}, "row a: train/main.py"),
        ({"seeds": [1, 1]}, "seeds .1, 1. repeat; each counts once"),
        ({"splits": [1]}, "a grid with splits has a test set by split; leave out test"),
        ({"rows": {"a": {"pixels": "motion"}}}, "name that in untrained"),
        ({"rates": {"stage_1": 5}}, "rates: give stage_1 and stage_2, or neither"),
        ({"side_by_side": 0}, "side_by_side is 0; use 1 or more"),
        ({"test": None}, "evaluation r has no test set"),
        ({"evaluations": {"r": {"protocol": "knn"}}}, "evaluations"),
        (
            {"evaluations": {"r": {"protocol": "retrieval", "set": {"features.clips": 1}}}},
            "evaluation r: eval/main.py retrieval: .*features.clips",
        ),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    grid = {
        "pretrain": str(ROOT / "configs/pretrain/demo.yaml"),
        "shards": "train",
        "test": "test",
        "out": str(tmp_path / "out"),
        "rows": {"a": {}},
        "evaluations": {"r": {"protocol": "retrieval"}},
        "launcher": "false",
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid | changes))
    with pytest.raises(ConfigError, match=message):
        main(["--config", str(path)])
    assert not (tmp_path / "out" / "rows").exists()


def test_gpu_hours_are_epochs_of_videos_at_the_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    no_long = {f"method.weights.retrieval_{level}": 0 for level in ("low", "mid", "high")}
    schedule = {"schedule.epochs": 10, "schedule.second_stage_epoch": 4}
    grid = {
        "pretrain": str(ROOT / "configs/pretrain/demo.yaml"),
        "shards": "data",
        "splits": [1, 3],
        "seeds": [0, 1, 2],
        "set": schedule | {"schedule.lr_drop_epochs": []},
        "out": str(tmp_path / "out"),
        "rows": {
            "both": {},
            "one": {"set": no_long},
            "untrained": {"untrained": "both"},
            "motion": {"untrained": "one", "pixels": "motion"},
        },
        "evaluations": {"r": {"protocol": "retrieval"}},
        "launcher": "python",
        "rates": {"stage_1": 10, "stage_2": 5, "num_videos": 3600, "source": "a guess"},
        "plan_only": True,
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    assert main(["--config", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Six runs: 4 epochs of 360 s and 6 of 720 s, or ten of 360 s.
    assert lines[-3].startswith("both: 6 pretrainings of 4 epochs without and 6 with")
    assert lines[-3].endswith("9.6 GPU-hours")
    assert lines[-2].endswith("10 epochs without and 0 with the long sequence, 6.0 GPU-hours")
    assert lines[-1].startswith("in all 15.6 GPU-hours of pretraining at 10 and 5 samples/s (a gu")
    commands = lines[:-3]
    assert len(commands) == 12 + 12 + 6 + 2
    (one,) = (c for c in commands if "rows/both/split-3/seed-2/run --resume" in c)
    assert "--data.shards data/train03" in one
    assert "--seed 2" in one
    (two,) = (c for c in commands if "motion" in c and "split-1" in c)
    assert "--train data/train01 --test data/test01" in two
    assert "--checkpoint " + str(tmp_path / "out/rows/one/split-1/seed-0/run") in two
    assert "--weights motion --seed 0" in two


def test_launchers_run_in_this_environment():
    assert program(["python"]) == [sys.executable]
    command = program(["deepspeed", "--num_gpus", "2"])
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[-2] == "--master_port"
    assert "--master_port" not in program(["deepspeed", "--hostfile", "hosts"])
    assert program(["deepspeed", "--master_port=1"]).count("--master_port=1") == 1
    assert program(["torchrun", "--"])[-1] == "--"
    assert program(["srun", "python"]) == ["srun", "python"]


def shares(monkeypatch: pytest.MonkeyPatch, gpus: int, visible: str, runs: int, launcher: str):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return [each.get("CUDA_VISIBLE_DEVICES") for each in gpu_shares(runs, launcher.split())]


def test_runs_side_by_side_share_the_gpus(monkeypatch: pytest.MonkeyPatch):
    assert shares(monkeypatch, 4, "", 2, "deepspeed") == ["0,1", "2,3"]
    assert shares(monkeypatch, 4, "7,5,3,1", 4, "python") == ["7", "5", "3", "1"]
    assert shares(monkeypatch, 1, "", 2, "python") == ["0", "0"]
    assert shares(monkeypatch, 2, "5,6", 4, "python") == ["5", "5", "6", "6"]
    # One run has all, as the launcher likes; without GPUs nothing is divided.
    assert shares(monkeypatch, 4, "", 1, "deepspeed --num_gpus 2") == [None]
    assert shares(monkeypatch, 0, "", 2, "deepspeed --num_gpus 2") == [None, None]
    with pytest.raises(ConfigError, match="the launcher's --num_gpus would choose GPUs; leave it"):
        shares(monkeypatch, 4, "", 2, "deepspeed --num_gpus=2")
    with pytest.raises(
        ConfigError, match="3, but 4 GPUs are visible; use a divisor or a multiple of 4"
    ):
        shares(monkeypatch, 4, "", 3, "deepspeed")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{", b"[" * 100_000])
def test_a_record_of_a_grid_that_is_none_is_one_line(content: bytes, tmp_path: Path):
    path = tmp_path / "cell.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cell\.json is not valid"):
        read_json(path)


def test_a_record_has_a_page_for_a_browser_and_one_in_markdown(tmp_path: Path):
    def over(mean: float) -> dict[str, Any]:
        return {"mean": mean, "deviation": 0.02, "error": 0.01, "num_runs": 2}

    figures = {"retrieval": {"made": {"R@1": over(0.4), "R@5": over(0.7)}}}
    row = {"pretrain": None, "untrained": None, "pixels": None, "set": {"method.rate": 0.2}}
    summary = {
        "title": "A grid of <rows>",
        "grid": {
            **{"splits": [], "seeds": [0, 1], "set": {}, "shards": "shards/a"},
            **{"pretrain": "a.yaml", "rows": {"one": row, "b<c": row}},
        },
        "evaluations": {"retrieval": {"protocol": "retrieval", "in_words": {"one": "as it is"}}},
        "chance": {"retrieval": {"made": {"R@1": 0.1, "R@5": 0.5}}},
        "rows": {
            "one": {
                **{"num_runs": 2, "num_complete": 2, "figures": figures},
                **{"health": {"prototypes_in_use": over(9.0)}, "pretraining_s": over(60.0)},
            },
            "b<c": {
                **{"num_runs": 2, "num_complete": 0, "figures": {"retrieval": {}}},
                **{"health": {}, "pretraining_s": None},
            },
        },
        "runs": [
            {"name": "b<c, seed 0", "status": "failed", "reason": "it ended", "evaluations": {}}
        ],
        **{"strata": "0.1.0", "commits": ["c0ffee"], "total_s": 1.0},
    }
    assert "one" in write_tables(tmp_path, summary)
    page = (tmp_path / "ablation.html").read_text()
    markdown = (tmp_path / "ablation.md").read_text()
    for shown in ("40.0 ± 2.0", "not measured", "0 of 2 complete", "as it is", "9.000 ± 0.020"):
        assert shown in page
        assert shown in markdown
    assert "A grid of &lt;rows&gt;" in page
    assert "b&lt;c, seed 0" in page
    assert "`" not in page.partition("<body>")[2]
