"""Fixtures that several test files share; the models themselves are made in :mod:`tests.tiny`."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny import make_lm, make_model, make_tokenizer, misalign

# Tiny tensors are fastest on one thread. With this number fixed, one machine gives the same sums again for the same
# memory; another processor, another number of threads or weights at another address may round them differently.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


# TEXTRL_TEST_MISALIGN=1 moves every loaded model's weights: weights mapped from a safetensors file lie where the
# length of its header puts them, and matrix products of the same numbers may differ there in the last bit.
if os.environ.get("TEXTRL_TEST_MISALIGN"):
    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls, *args, **kwargs):
        loaded = load(cls, *args, **kwargs)
        misalign(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


#: Files of few tests that take long, longest first. Whole files are handed to the workers in the order of collection:
#: one of these at the end, and all others wait for the one worker that has it.
LONG_FILES = (
    "test_processes.py",
    "test_soak.py",
    "test_step_equals_fused.py",
    "test_gradients.py",
    "test_learning.py",
    "test_evaluation_on_the_way.py",
    "test_gpu_benchmark.py",
    "test_two_digit_sums.py",
    "test_exact_turns.py",
    "test_notebook.py",
)


def pytest_collection_modifyitems(items):
    places = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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
