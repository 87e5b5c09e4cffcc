"""Prompts with a hint: what a policy reads when it is its own teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reward_models.data.encoding import TEMPLATE_COLUMNS
from textrl_env.errors import ArgumentError
from textrl_env.lm.sequences import Sequences

#: The prompt of the teacher, and what may come into it.
PROMPT_TEMPLATE = "{prompt}{solution}{feedback}\n\nNow give the right answer to the question above.\n"
SOLUTION_TEMPLATE = "\n\nA right answer:\n{solution}"
FEEDBACK_TEMPLATE = "\n\nAbout an answer that was wrong:\n{feedback}"


class Shown(NamedTuple):
    """What the teacher reads.

    Attributes:
        sequences: The same responses behind prompts with a hint; behind their own where there is none.
        hinted: bool ``[B]``, responses whose prompt has a hint.
        too_long: How many have none because it would not fit into what the model can read.
    """

    sequences: Sequences
    hinted: Tensor
    too_long: int


class Hints:
    """Right answers of one's group, and texts that come with a prompt, put into the prompt.

    Args:
        env: Whose prompts are answered.
        feedback_column: A column of the prompts with a text that the teacher alone is shown; None is none.

    Raises:
        ValueError: An environment without prompts, or without the column.
    """

    def __init__(self, env: Any, feedback_column: str | None = None) -> None:
        self.dynamics = getattr(env, "dynamics", None)
        self.prompts = getattr(self.dynamics, "prompts", None)
        self.feedback_column = feedback_column
        if self.prompts is None:
            raise ArgumentError(
                f"feedback is put into the prompts of TextRLHF-v0 without a wrapper, and {env} has none"
            )
        if feedback_column is not None and feedback_column not in self.prompts.columns:
            raise ArgumentError(
                f"feedback_column={feedback_column!r} is no column of the prompts, which have "
                f"{sorted(self.prompts.columns)}"
            )

    def show(self, sequences: Sequences, episodes: Any, right: Tensor, longest: int | None) -> Shown:
        """Show each answer the first right one of its group that is another, and the feedback to its prompt.

        Args:
            sequences: ``B`` prompts and answers.
            episodes: The same as the environment tells them: ``prompt_id`` and ``responses``.
            right: bool ``[B / G, G]``, answers that were right.
            longest: Tokens that the model can read; None is any number.
        """
        shown, hinted, too_long = [], [], 0
        group_size = right.shape[1]
        for i, (own, response) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
            group, place = divmod(i, group_size)
            others = [j for j in right[group].nonzero().flatten().tolist() if j != place]
            solution = episodes.responses[group * group_size + others[0]] if others else None
            prompt = self.prompt(int(episodes.prompt_id[i]), solution)
            fits = prompt is not None and len(prompt) + len(response) <= (longest or np.inf)
            too_long += prompt is not None and not fits
            hinted.append(fits)
            shown.append(prompt if fits else own)
        return Shown(Sequences.from_responses(shown, sequences.responses), torch.tensor(hinted), too_long)

    def prompt(self, prompt_id: int, solution: str | None) -> list[int] | None:
        """A prompt with its hints, as token ids; None where there is nothing to show."""
        prompts = self.prompts
        told = prompts.columns[self.feedback_column][prompt_id] if self.feedback_column else None
        parts = {"solution": "", "feedback": ""}
        if solution is not None:
            parts["solution"] = SOLUTION_TEMPLATE.format(solution=solution.strip())
        if isinstance(told, str) and told.strip():
            parts["feedback"] = FEEDBACK_TEMPLATE.format(feedback=told.strip())
        if not any(parts.values()):
            return None
        if prompts.messages is None or prompts.messages[prompt_id] is None:
            asked = PROMPT_TEMPLATE.format(prompt=prompts.texts[prompt_id], **parts)
            return self.dynamics.encoder.prompt(asked)
        messages = list(prompts.messages[prompt_id])
        asks = [
            i for i, m in enumerate(messages) if m["role"] == "user" and isinstance(m.get("content"), str)
        ]
        if not asks:
            raise ArgumentError(f"a hint is put into the user's last text, and prompt {prompt_id} has none")
        last = messages[asks[-1]]
        messages[asks[-1]] = {**last, "content": PROMPT_TEMPLATE.format(prompt=last["content"], **parts)}
        columns = {
            name: values[prompt_id] for name, values in prompts.columns.items() if name in TEMPLATE_COLUMNS
        }
        return self.dynamics.encoder.prompt(messages, columns)
