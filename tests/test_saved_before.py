"""What version 0.1.0 saved, when every module lay elsewhere, still loads and goes on."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents import GRPO, PPO, RLOO, TabularPolicy
from agents.runs import run_directory
from tests.tiny import make_env

SAVED = Path(__file__).parent / "saved_by_0_1_0"


def _weights(agent):
    return {name: w for name, w in agent.policy.state_dict().items() if not name.startswith("model.")}


@pytest.mark.parametrize("with_env", [True, False])
@pytest.mark.parametrize("name, cls", [("toy", RLOO), ("text", PPO), ("lora", GRPO)])
def test_a_checkpoint_that_names_old_files_loads_and_learns_on(name, cls, with_env):
    env = None if not with_env else "TokenTree-v0" if name == "toy" else make_env(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        agent = cls.load(SAVED / name, env)
    document = json.loads((SAVED / name / "agent.json").read_text())
    assert document["agent"].startswith("agents.") and document["agent"] != f"agents:{cls.__name__}"
    assert agent.num_timesteps == document["num_timesteps"] > 0
    saved = load_file(SAVED / name / "agent.safetensors")
    for key, weight in _weights(agent).items():
        if f"policy.{key}" in saved:
            assert torch.equal(weight, saved[f"policy.{key}"]), key
    if with_env:
        agent.learn(20, reset_num_timesteps=False)
        assert agent.n_updates > document["n_updates"]


def test_a_class_of_ones_own_under_an_old_name_is_the_present_one():
    assert type(RLOO.load(SAVED / "toy").policy) is TabularPolicy


def test_a_run_directory_made_before_is_resumed(tmp_path):
    folder = shutil.copytree(SAVED / "run", tmp_path / "run")
    config = run_directory.read_config(folder)
    agent = run_directory.load_agent(config, folder / "final")
    assert isinstance(agent, PPO) and agent.num_timesteps == 4096
    agent.learn(4096, reset_num_timesteps=False)
    assert agent.num_timesteps == 8192


@pytest.mark.parametrize("cls", [PPO, RLOO])
def test_a_checkpoint_names_what_the_package_exports_and_no_file(cls, tmp_path):
    cls("MlpPolicy", "ToyBandit-v0", n_envs=2, seed=0).save(tmp_path)
    assert json.loads((tmp_path / "agent.json").read_text())["agent"] == f"agents:{cls.__name__}"


def test_a_module_is_imported_by_its_old_name_with_a_warning_that_says_where_it_is():
    from agents.offline.sft import sft as present

    with pytest.warns(DeprecationWarning, match=r"agents\.sft has moved to agents\.offline\.sft"):
        from agents.sft import sft
    assert sft is present
