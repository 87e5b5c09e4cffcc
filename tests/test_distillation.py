"""Distillation on the student's own answers: TRL's divergence, its gradient through a model, data, checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import GKD
from agents.algorithms.gradient_step import accumulate_gradients
from tests.tiny import EOS, WORDS, make_env, make_lm, make_model, make_tokenizer
from textrl_env.lm import divergence
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.divergence import generalized_jsd

DATA = [{"prompt": "a ", "completion": "b c"}, {"prompt": "d e ", "completion": "f"}]


def make(kind="llama", teacher_seed=5, lm=None, **kwargs) -> GKD:
    env = make_env(2, lm=lm or make_lm(kind))
    kwargs = {"teacher": make_lm(kind, seed=teacher_seed), "n_episodes": 8, "seed": 0} | kwargs
    return GKD("auto", env, **kwargs)


def theirs(student, teacher, labels, beta):
    """TRL's own loss."""
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    return trainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_trls(beta):
    torch.manual_seed(0)
    student, other = (3 * torch.randn(6, 11)).requires_grad_(), 3 * torch.randn(6, 11)
    labels = torch.zeros(1, 6, dtype=torch.long)
    expected = theirs(student[None], other[None], labels, beta)
    (slope,) = torch.autograd.grad(expected, student)
    own = generalized_jsd(student, other, beta).mean()
    (own_slope,) = torch.autograd.grad(own, student)
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(own_slope, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "chunk"), [("llama", 24), ("llama", 10**6), ("gpt2", 24)])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_a_step_has_the_gradient_of_trls_loss_on_the_students_answers(kind, chunk, beta, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_LOGITS", chunk)
    agent = make(kind, beta=beta)
    teacher = agent.teacher.model
    agent._set_up_learn(1, None, None, True, False)
    batch = agent.prepare_rollout(agent.collect())
    sequences = batch.inputs["sequences"]
    _, totals = accumulate_gradients(agent.policy, batch, agent.loss, agent.loss_weights(batch), 3)
    found = {name: p.grad.clone() for name, p in agent.policy.lm.model.named_parameters()}
    agent.policy.zero_grad()
    whole = [np.concatenate(pair) for pair in zip(sequences.prompts, sequences.responses, strict=True)]
    width = max(map(len, whole))
    ids = torch.full((len(whole), width), EOS)
    labels = torch.full((len(whole), width), -100)
    for row, (tokens, prompt) in enumerate(zip(whole, sequences.prompts, strict=True)):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        labels[row, len(prompt) : len(tokens)] = ids[row, len(prompt) : len(tokens)]
    real = (torch.arange(width) < torch.tensor([[len(tokens)] for tokens in whole])).long()
    logits = [m(input_ids=ids, attention_mask=real).logits[:, :-1] for m in (agent.policy.lm.model, teacher)]
    expected = theirs(logits[0], logits[1].detach(), labels[:, 1:], beta)
    expected.backward()
    assert float(totals[0]) == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in agent.policy.lm.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lmbda": 0.0, "data": DATA}, {"policy_kwargs": {"lora_rank": 4}}])
def test_a_student_comes_closer_to_its_teacher(options):
    agent = make(beta=1.0, learning_rate=5e-2 if "policy_kwargs" in options else 1e-2, **options)
    agent.learn(1, log_interval=None)
    before = agent.logger.name_to_value["train/divergence"]
    agent.learn(240, log_interval=None)
    assert agent.logger.name_to_value["train/divergence"] < 0.8 * before


def test_demonstrations_are_read_where_somebody_wrote_them():
    agent = make(lmbda=0.0, data=[{"prompt": "a b ", "completion": "c d"}])
    rollout = agent.collect()
    sequences = rollout.inputs["sequences"]
    assert sequences.prompts[0].tolist() == [3, 4]
    assert sequences.responses[0].tolist()[:2] == [5, 6]
    assert rollout.mask.sum() == len(sequences.responses[0]) == agent.num_timesteps
    assert not rollout.done.any()


def test_a_resumed_run_draws_the_same_rollouts_and_ends_bitwise_the_same(tmp_path):
    make_lm(seed=5).model.save_pretrained(tmp_path / "teacher")
    make_lm(seed=5).tokenizer.save_pretrained(tmp_path / "teacher")
    agent = make(teacher=str(tmp_path / "teacher"), lmbda=0.5, data=DATA, learning_rate=1e-3)
    agent.learn(80)
    agent.save(tmp_path / "checkpoint")
    torch.manual_seed(12345)
    resumed = GKD.load(tmp_path / "checkpoint", env=make_env(2, lm=make_lm("llama")))
    for each in (agent, resumed):
        each.learn(80, reset_num_timesteps=False)
    assert agent.num_timesteps == resumed.num_timesteps
    pairs = zip(agent.policy.parameters(), resumed.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    alone = GKD.load(tmp_path / "checkpoint")
    assert alone.policy.compare is None, "to predict it needs no teacher"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"teacher": None}, "pass teacher="),
        ({"beta": 1.5}, "beta must be in"),
        ({"lmbda": 0.5}, "pass data="),
        ({"teacher": CausalLM(make_model("llama"), make_tokenizer(words=WORDS[::-1]))}, "one vocabulary"),
    ],
)
def test_what_cannot_be_distilled_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        make(**options)


def test_networks_are_not_distilled():
    with pytest.raises(ValueError, match="distils language models"):
        GKD("MlpPolicy", "CartPole-v1", teacher=make_lm())


def test_it_takes_no_arguments_of_rewards():
    with pytest.raises(TypeError, match="takes no ent_coef"):
        make(ent_coef=0.1)
