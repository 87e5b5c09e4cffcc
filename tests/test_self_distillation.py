"""SDPO: TRL's loss and its gradient, who is shown what, and that the policy moves towards itself with hints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import GRPO, SDPO
from agents.algorithms.gradient_step import accumulate_gradients
from agents.distillation import hints
from tests.tiny import make_env, make_lm, make_tokenizer
from textrl_env.lm.causal_lm import CausalLM

ROWS = [{"prompt": "a", "hint": "b b c"}, {"prompt": "b c", "hint": ""}, {"prompt": "d e f", "hint": None}]


def likes_a(prompts, completions):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float("a" in text.split()) for text in texts]


def make(lm=None, env=None, **kwargs) -> SDPO:
    env = env or make_env(2, lm=lm or make_lm(), reward=likes_a, kl_coef=0.0)
    kwargs = {"group_size": 4, "n_episodes": 8, "seed": 0} | kwargs
    return SDPO("auto", env, **kwargs)


def collected(agent):
    agent._set_up_learn(1, None, None, True, False)
    return agent.collect()


def shown_text(agent, rollout, row) -> str:
    prompt = rollout.inputs["shown"].prompts[row]
    return agent.policy.lm.tokenizer.decode(prompt)


def test_each_answer_is_shown_the_first_right_one_of_its_group_that_is_another():
    agent = make(n_episodes=16)
    rollout = collected(agent)
    right = (rollout.rewards.sum(1) >= 1).tolist()
    assert 0 < sum(right) < 16
    expected = []
    for i in range(16):
        start = i - i % 4
        others = [j for j in range(start, start + 4) if right[j] and j != i]
        expected.append(others[0] if others else None)
    assert None in expected, "somebody has nobody to learn from"
    responses = agent._episodes.responses
    for i, demonstration in enumerate(expected):
        assert rollout.chosen[i].any() == (demonstration is not None)
        own = rollout.inputs["sequences"].prompts[i].tolist()
        read = rollout.inputs["shown"].prompts[i].tolist()
        if demonstration is None:
            assert read == own
        else:
            text = hints.SOLUTION_TEMPLATE.format(solution=responses[demonstration])
            prompt = hints.PROMPT_TEMPLATE.format(
                prompt=agent._episodes.prompts[i], solution=text, feedback=""
            )
            assert read == agent.policy.lm.tokenizer(prompt).input_ids
    assert (rollout.chosen & ~rollout.mask).sum() == 0
    answers = [rollout.inputs[name].actions.tolist() for name in ("sequences", "shown")]
    assert answers[0] == answers[1], "the teacher reads the same answers"
    assert agent.logger.name_to_value["distillation/taught"] == np.mean([e is not None for e in expected])


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_a_step_has_the_gradient_of_trls_loss(weight):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    agent = make(distillation_weight=weight, max_ratio=1.05, group_size=2)
    batch = agent.prepare_rollout(collected(agent))
    generator = torch.Generator().manual_seed(0)
    batch.log_probs = batch.log_probs + 0.3 * torch.randn(batch.mask.shape, generator=generator) * batch.mask
    _, totals = accumulate_gradients(agent.policy, batch, agent.loss, agent.loss_weights(batch), 3)
    model = agent.policy.lm.model
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    agent.policy.zero_grad()

    def logits(sequences):
        """Of the tokens that the policy wrote, ``[B, T, V]``, each sequence by itself."""
        out = torch.zeros(*batch.mask.shape, model.config.vocab_size)
        for i, (prompt, answer) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
            ids = torch.tensor([[*prompt, *answer]])
            out[i, : len(answer)] = model(ids).logits[0, len(prompt) - 1 : -1]
        return out

    student = logits(batch.inputs["sequences"])
    with torch.no_grad():
        teacher = logits(batch.inputs["shown"])
    per_token = losses.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=1.0)
    own = student.log_softmax(-1).gather(-1, batch.actions[..., None]).squeeze(-1)
    clipped = losses.apply_importance_sampling_clipping(per_token, own, batch.log_probs, 1.05)
    mask = batch.chosen.float()
    expected = ((clipped * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    ratio = (own - batch.log_probs).exp()
    clip = torch.min(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    policy = -(torch.where(batch.mask, clip, 0).sum(-1) / batch.mask.sum(-1)).mean()
    (weight * expected + (1 - weight) * policy).backward()
    assert 0 < batch.chosen.any(1).sum() < 8, "some have nobody to learn from"
    assert float(totals[0]) == pytest.approx((weight * expected + (1 - weight) * policy).item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_without_distillation_a_step_is_grpos():
    pair = [make(distillation_weight=0.0), None]
    env = make_env(2, lm=make_lm(), reward=likes_a, kl_coef=0.0)
    pair[1] = GRPO("auto", env, group_size=4, n_episodes=8, seed=0)
    for agent in pair:
        agent.learn(40, log_interval=None)
    for a, b in zip(*(agent.policy.parameters() for agent in pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_it_comes_closer_to_what_it_says_with_hints():
    agent = make(n_episodes=32, learning_rate=1e-2, teacher="reference")
    agent.learn(1, log_interval=None)
    before = agent.logger.name_to_value["train/divergence"]
    agent.learn(1500, log_interval=None)
    assert agent.logger.name_to_value["train/divergence"] < 0.7 * before


def test_a_column_of_the_prompts_is_shown_to_the_teacher_alone():
    env = make_env(
        2, prompts=ROWS, reward=lambda prompts, completions, **_: [0.0] * len(prompts), kl_coef=0.0
    )
    agent = make(env=env, n_episodes=16, feedback_column="hint")
    rollout = collected(agent)
    for i, name in enumerate(agent._episodes.prompts):
        told = name == "a"
        assert bool(rollout.chosen[i].any()) == told
        assert ("b b c" in shown_text(agent, rollout, i)) == told
        assert agent.policy.lm.tokenizer.decode(rollout.inputs["sequences"].prompts[i]) == name


def test_hints_stand_in_the_users_last_message():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}d {{ m['content'] }} e {% endfor %}f"
    lm = CausalLM(make_lm().model, tokenizer)
    chat = [
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    ]
    agent = make(env=make_env(2, lm=lm, prompts=chat, reward=likes_a, kl_coef=0.0))
    rollout = collected(agent)
    row = int(rollout.chosen.any(1).nonzero()[0])
    words = shown_text(agent, rollout, row).split()
    assert words[:7] == ["d", "a", "e", "d", "b", "e", "d"] and words[7] == "c" and words[-2:] == ["e", "f"]
    own = agent.policy.lm.tokenizer.decode(rollout.inputs["sequences"].prompts[row]).split()
    assert own == ["d", "a", "e", "d", "b", "e", "d", "c", "e", "f"]


def test_hints_that_do_not_fit_into_the_context_are_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(hints, "SOLUTION_TEMPLATE", "{solution} " + "b " * 60)
    agent = make()
    rollout = collected(agent)
    assert not rollout.chosen.any()
    assert agent.logger.name_to_value["distillation/too_long"] > 0
    agent.learn(20, log_interval=None)


def test_the_teacher_may_be_a_reference_that_averages_the_policies():
    env = make_env(2, lm=make_lm(), reward=likes_a, kl_coef=0.01)
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.05}
    agent = make(env=env, teacher="reference", learning_rate=1e-2, **moving)
    agent.learn(60, log_interval=None)
    assert agent.text_env.reference is not agent.text_env.lm
    batch = agent.prepare_rollout(agent.collect())
    *_, divergence = agent._compare(agent.policy.lm, batch)
    agent.teacher = "policy"
    *_, own = agent._compare(agent.policy.lm, batch)
    assert not torch.allclose(divergence, own)


def test_a_resumed_run_ends_with_bitwise_the_same_weights(tmp_path):
    agent = make(learning_rate=1e-2)
    agent.learn(60)
    agent.save(tmp_path)
    resumed = SDPO.load(tmp_path, env=make_env(2, lm=make_lm(), reward=likes_a, kl_coef=0.0))
    for each in (agent, resumed):
        each.learn(60, reset_num_timesteps=False)
    assert all(
        torch.equal(a, b) for a, b in zip(agent.policy.parameters(), resumed.policy.parameters(), strict=True)
    )
    assert SDPO.load(tmp_path).policy.compare is None, "to predict it needs no teacher"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"distillation_weight": 1.5}, "distillation_weight must be in"),
        ({"teacher": "nobody"}, "teacher='nobody'"),
        ({"feedback_column": "hint"}, "is no column of the prompts"),
    ],
)
def test_what_cannot_be_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        make(**options)


def test_an_environment_without_texts_is_refused():
    with pytest.raises(ValueError, match="prompts of TextRLHF-v0"):
        SDPO("auto", "ToyBandit-v0", seed=0)
