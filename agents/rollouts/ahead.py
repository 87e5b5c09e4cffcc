"""Generation one update ahead: the next responses are written while the policy learns from the last ones.

    collect 0 | write 0 | collect 1        | collect 2        |
              | write 1 | learn 0, write 2 | learn 1, write 3 |

From the second rollout on, what is learned from was written by the weights of one update before, never older: the
importance weights of :mod:`agents.algorithms.importance` correct for it. Left out: going further ahead, and a response
that goes on with new weights in its middle.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from agents.policies.base import Policy
from textrl_env.lm.sequences import Sequences

#: What is kept of sequences that have been written and not yet learned from.
_KEPT = ("tokens", "starts", "written_by", "log_probs")


class Ahead:
    """Responses that an outside generator writes in a thread of its own.

    Args:
        env: Draws prompts; has ``encoded_prompts``.
        policy: Has a generator with weights of its own.

    Raises:
        ValueError: There is nothing that could write while the policy learns.
    """

    def __init__(self, env: Any, policy: Policy) -> None:
        engine = getattr(policy, "engine", None)
        if engine is None or getattr(engine, "shares_weights", False):
            raise ValueError(
                "generate_ahead=True wants a generator with weights of its own, such as vllm or a server: "
                f"{getattr(policy, 'engine_name', type(policy).__name__)!r} reads those that are being trained"
            )
        if not hasattr(env, "encoded_prompts"):
            raise ValueError(
                "generate_ahead=True wants an environment whose episodes are one response to a prompt, such as "
                f"TextRLHF-v0; {env} has more to say on the way"
            )
        self.env, self.policy = env, policy
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="generate_ahead")
        self._written: tuple[np.ndarray, Future[Sequences]] | None = None

    def take(self, n_episodes: int, group_size: int) -> tuple[np.ndarray, Sequences]:
        """Responses that are ready, or soon, and begin with the next ones by the weights of now.

        Returns:
            Prompt ids int64 ``[n_episodes]``, the answers of a group being neighbours; and the sequences.
        """
        if self._written is None or len(self._written[0]) != n_episodes:
            self._begin(n_episodes, group_size)
        (prompt_ids, future), self._written = self._written, None
        sequences = future.result()
        self._begin(n_episodes, group_size)
        return prompt_ids, sequences

    def _begin(self, n_episodes: int, group_size: int) -> None:
        prompt_ids = np.repeat(self.env.draw_prompts(n_episodes // group_size), group_size)
        # Random streams and weights are read here and now, not in the thread.
        write = self.policy.generation(self.env.encoded_prompts(prompt_ids), self.env.max_new_tokens)
        self._written = prompt_ids, self._pool.submit(write)

    def get_state(self) -> dict[str, np.ndarray]:
        """What has been written and not yet learned from, waited for; empty if there is nothing, or if it failed."""
        if self._written is None or self._written[1].exception() is not None:
            return {}
        prompt_ids, sequences = self._written[0], self._written[1].result()
        values = {name: getattr(sequences, name) for name in _KEPT}
        return {"prompt_ids": prompt_ids} | {n: value for n, value in values.items() if value is not None}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self._written = None
        if state:
            future: Future[Sequences] = Future()
            future.set_result(Sequences(**{name: state[name] for name in _KEPT if name in state}))
            self._written = state["prompt_ids"], future
