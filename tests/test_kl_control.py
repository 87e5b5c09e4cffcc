"""Claims about KL coefficients that change while an agent learns: the adaptive controller and the annealing."""

from __future__ import annotations

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents import GRPO, PPO, REINFORCE, AdaptiveKL, AnnealKL
from agents.callbacks.kl_control import episode_kl
from agents.cli import main
from agents.rollouts.rollout import Rollout
from tests.tiny import make_env

SETTINGS = {"n_episodes": 16, "seed": 0, "learning_rate": 3e-3}


def make(agent=PPO, env=None, **kwargs):
    if agent is PPO:
        kwargs = {"batch_size": 8, "n_epochs": 2} | kwargs
    if agent is GRPO:
        kwargs = {"group_size": 4} | kwargs
    return agent("auto", make_env(kl_coef=0.1) if env is None else env, **(SETTINGS | kwargs))


@pytest.mark.parametrize(
    ("kl", "episodes", "factor"),
    [
        (4.0, 100, 1.0),  # on target
        (4.4, 100, 1.0 + 0.1 * 100 / 1000),  # a tenth above
        (40.0, 100, 1.0 + 0.2 * 100 / 1000),  # far above: clipped
        (0.0, 100, 1.0 - 0.2 * 100 / 1000),  # far below: clipped
        (-1.0, 100, 1.0 - 0.2 * 100 / 1000),  # a sample's estimate may be negative
        (40.0, 200, 1.0 + 0.2 * 200 / 1000),  # twice the episodes, twice the step
    ],
)
def test_the_update_is_the_papers(kl, episodes, factor):
    assert AdaptiveKL(target=4.0, horizon=1000).updated(0.5, kl, episodes) == pytest.approx(0.5 * factor)


def test_the_coefficient_stays_positive_even_where_a_rollout_outnumbers_the_horizon():
    assert AdaptiveKL(target=4.0, horizon=1).updated(0.5, 0.0, 10_000) > 0


def test_the_kl_is_summed_over_real_response_tokens_and_averaged_over_episodes():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    zeros = torch.zeros(2, 3)
    log_probs = torch.tensor([[1.0, 2.0, 100.0], [0.5, 0.5, 0.5]])
    done = torch.tensor([[False, True, False], [False, False, True]])
    rollout = Rollout({}, zeros, zeros, log_probs, zeros, zeros, mask, done, ref_log_probs=zeros)
    assert episode_kl(rollout) == (pytest.approx((3.0 + 1.5) / 2), 2)


@pytest.mark.parametrize("agent", [PPO, GRPO, REINFORCE])
def test_every_agent_is_steered_and_its_log_shows_the_kl_and_the_coefficient_of_one_rollout(agent):
    rows = []

    class Watch(AdaptiveKL):
        def _on_rollout_end(self):
            super()._on_rollout_end()
            charged = self.locals["rollout"].penalties.sum() / 16
            rows.append((episode_kl(self.locals["rollout"])[0], self.model.kl_coef, float(charged)))

    control = Watch(target=0.5, horizon=100)
    learner = make(agent)
    learner.learn(300, control)
    assert len(rows) > 2
    for (kl, coef, charged), (_, following, _) in itertools.pairwise(rows):
        assert following == pytest.approx(control.updated(coef, kl, 16))
        assert charged == pytest.approx(
            coef * kl, abs=1e-4
        )  # k1: what was charged is the coefficient times the KL
    kl, coef, _ = rows[-1]
    assert learner.latest["objective/kl_coef"] == coef
    assert learner.latest["objective/kl"] == pytest.approx(kl, abs=1e-4)
    assert learner.kl_coef == pytest.approx(control.updated(coef, kl, 16))  # ready for what comes next


def test_above_the_target_the_coefficient_rises_and_below_it_falls():
    coefs = {}
    for target in (1e-3, 1e3):
        learner = make().learn(400, AdaptiveKL(target, horizon=50, init=0.1))
        coefs[target] = learner.kl_coef
    assert coefs[1e3] < 0.1 < coefs[1e-3]


@pytest.mark.parametrize("init", [1e-3, 10.0])
def test_a_policy_whose_kl_answers_to_the_coefficient_settles_at_the_target(init):
    control, kl_coef, kl = AdaptiveKL(target=4.0, horizon=1000), init, 0.0
    for _ in range(2000):
        kl += 0.1 * (1.0 / kl_coef - kl)  # moves a tenth of the way to where this coefficient would hold it
        kl_coef = control.updated(kl_coef, kl, episodes=64)
    assert kl == pytest.approx(4.0, rel=1e-3) and kl_coef == pytest.approx(0.25, rel=1e-3)


def test_a_resumed_run_under_control_ends_bitwise_where_one_that_went_on_does(tmp_path):
    whole = make()
    whole.learn(200, AdaptiveKL(0.5, horizon=100, init=0.2))
    whole.save(tmp_path)
    assert whole.kl_coef not in (0.1, 0.2)
    resumed = PPO.load(tmp_path, env=make_env(kl_coef=0.1))
    assert resumed.kl_coef == whole.kl_coef
    for learner in (whole, resumed):  # a new controller, as in a new process; init is for the beginning only
        learner.learn(200, AdaptiveKL(0.5, horizon=100, init=0.2), reset_num_timesteps=False)
    assert resumed.kl_coef == whole.kl_coef
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_mlp_in_a_token_tree_is_steered_too():
    learner = PPO("MlpPolicy", "TokenTree-v0", n_steps=64, n_envs=4, seed=0)
    before = learner.kl_coef
    learner.learn(600, AdaptiveKL(1e-3, horizon=500))
    assert learner.kl_coef > before


@pytest.mark.parametrize("name", ["target", "horizon", "init"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_arguments_that_are_not_positive_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0"):
        AdaptiveKL(**({"target": 1.0} | {name: value}))


def test_an_environment_without_a_reference_or_with_a_coefficient_of_zero_is_refused():
    with pytest.raises(ValueError, match="has none; TextRLHF-v0"):
        PPO("MlpPolicy", "ToyBandit-v0", n_steps=8).learn(8, AdaptiveKL(1.0))
    with pytest.raises(ValueError, match="kl_coef=0 stays 0"):
        make(env=make_env(kl_coef=0.0)).learn(8, AdaptiveKL(1.0))
    assert make(env=make_env(kl_coef=0.0)).learn(8, AdaptiveKL(1.0, init=0.1)).kl_coef != 0.0


TREE = ["--env", "TokenTree-v0", "--policy", "MlpPolicy", "--n-steps", "32", "--n-envs", "2", "--no-progress"]


def test_the_command_line_steers_and_a_resumed_run_goes_on_steering(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--adaptive-kl-target", "0.001", "--adaptive-kl-horizon", "100", "--save-every", "128"]
    assert main(["train", *TREE, *flags, "--total-timesteps", "512", "--run-dir", "whole"]) == 0
    assert main(["train", *TREE, *flags, "--total-timesteps", "256", "--run-dir", "parts"]) == 0
    assert main(["train", "--resume", "parts", "--total-timesteps", "512", "--no-progress"]) == 0
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["adaptive_kl"]["target"] == 0.001
    coefs = {
        run: json.loads((tmp_path / run / "final" / "agent.json").read_text())["kl_coef"]
        for run in ("whole", "parts")
    }
    assert coefs["whole"] == coefs["parts"]
    with open(tmp_path / "whole" / "progress.csv", newline="") as lines:
        logged = [row.get("objective/kl") for row in csv.DictReader(lines)]
    assert len(logged) == 8 and np.isfinite([float(kl) for kl in logged]).all()


def test_a_horizon_without_a_target_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TREE, "--adaptive-kl-horizon", "100", "--run-dir", "x"]) == 2
    assert "--adaptive-kl-target" in capsys.readouterr().err


# -- annealing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 2.0), (0.25, 2.0 * 0.1**0.5), (0.5, 0.2), (0.75, 0.2), (1.0, 0.2)]
)
def test_the_coefficient_falls_evenly_in_its_logarithm_and_then_stays(progress, expected):
    assert AnnealKL(start=2.0, target=0.2, share=0.5).at(progress) == pytest.approx(expected)


@pytest.mark.parametrize("agent", [PPO, GRPO, REINFORCE])
def test_rewards_of_a_rollout_and_its_row_of_the_log_have_the_coefficient_of_its_beginning(agent):
    control, rows = AnnealKL(start=1.0, target=0.01, share=0.8), []

    class Watch(AnnealKL):
        def _on_rollout_start(self):
            super()._on_rollout_start()
            self.began = self.model.num_timesteps

        def _on_rollout_end(self):
            rollout = self.locals["rollout"]
            kl = float(((rollout.log_probs - rollout.ref_log_probs) * rollout.mask).sum())
            rows.append((self.began, self.model.kl_coef, kl, float(rollout.penalties.sum())))

    learner = make(agent).learn(400, Watch(start=1.0, target=0.01, share=0.8))
    assert len(rows) > 3 and rows[0][:2] == (0, 1.0)
    for began, coef, kl, charged in rows:
        assert coef == pytest.approx(control.at(began / 400))
        assert charged == pytest.approx(coef * kl, abs=1e-4)
    assert learner.latest["objective/kl_coef"] == rows[-1][1]
    assert learner.kl_coef == pytest.approx(0.01)


def test_a_resumed_annealing_ends_bitwise_where_one_that_went_on_does(tmp_path):
    def learn(agent, steps):
        agent.learn(steps, AnnealKL(1.0, 0.01), reset_num_timesteps=agent.num_timesteps == 0)

    whole = make()
    learn(whole, 200)
    whole.save(tmp_path)
    assert whole.kl_coef == pytest.approx(0.01)
    resumed = PPO.load(tmp_path, env=make_env(kl_coef=0.1))
    seen = []
    for learner in (whole, resumed):  # as much again, so half-way through a fall that is twice as long
        seen.append([])
        learner.learn(
            300,
            [AnnealKL(1.0, 0.01), lambda inner, outer, to=seen[-1]: to.append(inner["self"].kl_coef) or True],
            reset_num_timesteps=False,
        )
    assert seen[0] == seen[1]
    assert 0.01 < seen[0][0] < 1.0
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["start", "target", "share"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_an_annealing_between_impossible_coefficients_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"AnnealKL's {name} must be a finite number > 0"):
        AnnealKL(**({"start": 1.0, "target": 0.1} | {name: value}))


def test_an_annealing_longer_than_learning_or_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="at most 1"):
        AnnealKL(1.0, 0.1, share=1.5)
    with pytest.raises(ValueError, match="has none; TextRLHF-v0"):
        PPO("MlpPolicy", "ToyBandit-v0", n_steps=8).learn(8, AnnealKL(1.0, 0.1))


def test_the_command_line_anneals_and_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--kl-coef", "0.2", "--anneal-kl-start", "2", "--anneal-kl-share", "0.9", "--save-every", "256"]
    assert main(["train", *TREE, *flags, "--total-timesteps", "512", "--run-dir", "whole"]) == 0
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["anneal_kl"] == {"start": 2.0, "target": 0.2, "share": 0.9}
    # Take the end away: what is left is what an interruption leaves.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "final")
    assert main(["train", "--resume", "cut", "--no-progress"]) == 0

    def logits(run):
        return load_file(tmp_path / run / "final" / "agent.safetensors")

    whole, cut = logits("whole"), logits("cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    saved = [tmp_path / "whole" / name / "agent.json" for name in ("checkpoint-256", "final")]
    coefs = [json.loads(path.read_text())["kl_coef"] for path in saved]
    assert coefs == [pytest.approx(AnnealKL(2.0, 0.2, 0.9).at(0.5)), pytest.approx(0.2)]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--anneal-kl-share", "0.5"], "--anneal-kl-start"),
        (["--anneal-kl-start", "1"], "--kl-coef"),
        (["--anneal-kl-start", "1", "--kl-coef", "0.1", "--adaptive-kl-target", "4"], "choose one"),
    ],
)
def test_an_annealing_that_is_half_said_is_refused_with_what_is_missing(
    flags, hint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TREE, *flags, "--run-dir", "x"]) == 2
    assert hint in capsys.readouterr().err
