"""Whatever the architecture, every log-probability is that of the model's own unpadded pass."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, family_lm
from tests.tiny import WORDS, random_sequences
from textrl_env.lm.decoding import generate
from textrl_env.lm.next_tokens import gather_log_probs
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.slot_decoder import SlotDecoder

PROMPTS = random_sequences([3, 1, 9, 3])
PROMPTS[3] = PROMPTS[0]
RESPONSES = random_sequences([9, 14, 2, 6], seed=1)

#: Decoded without a cache: recurrent states, and local layers of an own making.
UNCACHED = {
    *("RWKV", "Mamba", "Mamba-2", "Falcon-Mamba", "RecurrentGemma", "xLSTM"),
    *(
        "Jamba",
        "Bamba",
        "Falcon-H1",
        "Zamba2",
        "LFM2",
        "Qwen3-Next",
        "MiniMax",
        "Granite 4 hybrid",
        "Nemotron-H",
    ),
    *("GPT-Neo", "XGLM", "Llama 4, early temperature"),
}
PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text().splitlines()
#: What docs/models.md says of each family: class, cached, packed, fused, prompts held once.
TABLE = {cells[1]: cells[2:7] for cells in (re.split(r" *\| *", line) for line in PAGE) if len(cells) == 10}


@torch.no_grad()
def plain(lm, sequences):
    """One sequence after another, no padding, no mask, no cache."""
    parts = []
    for prompt, response in zip(sequences.prompts, sequences.responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        table = lm.model(input_ids=ids, use_cache=False).logits[0, :, : len(WORDS)].float().log_softmax(-1)
        parts.append(table[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(response)[:, None])[:, 0])
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_those_of_unpadded_passes_evaluated_generated_and_stepped(name):
    lm = family_lm(name)
    batch = Sequences.from_responses(PROMPTS, RESPONSES)
    wanted = plain(lm, batch)
    assert wanted.std() > 0.05  # far from uniform, or an error would not show
    assert lm.log_probs(batch) == pytest.approx(wanted, abs=1e-4)

    written = generate(lm, PROMPTS, 12, torch.Generator().manual_seed(0))
    assert written.log_probs[written.policy] == pytest.approx(plain(lm, written), abs=1e-4)

    # The step way: slots of different lengths, one of which starts anew.
    decoder = SlotDecoder(lm, 2, 24)
    logits = decoder.prefill(np.arange(2), [PROMPTS[2], PROMPTS[1]])
    for token in RESPONSES[1][:3]:
        logits = decoder.step(np.array([1]), np.array([token]))
    stepped = gather_log_probs(logits, torch.from_numpy(RESPONSES[1][3:4]))
    logits = decoder.prefill(np.array([0]), [PROMPTS[0]])
    anew = gather_log_probs(logits, torch.from_numpy(RESPONSES[0][:1]))
    assert [*stepped, *anew] == pytest.approx(wanted[[9 + 3, 0]], abs=1e-4)

    assert (lm.ways.cache is None) == (name in UNCACHED)
    found = (lm.ways.cache, lm.ways.packing, lm.ways.fused, lm.ways.shared_prompts)
    assert TABLE[name] == [f"`{type(lm.model).__name__}`", *("yes" if way else "no" for way in found)]


@pytest.mark.parametrize("name", ["RWKV", "Llama", "Gemma 3"])
def test_a_model_that_does_not_bear_padding_is_read_one_length_at_a_time(name, monkeypatch):
    lm = family_lm(name)
    lm = lm.with_ways(dataclasses.replace(lm.ways, padding=False, packing=None, cache=None))
    seen = []
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda *a, **k: seen.append(k.get("attention_mask")) or forward(*a, **k)
    )
    batch = Sequences.from_responses(PROMPTS, RESPONSES)
    assert lm.log_probs(batch) == pytest.approx(plain(lm, batch), abs=1e-4)
    written = generate(lm, PROMPTS, 5, torch.Generator().manual_seed(0))
    assert written.log_probs[written.policy] == pytest.approx(plain(lm, written), abs=1e-4)
    assert all(mask is None for mask in seen)
