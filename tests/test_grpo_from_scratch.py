"""Claims about the one-file GRPO: it is short, imports the environment alone, equals ``agents.GRPO``, and learns."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import GRPO
from examples import grpo_from_scratch
from tests.tiny import EOS, id_sum, make_env, make_lm

SOURCE = Path(grpo_from_scratch.__file__)


def test_it_is_one_file_of_at_most_150_lines_on_the_environment_alone():
    text = SOURCE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    ours = {name for name in imported if name.split(".")[0] in ("agents", "reward_models", "textrl_env")}
    assert ours == {"textrl_env"}


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_its_update_gives_the_weights_that_ours_gives(architecture, epochs, monkeypatch):
    env = make_env(lm=make_lm(architecture), reward=id_sum, kl_coef=0.3)
    agent = GRPO(
        "CausalLMPolicy",
        env,
        learning_rate=1e-3,
        group_size=4,
        n_episodes=16,
        n_epochs=epochs,
        kl_in="loss",
        kl_loss_estimator="k3",
        seed=0,
        policy_kwargs={"autocast": False},
    )
    # Away from the reference, or the gradient of the KL would be zero and its weight would not matter.
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    agent.policy.weights_changed()
    # Modules of its own: what the agent makes faster about its modules stays with it.
    plain = make_lm(architecture).clone().model
    plain.load_state_dict(agent.policy.model.state_dict())
    before = {name: weight.clone() for name, weight in plain.named_parameters()}
    produced, run_episodes = [], env.run_episodes

    def remember(*args):
        produced.append(run_episodes(*args))
        return produced[-1]

    monkeypatch.setattr(agent.text_env, "run_episodes", remember)
    agent.learn(1)
    (episodes,) = produced
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, eps=1e-5)
    grpo_from_scratch.update(plain, optimizer, episodes, 4, env.kl_coef, epochs=epochs)
    ours = dict(agent.policy.model.named_parameters())
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(weight, ours[name], atol=1e-5, rtol=0)
    moved = max(
        float((weight - before[name]).detach().abs().max()) for name, weight in plain.named_parameters()
    )
    assert moved > 5e-4  # fifty times the tolerance


def test_its_advantages_are_ours_and_equal_scores_give_none():
    scores = torch.tensor([1.0, 2.0, 4.0, 3.0, 3.0, 3.0])
    advantages = grpo_from_scratch.group_advantages(scores, 3)
    assert advantages[:3].numpy() == pytest.approx(
        np.array([-4, -1, 5]) / 3 / np.std([1, 2, 4], ddof=1), abs=1e-3
    )
    assert advantages[3:].tolist() == [0.0, 0.0, 0.0]


def test_what_it_samples_ends_at_the_end_token_and_has_the_models_log_probabilities():
    lm = make_lm()
    prompts = [np.array([3]), np.array([4, 5, 6, 7])] * 20
    torch.manual_seed(0)
    answers, log_probs = grpo_from_scratch.sample(lm.model, prompts, 6, EOS)
    lengths = [len(answer) for answer in answers]
    assert min(lengths) < max(lengths) == 6
    assert all(EOS not in answer[:-1] for answer in answers)
    assert all(answer[-1] == EOS for answer in answers if len(answer) < 6)
    expected = lm.response_log_probs(prompts, answers)
    for row, wanted, length in zip(log_probs, expected, lengths, strict=True):
        assert row == pytest.approx(wanted[:length], abs=1e-4)


def test_it_learns(capsys):
    history = grpo_from_scratch.main(iterations=8, prompts=8)
    first, last = (np.mean([row["reward"] for row in rows]) for rows in (history[:2], history[-2:]))
    assert last > first + 0.2
    assert "gold" in capsys.readouterr().out
