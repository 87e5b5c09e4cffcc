"""Token sequences that a policy writes, many at a time, beside a frozen reference: what the text environments share."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from reward_models.data.encoding import TextEncoder
from textrl_env.kl import KLDynamics, estimate_kl
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.next_tokens import gather_log_probs
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.slot_decoder import SlotDecoder

#: Whole responses for given prompts: lists of token ids in; out come :class:`~textrl_env.lm.sequences.Sequences`, or a
#: pair (responses, log-probabilities) of lists of arrays.
Generate = Callable[[Sequence[np.ndarray]], Any]
#: The finished sequences with other log-probabilities beside them, for example the trained model's own.
Evaluate = Callable[[Sequences], Sequences]


@dataclasses.dataclass
class Episodes:
    """Whole episodes; ``B`` of them, and as arrays ``[B, T]`` with ``T`` the most tokens that the policy wrote.

    Attributes:
        sequences: Prompts and responses with log-probabilities, KL and rewards beside the tokens.
        prompt_id: int64 ``[B]``.
        prompts: ``B`` texts, in the words that were given: of messages, their contents without a chat template.
        score: float64 ``[B]``, before the KL.
        parts: Each reward by name, float64 ``[B]``.
        responses: ``B`` texts.
        stop_reason: ``B`` times "eos" or "length", of games "game", "turns" or "context".
        score_seconds: Time spent in the reference and the reward.
        rendered: ``B`` texts, what the model reads: of messages, what the chat template makes of them.
        scored: bool ``[B]``, false where no reward applied; None where every response was scored.
        truncated: bool ``[B]``, cut off by a time limit of the task's own; None where there is none.
        logged: What reward functions have logged, ``[B]`` arrays, see :mod:`reward_models.notes`.
    """

    sequences: Sequences
    prompt_id: np.ndarray
    prompts: list[str]
    score: np.ndarray
    parts: dict[str, np.ndarray]
    responses: list[str]
    stop_reason: list[str]
    score_seconds: float
    rendered: list[str] = dataclasses.field(default_factory=list)
    scored: np.ndarray | None = None
    truncated: np.ndarray | None = None
    logged: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rendered = self.rendered or self.prompts

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def prompt_tokens(self) -> list[np.ndarray]:
        """``B`` int64 arrays."""
        return self.sequences.prompts

    @cached_property
    def tokens(self) -> np.ndarray:
        """The actions, int64 ``[B, T]``, 0 after the end of a response."""
        return self.sequences.padded(self.sequences.actions)

    @cached_property
    def mask(self) -> np.ndarray:
        """bool ``[B, T]``, true on real actions (the end token included)."""
        return self.sequences.mask()

    @cached_property
    def log_prob(self) -> np.ndarray:
        """Of the acting policy, float64 ``[B, T]``."""
        return self._steps("log_probs")

    @cached_property
    def ref_logprob(self) -> np.ndarray:
        """Of the reference, float64 ``[B, T]``."""
        return self._steps("ref_log_probs")

    @cached_property
    def kl(self) -> np.ndarray:
        """The estimate that is charged, float64 ``[B, T]``."""
        return self._steps("kl")

    @cached_property
    def rewards(self) -> np.ndarray:
        """What ``step`` would have returned, float64 ``[B, T]``."""
        return self._steps("rewards")

    def _steps(self, name: str) -> np.ndarray:
        return self.sequences.padded(getattr(self.sequences, name)[self.sequences.policy])


class WritingDynamics(KLDynamics):
    """``N`` sequences being written, as arrays; a subclass says how they begin, go on and end.

    Attributes:
        lm: The initial policy, frozen, and the reference until that is moved.
        moved: The reference where it has been moved, else None.
        encoder: How texts become token ids.
        max_length: Tokens that a sequence can have, ``L``.
        max_new_tokens: The budget of a response, or of a turn.
        tokens: int64 ``[N, L]``, from the left.
        length: Tokens of each sequence, int64 ``[N]``.
        prompt_length: Of them those before the first one of the policy, int64 ``[N]``.
        kl_sum: Of the episode so far, float64 ``[N]``.
    """

    state_names: ClassVar[tuple[str, ...]] = ("prompt_id", "tokens", "length", "prompt_length", "kl_sum")
    lm: CausalLM
    moved: CausalLM | None = None
    encoder: TextEncoder
    max_length: int
    max_new_tokens: int
    #: What a ``prompt_id`` is made of, for errors.
    made_of: str = ""

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

    @property
    def reference(self) -> CausalLM:
        """What the KL is charged against."""
        return self.lm if self.moved is None else self.moved

    def move_reference(self, weights: Mapping[str, Any], alpha: float) -> None:
        """Mix weights into the reference: ``alpha`` of them and ``1 - alpha`` of its own, in place.

        Whoever else holds :attr:`lm` keeps it as it was: the first move makes a copy.

        Args:
            weights: Tensors by the names of the model's parameters, all of them.
            alpha: 1 takes the weights as they are.

        Raises:
            ValueError: The names differ, or the weights are quantised.
        """
        import torch

        if getattr(self.lm.model, "is_quantized", False):
            raise ValueError("quantised weights cannot be mixed with others, so the reference stays as it is")
        own = dict(self.reference.model.named_parameters())
        if own.keys() != weights.keys():
            differing = sorted(own.keys() ^ weights.keys())
            raise ValueError(
                f"the reference can only move to a model of its own kind; they differ in {differing[:3]}"
            )
        if self.moved is None:
            self.moved = self.lm.clone()
            self.moved.model.requires_grad_(False)
        with torch.no_grad():
            for name, parameter in self.moved.model.named_parameters():
                parameter.mul_(1.0 - alpha).add_(weights[name].detach().to(parameter), alpha=alpha)
        self._reference = None  # which has read with the weights of before

    def share_reference(self, other: WritingDynamics) -> None:
        """Take the reference of another environment of the same model."""
        self.moved, self._reference = other.moved, None

    def reference_log_probs(self, sequences: Sequences) -> np.ndarray:
        """The reference's log-probabilities of the policy's tokens, float64 ``[m]``; those beside them, if they are."""
        known = sequences.ref_log_probs
        return self.reference.log_probs(sequences) if known is None else known[sequences.policy]

    def _reference_log_prob(self, slots: np.ndarray, actions: np.ndarray) -> np.ndarray:
        import torch

        if self._reference is None:
            self._reference = SlotDecoder(self.reference.for_decoding(), self.num_slots, self.max_length)
        logits = self._reference.next_logits(self.tokens, self.length, slots)
        chosen = torch.from_numpy(np.ascontiguousarray(actions, dtype=np.int64)).to(logits.device)
        return gather_log_probs(logits, chosen).double().cpu().numpy()

    @property
    @abstractmethod
    def num_prompts(self) -> int:
        """How many starts there are."""

    def draw_prompts(self, num_episodes: int) -> np.ndarray:
        """Draw prompt ids ``[num_episodes]`` from the slots' own streams."""
        waves = -(-num_episodes // self.num_slots)
        return np.concatenate([self.rng.integers(self.num_prompts) for _ in range(waves)])[:num_episodes]

    def _check_prompt_id(self, prompt_id: Any) -> int:
        if not isinstance(prompt_id, (int, np.integer)) or not 0 <= prompt_id < self.num_prompts:
            raise ValueError(
                f"prompt_id must be an integer in [0, {self.num_prompts - 1}]{self.made_of}, got {prompt_id!r}"
            )
        return int(prompt_id)

    def charge(self, sequences: Sequences, ends: np.ndarray, given: np.ndarray) -> Sequences:
        """Finished sequences with the reference, the KL and the rewards beside them.

        Args:
            sequences: With the log-probabilities that are charged, ``m`` tokens of the policy's together.
            ends: The policy's tokens that a reward lands on, int ``[k]`` among the ``m``.
            given: Those rewards, float ``[k]``.
        """
        log_prob, ref_logprob = sequences.log_probs[sequences.policy], self.reference_log_probs(sequences)
        kl = estimate_kl(log_prob - ref_logprob, self.kl_estimator)
        rewards = -self.kl_coef * kl
        rewards[ends] += given
        beside = {"ref_log_probs": ref_logprob, "kl": kl, "rewards": rewards}
        return sequences.with_values(**{name: sequences.spread(x) for name, x in beside.items()})


class WritingEnv:
    """What single and vector envs of texts share beyond Gymnasium's interface."""

    dynamics: WritingDynamics

    @property
    def lm(self) -> CausalLM:
        """The initial policy, frozen, and the reference until that is moved."""
        return self.dynamics.lm

    @property
    def reference(self) -> CausalLM:
        """What the KL is charged against."""
        return self.dynamics.reference

    @property
    def num_prompts(self) -> int:
        """How many starts there are: prompts, or of a game rows times seeds."""
        return self.dynamics.num_prompts

    @property
    def max_new_tokens(self) -> int:
        """The budget of a response, or of a turn."""
        return self.dynamics.max_new_tokens

    @property
    def encoder(self) -> TextEncoder:
        """How texts become token ids."""
        return self.dynamics.encoder

    def draw_prompts(self, num_episodes: int) -> np.ndarray:
        """Draw prompt ids, int64 ``[num_episodes]``, as resets would."""
        if not self._seeded:
            self.reset()
        return self.dynamics.draw_prompts(num_episodes)

    def run_episodes(
        self,
        generate: Generate,
        prompt_ids: Sequence[int] | np.ndarray,
        evaluate: Evaluate | None = None,
    ) -> Episodes:
        """The fused way: whole episodes at once, with the rewards that ``step`` would have given.

        Args:
            generate: Takes prompts as int64 arrays (of a game, for each turn, the sequences so far of the episodes that
                go on); returns :class:`~textrl_env.lm.sequences.Sequences` with ``log_probs``, or a pair: int64 arrays
                of the tokens written (the end token included, at most ``max_new_tokens``) and arrays with the acting
                policy's log-probability of each of them. Sequences that come with ``ref_log_probs`` are charged by
                those. What goes on behind the end of a turn is not used.
            prompt_ids: Where each episode starts, int ``[B]``.
            evaluate: Called once with all finished sequences, before anything is charged; what it returns has the
                log-probabilities that count. None takes those of ``generate``.

        Returns:
            The episodes; nothing of them is a torch tensor.
        """
        return self.dynamics.run_episodes(generate, np.asarray(prompt_ids), evaluate)
