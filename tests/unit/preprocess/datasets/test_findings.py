from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.preprocess.datasets.findings import findings
from strata.preprocess.datasets.listing import list_files
from strata.preprocess.datasets.official import find_hmdb51
from tests.unit.preprocess.datasets.test_folder import put
from tests.unit.preprocess.datasets.test_official import make_hmdb


def test_each_kind_of_gap_has_its_line_and_reason(tmp_path: Path) -> None:
    videos, splits = make_hmdb(tmp_path)
    put(splits / "jump_test_split1.txt", b"x_jump.avi 1\ny_jump.avi 2\n")
    put(videos / "jump.rar", b"archive")
    put(videos / "wave" / "a_wave.avi", b"")
    put(videos / "wave" / "q_wave.avi", b"other")
    put(videos / "wave" / "r_wave.avi.part", b"half")
    told = "\n".join(findings(find_hmdb51([videos], splits, "1"), list_files([videos])))
    for line in (
        "found: 3 of 6 videos",
        "missing, 2 videos of 1 classes without any: jump: the folder or archive of the class",
        "missing, 1 videos of classes that have others: dive/gone_dive.avi: the copy is incomplete",
        "empty, 1 files: wave/a_wave.avi: the download or the copy broke off",
        "unfinished, 1 files: wave/r_wave.avi.part: the download was stopped",
        "not listed, 1 videos: wave/q_wave.avi: of another split",
        "1 archives are not unpacked: jump.rar",
    ):
        assert line in told, told
    assert len(told.splitlines()) == 7


def test_a_complete_set_has_one_line(tmp_path: Path) -> None:
    videos, splits = make_hmdb(tmp_path)
    put(videos / "dive" / "gone_dive.avi", b"found")
    sets = find_hmdb51([videos], splits, "1")
    assert findings(sets, list_files([videos])) == ["found: 4 of 4 videos"]


def test_archives_are_named_where_no_video_is_found(tmp_path: Path) -> None:
    _, splits = make_hmdb(tmp_path)
    put(tmp_path / "other" / "wave.rar", b"archive")
    with pytest.raises(ConfigError, match=r"1 archives are not unpacked: wave\.rar"):
        find_hmdb51([tmp_path / "other"], splits, "1")
