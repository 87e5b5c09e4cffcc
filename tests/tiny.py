"""Tiny random language models with a tokenizer of whole words, made in memory in milliseconds.

Their weights are drawn wide, so that next-token distributions are far from uniform and an error in a mask, a
position or a temperature shows.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from textrl_env.envs.text_rlhf import TextRLHFEnv, TextRLHFVectorEnv
from textrl_env.lm.causal_lm import CausalLM

#: Token id = place in this list.
WORDS = ["<eos>", "<unk>", "<pad>", "a", "b", "c", "d", "e", "f", "g", "h", "i"]
EOS = 0
CONTEXT = 48
PROMPTS = ["a", "b c", "d e f g", "h i a b c d"]


def make_tokenizer(pad: str | None = "<pad>", words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """``pad`` may be "<eos>" (as with GPT-2), or None."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pads = {} if pad is None else {"pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", **pads)


def _llama(vocab: int, dropout: float) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.35,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def _gpt2(vocab: int, dropout: float) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=CONTEXT,
        initializer_range=0.35,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config)


def _mistral(vocab: int, dropout: float, window: int = 4) -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.35,
        attention_dropout=dropout,
        sliding_window=window,
    )
    return MistralForCausalLM(config)


_MAKERS = {
    "llama": _llama,
    "gpt2": _gpt2,
    "mistral": _mistral,
    "mistral-window-12": functools.partial(_mistral, window=12),
}


@functools.cache
def make_model(kind: str = "llama", seed: int = 0, extra_vocab: int = 0, dropout: float = 0.0):
    """A random model, the same for the same arguments; ``extra_vocab`` logits belong to no token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _MAKERS[kind](len(WORDS) + extra_vocab, dropout)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 2
    return model.eval()


def make_small_lm(seed: int = 0, words: tuple[str, ...] = ("<eos>", "<unk>", "a", "b")) -> CausalLM:
    """A Llama whose vocabulary is so small that all its texts can be enumerated."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _llama(len(words), 0.0).eval()
    model.generation_config.eos_token_id = EOS
    return CausalLM(model, make_tokenizer("<eos>", list(words)))


def make_lm(
    kind: str = "llama", seed: int = 0, temperature: float = 1.0, pad: str | None = "<pad>", **kwargs: Any
) -> CausalLM:
    """A :class:`CausalLM` around :func:`make_model`."""
    return CausalLM(make_model(kind, seed, **kwargs), make_tokenizer(pad), temperature)


def misalign(model: PreTrainedModel) -> None:
    """Moves every weight four bytes beside the addresses that vector instructions are fastest at."""
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if tensor.is_floating_point():
            beside = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
            tensor.data = beside.copy_(tensor.data)


def count_a(prompts, completions):
    """A reward with something to learn: how many "a" a response holds."""
    return [float(c.split().count("a")) for c in completions]


def id_sum(prompts, completions, prompt_ids, completion_ids):
    """A reward that reads token ids, and differs for almost any two responses."""
    return [
        sum(i * t for i, t in enumerate(c, start=1)) / 50 - sum(p) / 30
        for p, c in zip(prompt_ids, completion_ids, strict=True)
    ]


def make_env(num_envs: int | None = None, lm: CausalLM | None = None, **kwargs: Any):
    """A text env around a tiny model: single, or a vector env of ``num_envs``."""
    kwargs = {"reward": count_a, "prompts": PROMPTS, "max_new_tokens": 6} | kwargs
    kwargs["model"] = make_lm() if lm is None else lm
    return TextRLHFEnv(**kwargs) if num_envs is None else TextRLHFVectorEnv(num_envs, **kwargs)


def random_sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Random token ids of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, len(WORDS), size=n) for n in lengths]
