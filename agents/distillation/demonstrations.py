"""Demonstrations for agents: drawn from the agent's own stream, as examples or as a rollout that nobody has played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.offline.sft import IGNORE, Example, encode_all
from agents.rollouts.rollout import Rollout
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.sequences import ENVIRONMENT, POLICY, PROMPT, Sequences


class Demonstrations:
    """Records, encoded once.

    Args:
        data: Demonstrations {"prompt", "completion"} or conversations {"messages"}: a list, or a file of them.
        lm: Whose tokens they become.
        longest: Tokens of one, at most; None is what the model can read.

    Raises:
        ValueError: A record that is none, or too long.
    """

    def __init__(
        self, data: str | Path | list[dict[str, Any]], lm: CausalLM, longest: int | None = None
    ) -> None:
        self.examples = encode_all(data, lm.tokenizer, longest or lm.max_length)

    def draw(self, n: int, rng: np.random.Generator) -> list[Example]:
        """``n`` of them, each at most once; all where there are fewer."""
        rows = rng.choice(len(self.examples), min(n, len(self.examples)), replace=False)
        return [self.examples[row] for row in rows]

    def rollout(self, n: int, rng: np.random.Generator) -> Rollout:
        """``n`` of them as a rollout: the tokens that were demonstrated are the policy's, with a reward of 0."""
        sequences = Sequences.concatenate([_as_sequence(example) for example in self.draw(n, rng)])
        mask = torch.from_numpy(sequences.mask())
        zeros = torch.zeros(mask.shape)
        actions = torch.from_numpy(sequences.padded(sequences.actions))
        none = torch.zeros_like(mask)  # nobody has played an episode
        return Rollout({"sequences": sequences}, actions, zeros.double(), zeros, zeros, zeros, mask, none)


def _as_sequence(example: Example) -> Sequences:
    """A demonstration: what carries loss is the policy's, between its parts somebody else has spoken."""
    labels = np.array(example.labels)
    written = labels != IGNORE
    written[0] = False  # nothing predicts the first token
    by = np.where(written, POLICY, ENVIRONMENT)
    by[: int(written.argmax())] = PROMPT
    return Sequences(np.array(example.input_ids), np.zeros(1, dtype=np.int64), by)
