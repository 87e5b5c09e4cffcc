"""Cached, ragged decoding against plain forward passes, and the distribution that acts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.tiny import CONTEXT, EOS, WORDS, make_lm, make_model, make_tokenizer, misalign, random_sequences
from textrl_env.lm import decoding, slot_decoder
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate
from textrl_env.lm.next_tokens import gather_log_probs, sample_actions
from textrl_env.lm.shared_prompts import SharedPrompts
from textrl_env.lm.slot_decoder import SlotDecoder


@torch.no_grad()
def plain_logits(lm: CausalLM, sequence: np.ndarray) -> torch.Tensor:
    """The truth: one sequence alone, no padding, no cache; ``[L, vocab_size]``."""
    logits = lm.model(torch.from_numpy(np.asarray(sequence))[None], use_cache=False).logits[0]
    return logits[:, : lm.vocab_size] / lm.temperature


def assert_logits(got, lm, sequences, tolerance=1e-4):
    expected = torch.stack([plain_logits(lm, s)[-1] for s in sequences])
    assert (got - expected).abs().max() < tolerance


# Decoding


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mistral-window-12"])
def test_ragged_decoding_gives_the_logits_of_a_plain_forward(kind):
    lm = make_lm(kind)
    sequences = random_sequences([5, 1, 14, 8])
    decoder = SlotDecoder(lm, 4, CONTEXT)
    assert_logits(decoder.prefill(np.arange(4), sequences), lm, sequences)
    rng = np.random.default_rng(1)
    for step in range(16):
        slots = np.flatnonzero(rng.random(4) < 0.7) if step % 3 else np.arange(4)
        if step == 8:  # one slot restarts while the others go on
            sequences[2] = random_sequences([3], seed=2)[0]
            assert_logits(decoder.prefill(np.array([2]), [sequences[2]]), lm, [sequences[2]])
        if len(slots) == 0:
            continue
        tokens = rng.integers(0, len(WORDS), size=len(slots))
        for slot, token in zip(slots, tokens, strict=True):
            sequences[slot] = np.append(sequences[slot], token)
        assert_logits(decoder.step(slots, tokens), lm, [sequences[s] for s in slots])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ordinary_models_are_decoded_with_a_cache(kind):
    assert SlotDecoder(make_lm(kind), 2, CONTEXT).use_cache


def test_a_window_that_the_self_check_could_not_reproduce_is_decoded_without_a_cache_where_it_matters():
    lm = make_lm("mistral-window-12")
    assert SlotDecoder(lm, 2, 13).use_cache and lm.ways.cache_windows
    lm = lm.with_ways(dataclasses.replace(lm.ways, cache_windows=False))
    assert SlotDecoder(lm, 2, 12).use_cache
    with pytest.warns(UserWarning, match="without a key/value cache.*up to 6 times as long"):
        assert not SlotDecoder(lm, 2, 13).use_cache


def test_next_logits_follows_sequences_that_grow_stay_restart_and_shrink(lm):
    rng = np.random.default_rng(0)
    decoder = SlotDecoder(lm, 3, 20)
    tokens, lengths = np.zeros((3, 20), dtype=np.int64), np.zeros(3, dtype=np.int64)

    def put(slot, sequence):
        tokens[slot, : len(sequence)], lengths[slot] = sequence, len(sequence)

    for slot in range(3):
        put(slot, rng.integers(0, len(WORDS), size=slot + 2))
    for step in range(12):
        slots = np.arange(3) if step % 2 else rng.permutation(3)[:2]
        got = decoder.next_logits(tokens, lengths, slots)
        assert_logits(got, lm, [tokens[s, : lengths[s]] for s in slots])
        put(0, np.append(tokens[0, : lengths[0]], rng.integers(len(WORDS))))  # grows
        if step == 3:
            put(1, rng.integers(0, len(WORDS), size=6))  # restarts
        if step == 5:
            put(1, tokens[1, :3].copy())  # is cut back to its own beginning
        if step == 7:
            put(2, np.append(tokens[2, : lengths[2]], rng.integers(0, len(WORDS), size=3)))  # grows by three
        if step == 9:
            tokens[2, 0] = (tokens[2, 0] + 1) % len(WORDS)  # same length, other prompt


def test_next_logits_after_a_prefill_and_in_a_fork_are_the_models_own(lm):
    sequences = random_sequences([4, 6])
    decoder = SlotDecoder(lm, 2, 12)
    decoder.prefill(np.arange(2), sequences)
    tokens, lengths = np.zeros((2, 12), dtype=np.int64), np.array([4, 6])
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    assert_logits(decoder.next_logits(tokens, lengths, np.arange(2)), lm, sequences)
    swapped = decoder.fork(np.array([1, 0]))
    got = swapped.next_logits(tokens[::-1].copy(), lengths[::-1].copy(), np.arange(2))
    assert_logits(got, lm, sequences[::-1])


def test_a_fork_goes_on_from_where_its_sources_were_and_leaves_them_alone(lm):
    sequences = random_sequences([3, 7])
    decoder = SlotDecoder(lm, 2, CONTEXT)
    decoder.prefill(np.arange(2), sequences)
    twin = decoder.fork(np.array([1, 0, 1]))
    extended = [np.append(sequences[s], t) for s, t in zip([1, 0, 1], [3, 4, 5], strict=True)]
    assert_logits(twin.step(np.arange(3), np.array([3, 4, 5])), lm, extended)
    assert_logits(
        decoder.step(np.arange(2), np.array([6, 6])), lm, [np.append(sequence, 6) for sequence in sequences]
    )


def test_clear_forgets_logits_of_old_weights():
    lm = make_lm().clone()
    tokens, lengths = np.array([[3, 4, 5]]), np.array([3])
    decoder = SlotDecoder(lm, 1, 8)
    before = decoder.next_logits(tokens, lengths, np.arange(1)).clone()
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(2)
    decoder.clear()
    after = decoder.next_logits(tokens, lengths, np.arange(1))
    assert after == pytest.approx(2 * before, abs=1e-4)


# Whole responses


def test_generated_log_probs_are_those_of_one_teacher_forced_pass(lm):
    prompts = random_sequences([3, 1, 6, 3, 3])
    prompts[4] = prompts[0]
    responses, log_probs = generate(lm, prompts, 12, torch.Generator().manual_seed(0))
    again = lm.response_log_probs(prompts, responses)
    for row, (response, log_prob) in enumerate(zip(responses, log_probs, strict=True)):
        assert log_prob == pytest.approx(again[row, : len(response)], abs=1e-4)
        assert (again[row, len(response) :] == 0).all()


def test_prompts_held_once_give_the_log_probs_of_a_teacher_forced_pass_too(lm, monkeypatch):
    monkeypatch.setattr(decoding, "SHARED_TOKENS", 1)
    asked = random_sequences([3, 1, 6])
    prompts = [asked[i] for i in (0, 2, 0, 1, 0, 2, 0)]
    responses, log_probs = generate(lm, prompts, 12, torch.Generator().manual_seed(0))
    again = lm.response_log_probs(prompts, responses)
    for row, (response, log_prob) in enumerate(zip(responses, log_probs, strict=True)):
        assert log_prob == pytest.approx(again[row, : len(response)], abs=1e-4)


def test_slots_that_continue_one_sequence_say_what_slots_with_copies_of_it_say(lm):
    if not lm.slot_cache_works(CONTEXT):
        pytest.skip("decoded without a cache")
    sequences, owners = random_sequences([3, 7]), np.array([1, 0, 1, 1])
    decoder = SlotDecoder(lm, 2, CONTEXT)
    decoder.prefill(np.arange(2), sequences)
    shared, held = decoder.continue_each(owners), [sequences[i] for i in owners]
    assert lm.shared_prompts_work()
    for token in (3, 4):
        held = [np.append(h, token + i) for i, h in enumerate(held)]
        assert_logits(shared.step(np.arange(4), np.array([h[-1] for h in held])), lm, held)
    # Rows leave, prompts stay.
    fewer = shared.fork(np.array([3, 1]))
    held = [np.append(held[i], 5) for i in (3, 1)]
    assert_logits(fewer.step(np.arange(2), np.array([5, 5])), lm, held)


def test_a_group_of_long_prompts_is_decoded_with_the_prompts_held_once(monkeypatch):
    made = []
    monkeypatch.setattr(slot_decoder, "SharedPrompts", lambda *a: made.append(a) or SharedPrompts(*a))
    lm, (short,) = make_lm(), random_sequences([3])
    generate(lm, [short, short], 3)
    assert not made
    monkeypatch.setattr(decoding, "SHARED_TOKENS", 3)
    generate(lm, [short, short], 3)
    assert made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("answers", [1, 3])
def test_what_different_prompts_begin_with_is_read_once(kind, answers, monkeypatch):
    lm, beginning = make_lm(kind).clone(), random_sequences([9])[0]
    prompts = [np.concatenate([beginning, end]) for end in random_sequences([2, 5, 1], seed=4)]
    prompts = [prompt for prompt in prompts for _ in range(answers)]
    read = []
    lm.check()
    lm.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, _: read.append(inputs[0].numel())
    )

    def write(shared_tokens):
        monkeypatch.setattr(decoding, "SHARED_TOKENS", shared_tokens)
        read.clear()
        responses, log_probs = generate(lm, prompts, 6, torch.Generator().manual_seed(2))
        return [r.tolist() for r in responses], log_probs, list(read)

    once, apart = write(9), write(10)
    assert once[2][:2] == [9, 3 * 5] and apart[2][0] == 3 * 14
    assert once[0] == apart[0]
    assert np.concatenate(once[1]) == pytest.approx(np.concatenate(apart[1]), abs=1e-5)


def test_a_prompt_that_another_one_goes_on_from_has_a_last_token_of_its_own(monkeypatch):
    monkeypatch.setattr(decoding, "SHARED_TOKENS", 3)
    lm, (long,) = make_lm(), random_sequences([8])
    prompts = [long[:5], long]
    responses, log_probs = generate(lm, prompts, 4, torch.Generator().manual_seed(2))
    again = lm.response_log_probs(prompts, responses)
    for row, one in zip(again, log_probs, strict=True):
        assert row[: len(one)] == pytest.approx(one, abs=1e-5)


def test_response_log_probs_are_those_of_unpadded_passes_in_any_chunking(lm):
    prompts, responses = random_sequences([3, 1, 6]), random_sequences([4, 9, 2], seed=1)
    for max_tokens in (1, 20, 10**6):
        got = lm.response_log_probs(prompts, responses, max_tokens)
        for row, prompt, response in zip(got, prompts, responses, strict=True):
            table = plain_logits(lm, np.concatenate([prompt, response])).log_softmax(-1)
            expected = [table[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
            assert row[: len(response)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_divides_the_logits_in_every_place(temperature):
    lm = make_lm(temperature=temperature)
    prompt, response = np.array([3, 4]), np.array([5, 6, 7])
    table = plain_logits(make_lm(), np.concatenate([prompt, response])) / temperature
    expected = table.log_softmax(-1)[[1, 2, 3], [5, 6, 7]]
    assert lm.response_log_probs([prompt], [response])[0] == pytest.approx(expected.numpy(), abs=1e-4)
    decoder = SlotDecoder(lm, 1, 8)
    logits = [decoder.prefill(np.arange(1), [prompt])]
    logits += [decoder.step(np.arange(1), np.array([token])) for token in (5, 6)]
    assert gather_log_probs(torch.cat(logits), torch.tensor([5, 6, 7])) == pytest.approx(expected, abs=1e-4)
    responses, log_probs = generate(lm, [prompt], 4, torch.Generator().manual_seed(0))
    assert log_probs[0] == pytest.approx(lm.response_log_probs([prompt], responses)[0], abs=1e-4)


def test_greedy_generation_equals_transformers_token_by_token(lm):
    greedy = GenerationConfig(do_sample=False, max_new_tokens=15, eos_token_id=[EOS, 5], pad_token_id=2)
    ours = make_lm("llama" if "Llama" in type(lm.model).__name__ else "gpt2")
    ours.eos_ids = np.array([EOS, 5])
    prompts = random_sequences([1, 2, 3, 4, 5, 6])
    responses, _ = generate(ours, prompts, 15, deterministic=True)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.from_numpy(prompt)[None]
        theirs = lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        assert response.tolist() == theirs[0, len(prompt) :].tolist()


def test_samples_have_the_frequencies_of_the_models_distribution():
    lm = make_lm()
    prompt = np.array([3, 4])
    responses, _ = generate(lm, [prompt] * 4000, 1, torch.Generator().manual_seed(0))
    counts = np.bincount(np.concatenate(responses), minlength=len(WORDS)) / 4000
    assert counts == pytest.approx(plain_logits(lm, prompt)[-1].softmax(-1).numpy(), abs=0.03)


def test_generation_stops_at_the_end_token_which_is_part_of_the_response(lm):
    responses, log_probs = generate(lm, [np.array([3])] * 40, 10, torch.Generator().manual_seed(0))
    for response, log_prob in zip(responses, log_probs, strict=True):
        assert EOS not in response[:-1] and len(response) == len(log_prob)
        assert response[-1] == EOS or len(response) == 10
    assert {len(r) for r in responses} > {10}


def test_every_listed_end_token_ends_a_response():
    model = make_model("llama", seed=3)
    model.generation_config.eos_token_id = [4, 5]
    lm = CausalLM(model, make_tokenizer())
    assert lm.eos_ids.tolist() == [EOS, 4, 5]
    responses, _ = generate(lm, [np.array([3])] * 60, 10, torch.Generator().manual_seed(0))
    ends = {int(r[-1]) for r in responses if len(r) < 10}
    assert ends == {EOS, 4, 5}
    assert not any(np.isin(r[:-1], lm.eos_ids).any() for r in responses)


def test_one_generator_seed_gives_one_set_of_responses(lm):
    first, second = (generate(lm, [np.array([3])] * 9, 8, torch.Generator().manual_seed(5)) for _ in "ab")
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.starts.tolist() == second.starts.tolist()
    assert first.log_probs.tolist() == second.log_probs.tolist()


# Tokens


def test_logits_beyond_the_vocabulary_are_never_sampled_and_take_no_probability(lm_wide):
    lm = lm_wide.clone()
    with torch.no_grad():
        lm.model.lm_head.weight[len(WORDS) :] *= 50
    assert lm.vocab_size == len(WORDS) < lm.model.config.vocab_size
    responses, log_probs = generate(lm, [np.array([3])] * 100, 6, torch.Generator().manual_seed(0))
    assert max(r.max() for r in responses) < len(WORDS)
    every = [np.array([token]) for token in range(len(WORDS))]
    total = np.exp(lm.response_log_probs([np.array([3])] * len(WORDS), every)).sum()
    assert total == pytest.approx(1.0, abs=1e-5)
    assert all((row <= 0).all() for row in log_probs)


def test_padding_that_is_the_end_token_does_not_hide_it(lm_pad_is_eos):
    lm = lm_pad_is_eos
    assert lm.pad_id == EOS
    prompts, responses = [np.array([3]), np.array([4, EOS, 5, 6])], [np.array([7, EOS]), np.array([EOS])]
    got = lm.response_log_probs(prompts, responses)
    for row, prompt, response in zip(got, prompts, responses, strict=True):
        table = plain_logits(lm, np.concatenate([prompt, response])).log_softmax(-1)
        expected = [table[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        assert row[: len(response)] == pytest.approx(expected, abs=1e-4)


def test_a_tokenizer_without_padding_is_enough():
    assert make_lm(pad=None).pad_id == EOS


def test_sampling_takes_the_argmax_when_told_to():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert sample_actions(logits, None, deterministic=True).tolist() == [1, 0]


def test_a_clone_has_weights_of_its_own():
    lm = make_lm()
    twin = lm.clone()
    with torch.no_grad():
        next(twin.model.parameters()).add_(1.0)
    assert not torch.equal(next(twin.model.parameters()), next(lm.model.parameters()))


def test_loading_a_folder_gives_the_models_own_logits(model_folder):
    lm = CausalLM.load(model_folder, device="cpu")
    sequence = np.array([3, 4, 5])
    for name, weight in make_lm().model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], weight), name
    # Equal to the bit only as long as both lie alike in memory, which is not the claim here.
    torch.testing.assert_close(
        plain_logits(lm, sequence), plain_logits(make_lm(), sequence), atol=1e-5, rtol=0
    )


def test_weights_mapped_from_a_file_move_to_where_those_of_a_copy_lie_so_that_both_round_alike(
    model_folder, monkeypatch
):
    load = AutoModelForCausalLM.from_pretrained

    def load_misaligned(*args, **kwargs):
        loaded = load(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        misalign(model)
        assert all(weight.data_ptr() % 64 for weight in model.parameters())
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_misaligned)
    lm = CausalLM.load(model_folder, device="cpu")
    twin = lm.clone()
    for weight in (*lm.model.parameters(), *twin.model.parameters()):
        assert weight.data_ptr() % 64 == 0
    with torch.no_grad():
        for token in range(len(WORDS)):  # one row: where a product depends on the alignment most
            ids = torch.tensor([[token]])
            assert torch.equal(lm.model(ids).logits, twin.model(ids).logits)
