"""Files and folders that are there whole or not at all, whatever stops the process or the machine.

A checkpoint is written beside its place, every file is flushed to the disk, a manifest with the size and checksum of
each is written last, and then the folder is renamed. What was there before is deleted after that, so at every moment
one whole folder can be found (:func:`whole_folder`), and one that was torn later is noticed (:func:`check_whole`).

Left out: defence against someone who changes a file and its checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NEW, _OLD = ".{}.new", ".{}.old"


class TornCheckpointError(ValueError):
    """A folder is not as it was written; the message names the file and what happened to it."""


def write_text(file: Path, text: str) -> None:
    """Write a file so that it holds the new text or the old one, and outlives a power failure.

    Raises:
        OSError: It cannot be written; the message names it.
    """
    scratch = file.with_name(_NEW.format(file.name))
    try:
        with open(scratch, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, file)
        _sync(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise type(error)(error.errno, f"cannot write {file}: {error.strerror}") from error


def write_table(file: Path, table: Any) -> Path:
    """Write a ``pyarrow.Table`` as Parquet, whole or not at all; returns the file.

    Tables are for reading: unlike a checkpoint they may be lost in a power failure, so the disk is not waited for.
    """
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    pq.write_table(table, scratch, compression="zstd")
    os.replace(scratch, file)
    return file


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, and put it in the place of ``folder``.

    Files of an earlier one are replaced. Anything else that lies there stays: then the files are exchanged one by one,
    the manifest last, and a kill in between leaves a folder that is known to be torn.

    Args:
        folder: Where it belongs.
        write: Called with an empty folder.

    Raises:
        OSError: It cannot be written (a full disk, no rights); what was there before is whole.
    """
    folder = Path(os.path.abspath(folder))
    new = folder.with_name(_NEW.format(folder.name))
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        write(new)
        seal(new)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        # safetensors and tokenizers have errors of their own for a full disk.
        if isinstance(error, OSError) or "os error" in str(error).lower():
            before = "; the one before is whole" if folder.exists() else ""
            raise OSError(f"cannot write {folder}{before}: {error}") from error
        raise
    if folder.is_dir() and _has_foreign_files(folder):
        _exchange_files(new, folder)
    else:
        _exchange(new, folder)


def whole_folder(folder: Path) -> Path:
    """``folder``, or what stands for it where its replacement was cut short."""
    if folder.exists():
        return folder
    new, old = (folder.with_name(form.format(folder.name)) for form in (_NEW, _OLD))
    if (new / MANIFEST).is_file():
        return new
    return old if old.is_dir() else folder


def settle(folder: Path) -> None:
    """Finish a replacement of ``folder`` that was cut short."""
    stands = whole_folder(folder)
    if stands != folder and stands.exists():
        os.rename(stands, folder)
        _sync(folder.parent)
    for form in (_NEW, _OLD):
        shutil.rmtree(folder.with_name(form.format(folder.name)), ignore_errors=True)


def check_whole(folder: Path) -> None:
    """Raise a TornCheckpointError unless every file is as the manifest says.

    Files that it does not list are no matter.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise TornCheckpointError(f"{folder} is torn: {MANIFEST} is missing")
    try:
        document = read_json(manifest)
        listed = {name: (int(e["size"]), str(e["sha256"])) for name, e in document["files"].items()}
        if document["sha256"] != _digest(document["files"]):
            raise ValueError("its checksum differs")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornCheckpointError(f"{folder} is torn: {MANIFEST} cannot be read ({error})") from None
    for name, (size, checksum) in listed.items():
        file = folder / name
        if not file.is_file():
            raise TornCheckpointError(f"{folder} is torn: {name} is missing")
        if file.stat().st_size != size:
            raise TornCheckpointError(
                f"{folder} is torn: {name} has {file.stat().st_size:,} bytes and was written with {size:,}"
            )
        if _checksum(file) != checksum:
            raise TornCheckpointError(
                f"{folder} is torn: {name} is not what was written, its checksum differs"
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: The file holds none; the message names it, and line and column.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} is no JSON (it has {size:,} bytes): {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be read") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object")
    return found


def seal(folder: Path) -> None:
    """Flush every file, and write the manifest last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        _sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _checksum(path)}
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        _sync(path)
    document = {"format": 1, "files": files, "sha256": _digest(files)}
    write_text(folder / MANIFEST, json.dumps(document, indent=2) + "\n")


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk; folders only where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _has_foreign_files(folder: Path) -> bool:
    """Whether something lies there that no manifest lists."""
    inside = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    try:
        return bool(inside - {MANIFEST, *read_json(folder / MANIFEST)["files"]})
    except (OSError, ValueError, KeyError, TypeError):
        return bool(inside)


def _exchange(new: Path, folder: Path) -> None:
    old = folder.with_name(_OLD.format(folder.name))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange_files(new: Path, folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted((p for p in new.rglob("*") if p.is_file()), key=lambda p: p.name == MANIFEST):
        target = folder / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    _sync(folder)
    shutil.rmtree(new, ignore_errors=True)
