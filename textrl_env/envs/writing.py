"""Token sequences that a policy writes, many at a time, beside a frozen reference: what the text environments share."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from gymnasium import spaces

from textrl_env.kl import KLDynamics, estimate_kl
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import SlotDecoder, gather_log_probs
from textrl_env.lm.sequences import Sequences


class WritingDynamics(KLDynamics):
    """``N`` sequences being written, as arrays; a subclass says how they begin, go on and end.

    Attributes:
        lm: The frozen reference.
        max_length: Tokens that a sequence can have, ``L``.
        tokens: int64 ``[N, L]``, from the left.
        length: Tokens of each sequence, int64 ``[N]``.
        prompt_length: Of them those before the first one of the policy, int64 ``[N]``.
        kl_sum: Of the episode so far, float64 ``[N]``.
    """

    state_names: ClassVar[tuple[str, ...]] = ("prompt_id", "tokens", "length", "prompt_length", "kl_sum")
    lm: CausalLM
    max_length: int

    def _open_slots(self, lm: CausalLM, max_length: int) -> None:
        """Make the spaces and the arrays, all slots empty."""
        self.lm, self.max_length = lm, max_length
        high = max(lm.vocab_size, lm.pad_id + 1) - 1
        self.action_space = spaces.Discrete(lm.vocab_size)
        self.observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, high, (max_length,), dtype=np.int64),
                "attention_mask": spaces.Box(0, 1, (max_length,), dtype=np.int64),
            }
        )
        self.prompt_id = np.zeros(self.num_slots, dtype=np.int64)
        self.tokens = np.full((self.num_slots, max_length), lm.pad_id, dtype=np.int64)
        self.length = np.ones(self.num_slots, dtype=np.int64)
        self.prompt_length = np.ones(self.num_slots, dtype=np.int64)
        self.kl_sum = np.zeros(self.num_slots)
        self._reference: SlotDecoder | None = None

    def _begin(self, slot: int, prompt: np.ndarray) -> None:
        """Start a slot anew with the tokens of a prompt."""
        self.tokens[slot] = self.lm.pad_id
        self.tokens[slot, : len(prompt)] = prompt
        self.prompt_length[slot] = self.length[slot] = len(prompt)
        self.kl_sum[slot] = 0.0

    def observe(self) -> dict[str, np.ndarray]:
        column = np.arange(self.max_length) - (self.max_length - self.length)[:, None]  # [N, L]
        mask = column >= 0
        shifted = np.take_along_axis(self.tokens, np.maximum(column, 0), axis=1)
        return {"input_ids": np.where(mask, shifted, self.lm.pad_id), "attention_mask": mask.astype(np.int64)}

    def _write(self, actions: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append the policy's tokens; the reference's log-probabilities of them and the KL, float64 ``[N]`` each."""
        slots = np.flatnonzero(active)
        log_prob = self.acting_log_prob(actions)
        ref_logprob = np.zeros(self.num_slots)
        ref_logprob[slots] = self._reference_log_prob(slots, actions[slots])
        kl = np.where(active, estimate_kl(log_prob - ref_logprob, self.kl_estimator), 0.0)
        self.tokens[slots, self.length[slots]] = actions[slots]
        self.length[slots] += 1
        self.kl_sum += kl
        return ref_logprob, kl

    def reference_log_probs(self, sequences: Sequences) -> np.ndarray:
        """The reference's log-probabilities of the policy's tokens, float64 ``[m]``; those beside them, if they are."""
        known = sequences.ref_log_probs
        return self.lm.log_probs(sequences) if known is None else known[sequences.policy]

    def _reference_log_prob(self, slots: np.ndarray, actions: np.ndarray) -> np.ndarray:
        import torch

        if self._reference is None:
            self._reference = SlotDecoder(self.lm.for_decoding(), self.num_slots, self.max_length)
        logits = self._reference.next_logits(self.tokens, self.length, slots)
        chosen = torch.from_numpy(np.ascontiguousarray(actions, dtype=np.int64)).to(logits.device)
        return gather_log_probs(logits, chosen).double().cpu().numpy()
