"""What comes out of a file runs nothing: names planted in checkpoints and runs; how one's own modules are allowed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from agents import PPO, Agent
from agents.cli import main
from agents.runs.names import resolve_class, resolve_function
from agents.runs.whole import seal
from reward_models import load_reward
from reward_models.trust import UntrustedNameError, foreign_modules, names_from
from textrl_env.games.loading import load_game

#: Importing it, or running it, leaves a file behind.
TRAP = """
from os import system
from pathlib import Path

from agents import PPO, MlpPolicy

Path("sprung").touch()


def reward(prompts, completions):
    return [float(text.count("a")) for text in completions]


class Own(PPO):
    pass


class OwnPolicy(MlpPolicy):
    pass
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module that must not be imported unasked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "trap_module.py").write_text(TRAP)
    yield tmp_path
    sys.modules.pop("trap_module", None)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run of the embedded world, stopped after its first update."""
    folder = tmp_path_factory.mktemp("made") / "run"
    args = [
        "train",
        "--no-progress",
        "--total-timesteps",
        "20",
        "--n-episodes",
        "2",
        "--run-dir",
        str(folder),
    ]
    assert main([*args, "--batch-size", "2", "--n-epochs", "1"]) == 0
    return folder


def plant(folder, **changes):
    """Write ``changes`` into every JSON document that a run is resumed from, and leave something to do."""
    config = json.loads((folder / "config.json").read_text())
    config["total_timesteps"] = 10_000_000
    config |= {name: value for name, value in changes.items() if name in config}
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*/agent.json"):
        document = json.loads(file.read_text())
        document |= {name: value for name, value in changes.items() if name in document}
        document["kwargs"] |= {n: v for n, v in changes.items() if n.endswith("kwargs")}
        file.write_text(json.dumps(document))
        seal(file.parent)


def touch(what="os:system"):
    return f"{what}('touch sprung')"


PLANTS = {
    "a reward with arguments": {"env_kwargs": {"reward": touch()}},
    "a weighted reward": {"env_kwargs": {"reward": [["reward_models:format_reward()", 1.0], [touch(), 1.0]]}},
    "a gold judge": {"env_kwargs": {"gold": touch()}},
    "a reward inside a reward": {"env_kwargs": {"reward": f"reward_models:Clip({touch()!r})"}},
    "a loader of rewards": {"env_kwargs": {"reward": f"reward_models:load_reward({touch()!r})"}},
    "a module's import": {"env_kwargs": {"reward": touch("agents.runs.whole:os.system")}},
    "a verb of the command line": {
        "env_kwargs": {
            "reward": "agents.cli:main(['train', '--total-timesteps', '20', '--run-dir', 'sprung'])"
        }
    },
    "a function by name": {"env_kwargs": {"reward": {"__function__": "trap_module:reward"}}},
    "a reward of another module": {"env_kwargs": {"reward": "trap_module:reward"}},
    "a reward in a file": {"env_kwargs": {"reward": "trap_module.py:reward"}},
    "an agent": {"agent": "trap_module:Own"},
    "an agent that is none": {"agent": "subprocess:Popen"},
    "a policy": {"policy": "trap_module:OwnPolicy"},
    "an env with its module": {"env": "trap_module:TextRLHF-v0"},
    "another process": {
        "env_kwargs": {
            "reward": touch(),
            "vectorization_mode": "async",
            "vector_kwargs": {"context": "spawn"},
        }
    },
}


@pytest.mark.parametrize("changes", PLANTS.values(), ids=PLANTS)
def test_a_planted_name_runs_nothing_at_resume(changes, text_run, here, capsys):
    folder = shutil.copytree(text_run, here / "run")
    plant(folder, **changes)
    assert main(["train", "--no-progress", "--resume", "run"]) == 2
    assert not (here / "sprung").exists() and "trap_module" not in sys.modules
    said = capsys.readouterr().err
    assert "names code" in said or "comes from a file" in said or "which is a module" in said


@pytest.mark.parametrize(
    "changes", [c for c in PLANTS.values() if "env" not in c], ids=[n for n in PLANTS if "env w" not in n]
)
def test_a_planted_name_runs_nothing_when_an_agent_is_loaded_for_an_env_id(changes, text_run, here):
    folder = shutil.copytree(text_run, here / "run")
    plant(folder, **changes)
    with pytest.raises((UntrustedNameError, TypeError)):
        Agent.load(folder / "final", env="TextRLHF-v0")
    assert not (here / "sprung").exists() and "trap_module" not in sys.modules


def test_a_folder_that_a_run_names_is_no_place_to_import_from(text_run, here, tmp_path_factory, capsys):
    folder = shutil.copytree(text_run, here / "run")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(here / "trap_module.py", elsewhere / "trap_module.py")
    plant(folder, agent="trap_module:Own", working_directory=str(elsewhere))
    assert main(["train", "--resume", "run", "--allow-module", "trap_module"]) == 2
    assert not (here / "sprung").exists()
    said = capsys.readouterr().err
    assert f"--allow-module {elsewhere}/trap_module.py" in said and "started in" in said


@pytest.mark.parametrize("spec", ["trap_module:reward", "trap_module.py:reward"])
def test_a_run_with_a_reward_of_ones_own_resumes_by_the_line_that_the_refusal_shows(spec, here, capsys):
    args = ["--n-episodes", "2", "--batch-size", "2", "--n-epochs", "1", "--reward", spec]
    assert main(["train", "--no-progress", "--total-timesteps", "20", "--run-dir", "run", *args]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "--resume run" in x]
    shown = shlex.split(line, comments=True)[1:]
    sys.modules.pop("trap_module", None)
    (here / "sprung").unlink()
    assert main(["train", "--no-progress", "--resume", "run", "--total-timesteps", "50"]) == 2
    assert not (here / "sprung").exists()
    said = capsys.readouterr().err
    module = str(here / "trap_module.py") if ".py" in spec else "trap_module"
    assert f"textrl train --resume run --allow-module {module}" in said
    assert "--allow-module" in shown and main([*shown, "--no-progress"]) == 0
    assert (here / "sprung").exists()


def test_an_agent_and_a_policy_of_ones_own_resume_when_their_module_is_allowed(here):
    args = ["--agent", "trap_module:Own", "--policy", "trap_module:OwnPolicy", "--env", "ToyBandit-v0"]
    args += ["--n-steps", "16", "--batch-size", "8", "--total-timesteps", "32", "--run-dir", "run"]
    assert main(["train", "--no-progress", *args]) == 0
    again = ["train", "--no-progress", "--resume", "run", "--total-timesteps", "64"]
    assert main(again) == 2
    assert main([*again, "--allow-module", "trap_module"]) == 0
    with pytest.raises(UntrustedNameError, match=r"trust_modules=\['trap_module'\]"):
        PPO.load("run/final")
    loaded = PPO.load("run/final", trust_modules=["trap_module"])
    assert type(loaded).__name__ == "Own" and type(loaded.policy).__name__ == "OwnPolicy"


def test_allowing_modules_without_resuming_is_refused(here, capsys):
    assert main(["train", "--env", "ToyBandit-v0", "--allow-module", "trap_module"]) == 2
    assert "goes with --resume" in capsys.readouterr().err


def test_what_a_module_only_passes_on_needs_its_own_module_allowed(here):
    with names_from("some file", ["trap_module"]):
        assert resolve_class("trap_module:Own", Agent).__name__ == "Own"
        for spec in ("trap_module:system('touch x')", "trap_module:system"):
            with pytest.raises(UntrustedNameError, match="posix"):
                load_reward(spec)
        with pytest.raises(UntrustedNameError, match="posix"):
            resolve_function("trap_module:system")
    assert not Path("x").exists()


def test_a_user_may_name_what_a_file_may_not(here):
    assert load_reward("trap_module:reward").score(["p"], ["aa"]).total.tolist() == [2.0]


def test_rules_with_patterns_that_look_like_names_are_this_project_s_own():
    spec = "reward_models:regex_match(pattern='answer:yes')"
    assert foreign_modules({"reward": spec, "prompts": ["os:system"]}) == []
    with names_from("some file"):
        assert load_reward(spec).score(["p"], ["answer:yes"]).total.tolist() == [1.0]


@pytest.mark.parametrize(
    ("game", "modules"),
    [
        ("reasoning_gym:chain_sum", ["reasoning_gym"]),
        ("textarena:Nim-v0", ["textarena"]),
        ("skyrl_gym:evil:env", ["skyrl_gym"]),
        ("gem:game:Mastermind-v0", ["gem"]),
        ("trap_module:MyEnv-v0", ["trap_module"]),
        ("trap_module:Own", ["trap_module"]),
        ("openenv:http://localhost:8000", []),
        ("FrozenLake-v1", []),
        ("textrl_env.games.second_chance:SecondChance", []),
    ],
)
def test_whatever_library_a_game_is_played_with_a_file_has_to_have_it_allowed(game, modules):
    assert foreign_modules({"game": game, "max_turns": 2}) == modules
    if modules:
        with names_from("some file"), pytest.raises(UntrustedNameError, match=modules[0]):
            load_game(game)


def test_an_opponent_that_a_file_names_needs_its_own_module_allowed(here):
    pytest.importorskip("textarena")
    with names_from("some file", ["textarena"]), pytest.raises(UntrustedNameError, match="trap_module"):
        load_game("textarena:Nim-v0", {"opponent": "trap_module:reward"})
    assert not (here / "sprung").exists()


def test_a_run_of_a_task_of_reasoning_gym_resumes_when_the_library_is_named(here, capsys):
    pytest.importorskip("reasoning_gym")
    args = ["--game", "reasoning_gym:chain_sum", "--game-kwargs", '{"max_terms": 2}', "--max-new-tokens", "2"]
    args += ["--agent", "reinforce", "--n-episodes", "4", "--total-timesteps", "8", "--run-dir", "run"]
    assert main(["train", "--no-progress", *args]) == 0
    again = ["train", "--no-progress", "--resume", "run", "--total-timesteps", "16"]
    assert main(again) == 2
    assert "textrl train --resume run --allow-module reasoning_gym" in capsys.readouterr().err
    assert main([*again, "--allow-module", "reasoning_gym"]) == 0


def test_a_module_of_python_is_never_offered_to_be_allowed():
    with names_from("some file"), pytest.raises(UntrustedNameError, match="do not use this file") as error:
        load_reward("subprocess:run('x')")
    assert "trust_modules" not in str(error.value)


def test_trusted_modules_are_a_list_and_no_text():
    with pytest.raises(TypeError, match="list of module names"), names_from("f", "os"):
        pass


def test_a_checkpoint_cannot_name_any_attribute_of_numpy_or_gymnasium():
    from agents.runs.checkpoint import decode_space
    from agents.runs.env_state import _decode

    with pytest.raises(ValueError, match="bit_generator='seed'"):
        _decode({"generator": {"bit_generator": "seed"}}, {})
    with pytest.raises(ValueError, match="names the space 'utils'"):
        decode_space({"utils": {}})


def test_a_model_with_code_of_its_own_is_not_run(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "evil.py").write_text("from pathlib import Path\nPath('sprung').touch()\n")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    from textrl_env.lm.causal_lm import CausalLM

    with pytest.raises((ValueError, FileNotFoundError)):
        CausalLM.load(model_folder)
    assert not Path("sprung").exists()
