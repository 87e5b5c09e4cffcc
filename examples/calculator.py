"""A calculator as a tool: a chat model learns to call it.

    python examples/calculator.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 200000

The class is what TRL takes as environment_factory, and a game here as it is: its public methods are tools, and their
schemas are shown to the model by its chat template. The same from the command line:

    textrl train --game examples/calculator.py:game --model ... --agent grpo --max-turns 3

Left out: a system prompt, and a warm start for models that have never seen a tool.
"""

from __future__ import annotations

import argparse
import operator
import random
import re
from typing import Any

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Calculator:
    """A sum to work out; the last number of the answer counts, and has to come in a turn without a call."""

    def reset(self, seed: int | None = None, question: str | None = None, **row: Any) -> str:
        """Take the question of the row, or draw one."""
        if question is None:
            draw = random.Random(seed)
            a, b, c = (draw.randint(100, 999) for _ in range(3))
            question = f"{a} * {b} {draw.choice('+-')} {c}"
        self.right = self._value(question)
        return f"What is {question}? Say the number."

    def calculate(self, expression: str) -> int:
        """Work out an expression with whole numbers, + , - and *.

        Args:
            expression: For example "12 * 3 + 4".
        """
        return self._value(expression)

    @staticmethod
    def _value(expression: str) -> int:
        """Products first, then sums, from left to right."""
        if not re.fullmatch(r"\s*-?\d{1,12}(\s*[-+*]\s*\d{1,12}){0,9}\s*", expression):
            raise ValueError(f"expected whole numbers with + - * between them, got {expression!r}")
        first, *rest = re.findall(r"^\s*-?\d+|[-+*]|\d+", expression)
        sums, signs = [int(first)], []
        for sign, number in zip(rest[::2], rest[1::2], strict=True):
            if sign == "*":
                sums[-1] *= int(number)
            else:
                signs.append(sign)
                sums.append(int(number))
        total = sums[0]
        for sign, value in zip(signs, sums[1:], strict=True):
            total = _OPERATIONS[sign](total, value)
        return total


def right_answer(environment: Calculator, text: str) -> float:
    """1 for a turn without a call whose last number is the right one."""
    numbers = re.findall(r"-?\d+", text.replace(",", ""))
    called = "<tool_call>" in text
    return float(not called and bool(numbers) and int(numbers[-1]) == environment.right)


def game() -> Any:
    """The calculator with what its answers are worth."""
    from textrl_env.games.tools import ToolGame

    return ToolGame(Calculator(), reward=right_answer)


def main() -> None:
    """Train."""
    import gymnasium as gym

    import textrl_env  # noqa: F401  registers the ids
    from agents import GRPO

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a chat model")
    parser.add_argument("--steps", type=int, default=200_000, help="tokens to learn from")
    parser.add_argument("--output", default="calculator", help="folder for the model")
    options = parser.parse_args()
    env = gym.make(
        "TextGame-v0", game=game, model=options.model, max_turns=3, max_new_tokens=128, kl_coef=0.01
    )
    agent = GRPO("auto", env, n_episodes=64, group_size=8, learning_rate=1e-6, seed=0, verbose=1)
    agent.learn(options.steps, progress_bar=True)
    agent.save(options.output)


if __name__ == "__main__":
    main()
