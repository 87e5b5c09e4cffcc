"""Claims about the house: the rooms that docs/design.md shows, imports that run one way, no circles, no private names.

Read from the sources with :mod:`ast`, so imports inside functions and under ``TYPE_CHECKING`` count too.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agents", "textrl_env", "reward_models")
#: What each package may import of the others.
BELOW = {
    "agents": {"textrl_env", "reward_models"},
    "textrl_env": {"reward_models"},
    "reward_models": set(),
}
#: Circles that are still there. A pair that is gone must leave this list.
KNOWN_CIRCLES: set[tuple[str, ...]] = set()
#: Names with an underscore that belong to others, and why they are used.
FOREIGN_PRIVATE = {
    "_fields": "public in a NamedTuple, in spite of its name",
    "_replace": "public in a NamedTuple, in spite of its name",
    "_max_episode_steps": "gymnasium's only record of the limit of a TimeLimit",
    **dict.fromkeys(
        ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        "torch has no public way to see the hooks of a module, which a fast way must not pass by",
    ),
    **dict.fromkeys(
        ("_parameters", "_buffers", "_modules"),
        "torch's own record of what a module holds itself, beside its other attributes",
    ),
    "_version": "torch's only count of changes to a tensor in place",
    "_name_or_path": "transformers' only record of where a model came from",
    "_scaled_dot_product_flash_attention_for_cpu": "the operation whose normaliser torch's public one hides",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "its gradient",
    "_forward_hooks": "torch's only record of who listens to a module",
    "_forward_pre_hooks": "the same",
    "_backward_hooks": "the same",
    "_backward_pre_hooks": "the same",
}
#: Uses of a private name of a module of ours that are still there.
KNOWN_PRIVATE: set[tuple[str, str]] = set()


def modules_of(root: Path) -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def sources() -> dict[str, ast.Module]:
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in modules_of(ROOT).items()}


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of ``known`` that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in known else node.module)
    return found & known


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which leads to every other of its set."""

    @functools.cache
    def reachable(start: str) -> frozenset[str]:
        seen, ahead = set(), [*graph[start]]
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += graph[module]
        return frozenset(seen)

    return [
        set(c)
        for c in {
            frozenset(m for m in reachable(start) if start in reachable(m))
            for start in graph
            if start in reachable(start)
        }
    ]


def private_uses(tree: ast.Module) -> set[str]:
    """Private names of others: imported, or read off anything but ``self`` and ``cls`` and not set here."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            used |= {part for part in parts if _is_private(part)}
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            used.add(ast.unparse(node))
    return {use for use in used if use.rpartition(".")[0] not in ("self", "cls")}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def drawn_rooms() -> set[str]:
    """The paths in the tree of docs/design.md; what lies in a room stands two spaces further in."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tree = re.search(r"^## The rooms\n\n((?:    .*\n)+)", text, re.MULTILINE).group(1)
    paths, above = set(), []
    for line in tree.splitlines():
        match = re.fullmatch(r"    ( *)([\w.]+/?) {2,}\S.*", line)
        assert match, f"a line of the tree is not a room and what is in it: {line!r}"
        depth = len(match[1]) // 2
        above = [*above[:depth], match[2]]
        path = "".join(above)
        assert path not in paths, f"{path} is drawn twice"
        paths.add(path)
    return paths


def test_the_tree_in_the_design_page_is_the_one_on_disk():
    there = set()
    for package in PACKAGES:
        there.add(f"{package}/")
        for path in (ROOT / package).iterdir():
            if path.is_dir() and (path / "__init__.py").is_file():
                there.add(f"{package}/{path.name}/")
            elif path.suffix == ".py" and path.name != "__init__.py":
                there.add(f"{package}/{path.name}")
    drawn = drawn_rooms()
    assert sorted(there - drawn) == [], "not in the tree of docs/design.md"
    assert sorted(drawn - there) == [], "in the tree of docs/design.md, and nowhere else"


def test_dependencies_run_one_way():
    known = set(sources())
    wrong = [
        (module, other)
        for module, tree in sources().items()
        for other in imports(tree, known)
        if other.partition(".")[0] not in BELOW[module.partition(".")[0]] | {module.partition(".")[0]}
    ]
    assert not wrong


def test_no_two_modules_import_each_other_not_even_for_type_checkers():
    known = set(sources())
    graph = {module: imports(tree, known) - {module} for module, tree in sources().items()}
    there = {tuple(sorted(circle)) for circle in circles(graph)}
    assert sorted(there - KNOWN_CIRCLES) == [], "circles of imports"
    assert sorted(KNOWN_CIRCLES - there) == [], "gone: take it off the list"


def test_no_module_uses_a_private_name_of_another():
    there = {
        (module, use)
        for module, tree in sources().items()
        for use in private_uses(tree)
        if use.rpartition(".")[2] not in FOREIGN_PRIVATE
    }
    assert sorted(there - KNOWN_PRIVATE) == []
    assert sorted(KNOWN_PRIVATE - there) == [], "gone: take it off the list"


def without_docstring(module: str) -> list[str]:
    """Public functions, classes and methods defined in a module, without a docstring and no override of another."""
    loaded, found = importlib.import_module(module), []
    for name, thing in vars(loaded).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module:
            continue
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not _documented(thing):
            found.append(name)
        if inspect.isclass(thing):
            found += [f"{name}.{member}" for member in _undocumented_members(thing)]
    return found


def _documented(thing: object) -> bool:
    own = thing.__doc__
    # A dataclass without a docstring gets its signature for one.
    return bool(own) and not own.startswith(f"{getattr(thing, '__name__', '')}(")


def _undocumented_members(cls: type) -> list[str]:
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    members = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
    return [
        name
        for name, value in members.items()
        if not name.startswith("_")
        and name not in inherited
        and (inspect.isfunction(value) or isinstance(value, (property, functools.cached_property)))
        and not _documented(value)
    ]


def test_everything_public_has_a_docstring_but_overrides():
    missing = {module: without_docstring(module) for module in sources()}
    assert {module: names for module, names in missing.items() if names} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_no_torch(package):
    code = (
        f"import sys, {package}; print(*sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_checks_notice_what_they_look_for():
    """A circle of three, one under ``TYPE_CHECKING``; a private import; a private attribute."""
    written = {
        "a.b": "def late():\n    from a import c\n",
        "a.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.d import thing\n",
        "a.d": "import a.b\n",
        "a.e": "from a.b import late, _hidden\nlate._mark\n_own = 1\nlate._own\nself._mine\n",
    }
    trees = {name: ast.parse(text) for name, text in written.items()}
    graph = {name: imports(tree, set(trees)) for name, tree in trees.items()}
    assert circles(graph) == [{"a.b", "a.c", "a.d"}]
    assert private_uses(trees["a.e"]) == {"_hidden", "late._mark"}
