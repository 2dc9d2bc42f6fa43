"""`tools/verify_shards.py FOLDER` names every broken sample, and reads every file once."""

import shutil
from pathlib import Path

import psutil
import pytest

from strata.errors import ShardError
from strata.format.schema import NormalForm
from strata.preprocess.audit import check_folder
from strata.preprocess.audit_command import main as verify
from tests.support.shard_edits import flip, place_of
from tests.support.shard_folders import HEIGHT, WIDTH, make_shards

FORMS = {
    "jpeg": NormalForm(width=WIDTH, height=HEIGHT, segment_frames=20),
    "mp4": NormalForm(width=WIDTH, height=HEIGHT, payload="mp4", segment_frames=20),
}


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / request.param
    make_shards(
        folder, num_videos=8, num_classes=2, shard_size=4, seed=3, form=FORMS[request.param]
    )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def named(faults: list[str]) -> set[str]:
    """Samples in lines of the form `shard: sample: fault`."""
    return {f.split(": ")[1] for f in faults if ": video-" in f}


@pytest.mark.parametrize("ext", ["first", "last", "frames.i32", "json", "header", "padding"])
def test_a_flip_in_any_part_names_its_sample(folder: Path, ext: str):
    kind = "jpg" if folder.name == "jpeg" else "mp4"
    member = {"first": f"000.{kind}", "last": f"001.{kind}", "padding": "json"}.get(ext, ext)
    path, start, size = place_of(folder, 5, "frames.i32" if ext == "header" else member)
    match ext:
        case "header":
            places = range(start - 512, start, 37)
        case "padding":
            # Behind the facts of sample 4: in front of the first member of sample 5.
            path, start, size = place_of(folder, 4, "json")
            places = [start + size]
        case _:
            places = range(start, start + size, 1 + size // 40)
    for place in places:
        flip(path, place)
        faults = check_folder(folder, decode=0, workers=1)
        assert named(faults) == {"video-0005"}, place
        assert faults[-1] == "shard-000001.tar: its SHA-256 is not what the manifest says"
        flip(path, place)
    assert check_folder(folder, decode=0) == []


def test_all_broken_samples_are_named_by_default(folder: Path, capsys: pytest.CaptureFixture[str]):
    kind = "jpg" if folder.name == "jpeg" else "mp4"
    for sample in (0, 2, 3, 7):
        path, start, size = place_of(folder, sample, f"000.{kind}")
        flip(path, start + size // 2)
    with pytest.raises(ShardError, match="6 faults"):
        verify([str(folder)])
    output = capsys.readouterr().out
    for sample in range(8):
        assert (f"video-{sample:04d}: " in output) == (sample in (0, 2, 3, 7))


def test_every_file_is_read_once(folder: Path):
    process = psutil.Process()
    check_folder(folder, decode=0, workers=1)
    before = process.io_counters().read_chars  # pyright: ignore[reportAttributeAccessIssue]
    assert check_folder(folder, decode=0, workers=1) == []
    read = process.io_counters().read_chars - before  # pyright: ignore[reportAttributeAccessIssue]
    tars = sum(p.stat().st_size for p in folder.glob("*.tar"))
    others = sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".tar")
    # The manifest is read once more to be held against its own spelling; frame tables too.
    assert tars <= read <= tars + 2 * others + 8 * 1024 + 8192


def test_a_cut_off_shard_names_what_is_lost(folder: Path):
    path, start, _ = place_of(folder, 6, "frames.i32")
    path.write_bytes(path.read_bytes()[: start + 10])
    faults = check_folder(folder, decode=0)
    assert named(faults) == {"video-0006", "video-0007"}


def test_a_damaged_index_hides_no_sample(folder: Path):
    index = folder / "shard-000001.idx"
    flip(index, 30)
    path, start, size = place_of_member(folder, 6)
    flip(path, start + size // 2)
    faults = check_folder(folder, decode=0)
    assert "shard-000001.idx: its SHA-256 is not what the manifest says" in faults
    assert named(faults) == {"video-0006"}
    index.unlink()
    faults = check_folder(folder, decode=0)
    assert "shard-000001.idx: missing" in faults
    assert named(faults) == {"video-0006"}


def place_of_member(folder: Path, sample: int) -> tuple[Path, int, int]:
    import tarfile

    path = folder / "shard-000001.tar"
    with tarfile.open(path) as tar:
        info = next(m for m in tar if m.name.startswith(f"video-{sample:04d}.000"))
    return path, info.offset_data, info.size
