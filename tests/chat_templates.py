"""Tokenizers with the chat templates of well-known models, which come with the package ``trl``.

Every byte is a token, so that token and text borders are easy to see, and the model's control tokens are special.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHATML = ("<|im_end|>", ("<|im_start|>", "<|endoftext|>"), None)
_DEEPSEEK = ("<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), "<｜begin▁of▁sentence｜>")
_GEMMA = ("<eos>", ("<start_of_turn>", "<end_of_turn>"), "<bos>")
_LLAMA = ("<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>")
_PHI = ("<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>"), None)
_HARMONY = ("<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"), None)
_GLM = ("<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>"), None)
_COHERE = (
    "<|END_OF_TURN_TOKEN|>",
    ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    "<BOS_TOKEN>",
)

#: End token, other control tokens, start token of each template.
TEMPLATES = {
    "cohere": _COHERE,
    "deepseek_r1_distill": _DEEPSEEK,
    "deepseekv3": _DEEPSEEK,
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "glm4moe": _GLM,
    "gptoss": _HARMONY,
    "llama3": _LLAMA,
    "llama3_1": _LLAMA,
    "nemotron_3_nano": _CHATML,
    "nemotron_3_super": _CHATML,
    "phi3": _PHI,
    "phi3_5": _PHI,
    "qwen2_5": _CHATML,
    "qwen3": _CHATML,
    "qwen3_training": _CHATML,
    "qwen3_5_think": _CHATML,
    "qwen3_8": _CHATML,
    "smolvlm": ("<end_of_utterance>", ("<|im_start|>",), None),
}

#: As in Mistral's and Llama 2's templates: no header, the end token is the tokenizer's.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_tokenizer(
    template: str | None,
    eos: str = "</s>",
    special: tuple[str, ...] = (),
    bos: str | None = None,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """One token for each byte and each control token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    start = {} if bos is None else {"bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, **start, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def template_text(name: str) -> str:
    """The template as it comes with trl."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of :data:`TEMPLATES`, or of "inst"."""
    if name == "inst":
        return byte_tokenizer(INST, bos="<s>")
    eos, special, bos = TEMPLATES[name]
    return byte_tokenizer(template_text(name), eos, special, bos)


def turns(*said: str) -> list[dict[str, str]]:
    """A conversation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
