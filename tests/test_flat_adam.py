"""Adam over one vector takes the steps of torch.optim.Adam, whatever becomes of the gradients in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from agents.algorithms.flat_adam import FlatAdam


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step))
    return (model(x) ** 2).sum() * (1 + step)


def twins() -> tuple[nn.Module, FlatAdam, nn.Module, torch.optim.Adam]:
    ours, theirs = network(), network()
    flat = FlatAdam(ours.parameters(), lr=0.02, eps=1e-5, fused=True)
    return ours, flat, theirs, torch.optim.Adam(theirs.parameters(), lr=0.02, eps=1e-5)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipped_steps_are_those_of_torch(max_norm):
    ours, flat, theirs, adam = twins()
    for step in range(5):
        for model, optimizer in ((ours, flat), (theirs, adam)):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            optimizer.zero_grad()
            loss(model, step).backward()
        norm = flat.clip_grad_norm(max_norm)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)), rel=1e-5)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)
        flat.step()
        adam.step()
        assert same(ours, theirs)


@pytest.mark.parametrize("forget", ["module", "none"])
def test_gradients_that_somebody_else_has_put_there_count(forget):
    ours, flat, theirs, adam = twins()
    for step in range(3):
        if forget == "module":
            ours.zero_grad()
        else:
            for parameter in ours.parameters():
                parameter.grad = None
        adam.zero_grad()
        loss(ours, step).backward()
        loss(theirs, step).backward()
        flat.step()
        adam.step()
    assert same(ours, theirs)


def test_weights_and_state_can_be_loaded_and_go_on_alike():
    ours, flat, *_ = twins()
    loss(ours, 0).backward()
    flat.step()
    saved, state = copy.deepcopy(ours.state_dict()), copy.deepcopy(flat.state_dict())
    again = network()
    resumed = FlatAdam(again.parameters(), lr=0.02, eps=1e-5, fused=True)
    again.load_state_dict(saved)
    resumed.load_state_dict(state)
    for model, optimizer in ((ours, flat), (again, resumed)):
        optimizer.zero_grad()
        loss(model, 1).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
