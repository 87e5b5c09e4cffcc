"""A checkpoint's folder in one file, for habits that want ``model.zip``; nothing in it is ever unpickled."""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def write_archive(folder: Path, target: Path | IO[bytes]) -> None:
    """Write the files of a folder into an archive, uncompressed: weights do not shrink."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(folder).as_posix())


@contextlib.contextmanager
def unpacked(path: Any) -> Iterator[Path]:
    """The folder of a checkpoint, wherever it is: the folder itself, or an archive unpacked for as long as needed.

    "m" and "m.zip" are looked for under each other's name too, as stable-baselines3 writes "m.zip" for ``save("m")``.

    Args:
        path: A path, or an open file.

    Raises:
        ValueError: The file is none of ours.
    """
    source = path if hasattr(path, "read") else _existing(Path(path))
    if isinstance(source, Path) and not source.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(source) as archive:
                names = archive.namelist()
                if "agent.json" in names:
                    archive.extractall(folder)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} is neither a checkpoint's folder nor an archive of one: it wasn't a zip-file"
            ) from error
        if "agent.json" not in names:
            theirs = "data" in names and "policy.pth" in names
            hint = (
                ": stable-baselines3 wrote it, and its format is a pickle, which is not read here"
                if theirs
                else ""
            )
            raise ValueError(
                f"{path} holds no checkpoint of an agent{hint}; train with this package and save again"
            )
        yield Path(folder)


def _existing(path: Path) -> Path:
    """The path, or the one with or without ".zip" where only that is there."""
    if path.exists():
        return path
    other = path.with_suffix("") if path.suffix == ".zip" else path.with_name(path.name + ".zip")
    return other if other.exists() else path
