"""The embedded world: what ``TextRLHF-v0`` runs on when it is told nothing, offline and in two CPU cores.

A closed little world of questions, a tiny language model pre-trained on messy text of that world (``base``) and
fine-tuned into a middling assistant (``sft``), a reward model that learned from simulated raters' comparisons
only (``reward``), and the gold rubric that the raters see and the reward model does not. Everything is made by
``examples/make_embedded_world.py`` from a seed. Importing this loads neither torch nor transformers::

    from textrl_env import embedded

    model = AutoModelForCausalLM.from_pretrained(embedded.path("sft"))
    embedded.gold_score(["what is 2 plus 2?"], ["sure, it is 4."])
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from textrl_env.embedded import raters
from textrl_env.embedded.rubric import gold_parts, gold_score
from textrl_env.errors import check_choice

__all__ = ["MAX_NEW_TOKENS", "gold_parts", "gold_score", "is_embedded_tokenizer", "path", "raters"]

#: The response budget that goes with this world, in tokens.
MAX_NEW_TOKENS = 24

_FILES = {
    "base": "base",
    "sft": "sft",
    "reward": "reward",
    "prompts_train": "prompts_train.jsonl",
    "prompts_heldout": "prompts_heldout.jsonl",
    "pretraining_sample": "pretraining_sample.jsonl",
    "sft_sample": "sft_sample.jsonl",
    "figures": "figures.json",
}


def path(name: str) -> Path:
    """Where a part of the embedded world lies.

    Args:
        name: ``"base"``, ``"sft"`` or ``"reward"`` (model folders), ``"prompts_train"`` or ``"prompts_heldout"``
            (JSONL files with ``prompt``, ``kind`` and ``answer``), ``"pretraining_sample"`` (web pages like those
            that the base model learned from, a JSONL file with ``text``), or ``"sft_sample"`` (16 answers of
            the SFT model to each held-out prompt, with their gold scores), or ``"figures"`` (what was measured when
            it was made).

    Raises:
        ValueError: For any other name.
    """
    check_choice("name", name, _FILES)
    return Path(__file__).parent / _FILES[name]


def is_embedded_tokenizer(tokenizer: Any) -> bool:
    """Whether a tokenizer has the vocabulary of this world, as its models have and what was made from them."""
    vocabulary = _vocabulary()
    return len(tokenizer) == len(vocabulary) and tokenizer.get_vocab() == vocabulary


@functools.cache
def _vocabulary() -> dict[str, int]:
    return json.loads((path("sft") / "tokenizer.json").read_text())["model"]["vocab"]
