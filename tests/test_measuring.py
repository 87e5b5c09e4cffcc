"""How estimators are measured: the worlds, their exact gradients, what is stored, and ``textrl gradients``."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import agents
from agents import GRPO, RLOO, DrGRPO, MaxRL, PassAtK
from agents.algorithms import methods
from agents.cli import main
from agents.evaluation import estimators as est
from agents.evaluation import worlds
from textrl_env.exact.solver import log_softmax
from textrl_env.exact.turns import evaluate_turns

BATCHES = 60


@pytest.mark.parametrize("world", [est.RIGHT_OR_WRONG, est.REAL_SCORES], ids=lambda world: world.name)
def test_rollouts_are_what_stepping_the_environment_gives(world):
    env = world.make_env(est.EPISODES)
    logits = world.logits(env)
    rollout = worlds.draw(env, logits, np.random.default_rng(3))
    agent = est.make_agent(GRPO, world)
    env.unwrapped.bind_policy(agent.policy.log_prob)
    starts = rollout.inputs["rows"][:, 0].tolist()
    observation, _ = env.reset(options={"prompt_id": starts})
    for t in range(world.horizon):
        alive = rollout.mask[:, t].numpy()
        rows = agent.policy.rows(observation)
        assert (rows == rollout.inputs["rows"][:, t].numpy())[alive].all()
        observation, rewards, ended, _, _ = env.step(rollout.actions[:, t].numpy())
        np.testing.assert_allclose(rewards[alive], rollout.rewards[alive, t], atol=1e-6)
        assert (ended[alive] == rollout.done[alive, t].numpy()).all()


def test_groups_share_a_prompt_and_prompts_are_as_hard_as_the_world_says():
    env = est.RIGHT_OR_WRONG.make_env()
    logits = est.RIGHT_OR_WRONG.logits(env)
    rollout = worlds.draw(env, logits, np.random.default_rng(0), episodes=8000)
    prompts = rollout.inputs["rows"][:, 0].view(-1, est.GROUP)
    assert (prompts == prompts[:, :1]).all()
    scores = ((rollout.rewards + rollout.penalties) * rollout.mask).sum(1)
    assert set(scores.round(decimals=6).tolist()) == {0.0, 1.0}
    for prompt, rate in enumerate(est.RIGHT_OR_WRONG.pass_rates):
        assert float(scores[prompts.flatten() == prompt].mean()) == pytest.approx(rate, abs=0.1)


FREE = dataclasses.replace(est.RIGHT_OR_WRONG, kl_coef=0.0)
OWN = {"rloo": RLOO, "dr-grpo": DrGRPO, "maxrl": MaxRL, "pass-at-k": PassAtK}


@pytest.mark.parametrize("name", OWN)
def test_a_method_climbs_what_its_paper_says(name):
    agent = est.make_agent(OWN[name], FREE)
    steps, tokens = est.steps_of(agent, est.supply(FREE, BATCHES))
    found = est.direction(steps, tokens, est.own_gradient(name, FREE))
    assert found.z < 3 and found.cosine == pytest.approx(1, abs=0.03)
    if name in ("maxrl", "pass-at-k"):  # and that is another direction than the share of right answers
        assert est.direction(steps, tokens, est.own_gradient("rloo", FREE)).z > 10


def test_grpos_own_objective_is_known_at_a_finite_group_where_lengths_do_not_count():
    agent = est.make_agent(GRPO, FREE, average="constant")
    steps = est.steps_of(agent, est.supply(FREE, BATCHES))
    found = est.direction(*steps, est.own_gradient("grpo", FREE))
    assert found.z < 3 and found.cosine == pytest.approx(1, abs=0.02)


OBJECTIVES = {
    "maxrl": lambda p: sum((1 - (1 - p) ** k) / k for k in range(1, est.GROUP)),
    "pass-at-k": lambda p: 1 - (1 - p) ** 4,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_weight_of_a_prompt_is_the_slope_of_the_objective(name):
    value = OBJECTIVES[name]
    for rate in (0.02, 0.3, 0.9):
        slope = (value(rate + 1e-6) - value(rate - 1e-6)) / 2e-6
        assert est.own_weight(name, rate) == pytest.approx(slope, rel=1e-6)


def test_the_own_gradient_is_that_of_the_mean_over_prompts():
    env = FREE.make_env()
    tree, logits = env.unwrapped.dynamics, FREE.logits(env)

    def objective(table):
        rates = worlds.truth(env, table).value[0]  # of each prompt: its share of right answers
        return float(np.mean([OBJECTIVES["pass-at-k"](rate) for rate in rates]))

    gradient = est.own_gradient("pass-at-k", FREE).reshape(logits.shape)
    for row, token in [(0, 0), (1, 2), (int(tree.level_start[2]), 1)]:
        up, down = logits.copy(), logits.copy()
        up[row, token] += 1e-5
        down[row, token] -= 1e-5
        assert gradient[row, token] == pytest.approx((objective(up) - objective(down)) / 2e-5, abs=1e-8)


def test_noise_is_the_number_of_tokens_after_which_scatter_and_step_are_equally_long():
    rng = np.random.default_rng(0)
    target = np.ones(50)
    steps = target + rng.normal(0, 0.5, (4000, 50))
    found = est.direction(steps, 10.0, 3 * target)  # its length does not matter
    assert found.z < 3 and found.cosine == pytest.approx(1, abs=0.01)
    assert found.noise == pytest.approx(10 * 0.25, rel=0.05)


def test_old_samples_keep_their_log_probs_and_fresh_ones_do_not():
    world, seen = est.RIGHT_OR_WRONG, []

    class Looks(GRPO):
        def loss(self, batch, new):
            seen.append(float(((new.log_probs - batch.log_probs) * batch.mask).abs().max()))
            return super().loss(batch, new)

    agent = est.make_agent(Looks, world)
    est.steps_of(agent, est.supply(world, 2, behind=4), fresh=False)
    est.steps_of(agent, est.supply(world, 2))
    assert min(seen[:2]) > 1e-3 and max(seen[2:]) < 1e-6


@pytest.mark.parametrize("world", [est.RIGHT_OR_WRONG, worlds.TWO_TURNS], ids=lambda world: world.name)
def test_the_gap_is_one_at_the_reference_and_small_after_learning(world):
    assert est.final_gap(RLOO, 0.1, 0, updates=1, rate=0.0, world=world) == pytest.approx(1.0, abs=1e-6)
    assert 0 <= est.final_gap(RLOO, 0.1, 0, updates=60, rate=0.1, world=world) < 0.5


# -- two turns ------------------------------------------------------------------------------------------------

TWO = worlds.TWO_TURNS


def test_conversations_are_those_that_the_solver_enumerates():
    table = TWO.logits()
    rng = np.random.default_rng(0)
    rollouts = [TWO.draw(None, table, rng) for _ in range(150)]
    returns = np.concatenate([rollout.rewards.sum(1).numpy() for rollout in rollouts])
    error = returns.std() / math.sqrt(len(returns) / est.GROUP)  # a group shares its prompt
    found = TWO.value_of(None, table)
    assert abs(returns.mean() - found.objective) < 3 * error
    visits = np.zeros(len(table))
    for rollout in rollouts:
        mask = rollout.mask
        assert (mask.long().diff(dim=1) <= 0).all(), "no holes"
        assert (rollout.done.sum(1) == 1).all() and (rollout.done & ~mask).sum() == 0
        assert (rollout.turn[mask].unique() == torch.tensor([0, 1])).all()
        np.add.at(visits, rollout.inputs["rows"][mask].numpy(), 1 / len(returns))
    assert abs(visits - np.concatenate(_visits(table))).max() < 0.05
    rows = rollouts[0].inputs["rows"].view(-1, est.GROUP, mask.shape[1])
    assert (rows[:, :, 0] == rows[:, :1, 0]).all(), "a group has one start"


def _visits(table):
    found = evaluate_turns(TWO.mdp(), TWO.levels(log_softmax(table)))
    return [level for stage in found.visits for level in stage]


def test_the_exact_values_are_the_mean_of_what_follows():
    table = TWO.reference()
    found = TWO.value_of(None, table)
    assert found.values[: TWO.num_prompts].mean() == pytest.approx(found.objective)
    assert found.objective < TWO.best()


@pytest.mark.parametrize(("cls", "biased"), [(RLOO, False), (GRPO, True)])
def test_over_two_turns_too_the_unbiased_are_unbiased_and_grpo_is_not(cls, biased):
    agent = est.make_agent(cls, TWO)
    target = TWO.value_of(None, TWO.logits()).gradient.ravel()
    found = est.direction(*est.steps_of(agent, est.supply(TWO, 120)), target)
    assert (found.z > 5) == biased
    assert biased or found.cosine == pytest.approx(1, abs=0.02)


def test_gigpo_finds_turns_that_answer_the_same_state():
    agent = est.make_agent(agents.GiGPO, TWO)
    plain = est.make_agent(GRPO, TWO)
    steps = [est.steps_of(each, est.supply(TWO, 4))[0] for each in (agent, plain)]
    assert np.abs(steps[0] - steps[1]).max() > 1e-4


# -- textrl gradients -----------------------------------------------------------------------------------------

MINE = """
from agents import Agent


class Mine(Agent):
    whole_episodes = True

    def __init__(self, policy, env, learning_rate=None, sign=1.0, **kwargs):
        self.sign = sign
        super().__init__(policy, env, learning_rate, gamma=1.0, **kwargs)

    def loss(self, batch, new):
        return -self.sign * new.log_probs * batch.advantages, {}
"""


@pytest.mark.parametrize("width, columns", [(80, 5), (200, 12)])
def test_a_terminal_gets_the_columns_that_it_can_hold_whole(width, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["gradients"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and "right direction" in shown and "E[score] - kl_coef" in " ".join(shown.split())
    (row,) = (line for line in shown.splitlines() if " rloo " in line)
    assert row.count("│") == columns + 2
    assert ("a wider terminal shows" in shown) == (width == 80)


def test_a_strangers_estimator_gets_a_row_beside_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.py").write_text(MINE)
    spec, out = f"{tmp_path / 'mine.py'}:Mine", tmp_path / "row.json"
    command = ["gradients", "--agent", spec, "--batches", "8", "--output", str(out)]
    assert main([*command, "--arg", "sign=-1.0"]) == 0
    shown = capsys.readouterr().out
    assert "Mine" in shown and "rloo" in shown and "grpo" in shown
    row = json.loads(out.read_text())["Mine"]
    assert row["settings"] == {"sign": -1.0}
    assert row["plain"]["cosine"] < -0.5  # it goes the wrong way
    assert "with any number of tokens in a step rloo" in " ".join(shown.split())
    parts = {"settings", "batches", "plain", "real", "turns", "old 4", "old 16"}
    assert set(row) == parts | {a + b for a in est.ELSEWHERE.values() for b in est.CORRECTIONS}


def test_a_bias_matters_from_where_an_unbiased_step_of_so_many_tokens_is_the_better_one():
    quiet, noisy = {"cosine": 0.9, "z": 9.0, "noise": 40.0}, {"cosine": 1.0, "z": 0.0, "noise": 90.0}
    tokens = est.matters_from(quiet, noisy)
    assert est.progress(quiet, tokens) == pytest.approx(est.progress(noisy, tokens))
    assert est.progress(quiet, tokens / 2) > est.progress(noisy, tokens / 2)
    assert est.progress(quiet, 2 * tokens) < est.progress(noisy, 2 * tokens)
    for worse in (quiet | {"noise": 90.0}, quiet | {"cosine": -0.9}):
        assert est.matters_from(worse, noisy) == 0
    assert est.matters_from(quiet | {"z": 2.9}, noisy) is None
    assert est.matters_from(quiet | {"cosine": 1.0}, noisy) is None


def test_the_verdict_is_the_worst_of_the_worlds_and_noise_is_no_bias():
    right, near, off, noisy = ({"cosine": c, "z": z} for c, z in ((1, 9), (0.995, 9), (0.9, 9), (0.9, 2)))
    assert est.verdict({"plain": right, "real": noisy, "turns": {"refused": "no"}}) == "right direction"
    assert est.verdict({"plain": right, "real": near}) == "nearly"
    assert est.verdict({"plain": right, "real": near, "turns": off}) == "biased"


@pytest.mark.parametrize(
    "more, told",
    [
        (["--agent", "ppo-ptx"], "PPOptx needs a language model"),
        (["--beside", "rlo"], "nothing is stored of 'rlo'. Did you mean 'rloo'"),
        (["--output", "x.json"], "are for an --agent that is measured"),
    ],
)
def test_what_cannot_be_measured_is_an_error(more, told, capsys):
    assert main(["gradients", *more]) == 2
    assert told in capsys.readouterr().err


# -- what is stored and shown ---------------------------------------------------------------------------------

SHOWN = [method for method in methods.METHODS if not method.text_only]


@pytest.mark.parametrize("method", SHOWN, ids=lambda method: method.name)
def test_every_method_has_been_measured_and_is_what_theory_says(method):
    row = est.stored().get(method.name)
    command = f"python benchmarks/gradients.py --only {method.name}"
    assert row is not None, f"measure it: {command}"
    assert row["settings"] == json.loads(json.dumps(dict(method.settings))), f"measured otherwise: {command}"
    fits = {"nearly": ("right direction", "nearly"), "biased": ("biased",)}
    agrees = est.verdict(row) in fits.get(method.expects, ("right direction",))
    assert agrees, f"{method.name} is said to be {method.expects}: {row}"
    if method.name in est.OWN:
        assert row["own"]["z"] < 3


def test_the_readme_tells_what_is_stored():
    from benchmarks.gradients import ANATOMY

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in ("rloo", "grpo", "ppo"):
        row = est.stored()[name]
        plain, cosines = row["plain"], (row[part]["cosine"] for part in ("real", "turns"))
        cells = [f"{plain['cosine']:.3f}", f"{plain['bias']:.3f}", est.verdict(row), f"{plain['noise']:.0f}"]
        cells += [f"{est.progress(plain):.3f}", *(f"{cosine:.3f}" for cosine in cosines)]
        assert f"| `{name}` | {' | '.join(cells)} |" in readme
    parts = len(json.loads(ANATOMY.read_text(encoding="utf-8"))["estimators"])
    assert f"{len(SHOWN)} methods and {parts} parts of them" in readme


def test_a_method_whose_end_has_not_been_measured_yet_does_not_take_away_that_of_the_others():
    from benchmarks.gradients_page import common_seeds, ends_table

    rows = est.stored()
    newcomer = {name: part for name, part in rows["rloo"].items() if "gaps" not in name}
    some = {"grpo": rows["grpo"], "rloo": newcomer}
    assert common_seeds(some) == len(rows["grpo"]["gaps"]["0.1"]) and common_seeds({"rloo": newcomer}) == 0
    assert ends_table(some).count("| `grpo` |") == 1


def test_the_page_shows_every_method_once():
    from benchmarks.gradients_page import DOCUMENT

    page = DOCUMENT.read_text(encoding="utf-8")
    table = page[: page.index("## What it climbs instead")]
    for method in SHOWN:
        assert table.count(f"| `{method.name}` |") == 1, (
            "write it again: python benchmarks/gradients.py --pages"
        )


def test_ranks_are_compared_and_ties_share_one():
    from benchmarks.gradients_page import rank_correlation

    assert rank_correlation([1.0, 2.0, 3.0, 10.0], [0.1, 0.2, 0.3, 0.31]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        4.5 / math.sqrt(22.5)
    )


def test_the_picture_has_every_method_and_its_frontier_falls():
    from benchmarks import gradients_picture as picture

    places = picture.groups_of_dots(est.stored())
    assert sum(len(names) for _, _, names in places) == len(SHOWN)
    frontier = picture.frontier_of(places)
    assert all(x <= v and y >= w for (x, y), (v, w) in itertools.pairwise(frontier))
    assert min(y for _, y, _ in places) == pytest.approx(frontier[-1][1])


def test_the_order_on_text_is_ranked_against_the_exact_worlds():
    from benchmarks import on_text

    exact = {
        name: {"gaps": {"0.1": [0.01 * i]}, "plain": {"cosine": 1.0, "noise": 50.0 + i}}
        for i, name in enumerate(on_text.METHODS)
    }
    found = {
        f"order-{name}-{seed}": {"objective": 2.0 - i + 0.1 * seed, "gold": 0.5, "kl": 1.0}
        for i, name in enumerate(on_text.METHODS)
        for seed in range(2)
    }
    table = on_text.order_table(found, exact)
    assert "2 seeds each, with *progress*: +1.00; with a small exact gap: +1.00" in table
    rows = [line.split("|")[1].strip(" `") for line in table.splitlines() if line.startswith("| `")]
    assert rows == list(on_text.METHODS), "the best first"
    assert "Not measured yet" in on_text.order_table({}, exact)

    worst_first = list(reversed(on_text.BEST))
    found |= {
        f"real-{name}-{seed}": {
            "after": 0.1 * (i + 1),
            "scores": [0.9, 0.1 * i, 0.1 * i + 0.02],
            "kl": [0.0, 4.0],
        }
        for i, name in enumerate(worst_first)
        for seed in range(3)
    }
    real = on_text.real_table(found, exact)
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:6]]
        for line in real.splitlines()
        if line.startswith("| `")
    ]
    assert rows[0] == [on_text.BEST[0], "50", "50, 50, 50", "41", "4.0"], (
        "the first rollout is not learned from"
    )
    told = real.partition("Rank correlations")[2]
    assert "*progress* +1.00 and +1.00" in told and "*J on text* +1.00 and +1.00" in told
    assert "Not measured yet" in on_text.real_table({}, exact)


def test_a_method_measured_again_gives_what_is_stored():
    row = est.stored()["rloo"]
    found = dict(est.measure(agents.RLOO, {}, row["batches"], "rloo", ("plain",)))["plain"]
    assert found["noise"] == pytest.approx(row["plain"]["noise"], rel=1e-3)
    assert math.isclose(found["cosine"], row["plain"]["cosine"], abs_tol=1e-4)
