"""Write a checkpoint's encoder for use elsewhere.

python tools/export.py --checkpoint runs/a --out exported
"""

import sys
from collections.abc import Sequence

from strata.config import parse_config
from strata.errors import exit_with_one_line
from strata.train.export import ExportCommand, write_export


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    described = "Write a checkpoint's encoder as safetensors or as a torch.export program."
    command = parse_config(ExportCommand, argv, prog="tools/export.py", description=described)
    out = write_export(command)
    print(f"wrote {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    print(f"{out / 'README.md'} has the code that loads it")
    if command.push_to_hub:
        print(f'on the hub: strata.load_encoder("{command.push_to_hub}")')


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
