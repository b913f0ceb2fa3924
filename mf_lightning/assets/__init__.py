"""Small files that ship with the package: the quickstart's autoencoder and feature extractor."""

from pathlib import Path


def asset(name: str) -> Path:
    """Return the path of a shipped file or folder; a missing one means a broken installation.

    Raises:
        FileNotFoundError: the file is not there.
    """
    path = Path(__file__).parent / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, expected it to ship with mf_lightning. Reinstall the package, or make it again with "
            "scripts/train_digit_assets.py."
        )
    return path
