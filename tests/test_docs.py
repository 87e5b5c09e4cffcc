"""The pages are true: every Python block runs, every link leads somewhere, every page has its place in the site.

The blocks of a page run one after another, as they are read, in a folder of their own. What a reader has and a test
has not takes its place from :data:`STAND_INS` (a model, a file) or :data:`BEFORE` (names that a page presumes), and
learning is cut short. A block that would need a GPU, the network or minutes is marked, and says why::

    <!-- not run: needs a vLLM server -->
    ```python
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import stable_baselines3
import yaml

from agents.cli import VERBS, main
from agents.loop import LearningLoop
from tests.tiny import make_model, make_tokenizer
from textrl_env import embedded

ROOT = Path(__file__).parents[1]
LEARN = LearningLoop.learn
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
#: Texts in blocks, and what stands there when they run.
STAND_INS = {
    '"path-or-hub-id"': '"model"',
    "model=...": 'model="model"',
    "num_envs=64": "num_envs=4",
    "range(128)": "range(4)",
    "eval_freq=10_000": "eval_freq=10_000, n_eval_episodes=8",
}
#: What a page takes for granted, as Python.
BEFORE = {
    "docs/chat.md": """
from tests.chat_templates import chat_tokenizer
tokenizer = chat_tokenizer("qwen3")
messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
""",
    "docs/other_agents.md": """
import numpy as np
import torch
log_prob = lambda observations, actions: np.full(len(actions), -3.0)
act = lambda observations: envs.action_space.sample()
agent = lambda input_ids, attention_mask: torch.zeros(len(input_ids), int(envs.single_action_space.n))
""",
    "docs/seeing.md": """
import pathlib
import pandas as pd
pathlib.Path("runs/grpo/samples").mkdir(parents=True)
rows = {"prompt": ["a"], "response": ["b"], "score": [1.0], "kl_sum": [0.1], "advantage": [0.5]}
pd.DataFrame(rows).to_parquet("runs/grpo/samples/0.parquet")
""",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """Line, code and the reason why it is not run (or None) of each Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start("code")].count("\n") + 1, match["code"], match["why"])
        for match in FENCE.finditer(text)
    ]


WITH_BLOCKS = [page for page in PAGES if any(why is None for _, _, why in blocks(page))]


def tiny_model(folder: str) -> None:
    """A tiny Llama with room for conversations, in a folder."""
    model = copy.deepcopy(make_model("llama"))
    model.config.max_position_embeddings = 1024  # rotary positions, so any number will do
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def cut_short(monkeypatch) -> None:
    """Learning is over after one small rollout, ours and stable-baselines3's."""

    def few(self, total_timesteps, *args, original, **kwargs):
        small = {"n_steps": 32, "n_episodes": 8, "n_epochs": 1} if original is LEARN else {"n_epochs": 1}
        for setting, most in small.items():
            if getattr(self, setting, None):
                setattr(self, setting, min(getattr(self, setting), most))
        return original(self, min(total_timesteps, 8), *args, **kwargs)

    monkeypatch.setattr(LearningLoop, "learn", functools.partialmethod(few, original=LEARN))
    for cls in (stable_baselines3.PPO, stable_baselines3.A2C):
        monkeypatch.setattr(cls, "learn", functools.partialmethod(few, original=cls.learn))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what the pages speak of: a tiny model, prompts, a module; and learning that is soon over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny_model("model")
    rows = [{"prompt": "a b", "answer": "c"}, {"prompt": "d", "answer": "e"}] * 8
    for file in ("prompts.jsonl", "sums.jsonl"):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_module.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    cut_short(monkeypatch)
    monkeypatch.setattr(embedded, "MAX_NEW_TOKENS", 6)
    few = embedded.path("prompts_heldout").read_text().splitlines()[::16]
    Path("heldout.jsonl").write_text("\n".join(few))
    monkeypatch.setitem(embedded._FILES, "prompts_heldout", str(tmp_path / "heldout.jsonl"))
    before = set(gym.registry)
    yield
    for module in ("my_module", "my_games"):
        sys.modules.pop(module, None)
    for env_id in set(gym.registry) - before:
        del gym.registry[env_id]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name)
def test_every_python_block_runs(page, reader):
    names = {"__name__": "__page__"}
    exec(BEFORE.get(name(page), ""), names)
    for line, code, why in blocks(page):
        if why is not None:
            continue
        for text, stand_in in STAND_INS.items():
            code = code.replace(text, stand_in)
        if file := re.match(r"# (\w+\.py)\n", code):
            Path(file[1]).write_text(code)
        # Behind as many empty lines as the page has before it, so that a traceback leads to the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def test_blocks_that_are_not_run_say_why():
    """One convention, so that a reader of the source sees what is not tested; each of them is listed here."""
    marked = {
        (name(page), why.split(":")[0]) for page in PAGES for _, _, why in blocks(page) if why is not None
    }
    assert marked == {
        (
            "docs/other_agents.md",
            "needs sb3-contrib; benchmarks/other_agents.py runs it in an environment of its own",
        ),
        (
            "docs/turns.md",
            "a conversation that can be enumerated takes a game, a model and a table made for it, as in "
            "tests/test_exact_turns.py",
        ),
    }


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or target.suffix != ".md" or anchor in slugs(target), f"{name(page)}: {link}"


def test_every_page_has_a_place_in_the_site():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.SafeLoader)

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)
        ]

    placed = [leaf for leaf in leaves(site["nav"]) if leaf.endswith(".md")]
    there = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT]
    assert sorted(placed) == sorted(there)


def test_what_the_reference_shows_exists():
    """``::: package.module.Name`` of the reference pages, without building the site."""
    shown = [
        (page, path)
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(shown) > 30
    for _, path in shown:
        resolve(path)


def resolve(path: str):
    """The module, class or function that a dotted path names."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


COMMAND = re.compile(r"textrl (?P<verb>[a-z]+)(?P<rest>(?:[^`\n|;)\\]|\\\n)*)")


def commands() -> dict[tuple[str, str], dict[str, str]]:
    """By verb and agent, the flags that commands on the pages give, and a page of each."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for page in [*PAGES, *sorted((ROOT / "docs" / "explainer").glob("*.html"))]:
        for match in COMMAND.finditer(page.read_text(encoding="utf-8")):
            verb, rest = match["verb"], match["rest"].partition(" #")[0]
            agent = re.search(r"--agent[ =]([\w.]+)(?![\w:/])", rest)
            flags = found.setdefault((verb, agent[1] if agent and verb == "train" else ""), {})
            flags |= dict.fromkeys(
                re.findall(r"(?<![\w-])--[a-z][\w-]*", rest), f"{name(page)}: {match[0][:100]}"
            )
    return {key: flags for key, flags in found.items() if key[0] in VERBS}


def test_every_flag_of_every_command_on_the_pages_exists(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # names are written out, not cut to fit
    given = commands()
    assert len(given) > 10
    for (verb, agent), flags in given.items():
        main([verb, *(["--agent", agent] if agent else []), "--help"])
        known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)) | {"--help", "--resume", "--agent"}
        for flag, where in flags.items():
            assert flag in known, f"{where}: {verb} {agent} has no {flag}"
