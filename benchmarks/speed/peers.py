"""The peers' virtual environments, made once, each with the versions it was last tested with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

#: TRL 0.23.1 is the last with a PPO trainer, and needs the transformers and numpy of its time.
REQUIREMENTS = {
    "trl-1.16": ["torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "numpy==2.4.6"],
    "trl-0.23": ["torch==2.13.0", "trl==0.23.1", "transformers==4.57.1", "numpy<2.4"],
}


def python_of(name: str, under: Path) -> Path:
    """The interpreter of a peer's environment, which is made and filled if it is not there.

    This interpreter, where it has exactly these versions.
    """
    if all(_is_here(requirement) for requirement in REQUIREMENTS[name]):
        return Path(sys.executable)
    return environment(under / name, REQUIREMENTS[name])


def _is_here(requirement: str) -> bool:
    package, _, version = requirement.partition("==")
    try:
        return metadata.version(package).partition("+")[0] == version
    except metadata.PackageNotFoundError:
        return False


def environment(folder: Path, requirements: Sequence[str]) -> Path:
    """The interpreter of a virtual environment, which is made and filled if it is not there.

    Args:
        folder: Where it is, or will be.
        requirements: Arguments of ``pip install``, torch first.
    """
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"making the virtual environment {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first and alone: a range would bring the build with CUDA.
        subprocess.run([*pip, requirements[0]], check=True)
        subprocess.run([*pip, *requirements], check=True)
        ready.touch()
    return python
