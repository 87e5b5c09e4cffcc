"""Fixtures that several test files share; the models themselves are made in :mod:`tests.tiny`."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import make_lm, make_model, make_tokenizer

# Tiny tensors are fastest on one thread, and sums then come out the same on every machine.
torch.set_num_threads(1)


@pytest.fixture(params=["llama", "gpt2"])
def lm(request):
    """A tiny random Llama (grouped-query attention, rotary positions) or GPT-2 (learned positions)."""
    return make_lm(request.param)


@pytest.fixture
def lm_pad_is_eos():
    """Padding is EOS, as with GPT-2's tokenizer."""
    return make_lm("gpt2", pad="<eos>")


@pytest.fixture
def lm_wide():
    """Seven more logits than tokens, as with embeddings padded to a round size."""
    return make_lm("llama", extra_vocab=7)


@pytest.fixture
def model_folder(tmp_path):
    """A tiny Llama as an ordinary Hugging Face folder."""
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    return folder
