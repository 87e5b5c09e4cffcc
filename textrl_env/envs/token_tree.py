"""TokenTree-v0: a language small enough to know everything about it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from textrl_env.core import object_array
from textrl_env.envs.canvas import BLUE, CARD, GREEN, INK, LINE, PALE_BLUE, QUIET, Canvas, bars
from textrl_env.kl import KLDynamics, KLEnv, KLVectorEnv, estimate_kl

EOS = 0
#: Sequences a tree may have in all; 2**24 of them are about a gigabyte of tables.
MAX_SEQUENCES = 1 << 24


_STOP_REASONS = object_array(["length", "eos"])


class TokenTreeDynamics(KLDynamics):
    """``N`` responses written into one tree, as arrays; see :class:`TokenTreeEnv`.

    The prefixes of ``t`` tokens that can still go on are the *nodes* of level ``t``, numbered so that the
    child ``a`` of node ``i`` is ``i * branching + a`` (``a - 1`` where token 0 is EOS). The tables are arrays
    with one row for each node, level after level, so no step looks anything up in Python.
    """

    start_option: ClassVar[str] = "prompt_id"
    budget_argument: ClassVar[str] = "horizon"
    state_names: ClassVar[tuple[str, ...]] = ("prompt_id", "input_ids", "length", "node", "kl_sum")
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 2}

    def __init__(
        self,
        num_slots: int,
        vocab_size: int = 5,
        horizon: int = 4,
        num_prompts: int = 2,
        eos: bool = True,
        kl_coef: float = 0.1,
        kl_estimator: str = "k1",
        ref_seed: int = 0,
        reward_seed: int = 0,
    ) -> None:
        super().__init__(num_slots, kl_coef, kl_estimator)
        _check_size(vocab_size, horizon, num_prompts)
        self.vocab_size, self.horizon, self.num_prompts, self.eos = vocab_size, horizon, num_prompts, eos
        self.branching = vocab_size - 1 if eos else vocab_size
        sizes = num_prompts * self.branching ** np.arange(horizon)
        self.level_start = np.concatenate([[0], np.cumsum(sizes)])  # rows of level t begin here
        rows = int(self.level_start[-1])
        # Two streams: equal seeds must not make the score a copy of the logits.
        logits = np.random.default_rng([ref_seed, 1]).standard_normal((rows, vocab_size))
        #: The reference policy, float64 ``[nodes, vocab_size]``.
        self.ref_table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        #: The score of the sequence that ends with each token after each node; 0 where it goes on.
        self.score_table = np.random.default_rng([reward_seed, 2]).standard_normal((rows, vocab_size))
        self.score_table[: self.level_start[-2], int(eos) :] = 0.0
        self.pad_id = vocab_size + num_prompts
        shape, high = (1 + horizon,), self.pad_id
        self.observation_space = spaces.Dict(
            input_ids=spaces.Box(0, high, shape, np.int64), attention_mask=spaces.Box(0, 1, shape, np.int64)
        )
        self.action_space = spaces.Discrete(vocab_size)
        self._words = object_array([str(token) for token in range(self.pad_id)])
        self._openings = self._words + " "
        self._prompts = object_array([f"prompt {k}" for k in range(num_prompts)])
        self.prompt_id = np.zeros(num_slots, dtype=np.int64)
        self.input_ids = np.full((num_slots, 1 + horizon), self.pad_id, dtype=np.int64)
        self.length = np.zeros(num_slots, dtype=np.int64)
        self.node = np.zeros(num_slots, dtype=np.int64)
        self.kl_sum = np.zeros(num_slots)

    def level(self, t: int) -> slice:
        """The rows of the tables that belong to prefixes of ``t`` tokens."""
        return slice(int(self.level_start[t]), int(self.level_start[t + 1]))

    def reset(self, slots: np.ndarray, starts: list[Any] | None) -> dict[str, np.ndarray]:
        prompt_id = self.rng.integers(self.num_prompts, slots)
        for i, start in enumerate(starts or []):
            if start is not None:
                if not 0 <= int(start) < self.num_prompts:
                    raise ValueError(
                        f"options['prompt_id'] must be in [0, {self.num_prompts - 1}], got {start!r}"
                    )
                prompt_id[i] = int(start)
        self.prompt_id[slots] = prompt_id
        self.input_ids[slots] = self.pad_id
        self.input_ids[slots, -1] = self.vocab_size + prompt_id
        self.length[slots], self.node[slots], self.kl_sum[slots] = 0, prompt_id, 0.0
        return {"prompt": self._prompts[prompt_id], "prompt_id": prompt_id}

    def observe(self) -> dict[str, np.ndarray]:
        place = np.arange(self.horizon, -1, -1)  # distance from the right end
        mask = (place <= self.length[:, None]).astype(np.int64)
        return {"input_ids": self.input_ids.copy(), "attention_mask": mask}

    def step(self, actions: np.ndarray, active: np.ndarray):
        # A slot that waits for its reset has no row of its own; it looks at row 0, and what comes of that is ignored.
        row = np.where(active, self.level_start[self.length] + self.node, 0)
        ref_logprob = self.ref_table[row, actions]
        kl = estimate_kl(self.acting_log_prob(actions) - ref_logprob, self.kl_estimator)
        self.kl_sum += np.where(active, kl, 0.0)
        self._write(actions, active)
        stopped = np.full(self.num_slots, False) if not self.eos else actions == EOS
        terminated = stopped | (self.length == self.horizon)
        score = np.where(terminated, self.score_table[row, actions], 0.0)
        final = self._final_info(np.flatnonzero(active & terminated), score, stopped)
        return score - self.kl_coef * kl, terminated, {"ref_logprob": ref_logprob, "kl": kl}, final

    def render(self, slot: int, mode: str) -> str | np.ndarray:
        length = int(self.length[slot])
        tokens = self.input_ids[slot, self.input_ids.shape[1] - length :].tolist()
        if mode == "ansi":
            return " ".join([f"[prompt {self.prompt_id[slot]}]", *map(str, tokens)])
        return self._picture(slot, tokens)

    def _picture(self, slot: int, tokens: list[int]) -> np.ndarray:
        """The response so far as a row of cards, and what the reference would write next as bars."""
        canvas = Canvas(560, 340)
        canvas.text(24, 18, f"Prompt {self.prompt_id[slot]}", 16, bold=True)
        canvas.text(536, 21, f"KL so far {self.kl_sum[slot]:.2f}", 13, QUIET, "ra")
        wide = min(56.0, 512 / self.horizon)
        for t in range(self.horizon):
            x, written = 24 + t * wide, t < len(tokens)
            fill = CARD if not written else GREEN if self.eos and tokens[t] == EOS else PALE_BLUE
            canvas.rectangle(x, 52, x + wide - 6, 96, fill, 6, LINE)
            if written and wide >= 24:
                end = self.eos and tokens[t] == EOS
                canvas.text(
                    x + (wide - 6) / 2, 74, "end" if end else str(tokens[t]), 14, CARD if end else INK, "mm"
                )
        over = len(tokens) == self.horizon or bool(self.eos and tokens and tokens[-1] == EOS)
        if over:
            canvas.text(280, 210, "the response is over", 14, QUIET, "mm")
            return canvas.array()
        canvas.text(24, 116, "what the reference would write next", 12, QUIET)
        probabilities = np.exp(self.ref_table[self.level_start[self.length[slot]] + self.node[slot]])
        labels = ["end" if self.eos and k == EOS else str(k) for k in range(self.vocab_size)]
        bars(canvas, (24, 134, 536, 326), probabilities, labels, [BLUE] * self.vocab_size)
        return canvas.array()

    def _write(self, actions: np.ndarray, active: np.ndarray) -> None:
        """Append each active slot's token: the row moves one place to the left."""
        self.input_ids[active, :-1] = self.input_ids[active, 1:]
        self.input_ids[active, -1] = actions[active]
        self.length += active
        child = self.node * self.branching + actions - int(self.eos)
        self.node = np.where(active, child, self.node)

    def _final_info(self, done: np.ndarray, score: np.ndarray, stopped: np.ndarray) -> dict[str, np.ndarray]:
        length = self.length[done]
        return {
            "response": self._texts(self.input_ids[done], length),
            "score": score[done],
            "kl_sum": self.kl_sum[done],
            "response_length": length,
            "stop_reason": _STOP_REASONS[stopped[done].astype(np.int64)],
        }

    def _texts(self, ids: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The last ``length`` tokens of each row as text, such as "3 1 0"; all rows at once, from the right."""
        texts = self._words[ids[:, -1]]
        for j in range(2, int(length.max(initial=0)) + 1):
            longer = length >= j
            texts[longer] = self._openings[ids[longer, -j]] + texts[longer]
        return texts


def _check_size(vocab_size: int, horizon: int, num_prompts: int) -> None:
    for name, given, least in (
        ("vocab_size", vocab_size, 2),
        ("horizon", horizon, 1),
        ("num_prompts", num_prompts, 1),
    ):
        if given < least:
            raise ValueError(f"{name} must be at least {least}, got {given}")
    sequences = num_prompts * vocab_size**horizon
    if sequences > MAX_SEQUENCES:
        raise ValueError(
            f"num_prompts * vocab_size ** horizon = {sequences:,} sequences are too many to tabulate; "
            f"the limit is {MAX_SEQUENCES:,}"
        )


class TokenTreeEnv(KLEnv):
    """Write a short response in a language of a few tokens, with a reference to stay close to.

    ## Description
    The Markov decision process of ``TextRLHF-v0`` with tables in place of models: a reference policy with its
    own distribution after every prefix, and a score for every complete response. All of it is enumerable, so
    :mod:`textrl_env.exact.solver` knows the optimal policy, its value, and the exact objective, KL and gradient of
    any other. Whatever a method for language models claims can be checked here against the truth.

    ## Action Space
    ``Discrete(vocab_size)``: the next token. Token 0 is EOS if ``eos``.

    ## Observation Space
    ``Dict(input_ids, attention_mask)``, int64 arrays of shape ``(1 + horizon,)``, left-padded: the prompt,
    which is the one token ``vocab_size + prompt_id``, and the tokens written so far. Padding is the highest
    id, ``vocab_size + num_prompts``.

    ## Starting State
    A prompt, drawn uniformly. ``reset(options={"prompt_id": k})`` starts from prompt ``k``.

    ## Rewards
    ``1[t = T] * score - kl_coef * kl_t``, with ``kl_t`` the estimate named by ``kl_estimator`` from
    ``log pi(a|s) - log pi_ref(a|s)``. Tell the env who acts with ``env.unwrapped.bind_policy(log_prob)``;
    unbound, the acting policy is taken to be uniform.

    ## Episode End
    Terminates on EOS and after ``horizon`` tokens. Never truncated: the budget is part of the task.

    ## Information
    At reset ``prompt`` (text) and ``prompt_id``. Every step ``ref_logprob`` and ``kl`` (the estimate that is
    charged). At the end ``response`` (its token ids as text, such as "3 1 0"), ``score``, ``kl_sum``,
    ``response_length`` (EOS included) and ``stop_reason`` ("eos" or "length").

    ## Arguments
    ``vocab_size`` (5); ``horizon`` (4); ``num_prompts`` (2); ``eos`` (True); ``kl_coef`` (0.1);
    ``kl_estimator`` ("k1", "k2" or "k3"); ``ref_seed`` (0) draws the reference's logits and ``reward_seed``
    (0) the scores, all of them from N(0, 1); ``render_mode`` "ansi" or "rgb_array".

    ## References
    Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019); Schulman, Approximating KL
    divergence (2020).

    ## Version History
    v0: first release.
    """

    dynamics_class = TokenTreeDynamics


class TokenTreeVectorEnv(KLVectorEnv):
    """Many responses in one array program; see :class:`TokenTreeEnv`."""

    dynamics_class = TokenTreeDynamics
