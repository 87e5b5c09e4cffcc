"""The alignment tax: what a policy has unlearned of the text that its model was pre-trained on, as perplexity.

before, after = (perplexity(lm, texts) for lm in (env.lm, agent.policy.lm))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.offline.sft import encode_demonstration, evaluate_sft
from reward_models.data.records import load_records
from textrl_env import embedded


def perplexity(lm: Any, texts: Sequence[str]) -> float:
    """Perplexity per token of texts under a :class:`~textrl_env.lm.causal_lm.CausalLM`, at temperature 1."""
    examples = [encode_demonstration({"text": text}, lm.tokenizer) for text in texts]
    return evaluate_sft(lm.model, examples, lm.pad_id)["perplexity"]


def pretraining_texts(tokenizer: Any) -> list[str]:
    """Text of the kind that the embedded world's base model learned from; empty for other vocabularies."""
    if not embedded.is_embedded_tokenizer(tokenizer):
        return []
    return list(load_records(embedded.path("pretraining_sample"), ("text",)).columns["text"])
