"""A small language model that has read nothing but random walks through a game.

    make_walker("build/walker", "GridWorld-v0", words=("left", "down", "right", "up"), game_kwargs={"cue": "\\n> "})

It knows how the game is written and which moves there are, and prefers none of them: what a policy from scratch is
for an MLP. The walks are texts, as ``TextGame-v0`` shows them (``layout="text"``); a byte-pair tokenizer and a Llama
are made from them and nothing else. A turn is a word and the end of its line, so it is played with ``stop="\\n"``.

Left out: chat templates, and games whose answers to random words teach nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.offline.callbacks import StepCallback
from agents.offline.sft import sft
from textrl_env.games.loading import load_game
from textrl_env.protocols import Game

#: What ends a turn.
END = "\n"
#: Tokens do not reach from one word or row of a board into the next; the end of a line belongs to what it ends, so a
#: move and a row can become a token each. What a cue leaves open, "> ", is one too.
_PIECES = Regex(r"> |\n| ?[^\s]+\n?| ")
#: Written when a folder is complete.
_FIGURES = "walks.json"


def random_walk(game: Game, words: Sequence[str], turns: int, rng: random.Random, seed: int) -> str:
    """An episode in which every turn is a word drawn at random, as one text.

    Args:
        game: Its observations are texts.
        words: What may be said.
        turns: The most turns.
        rng: Draws the words.
        seed: The game's.
    """
    text, _ = game.reset(seed=seed)
    written = [text]
    for _ in range(turns):
        said = rng.choice(words) + END
        text, _, terminated, truncated, _ = game.step(said)
        written += [said, text]
        if terminated or truncated:
            break
    return "".join(written)


def random_walks(
    make: Callable[[], Game], words: Sequence[str], count: int, turns: int, seed: int
) -> list[str]:
    """So many walks; the games' seeds and the words come from ``seed``."""
    game, rng = make(), random.Random(seed)
    return [random_walk(game, words, turns, rng, rng.randrange(2**31)) for _ in range(count)]


def walk_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer learnt from texts; ``decode(encode(text)) == text`` for their characters.

    Args:
        texts: Their characters are its alphabet.
        vocab_size: Tokens, at the most.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(_PIECES, "isolated")
    core.decoder = decoders.Fuse()
    special = ["<end>", "<unk>"]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def small_llama(
    tokenizer: PreTrainedTokenizerFast, context: int, hidden_size: int, num_layers: int, seed: int
) -> LlamaForCausalLM:
    """A random Llama for the tokenizer.

    Args:
        tokenizer: Says how many tokens there are.
        context: Tokens that it can read.
        hidden_size: Width; a head has 16 of it.
        num_layers: Depth.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=hidden_size * 11 // 4,
                num_hidden_layers=num_layers,
                num_attention_heads=max(hidden_size // 16, 1),
                max_position_embeddings=context,
                tie_word_embeddings=True,
                initializer_range=0.08,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def make_walker(
    folder: str | Path,
    game: Any,
    words: Sequence[str],
    *,
    game_kwargs: Mapping[str, Any] | None = None,
    turns: int = 12,
    walks: int = 1500,
    epochs: float = 1.0,
    vocab_size: int = 256,
    context: int = 512,
    hidden_size: int = 64,
    num_layers: int = 2,
    learning_rate: float = 5e-3,
    batch_size: int = 16,
    seed: int = 0,
    callback: StepCallback | None = None,
) -> dict[str, float]:
    """Write a language model that has learnt random walks into a folder, unless a whole one is there already.

    Args:
        folder: An ordinary Hugging Face folder when this returns.
        game: As ``TextGame-v0`` takes it.
        words: What may be said.
        game_kwargs: As ``TextGame-v0`` takes them.
        turns: The most turns of a walk.
        walks: How many.
        epochs: Passes over them.
        vocab_size: Of the tokenizer, at the most.
        context: Tokens that the model can read.
        hidden_size: Of the model.
        num_layers: Of the model.
        learning_rate: Peak of Adam's.
        batch_size: Walks of a step.
        seed: Of walks, weights and order.
        callback: As in :func:`agents.offline.sft.sft`.

    Returns:
        What ``sft`` returns, with ``parameters`` and ``vocabulary``.
    """
    folder = Path(folder)
    if (folder / _FIGURES).is_file():
        return json.loads((folder / _FIGURES).read_text(encoding="utf-8"))
    texts = random_walks(load_game(game, game_kwargs), words, walks, turns, seed)
    tokenizer = walk_tokenizer(texts, vocab_size)
    model = small_llama(tokenizer, context, hidden_size, num_layers, seed)
    figures = sft(
        model,
        [{"text": text} for text in texts],
        tokenizer=tokenizer,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        device="cpu",
        callback=callback,
    )
    figures |= {"parameters": float(model.num_parameters()), "vocabulary": float(len(tokenizer))}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / _FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures
