"""Llamas with random weights and a tokenizer of made-up words, made on the spot from a shape; nothing is loaded.

Responses never end by themselves, so that everyone who is timed writes equally many tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.llama_costs import Shape
from textrl_env.lm.causal_lm import CausalLM


def config_of(shape: Shape, max_length: int = 4096) -> LlamaConfig:
    """The transformers config of a shape; no token ends a response."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Token ``i`` is the word ``w<i>``."""
    words = {f"w{i}": i for i in range(vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w0", pad_token="w0", unk_token="w0")


def make_lm(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> CausalLM:
    """A random Llama on ``device``; the weights are drawn there, which is what makes billions of them quick."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
    lm = CausalLM(model, make_tokenizer(shape.vocab), autocast=False)
    lm.eos_ids = np.array([-1])
    return lm


def make_prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[str]:
    """Texts of ``length`` tokens each, all different."""
    ids = np.random.default_rng(seed).integers(1, vocab, (count, length))
    return [" ".join(f"w{i}" for i in row) for row in ids]


def count_even(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """A reward that costs nothing: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
