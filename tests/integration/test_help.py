"""The shell completes the names of settings."""

import subprocess
import sys
from pathlib import Path

from tests.support.commands import ROOT


def test_bash_completes_the_settings(tmp_path: Path):
    """The commands of docs/operations.md in a real bash."""
    completed = subprocess.run(
        [sys.executable, "train/main.py", "--print_completion=shtab-bash"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    script = tmp_path / "complete.bash"
    script.write_text(completed.stdout)
    asked = """
        source "$1"
        COMP_WORDS=(train/main.py --data.batch) COMP_CWORD=1 COMP_LINE="" COMP_POINT=0
        how=$(complete -p train/main.py)
        [[ $how =~ -F\\ ([^ ]+) ]] && ${BASH_REMATCH[1]} train/main.py --data.batch train/main.py
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", asked, "bash", str(script)], capture_output=True, text=True, check=True
    )
    assert "--data.batch_size" in done.stdout.split()
