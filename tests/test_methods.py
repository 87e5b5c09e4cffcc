"""The table of methods is what the package exports, the command line takes and the docs list."""

from __future__ import annotations

import ast
import json
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import agents
from agents.algorithms import methods
from agents.runs.registry import AGENTS, find_agent
from benchmarks.gradients import METHODS_DOCUMENT, methods_page
from benchmarks.mutations import BUGS
from tests.tiny import make_env

ROOM = Path(methods.__file__).parent
every_method = pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)


def test_names_and_classes_are_there_once():
    for key in ("name", "class_name"):
        values = [getattr(method, key).lower() for method in methods.METHODS]
        assert len(set(values)) == len(values)


@every_method
def test_a_method_is_exported_under_its_class_and_found_under_its_name(method):
    cls = getattr(agents, method.class_name)
    assert method.class_name in agents.__all__
    assert cls.__module__ == method.module and issubclass(cls, agents.Agent)
    for name in (method.name, method.class_name, method.class_name.upper()):
        assert find_agent(name) is cls and methods.find_method(name) is method
    assert AGENTS[method.name] == f"agents:{method.class_name}"


def test_every_agent_that_is_exported_is_in_the_table():
    exported = {name for name in agents.__all__ if _is_method(getattr(agents, name))}
    assert exported == {method.class_name for method in methods.METHODS}


def _is_method(thing) -> bool:
    return isinstance(thing, type) and issubclass(thing, agents.Agent) and thing is not agents.Agent


def test_every_file_of_the_room_is_a_method_of_the_table():
    files = {file.stem for file in ROOM.glob("*.py")} - {"__init__"}
    listed = {m.module.rpartition(".")[2] for m in methods.METHODS if m.module.startswith(methods.__name__)}
    assert files == listed


@every_method
def test_an_entry_says_what_it_is(method):
    assert method.family in methods.FAMILIES
    assert method.expects in methods.EXPECTATIONS
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", method.paper)
    assert method.changes and not method.changes.endswith(".")
    source = Path(agents.__file__).parents[1].joinpath(*method.module.split(".")).with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    assert method.paper in docstring, "the file's docstring names the paper"


_TRL = "variants::test_losses_gradients_and_kl_are_those_of_trls_trainers"
#: What holds each method to its paper: TRL's loss or stable-baselines3's update, or the formula written out by hand.
_EQUAL = {
    "reinforce": "variants::test_reinforce_is_the_reward_to_go_less_that_of_the_others_at_the_same_step",
    "ppo": "agents::test_one_update_of_ppo_gives_the_weights_that_stable_baselines3s_gives",
    "grpo": _TRL,
    "rloo": _TRL,
    "reinforce++": "variants::test_reinforce_plus_plus_whitens_reward_to_go_over_all_tokens_and_clips_as_ppo",
    "dr-grpo": _TRL,
    "gigpo": "turns::test_gigpo_adds_the_turns_own_advantage_to_that_of_the_episode",
    "process-grpo": "process_rewards::test_advantages_are_the_papers",
    "maxrl": "estimators::test_maxrl_divides_by_the_mean_score_of_the_group_and_leaves_the_kl_its_size",
    "pass-at-k": "estimators::test_an_answer_is_credited_with_what_it_adds_to_the_best_of_k",
    "opo": "estimators::test_opos_baseline_is_the_mean_return_weighted_by_length",
    "otb": "estimators::test_otbs_baseline_of_a_token_weighs_returns_by_the_gradient_that_came_before",
    "gdpo": "estimators::test_gdpo_normalises_each_reward_before_it_adds_them_as_trl_does",
    "dapo": _TRL,
    "gspo": _TRL,
    "cispo": _TRL,
    "sapo": _TRL,
    "dppo": "ratios::test_dppo_stops_tokens_whose_probability_has_moved_away_by_more_than_delta",
    "gmpo": _TRL,
    "luspo": _TRL,
    "vespo": _TRL,
    "gpg": "ratios::test_gpg_makes_up_for_groups_that_are_all_alike",
    "scale-rl": "ratios::test_scale_rl_averages_over_the_prompts_whose_answers_differ",
    "vc-ppo": "estimators::test_vc_ppo_is_ppo_with_a_critic_that_learns_first",
    "vapo": "estimators::test_vapo_adds_the_likelihood_of_right_answers_and_clips_higher",
    "clip-cov": "ratios::test_clip_cov_leaves_out_tokens_of_high_covariance_at_random",
    "kl-cov": "ratios::test_kl_cov_holds_the_tokens_of_the_highest_covariance",
    "raft": "ratios::test_the_best_answer_of_each_group_is_imitated_and_no_other",
    "gkd": "distillation::test_a_step_has_the_gradient_of_trls_loss_on_the_students_answers",
    "sdpo": "self_distillation::test_a_step_has_the_gradient_of_trls_loss",
    "ppo-ptx": "ptx::test_the_gradient_of_a_step_is_ppos_plus_the_coefficient_times_the_supervised_one",
}


@every_method
def test_a_method_is_held_to_its_paper_by_a_test_of_equality(method):
    assert method.name in _EQUAL, "name the test that compares it with TRL's loss or its paper's formula"
    file, _, test = _EQUAL[method.name].partition("::")
    source = (Path(__file__).parent / f"test_{file}.py").read_text(encoding="utf-8")
    assert f"def {test}(" in source and method.class_name in source


@every_method
def test_a_bug_is_planted_in_the_file_of_a_method(method):
    file = method.module.replace(".", "/") + ".py"
    assert any(bug.file == file for bug in BUGS), f"plant one in {file}: benchmarks/mutations.py"


#: Those of earlier days have tests like it of their own, in test_variants, test_turns and test_ptx.
_ELSEWHERE = {
    "GRPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "REINFORCEPlusPlus",
    "DrGRPO",
    "GiGPO",
    "DAPO",
    "GSPO",
    "CISPO",
}
newer = pytest.mark.parametrize(
    "method",
    [m for m in methods.METHODS if m.class_name not in _ELSEWHERE and not m.text_only],
    ids=lambda method: method.name,
)


@newer
def test_a_method_learns_on_text_and_is_saved_as_itself(method, tmp_path):
    cls = getattr(agents, method.class_name)
    agent = cls("auto", make_env(num_envs=2), n_episodes=16, seed=0, learning_rate=1e-2, **method.settings)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(60, log_interval=None)
    after = list(agent.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.isfinite().all() for p in after)
    agent.save(tmp_path)
    assert json.loads((tmp_path / "agent.json").read_text())["agent"] == f"agents:{method.class_name}"
    loaded = cls.load(tmp_path)
    assert type(loaded) is cls
    assert all(torch.equal(a, b) for a, b in zip(after, loaded.policy.parameters(), strict=True))


@newer
def test_equal_scores_give_a_step_that_is_finite(method):
    cls = getattr(agents, method.class_name)
    reward = partial(constant, value=0.0)
    env = make_env(num_envs=2, reward=reward, kl_coef=0.0)
    agent = cls("auto", env, n_episodes=16, seed=0, learning_rate=1e-2, **method.settings)
    agent.learn(1, log_interval=None)
    assert all(p.isfinite().all() for p in agent.policy.parameters())


def constant(prompts, completions, value):
    return [value] * len(completions)


def test_the_page_of_methods_is_that_of_the_table():
    written = METHODS_DOCUMENT.read_text(encoding="utf-8")
    assert written == methods_page(), "write it again: python benchmarks/gradients.py --methods"


def test_a_method_that_has_moved_is_found_where_it_was():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from agents.algorithms.gigpo import GiGPO
        from agents.algorithms.grpo_variants import RLOO
    assert (RLOO, GiGPO) == (agents.RLOO, agents.GiGPO)
    assert {str(w.message) for w in caught} == {
        "agents.algorithms.grpo_variants has moved to agents",
        "agents.algorithms.gigpo has moved to agents.algorithms.methods.gigpo",
    }
