"""The work that everyone is timed on: a small random Llama, prompts of given lengths and a cheap reward.

Imported by the scripts of every side, each in its own virtual environment, so it needs torch, transformers and
tokenizers only. Models are written once as Hugging Face folders; all sides load the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of training: ``prompts x group_size`` episodes.

    Attributes:
        name: What it is called in the tables.
        prompt_length: Tokens of every prompt.
        common: With how many tokens all prompts begin alike, as behind one system message or the same worked examples.
        max_new_tokens: The response budget.
        mean_length: Responses end by themselves after about so many tokens; None never ends them early.
        prompts: Distinct prompts in a step.
        group_size: Responses to each.
        vocab_size: ``V``.
        hidden_size: Of the Llama.
        layers: Of the Llama.
    """

    name: str
    prompt_length: int
    max_new_tokens: int
    mean_length: int | None = None
    prompts: int = 8
    group_size: int = 8
    vocab_size: int = 1024
    hidden_size: int = 256
    layers: int = 4
    common: int = 0

    @property
    def episodes(self) -> int:
        """Responses in a step."""
        return self.prompts * self.group_size


WORKLOADS = {
    work.name: work
    for work in (
        Workload("uniform", 16, 64),
        Workload("ragged", 16, 128, mean_length=15),
        Workload("real-lengths", 64, 512, mean_length=150),
        Workload("long-prompt", 256, 64),
        Workload("few-shot", 272, 32, prompts=32, group_size=2, common=256),
        Workload("big-vocab", 16, 256, prompts=1, group_size=8, vocab_size=151_936, hidden_size=64, layers=2),
    )
}
#: PPO's: every episode answers a prompt of its own.
PPO_WORKLOAD = dataclasses.replace(WORKLOADS["uniform"], prompts=64, group_size=1)

#: So small that nobody's responses grow or shrink while they are timed.
LEARNING_RATE = 1e-8
KL_COEF = 0.04


def _words(vocab_size: int) -> list[str]:
    return ["<eos>", "<pad>", *(f"w{i}" for i in range(vocab_size - 2))]


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token for each word; ``<eos>`` is 0 and ``<pad>`` is 1."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(_words(vocab_size))}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def make_model(work: Workload) -> LlamaForCausalLM:
    """A random Llama whose chance to end is the same at every token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=4 * work.hidden_size,
        num_hidden_layers=work.layers,
        num_attention_heads=max(1, work.hidden_size // 64),
        num_key_value_heads=max(1, work.hidden_size // 64),
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # All embeddings share a direction that outlasts the layers; the end token's logit reads it alone.
        direction = torch.full((work.hidden_size,), work.hidden_size**-0.5)
        model.model.embed_tokens.weight += 4.0 * direction
        sample = torch.randint(2, work.vocab_size, (4, 32))
        hidden = model.model(sample).last_hidden_state
        others = (hidden @ model.lm_head.weight[2:].T).logsumexp(-1).mean()
        wanted = -20.0 if work.mean_length is None else others - math.log(work.mean_length - 1)
        model.lm_head.weight[0] = direction * wanted / (hidden @ direction).mean()
    return model


def model_folder(work: Workload, under: Path) -> Path:
    """The workload's model as a Hugging Face folder, written where it does not exist yet."""
    folder = under / f"llama-{work.hidden_size}x{work.layers}-v{work.vocab_size}-m{work.mean_length}"
    if not (folder / "config.json").exists():
        make_model(work).save_pretrained(str(folder))
        tokenizer(work.vocab_size).save_pretrained(str(folder))
    return folder


def reward_folder(work: Workload, under: Path) -> Path:
    """A small classifier over the same tokens, for sides that score with a model only."""
    folder = under / f"classifier-v{work.vocab_size}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=work.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=1024,
            num_labels=1,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
        LlamaForSequenceClassification(config).save_pretrained(str(folder))
        tokenizer(work.vocab_size).save_pretrained(str(folder))
    return folder


def prompts(work: Workload, count: int | None = None) -> list[str]:
    """``count`` texts (one step's by default) of exactly ``prompt_length`` tokens, all different."""
    generator = torch.Generator().manual_seed(1)
    shape = (count or work.prompts, work.prompt_length)
    ids = torch.randint(0, work.vocab_size - 2, shape, generator=generator)
    ids[:, : work.common] = ids[0, : work.common]
    return [" ".join(f"w{i}" for i in row.tolist()) for row in ids]


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Share of the words that end in an even digit: costs nothing beside the model."""
    words = [text.split() for text in completions]
    return [sum(w[-1] in "02468" for w in each) / max(len(each), 1) for each in words]
