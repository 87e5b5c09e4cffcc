"""What other parts ask of an environment, written down once; anything with these members will do.

The protocols of a language model that decodes (:class:`textrl_env.lm.decoding.DecodingModel`) and of a judge
(:class:`agents.preferences.judges.Judge`) stand beside the code that uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Stateful(Protocol):
    """A thing whose exact state can be saved as arrays and put back."""

    def get_state(self) -> dict[str, Any]:
        """The state, by name."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        ...


@runtime_checkable
class BindsPolicy(Protocol):
    """An environment that wants to know who acts."""

    def bind_policy(self, log_prob: Callable[[Any, Any], Any] | None) -> None:
        """Tell the environment who acts; None unbinds."""
        ...


@runtime_checkable
class ChargesKL(BindsPolicy, Protocol):
    """An environment that charges the acting policy for leaving a reference."""

    kl_coef: float


@runtime_checkable
class TextEnv(ChargesKL, Protocol):
    """An environment of texts that can run whole episodes at once (the fused way)."""

    lm: Any
    max_new_tokens: int
    num_prompts: int

    def draw_prompts(self, num_episodes: int) -> np.ndarray:
        """Prompt ids ``[num_episodes]`` from the environment's own random streams."""
        ...

    def run_episodes(
        self,
        generate: Callable[..., Any],
        prompt_ids: Sequence[int] | np.ndarray,
        evaluate: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Whole episodes from the given prompts; ``evaluate`` sees all finished sequences before they are charged."""
        ...


@runtime_checkable
class MovesReference(Protocol):
    """What charges a KL against a language model that may follow the policy.

    Attributes:
        moved: The reference where it has been moved, else None.
    """

    moved: Any

    def move_reference(self, weights: Mapping[str, Any], alpha: float) -> None:
        """Mix ``alpha`` of these weights into the reference."""
        ...

    def share_reference(self, other: Any) -> None:
        """Take the reference of another one."""
        ...


@runtime_checkable
class Game(Protocol):
    """A text game: Gymnasium's five values, with text for observation and action.

    An observation is a text, or messages (a list of dicts with "role" and "content"). What ``step`` returns as one is
    the game's answer to the policy's turn.
    """

    def reset(self, seed: int | None = None, **row: Any) -> tuple[Any, dict[str, Any]]:
        """Begin anew; the same seed and row begin alike.

        Args:
            seed: Of the game's randomness.
            **row: A row of the data that the environment was given, if it was given any.

        Returns:
            The opening, which the policy answers, and an info.
        """
        ...

    def step(self, text: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Answer the policy's turn.

        Args:
            text: What the policy wrote, without its end token.

        Returns:
            The answer, the reward of the turn, whether the game has ended, whether a time limit of its own has cut it
            off, and an info.
        """
        ...


@runtime_checkable
class Generator(Protocol):
    """What writes responses in place of our own decoder: a serving engine, in this process or behind a server.

    Called by :func:`textrl_env.generators.answers.ask`, which checks what comes back. One that says ``shares_weights =
    True`` reads the very tensors that are being trained, and so cannot write while the policy learns; ``serves_many =
    True`` says that it is one for all processes of a run, and gets the weights from the main one alone.
    """

    def generate(self, prompts: Sequence[np.ndarray], sampling: Any) -> Any:
        """One response to each prompt.

        Args:
            prompts: ``B`` int64 arrays of token ids.
            sampling: A :class:`~textrl_env.generators.Sampling`: budget, end tokens, temperature and the rest.

        Returns:
            A :class:`~textrl_env.generators.Generated`: token ids, the log-probabilities with which they were drawn,
            who stopped each response. A pair (responses, log-probabilities) or
            :class:`~textrl_env.lm.sequences.Sequences` will do as well.
        """
        ...

    def update_weights(self, model: Any) -> None:
        """Take the present weights of a transformers model; called before the first rollout and after updates."""
        ...
