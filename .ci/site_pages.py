"""Pages of the site that are made from other files: README, changelog, help of commands, recipes.

A hook of MkDocs. Links from the documentation to files of the repository become links to the pages
made from them; a link to any other file fails the strict build.
"""

import contextlib
import importlib
import io
import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from strata.recipes import recipes, summary_of

ROOT = Path(__file__).resolve().parent.parent
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
COMMANDS = {
    "strata shard folder": ("preprocess.command", ["folder"]),
    "strata shard ucf101": ("preprocess.command", ["ucf101"]),
    "strata shard kinetics400": ("preprocess.command", ["kinetics400"]),
    "strata shard merge": ("preprocess.command", ["merge"]),
    "strata shard index": ("preprocess.command", ["index"]),
    "strata verify": ("preprocess.audit_command", []),
    "strata pretrain": ("train.main", []),
    "strata evaluate retrieval": ("eval.main", ["retrieval"]),
    "strata evaluate linear": ("eval.main", ["linear"]),
    "strata evaluate finetune": ("eval.main", ["finetune"]),
    "strata evaluate compare": ("eval.main", ["compare"]),
    "strata evaluate temporal_cam": ("eval.main", ["temporal_cam"]),
    "strata evaluate features": ("eval.main", ["features"]),
    "strata export": ("tools.export", []),
    "strata inspect": ("tools.inspect_batch", []),
    "strata ablate": ("tools.ablation", []),
    "strata demo": ("tools.demo_steps", []),
}
"""Commands whose complete help is a page's section: module, and words before --help_all."""
_OTHER_FILES = {
    "configs": "recipes.md",
    "tools/slurm.sbatch": "slurm.md",
    "LICENSE": "license.md",
    "CITATION.cff": "citation.md",
}
"""Files and folders outside docs/ that pages link to, and the page that shows them."""


def on_startup(**_: Any) -> None:
    """Put the packages into one tree, as pyproject.toml maps them, to read their docstrings."""
    tree = ROOT / "build" / "sources" / "strata"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for path in (ROOT / "strata").iterdir():
        (tree / path.name).symlink_to(path)
    for name in ("preprocess", "dataload", "train", "eval", "tools"):
        (tree / name).symlink_to(ROOT / name)


def commands_page() -> str:
    """The complete help of every command, which is also that of `--help_all`."""
    os.environ["COLUMNS"] = "100"
    os.environ["STRATA_PROGRAM"] = "strata"
    parts = ["# Command line", "", "What `--help_all` prints; `--help` prints what matters most."]
    for name, (module, words) in COMMANDS.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(f"strata.{module}").main([*words, "--help_all"])
        parts += ["", f"## {name}", "", "```text", said.getvalue().rstrip(), "```"]
    return "\n".join(parts) + "\n"


def recipes_page() -> str:
    """Every recipe, with its text."""
    parts = ["# Recipes", "", "`--config NAME` takes them by name from any folder."]
    for name, path in recipes().items():
        parts += ["", f"## {name}", "", f"{summary_of(path)}.", ""]
        parts += ["```yaml", path.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """The text of every made page by its path in the site."""
    made = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in COPIED.items()}
    slurm = (ROOT / "tools" / "slurm.sbatch").read_text(encoding="utf-8")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    made["slurm.md"] = f"# Slurm\n\n```bash\n{slurm}```\n"
    made["license.md"] = f"# Licence\n\n```text\n{licence}```\n"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    made["citation.md"] = f"# Citation\n\n```yaml\n{citation}```\n"
    return made | {"commands.md": commands_page(), "recipes.md": recipes_page()}


def linked(text: str, folder: str) -> str:
    """A page's text with its links to files of the repository led to pages of the site.

    Args:
        text: Markdown.
        folder: Where the page is in the repository: `docs`, or empty for its root.
    """

    def page_of(target: str) -> str:
        name, hash_, anchor = target.partition("#")
        if not name or "://" in name:
            return target
        path = posixpath.normpath(posixpath.join(folder, name))
        found = COPIED.get(path)
        for place, page in _OTHER_FILES.items():
            if path == place or path.startswith(f"{place}/"):
                found = page
        if found is None and path.startswith("docs/"):
            found = path.removeprefix("docs/")
        return f"{found or target}{hash_}{anchor}"

    text = re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({page_of(m[1])})", text)
    return re.sub(r"^(\[[\w-]+\]: )(\S+)$", lambda m: m[1] + page_of(m[2]), text, flags=re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages."""
    for page, text in pages().items():
        files.append(File.generated(config, page, content=linked(text, "")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page of docs/ to the made pages."""
    if page.file.generated_by is not None and page.file.abs_src_path is None:
        return markdown
    return linked(markdown, "docs")
