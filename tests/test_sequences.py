"""One ragged shape for token sequences: who wrote what, rows, padding, and one pass that reads them all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.policies.causal_lm import CausalLMPolicy
from agents.rollouts.rollout import Rollout, concatenate
from tests.tiny import WORDS, make_env, make_lm, make_tokenizer
from textrl_env.lm import Sequences, generate
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.sequences import ENVIRONMENT, POLICY, PROMPT
from textrl_env.lm.teacher_forcing import PackedLayout, PaddedLayout

#: Who writes the spans of a sequence, one after another.
AUTHORS = [PROMPT, POLICY, ENVIRONMENT, POLICY, ENVIRONMENT]

#: Lengths of the spans of some sequences, and which of three prompts each has.
conversations = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(1, 4), min_size=1, max_size=4)), min_size=1, max_size=6
)


def talk(rows, prompt_lengths=(2, 5, 5), seed=0) -> Sequences:
    """Random conversations: the prompt's number and the lengths of the spans that follow it."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(3, len(WORDS), size=n)  # noqa: E731
    prompts = [draw(n) for n in prompt_lengths]
    return Sequences.from_spans(
        [[(PROMPT, prompts[k]), *zip(AUTHORS[1:], map(draw, lengths), strict=False)] for k, lengths in rows]
    )


def three() -> Sequences:
    """Prompt, policy, environment, policy; prompt and policy; prompt, policy, environment."""
    return Sequences.from_spans(
        [
            [(PROMPT, [1, 2]), (POLICY, [3]), (ENVIRONMENT, [4, 5]), (POLICY, [6, 7])],
            [(PROMPT, [1]), (POLICY, [8])],
            [(PROMPT, [1, 2]), (POLICY, [9, 10]), (ENVIRONMENT, [11])],
        ]
    )


def lists(arrays) -> list[list]:
    return [array.tolist() for array in arrays]


def assert_same(one: Sequences, other: Sequences) -> None:
    for name in ("tokens", "starts", "written_by", "log_probs", "rewards"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None) and (mine is None or mine.tolist() == theirs.tolist())


# -- what a batch knows of itself ---------------------------------------------------------------------------------


def test_tokens_starts_and_authors_are_flat_arrays():
    batch = three()
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 8, 1, 2, 9, 10, 11]
    assert batch.starts.tolist() == [0, 7, 9] and batch.lengths.tolist() == [7, 2, 5]
    assert batch.written_by.tolist() == [0, 0, 1, 2, 2, 1, 1, 0, 1, 0, 0, 1, 1, 2]


def test_the_policys_tokens_are_known_by_place_row_and_number():
    batch = three()
    assert batch.policy.tolist() == [2, 5, 6, 8, 11, 12]
    assert batch.actions.tolist() == [3, 6, 7, 8, 9, 10]
    assert batch.rows.tolist() == [0, 0, 0, 1, 2, 2] and batch.num_actions.tolist() == [3, 1, 2]
    assert batch.first.tolist() == [2, 1, 2] and batch.last.tolist() == [6, 1, 3]


def test_a_prompt_ends_and_a_response_begins_with_the_policys_first_token():
    assert lists(three().prompts) == [[1, 2], [1], [1, 2]]
    assert lists(three().responses) == [[3, 4, 5, 6, 7], [8], [9, 10, 11]]


def test_responses_and_log_probs_unpack_as_two_lists():
    batch = Sequences.from_responses([[1, 2], [3]], [[4], [5, 6]], [[-1.0], [-2.0, -3.0]])
    responses, log_probs = batch
    assert lists(responses) == [[4], [5, 6]] and lists(log_probs) == [[-1.0], [-2.0, -3.0]]
    assert batch.log_probs.tolist() == [0, 0, -1, 0, -2, -3]
    responses, log_probs = batch.with_values(log_probs=None)
    assert log_probs is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([1, 2], [0], [1, 1]), "sequence 0 begins with a token of the policy"),
        (([1, 2, 3], [0, 1], [0, 1, 0]), "sequence 1 begins with a token of the policy"),
        (([1, 2], [0, 0], [0, 1]), "at least one of the 2 tokens"),
        (([1, 2], [1], [0, 1]), "starts must begin with 0"),
        (([1, 2], [0, 2], [0, 1]), "at least one of the 2 tokens"),
        (([1, 2], [0], [0, 3]), r"written_by must be .* got \[0, 3\]"),
        (([1, 2], [0], [0]), r"written_by has the shape \(1,\), expected \(2,\)"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        Sequences(*arrays)


def test_values_beside_the_tokens_need_one_for_each():
    with pytest.raises(ValueError, match=r"rewards has the shape \(2,\), expected \(14,\)"):
        three().with_values(rewards=[1.0, 2.0])


# -- rows ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(conversations, st.data())
def test_chosen_rows_put_together_are_the_batch_in_that_order(rows, data):
    batch = talk(rows)
    batch = batch.with_values(log_probs=batch.spread(-np.arange(len(batch.actions))))
    order = data.draw(st.permutations(range(len(batch))))
    chosen = batch[np.array(order)]
    assert_same(chosen, Sequences.concatenate([batch[i] for i in order]))
    assert lists(chosen.responses) == [batch.responses[i].tolist() for i in order]
    assert_same(batch[torch.arange(len(batch))], batch)
    assert_same(batch[1:], batch[np.arange(len(batch)) > 0])


def test_what_not_every_part_has_is_dropped_when_parts_are_put_together():
    one = Sequences.from_responses([[1]], [[2]], [[-1.0]])
    both = Sequences.concatenate([one, one.with_values(log_probs=None)])
    assert both.log_probs is None and both.tokens.tolist() == [1, 2, 1, 2]


def test_turns_are_put_after_one_another_and_an_empty_one_leaves_its_sequence_alone():
    batch = Sequences.from_prompts([[1, 2], [1], [1, 2]])
    batch = batch.extended([[3], [8], [9, 10]], POLICY).extended([[4, 5], [], [11]], ENVIRONMENT)
    assert_same(batch.extended([[6, 7], [], []], POLICY), three())


def test_log_probs_stay_while_they_are_known_of_every_token_of_the_policy():
    batch = Sequences.from_prompts([[1], [2, 2]])
    assert batch.extended([[4], []], ENVIRONMENT).log_probs is None
    batch = batch.extended([[3], [4, 5]], POLICY, [[-1.0], [-2.0, -3.0]]).extended([[6], []], ENVIRONMENT)
    assert batch.extended([[7], []], POLICY, [[-4.0], []]).log_probs.tolist() == [0, -1, 0, -4, 0, 0, -2, -3]
    batch = batch.extended([[7], [8]], POLICY)
    assert batch.log_probs is None and batch.extended([[9], []], POLICY, [[-1.0], []]).log_probs is None


# -- [B, T] and a mask --------------------------------------------------------------------------------------------


def test_the_policys_tokens_become_steps_from_the_left_and_the_environments_do_not():
    batch = three()
    assert batch.mask().tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert batch.padded(batch.actions).tolist() == [[3, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert batch.padded(batch.actions, 4).tolist() == [[3, 6, 7, 0], [8, 0, 0, 0], [9, 10, 0, 0]]


def test_a_padded_tensor_keeps_its_gradient():
    batch, values = three(), torch.arange(1.0, 7.0, requires_grad=True)
    steps = batch.padded(values, 4)
    assert steps.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]]
    (steps * torch.arange(12.0).view(3, 4)).sum().backward()
    assert values.grad.tolist() == [0, 1, 2, 4, 8, 9]


@settings(deadline=None)
@given(conversations)
def test_padding_on_the_left_is_taken_off_again(rows):
    batch = talk(rows)
    width = batch.lengths.max() + 2
    ids, real, authors = np.full((3, len(batch), width), 7)
    for i, (tokens, author) in enumerate(
        zip(batch.split(batch.tokens), batch.split(batch.written_by), strict=True)
    ):
        real[i], ids[i, -len(tokens) :], authors[i, -len(tokens) :] = 0, tokens, author
        real[i, -len(tokens) :] = 1
    assert_same(Sequences.from_padded(ids, real, authors), batch)


# -- one pass over what was written ---------------------------------------------------------------------------------


def plain(lm, batch: Sequences):
    """Log-probabilities and entropies of the policy's tokens, one unpadded forward after another."""
    log_probs, entropies = [], []
    for tokens, authors in zip(batch.split(batch.tokens), batch.split(batch.written_by), strict=True):
        table = lm.action_logits(lm.model(torch.from_numpy(tokens)[None]).logits)[0].log_softmax(-1)
        places = np.flatnonzero(authors == POLICY)
        log_probs.append(table[places - 1, tokens[places]])
        entropies.append(-(table.exp() * table).sum(-1)[places - 1])
    return torch.cat(log_probs), torch.cat(entropies)


def gradient(lm, value):
    lm.model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten().clone() for p in lm.model.parameters() if p.grad is not None])


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["llama", "gpt2"]), rows=conversations, packed=st.booleans())
def test_log_probs_of_turns_are_those_of_plain_forwards_prompts_shared_or_not(kind, rows, packed):
    lm = make_lm(kind).clone()
    lm.model.requires_grad_(True)
    batch = talk(rows)
    reader = lm if packed else lm.with_ways(dataclasses.replace(lm.ways, packing=None))
    assert isinstance(reader.layout(batch), PackedLayout) == packed
    got, entropy, _ = reader.evaluate(batch)
    wanted, wanted_entropy = plain(lm, batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, wanted_entropy, atol=1e-5, rtol=1e-4)
    weights = torch.arange(1.0, len(got) + 1)
    mine, theirs = gradient(lm, weights @ got), gradient(lm, weights @ wanted)
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_turn_is_generated_after_what_others_have_written(kind):
    lm, rng = make_lm(kind), torch.Generator().manual_seed(0)
    lm.eos_ids = np.array([0])
    first = generate(lm, [np.array([3, 4]), np.array([5]), np.array([3, 4])], 4, rng)
    answered = first.extended([[6, 7], [8], []], ENVIRONMENT)
    batch = generate(lm, answered, 3, rng)
    assert batch.native and (batch.num_actions > first.num_actions).all()
    assert lists(batch.split(batch.tokens)[i][:n] for i, n in enumerate(answered.lengths)) == lists(
        answered.split(answered.tokens)
    )
    assert batch.log_probs[batch.policy] == pytest.approx(lm.log_probs(batch), abs=1e-4)
    assert Sequences.from_generated(batch, answered) is batch


@pytest.mark.parametrize("disable", [(), ("packing",), ("fused",)])
def test_turns_longer_than_a_window_are_read_by_every_way(disable):
    lm = CausalLM(make_lm("mistral-window-12").model, make_tokenizer(), disable=disable)
    batch = talk([(1, [4, 3, 4]), (1, [2]), (0, [1, 4, 4, 2])])
    assert batch.lengths.max() > 12
    assert isinstance(lm.layout(batch), PaddedLayout if "packing" in disable else PackedLayout)
    assert (lm.fused_body() is None) == ("fused" in disable)
    torch.testing.assert_close(lm.evaluate(batch)[0], plain(lm, batch)[0], atol=1e-5, rtol=1e-4)
    assert lm.log_probs(batch) == pytest.approx(plain(lm, batch)[0].detach().numpy(), abs=1e-4)


def test_what_predicts_nothing_that_is_asked_for_is_not_read(monkeypatch):
    lm = make_lm()
    batch = talk(
        [(1, [3, 2, 2, 4])] * 4
    )  # of 11 tokens after the prompt, the last 4 and one more predict nothing
    lm.layout(batch)
    read = []
    embed = lm.body.embed_tokens.forward
    monkeypatch.setattr(lm.body.embed_tokens, "forward", lambda ids: read.append(ids.numel()) or embed(ids))
    lm.evaluate(batch)
    assert read == [5, 4 * 6]


def test_a_sequence_without_a_token_of_the_policy_gives_no_log_prob_and_disturbs_nothing():
    lm = make_lm()
    batch = talk([(1, [3]), (1, []), (0, [2, 1])])
    assert batch.num_actions.tolist() == [3, 0, 2]
    torch.testing.assert_close(lm.evaluate(batch)[0], plain(lm, batch)[0], atol=1e-5, rtol=1e-4)
    assert lm.evaluate(batch[1:2])[0].shape == (0,)


def test_a_layout_is_made_once_and_outlives_new_values_beside_the_tokens():
    lm, batch = make_lm(), talk([(1, [3, 2, 2]), (1, [1])])
    layout = lm.layout(batch)
    assert isinstance(layout, PackedLayout) and lm.layout(batch) is layout
    assert lm.layout(batch.with_values(rewards=batch.spread(np.ones(6)))) is layout
    assert lm.layout(batch[:1]) is not layout


# -- in a rollout ---------------------------------------------------------------------------------------------------


def policy_of(env, critic="head") -> CausalLMPolicy:
    torch.manual_seed(0)
    policy = CausalLMPolicy(env.single_observation_space, env.single_action_space, critic, model=env.lm)
    if critic is not None:
        torch.nn.init.normal_(policy.value_head.out.weight)
    return policy


def rollout_of(batch: Sequences) -> Rollout:
    mask = torch.from_numpy(batch.mask())
    zeros = torch.zeros(mask.shape)
    actions = torch.from_numpy(batch.padded(batch.actions))
    return Rollout({"sequences": batch}, actions, zeros, zeros, zeros, zeros, mask, mask)


@pytest.mark.parametrize("critic", ["head", "separate", None])
def test_a_policy_evaluates_turns_as_steps(critic):
    policy, batch = policy_of(make_env(2), critic), talk([(1, [3, 2, 2]), (1, [1]), (2, [2, 3, 1])])
    rollout = rollout_of(batch)
    new = policy.evaluate(rollout)
    wanted = batch.padded(plain(policy.lm, batch)[0])
    torch.testing.assert_close(new.log_probs, wanted, atol=1e-5, rtol=1e-4)
    for micro, rows in rollout.micro_batches(2):
        again = policy.evaluate(micro)
        torch.testing.assert_close(again.log_probs, new.log_probs[rows], atol=1e-5, rtol=1e-4)
        if critic is not None:
            torch.testing.assert_close(again.values, new.values[rows], atol=1e-5, rtol=1e-4)


def test_micro_batches_are_cut_once_and_read_what_has_changed_since():
    rollout = rollout_of(talk([(1, [3]), (1, [1]), (2, [2]), (0, [2])]))
    rollout.advantages = torch.zeros(rollout.mask.shape)
    first = [micro for micro, _ in rollout.micro_batches(2)]
    rollout.advantages = torch.ones(rollout.mask.shape)
    second = [micro for micro, _ in rollout.micro_batches(2)]
    assert [a.inputs["sequences"] is b.inputs["sequences"] for a, b in zip(first, second, strict=True)] == [
        True
    ] * 2
    assert all(micro.advantages.all() for micro in second)


def test_rollouts_of_turns_are_put_together():
    one, other = (rollout_of(talk(rows)) for rows in ([(1, [3, 2, 2])], [(0, [1]), (1, [2, 2, 4])]))
    both = concatenate([one, other])
    parts = [r.inputs["sequences"] for r in (one, other)]
    assert_same(both.inputs["sequences"], Sequences.concatenate(parts))
    assert both.mask.tolist() == both.inputs["sequences"].mask().tolist()


def observation(*rows, width=12):
    """A left-padded batch of token ids."""
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def test_an_environment_that_answers_back_is_seen_in_what_its_steps_show():
    policy = policy_of(make_env(2), None)
    shown = [
        observation([3, 4], [5]),
        observation([3, 4, 6], [5, 7, 8, 9]),  # slot 1 was answered with 8 9
        observation([3, 4, 6, 10, 11], [5, 7, 8, 9, 3]),  # and slot 0 with 11 after its second token
    ]
    actions = np.array([[6, 10, 5], [7, 3, 4]])
    mask = np.array([[True, True, True], [True, True, False]])
    batch = policy.stack(shown, actions, mask)["sequences"]
    assert lists(batch.split(batch.tokens)) == [[3, 4, 6, 10, 11, 5], [5, 7, 8, 9, 3]]
    assert lists(batch.split(batch.written_by)) == [[0, 0, 1, 1, 2, 1], [0, 1, 2, 2, 1]]
    assert batch.mask().tolist() == mask.tolist()


def test_observations_that_forget_what_was_written_are_refused():
    policy = policy_of(make_env(1), None)
    shown = [observation([3, 4]), observation([4, 9, 8])]
    with pytest.raises(ValueError, match="slot 0 do not keep what the policy wrote"):
        policy.stack(shown, np.array([[6, 7]]), np.array([[True, True]]))
