"""The Hugging Face hub: exports up and down. The only user of huggingface_hub, an extra.

The client finds the user's token itself (`hf auth login`, or HF_TOKEN) and the server in
HF_ENDPOINT; neither passes through this code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from strata.errors import CheckpointError, ConfigError

__all__ = ["download", "push", "require_hub"]

_FILES = ["config.json", "model.safetensors", "README.md"]


def require_hub() -> None:
    """Check that the client is installed.

    Raises:
        ConfigError: It is not.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the hub needs the package huggingface_hub; install strata-video[hub]"
        ) from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn errors of the client and the network into one line."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    faults = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
    try:
        yield
    except (*faults, httpx2.HTTPError) as error:
        lines = [text.strip() for text in str(error).splitlines() if text.strip()]
        line = " ".join(lines[:2]).rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"{what}: {line}; check the name, the network and `hf auth whoami`"
        ) from error


def download(name: str) -> Path:
    """Fetch an export into the client's cache.

    Args:
        name: `ORG/NAME`.

    Returns:
        The folder with the files.

    Raises:
        CheckpointError: The hub has no such export, or does not answer.
        ConfigError: The client is not installed.
    """
    require_hub()
    from huggingface_hub import snapshot_download

    with _explained(f"{name} cannot be fetched from the hub"):
        return Path(snapshot_download(name, allow_patterns=_FILES))


def push(folder: Path, name: str) -> str:
    """Upload an export.

    Args:
        folder: The export.
        name: `ORG/NAME`; the repository is made if it does not exist.

    Returns:
        Its address.

    Raises:
        CheckpointError: The hub refuses, or does not answer.
        ConfigError: The client is not installed.
    """
    require_hub()
    from huggingface_hub import HfApi

    with _explained(f"{folder} cannot be pushed to {name}"):
        api = HfApi()
        address = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export by Strata")
    return address
