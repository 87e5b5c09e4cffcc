"""stable-baselines3's own tests, run with our PPO in place of its own.

    python benchmarks/sb3_own_tests.py                  # all of them, a table at the end
    python benchmarks/sb3_own_tests.py -k save_load     # what follows is handed to pytest

Fetches the source distribution of the installed stable-baselines3 from the package index (``--sdist FILE`` takes one
that is there), puts ``agents.PPO`` where its tests look for ``stable_baselines3.PPO``, and runs the tests that make
a PPO. Of the tests that are parametrised over agents only the cases of PPO are run. What fails, and why, is listed in
``docs/stable_baselines3.md``. Nothing of those tests is kept here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

NAME = "stable-baselines3"
#: Tests, by file or by name, that look inside its PPO: its rollout buffer, the modes and layers of its networks.
INSIDES = ("test_gae.py", "test_state_dependent_noise", "test_train_eval_mode.py", "test_distributions.py")


def fetch(folder: Path) -> Path:
    """Download the source distribution of the installed version; returns the archive."""
    version = importlib.metadata.version(NAME)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-binary", NAME, "--dest", str(folder), f"{NAME}=={version}"], check=True)
    return next(folder.glob("*.tar.gz"))


class OurPPO:
    """A pytest plugin: our PPO for theirs, and only the tests that use it; writes down how each went."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_configure(self) -> None:
        import stable_baselines3

        import agents

        self.ppo = stable_baselines3.PPO = stable_baselines3.ppo.PPO = agents.PPO

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept = [item for item in items if self._uses_ppo(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def _uses_ppo(self, item: Any) -> bool:
        given = list(getattr(getattr(item, "callspec", None), "params", {}).values())
        if any(value is self.ppo or (isinstance(value, str) and value == "ppo") for value in given):
            return True  # test_tensorboard goes by names
        if "ppo" in self._names(item):  # a table of agents by name, and this is another one
            return False
        if any(
            isinstance(value, type) and value.__module__.startswith("stable_baselines3.") for value in given
        ):
            return False
        source = inspect.getsource(item.function)
        return "PPO(" in source or "PPO.load" in source

    @staticmethod
    def _names(item: Any) -> list[str]:
        """The names of agents in a table of them that a test module keeps."""
        return list(getattr(item.module, "MODEL_DICT", ()))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reasons[report.nodeid] = str(crash.message if crash else report.longrepr).splitlines()[0][
                :160
            ]


def run(tests: Path, arguments: list[str]) -> OurPPO:
    """Run the tests in a folder of their own."""
    import pytest

    plugin = OurPPO()
    os.chdir(tests.parent)
    sys.path.insert(0, str(tests.parent))
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "--tb=no", "-W", "ignore"]
    files = sorted(str(file) for file in tests.glob("test_*.py") if "PPO" in file.read_text(encoding="utf-8"))
    pytest.main([*options, f"--rootdir={tests.parent}", *files, *arguments], plugins=[plugin])
    return plugin


def table(plugin: OurPPO) -> str:
    """How many passed, by file, the insides apart; and what failed."""
    counts: dict[tuple[bool, str], Counter] = {}
    for test, outcome in plugin.outcomes.items():
        place = any(name in test for name in INSIDES), Path(test.partition("::")[0]).name
        counts.setdefault(place, Counter())[outcome] += 1
    lines = []
    for insides in (False, True):
        chosen = {file: count for (inside, file), count in sorted(counts.items()) if inside is insides}
        total = sum(chosen.values(), Counter())
        ran = total["passed"] + total["failed"]
        share = f"{total['passed'] / ran:.1%}" if ran else "-"
        lines.append(f"{'insides' if insides else 'surface'}: {total['passed']} of {ran} pass ({share})")
        lines += [f"  {file:32} {dict(count)}" for file, count in chosen.items()]
    lines.append("failed:")
    lines += [f"  {test.rpartition('/')[2]}: {why}" for test, why in sorted(plugin.reasons.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="a source distribution that is there already")
    parser.add_argument("--json", type=Path, help="where to write the outcome of every test")
    options, arguments = parser.parse_known_args()
    given = {name: None if value is None else value.resolve() for name, value in vars(options).items()}
    with tempfile.TemporaryDirectory() as folder:
        archive = given["sdist"] or fetch(Path(folder))
        with tarfile.open(archive) as source:
            source.extractall(folder, filter="data")
        plugin = run(next(Path(folder).glob("*/tests")), arguments)
        print(table(plugin))
        if given["json"] is not None:
            given["json"].write_text(
                json.dumps({"outcomes": plugin.outcomes, "reasons": plugin.reasons}, indent=2)
            )


if __name__ == "__main__":
    main()
