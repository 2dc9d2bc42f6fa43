"""Errors that a user can cause end a command with one line and exit code 2."""

import pickle

import pytest

from strata.errors import FaultKind, ShardError, VideoFault, exit_with_one_line


def test_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught, exit_with_one_line():
        raise ShardError("shard x:\n  broken")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: shard x: broken\n"


def test_the_rank_is_named_in_a_distributed_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit), exit_with_one_line():
        raise ShardError("broken")
    assert capsys.readouterr().err == "error (rank 3): broken\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), exit_with_one_line():
        raise KeyError("x")


def test_a_fault_survives_the_way_out_of_a_worker():
    fault = VideoFault(FaultKind.TRUNCATED, "a/b.mp4", "ends at frame 7")
    again = pickle.loads(pickle.dumps(fault))
    assert (again.kind, again.source, str(again)) == (
        FaultKind.TRUNCATED,
        "a/b.mp4",
        "a/b.mp4: truncated: ends at frame 7",
    )
