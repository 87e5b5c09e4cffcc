"""Nothing inside an update waits for a GPU or sends it anything, but for one read of what is logged.

The device is torch's "meta": its tensors have shapes and no numbers, so looking at one raises an error where a GPU
would be waited for. What is copied to it from the host's memory is counted.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agents
from agents import base
from agents.algorithms.maths import masked_whiten
from tests.tiny import make_env, make_lm

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """torch knows no autocast on "meta", not even one that is off."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)


class Transfers(TorchDispatchMode):
    """Collects the operations that read or write two devices; single numbers that ride along do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.dim() > 0]
        if len({x.device.type for x in tensors}) > 1:
            self.found.append(str(func))
        return out


def learner_on_meta(method, prompts, kind="llama", **kwargs):
    """An agent that has collected on the CPU and whose policy has then moved to a device without numbers."""
    kwargs = {"n_episodes": 8, "seed": 0} | kwargs
    env = make_env(lm=make_lm(kind), prompts=prompts, max_new_tokens=6)
    agent = getattr(agents, method)("auto", env, **kwargs)
    agent._set_up_learn(1, None, None, True, False)
    rollout = agent.collect()
    agent.policy.evaluate(rollout)  # checks of the fast ways look at numbers, once in a model's life
    rollout.evaluation = None
    names = {parameter: name for name, parameter in agent.policy.named_parameters()}
    agent.policy.to(META)
    agent.device = META
    moved = dict(agent.policy.named_parameters())
    adams = agent.optimizer.defaults
    groups = [
        {name: value for name, value in g.items() if name not in adams}
        | {"params": [moved[names[p]] for p in g["params"]]}
        for g in agent.optimizer.param_groups
    ]
    agent.optimizer = torch.optim.SGD(groups, lr=0.1)
    return agent, rollout


def counted_updates(monkeypatch, agent):
    """Transfers inside each update, and reads of what is logged in each."""
    counts, reads, update = [], [], agent.update
    # With "meta" there is nothing to read.
    monkeypatch.setattr(
        base, "read_scalars", lambda values, norm: reads.append(1) or [0.0] * (len(values) + 1)
    )

    def counting(batch, fresh=False):
        reads.clear()
        with Transfers() as transfers:
            record = update(batch, fresh)
        counts.append((transfers.found, len(reads)))
        return record

    monkeypatch.setattr(agent, "update", counting)
    monkeypatch.setattr(agent, "_log_training", lambda *args: None)
    monkeypatch.setattr(base, "check_weights", lambda *args: None)  # once for a rollout, after its updates
    return counts


SHARED, APART = ["a b c d e f g"], ["a", "b c", "d e f", "h i a b"]


@pytest.mark.parametrize(
    ("method", "prompts", "kwargs"),
    [
        ("GRPO", SHARED, {"group_size": 4}),
        ("GRPO", APART, {"group_size": 1, "ent_coef": 0.1, "entropy_average": "token", "kl_in": "loss"}),
        ("GRPO", SHARED, {"group_size": 4, "micro_batch_size": 3, "batch_size": 4}),
        ("DrGRPO", SHARED, {"group_size": 4, "ent_coef": 0.1}),
        ("GSPO", SHARED, {"group_size": 4}),
        (
            "GRPO",
            SHARED,
            {"group_size": 4, "top_entropy_quantile": 0.3, "ent_coef": 0.1, "off_policy_mask_threshold": 0.1},
        ),
        ("GRPO", APART, {"group_size": 1, "top_entropy_quantile": 0.3, "micro_batch_size": 3}),
        ("GMPO", SHARED, {"group_size": 4}),
        ("KLCov", SHARED, {"group_size": 4}),
        ("PPO", SHARED, {"batch_size": 4, "n_epochs": 1}),
        ("PPO", APART, {"batch_size": 4, "micro_batch_size": 2, "n_epochs": 1, "critic": "separate"}),
        ("REINFORCE", APART, {"baseline": "learned"}),
    ],
)
def test_an_update_sends_nothing_to_the_device_and_reads_once(monkeypatch, method, prompts, kwargs):
    agent, rollout = learner_on_meta(method, prompts, **kwargs)
    counts = counted_updates(monkeypatch, agent)
    agent.train(rollout)
    assert counts == [([], 1)] * -(-8 // (agent.batch_size or 8))


@pytest.mark.parametrize("prompts", [SHARED, APART], ids=["shared", "apart"])
def test_neither_does_one_that_goes_through_a_models_own_modules(monkeypatch, prompts):
    agent, rollout = learner_on_meta("GRPO", prompts, "gpt2", group_size=1)
    counts = counted_updates(monkeypatch, agent)
    agent.train(rollout)
    assert counts == [([], 1)]


def test_what_was_laid_out_is_moved_once_for_all_passes_over_a_rollout(monkeypatch):
    moved = []
    agent, rollout = learner_on_meta("PPO", SHARED, batch_size=None, micro_batch_size=4, n_epochs=2)
    counts = counted_updates(monkeypatch, agent)
    prepare = agent.policy.prepare

    def counting(piece):
        with Transfers() as transfers:
            prepare(piece)
        moved.append(len(transfers.found))

    monkeypatch.setattr(agent.policy, "prepare", counting)
    agent.train(rollout)
    assert len(counts) == 2
    assert moved == [2, 2, 0, 0]  # for each of two pieces a layout and the places of the steps


def test_the_count_sees_a_copy_to_the_device_and_looking_fails_on_it():
    with Transfers() as transfers:
        torch.arange(3).to(META)
        torch.zeros(3, device=META) * 2.0
    assert len(transfers.found) == 1
    for look in (
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: bool(x),
        lambda x: x.view(1)[x.view(1) > 0],
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look(torch.zeros((), device=META))


def test_whitening_decides_about_equal_entries_on_the_device():
    masked_whiten(torch.ones(2, 3, device=META), torch.ones(2, 3, dtype=torch.bool, device=META))
