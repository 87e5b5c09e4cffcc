"""One pass over given responses, prompts shared and rows filled, says what plain passes over each alone say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.tiny import make_lm, random_sequences
from textrl_env.lm import teacher_forcing
from textrl_env.lm.next_tokens import sample_actions
from textrl_env.lm.sequences import Sequences, distinct
from textrl_env.lm.teacher_forcing import linear_log_probs, pack_rows


def plain(lm, prompts, responses):
    """Log-probabilities and entropies, one unpadded pass after another."""
    log_probs, entropies = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        table = lm.action_logits(lm.model(ids).logits)[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_probs.append(table.gather(-1, torch.from_numpy(response)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)


def weight_gradient(lm, value):
    lm.model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten().clone() for p in lm.model.parameters() if p.grad is not None])


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["llama", "gpt2"]),
    temperature=st.sampled_from([0.7, 1.0]),
    distinct=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
)
def test_log_probs_entropies_and_gradients_are_those_of_plain_passes(kind, temperature, distinct, lengths):
    lm = make_lm(kind, temperature=temperature).clone()
    lm.model.requires_grad_(True)
    asked = random_sequences(distinct)
    prompts = [asked[i % len(asked)] for i in range(len(lengths))]
    responses = random_sequences(lengths, seed=1)
    got, entropy, _ = lm.evaluate(Sequences.from_responses(prompts, responses))
    wanted, wanted_entropy = plain(lm, prompts, responses)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, wanted_entropy, atol=1e-5, rtol=1e-4)
    weights = torch.arange(1.0, len(got) + 1)
    mine = weight_gradient(lm, (weights * got + 0.1 * entropy).sum())
    theirs = weight_gradient(lm, (weights * wanted + 0.1 * wanted_entropy).sum())
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_gradients_are_right_where_one_prompt_has_more_rows_than_another():
    lm = make_lm("llama").clone()
    lm.model.requires_grad_(True)
    first, second = random_sequences([6, 4])
    prompts, responses = [first, second, first, first], random_sequences([7, 7, 6, 5], seed=1)
    mine = weight_gradient(lm, lm.evaluate(Sequences.from_responses(prompts, responses))[0].sum())
    theirs = weight_gradient(lm, plain(lm, prompts, responses)[0].sum())
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_this_is_the_way_that_llamas_and_gpts_take():
    assert make_lm("llama").teacher_forcing_works()
    assert make_lm("gpt2").teacher_forcing_works()


def counted(monkeypatch):
    """A model, and a list that gets the number of tokens of each pass through it."""
    lm, read = make_lm(), []
    lm.teacher_forcing_works()
    embed = lm.body.embed_tokens.forward
    monkeypatch.setattr(lm.body.embed_tokens, "forward", lambda ids: read.append(ids.numel()) or embed(ids))
    return lm, read


def test_a_prompt_is_read_once_for_all_its_responses(monkeypatch):
    lm, read = counted(monkeypatch)
    prompts = random_sequences([20]) * 6
    lm.evaluate(Sequences.from_responses(prompts, random_sequences([5] * 6, seed=1)))
    assert read == [20, 6 * 4]


def test_a_beginning_that_different_prompts_share_is_read_once(monkeypatch):
    lm, read = counted(monkeypatch)
    common, *tails = random_sequences([12, 3, 3, 3, 3], seed=4)
    for k, tail in enumerate(tails):
        tail[0] = k
    lm.evaluate(
        Sequences.from_responses([np.append(common, t) for t in tails], random_sequences([5] * 4, seed=1))
    )
    assert read == [12, 4 * (3 + 4)]


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["llama", "gpt2"]),
    common=st.integers(1, 12),
    tails=st.lists(st.integers(0, 4), min_size=2, max_size=5),
    each=st.integers(1, 2),
)
def test_log_probs_and_gradients_behind_a_common_beginning_are_those_of_plain_passes(
    kind, common, tails, each
):
    lm = make_lm(kind).clone()
    lm.model.requires_grad_(True)
    beginning, *rest = random_sequences([common, *tails], seed=2)
    prompts = [np.append(beginning, tail) for tail in rest for _ in range(each)]
    responses = random_sequences([1 + k % 5 for k in range(len(prompts))], seed=1)
    got, _, _ = lm.evaluate(Sequences.from_responses(prompts, responses))
    wanted, _ = plain(lm, prompts, responses)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    weights = torch.arange(1.0, len(got) + 1)
    mine, theirs = (weight_gradient(lm, (weights * value).sum()) for value in (got, wanted))
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_a_head_that_is_more_than_a_matrix_takes_the_plain_way_and_is_still_right():
    lm = make_lm().clone()
    head = lm.model.lm_head
    lm.model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), head)
    assert not lm.teacher_forcing_works()
    prompts, responses = random_sequences([3, 3]), random_sequences([4, 2], seed=1)
    got, entropy, _ = lm.evaluate(Sequences.from_responses(prompts, responses))
    wanted, wanted_entropy = plain(lm, prompts, responses)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, wanted_entropy, atol=1e-5, rtol=1e-4)


def test_logits_that_a_model_rescales_are_noticed(monkeypatch):
    lm = make_lm().clone()
    forward = lm.model.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 2.0 * torch.tanh(out.logits / 2.0)
        return out

    monkeypatch.setattr(lm.model, "forward", capped)
    assert not lm.teacher_forcing_works()


def test_the_plain_way_gives_the_states_of_the_other(monkeypatch):
    lm = make_lm().clone()
    prompts, responses = random_sequences([3, 1, 3]), random_sequences([4, 2, 1], seed=1)
    states = {}
    for works in (True, False):
        monkeypatch.setattr(lm, "teacher_forcing_works", lambda length, works=works: works)
        states[works] = lm.policy_states(Sequences.from_responses(prompts, responses))
        torch.testing.assert_close(
            states[works], lm.evaluate(Sequences.from_responses(prompts, responses), with_states=True)[2]
        )
    torch.testing.assert_close(states[True], states[False], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_log_probs_and_entropies_have_the_gradients_of_whole_logits(monkeypatch, chunk, bias):
    monkeypatch.setattr(teacher_forcing, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    head = nn.Linear(6, 13, bias=bias).double()
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(0, 11, (7,))
    parameters = [hidden, *head.parameters()]
    weights, more = torch.randn(7), torch.randn(7)

    def gradients(log_probs, entropies):
        return torch.autograd.grad((weights * log_probs + more * entropies).sum(), parameters)

    table = head(hidden)[:, :11].log_softmax(-1)
    wanted = gradients(table.gather(-1, actions[:, None])[:, 0], -(table.exp() * table).sum(-1))
    got = gradients(*linear_log_probs(hidden, head, actions, 11))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_bfloat16_log_probs_stay_near_those_of_float32():
    lm = make_lm().clone()
    prompts, responses = random_sequences([4] * 4), random_sequences([6, 3, 5, 1], seed=1)
    exact = lm.response_log_probs(prompts, responses)
    lm.autocast = True
    low = lm.response_log_probs(prompts, responses)
    assert low == pytest.approx(exact, abs=0.3)
    assert np.abs(low - exact).max() > 1e-5  # it did compute otherwise


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=30))
def test_packed_sequences_do_not_overlap_and_share_rows_with_their_own_only(items):
    lengths, owners = (np.array(x) for x in zip(*items, strict=True))
    row, column, owner_of_row = pack_rows(lengths, owners)
    taken = np.zeros((len(owner_of_row), max(lengths.max(), 1)), dtype=int)
    for r, c, length, owner in zip(row, column, lengths, owners, strict=True):
        assert c + length <= lengths.max()
        assert owner_of_row[r] == owner
        taken[r, c : c + length] += 1
    assert taken.max() <= 1
    # No two rows of one owner could have been one.
    filled = taken.sum(1)
    for owner in set(owners.tolist()):
        mine = sorted(filled[owner_of_row == owner])
        assert len(mine) < 2 or mine[0] + mine[1] > lengths.max()


def test_distinct_rows_keep_the_order_of_first_appearance():
    first, kind = distinct([np.array([2, 1]), np.array([3]), np.array([2, 1])])
    assert first.tolist() == [0, 1] and kind.tolist() == [0, 1, 0]


def test_samples_have_the_frequencies_of_the_softmax_and_impossible_actions_never_come():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    drawn = sample_actions(logits.expand(20_000, 5), torch.Generator().manual_seed(0))
    share = np.bincount(drawn.numpy(), minlength=5) / 20_000
    assert share == pytest.approx(logits.softmax(0).numpy(), abs=0.015)
    assert share[2] == share[4] == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("distinct", [1, 4])
def test_under_autocast_a_reference_says_to_the_bit_what_its_policy_says_with_gradient(kind, distinct):
    lm = make_lm(kind).clone()
    lm.autocast = True
    lm.model.requires_grad_(True)
    asked = random_sequences([7] * distinct)
    prompts, responses = [asked[i % distinct] for i in range(4)], random_sequences([6, 2, 5, 6], seed=1)
    with_gradient, _, _ = lm.evaluate(Sequences.from_responses(prompts, responses))
    said = lm.response_log_probs(prompts, responses)
    lengths = [len(r) for r in responses]
    rows = np.split(with_gradient.detach().double().numpy(), np.cumsum(lengths)[:-1])
    for row, reference, length in zip(rows, said, lengths, strict=True):
        assert with_gradient.requires_grad and np.array_equal(row, reference[:length])
