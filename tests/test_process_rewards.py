"""Steps of an answer that are scored one by one: the game that says nothing, and GRPO with process supervision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import GRPO, ProcessGRPO
from tests.tiny import count_a, make_lm
from textrl_env.envs.text_game import TextGameEnv, TextGameVectorEnv
from textrl_env.games.steps import Steps
from textrl_env.lm.sequences import ENVIRONMENT

ROWS = [{"prompt": "a b", "bonus": 1.0}, {"prompt": "d", "bonus": 2.0}]


def bonus(prompts, completions, bonus):
    return [value * text.endswith("d") for value, text in zip(bonus, completions, strict=True)]


def make_env(num_envs=None, **kwargs):
    game_kwargs = {"process": count_a, "outcome": bonus, "stop": "c", "max_steps": 4}
    kwargs = {"kl_coef": 0.0, "max_new_tokens": 5} | kwargs
    kwargs |= {"game": Steps, "game_kwargs": game_kwargs, "model": make_lm(), "rows": ROWS, "num_seeds": 1}
    kwargs |= {"max_turns": 4, "stop": "c", "layout": "text"}
    return TextGameEnv(**kwargs) if num_envs is None else TextGameVectorEnv(num_envs, **kwargs)


def collected(cls=ProcessGRPO, **kwargs):
    agent = cls("auto", make_env(**kwargs), group_size=4, n_episodes=16, seed=0)
    agent._set_up_learn(1, None, None, True, False)
    return agent, agent.collect()


def test_the_process_reward_sees_all_up_to_a_step_and_the_outcome_the_whole():
    game = Steps(count_a, bonus, stop="c")
    assert game.reset(seed=3, **ROWS[1]) == ("d", {})
    assert game.step("a b c") == ("", 1.0, False, False, {"process": 1.0, "outcome": 0.0})
    assert game.step(" a a d") == ("", 3.0 + 2.0, True, False, {"process": 3.0, "outcome": 2.0})
    game.reset(**ROWS[0])
    assert game.step("d")[1:3] == (1.0, True), "a new answer begins with nothing written"


def test_an_answer_ends_with_its_last_step_whatever_stands_there():
    game = Steps(count_a, stop="c", max_steps=2)
    game.reset(**ROWS[0])
    assert not game.step("c")[2] and game.step("c")[2]


def test_steps_are_one_unbroken_answer_with_a_reward_at_the_end_of_each():
    agent, rollout = collected()
    sequences = rollout.inputs["sequences"]
    assert (sequences.written_by != ENVIRONMENT).all(), "nothing is put between steps"
    assert rollout.turn.max() > 0
    decode = agent.policy.lm.tokenizer.decode
    for row, answer in enumerate(sequences.responses):
        for t in np.flatnonzero(agent.step_ends(rollout)[row]):
            last = bool(rollout.done[row, t])
            text = decode(answer[: t + 1], skip_special_tokens=True)
            given = count_a([""], [text])[0]
            if last:
                given += ROWS[int(sequences.prompts[row][0] != 3)]["bonus"] * text.endswith("d")
            assert float(rollout.rewards[row, t]) == given
    assert float((rollout.rewards * ~agent.step_ends(rollout)).abs().sum()) == 0.0


def test_advantages_are_the_papers():
    agent, rollout = collected(kl_coef=0.0)
    ends = agent.step_ends(rollout)
    found = agent.advantages(rollout)
    for start in range(0, 16, 4):
        rewards = [
            [(t, float(rollout.rewards[i, t])) for t in np.flatnonzero(ends[i])]
            for i in range(start, start + 4)
        ]
        everything = np.array([r for row in rewards for _, r in row])
        assert len(everything) > 4, "some answers have several steps"
        for i, row in enumerate(rewards):
            for t in range(int(rollout.mask[start + i].sum())):
                following = [
                    (r - everything.mean()) / (everything.std(ddof=1) + 1e-4) for at, r in row if at >= t
                ]
                assert float(found[start + i, t]) == pytest.approx(sum(following), abs=1e-4)
    assert float((found * ~rollout.mask).abs().sum()) == 0.0


def test_with_one_step_to_an_answer_it_is_grpo():
    from agents.evaluation import estimators as est

    steps = [
        est.steps_of(est.make_agent(cls, est.REAL_SCORES, **kwargs), est.supply(est.REAL_SCORES, 3))[0]
        for cls, kwargs in ((ProcessGRPO, {"kl_in": "loss"}), (GRPO, {"kl_in": "loss"}))
    ]
    np.testing.assert_allclose(*steps, rtol=1e-4, atol=1e-6)


def test_it_learns_to_write_what_its_steps_are_paid_for():
    env = make_env(num_envs=2)
    agent = ProcessGRPO("auto", env, group_size=4, n_episodes=32, seed=0, learning_rate=1e-2)
    before = float(agent.learn(1, log_interval=None).collect().rewards.sum(1).mean())
    agent.learn(2500, log_interval=None)
    assert float(agent.collect().rewards.sum(1).mean()) > 2 * before
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Steps(), "got neither"),
        (lambda: Steps(count_a).reset(prompt=[{"role": "user", "content": "a"}]), "a text, got"),
        (lambda: Steps(count_a).reset(), "column 'prompt'"),
    ],
)
def test_what_cannot_be_scored_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()
