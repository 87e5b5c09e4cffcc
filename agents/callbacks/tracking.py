"""What a run keeps beside its log: every sample as Parquet, and histograms and pictures for TensorBoard.

``textrl train`` has it on for language models. Nothing here changes what is learned: no random number is drawn. Left
out: rollouts of other environments, whose observations are no texts.
"""

from __future__ import annotations

import numbers
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure

from agents.callbacks.evaluation import EvalCallback
from agents.evaluation.plots import episode_strip, proxy_and_gold_figure
from agents.rollouts.rollout import Rollout
from agents.runs.samples import DETAILED, OF_PROMPTS, OWN, drop_after, write_samples
from reward_models.notes import EXTRA, METRIC
from reward_models.warning import warn

#: Updates between two histograms.
EVERY = 10
_ONLY_TENSORBOARD = ("stdout", "log", "csv", "json")


class TrackSamples(BaseCallback):
    """Keeps the samples of every update, and draws for TensorBoard.

    Args:
        folder: The run directory.
        evaluation: Whose points are drawn; None draws none.
        every: Updates between two histograms.
        verbose: As in stable-baselines3.
    """

    def __init__(
        self, folder: str | Path, evaluation: EvalCallback | None = None, every: int = EVERY, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.folder, self.evaluation, self.every = Path(folder), evaluation, every
        self._updates = self._drawn = 0
        self._told_of_names = False
        self._kinds: dict[str, dict[str, str]] = {}

    def _on_training_start(self) -> None:
        drop_after(self.folder, self.model.num_timesteps if self.model.num_timesteps else -1)
        self._kinds = kinds_of_prompts(self.model.text_env)
        self._updates = self._drawn = 0

    def get_state(self) -> dict[str, Any]:
        """How many updates there were, and how many evaluations have been drawn."""
        return {"updates": self._updates, "drawn": self._drawn}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self._updates, self._drawn = int(state["updates"]), int(state["drawn"])

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        """Keep what has just been learned from; the learning loop calls it after each update."""
        rollout: Rollout | None = self.locals.get("rollout")
        if rollout is None or not self.model.policy.whole_episodes:
            return True
        samples = samples_of(self.model, rollout)
        self._tell_of_taken_names(samples)
        if samples:
            samples |= {
                f"{OF_PROMPTS}{name}": [kinds.get(prompt, "") for prompt in samples["prompt"]]
                for name, kinds in self._kinds.items()
            }
            write_samples(self.folder, self.model.num_timesteps, samples)
        if self._updates % self.every == 0 and rollout.advantages is not None:
            for name, values in self._histograms(rollout).items():
                self.logger.record(f"histogram/{name}", values, exclude=_ONLY_TENSORBOARD)
        self._updates += 1
        self._draw(samples)
        return True

    def _tell_of_taken_names(self, samples: dict[str, list[Any]]) -> None:
        taken = sorted(name for name in samples if name.startswith(EXTRA))
        if taken and not self._told_of_names:
            self._told_of_names = True
            names = ", ".join(repr(name.removeprefix(EXTRA)) for name in taken)
            warn(
                f"the samples have columns of their own named {names}; what the reward logged by log_extra is kept as "
                f"{', '.join(map(repr, taken))}"
            )

    def _histograms(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """Values of the policy's tokens, one-dimensional."""
        mask = rollout.mask.cpu()
        found = {"advantage": rollout.advantages.cpu()[mask].float()}
        if self.model.policy.has_critic:
            found["value"] = rollout.values.cpu()[mask].float()
        if rollout.ref_log_probs is not None:
            found["token_kl"] = (rollout.log_probs - rollout.ref_log_probs).cpu()[mask].float()
        found["ratio"] = (self._new_log_probs(rollout) - rollout.log_probs.cpu())[mask].float().exp()
        return found

    @torch.no_grad()
    def _new_log_probs(self, rollout: Rollout) -> torch.Tensor:
        """Log-probabilities ``[B, T]`` of the rollout's tokens under the policy after the update."""
        moved, policy = rollout.to(self.model.device), self.model.policy
        found = torch.zeros(rollout.mask.shape)
        at_once = self.model.micro_batch_size or self.model.batch_size  # no more than an update holds
        for part, rows in moved.micro_batches(at_once):
            found[rows if isinstance(rows, slice) else rows.cpu()] = (
                policy.evaluate(part).log_probs.float().cpu()
            )
        return found

    def _draw(self, samples: dict[str, list[Any]]) -> None:
        """An episode token by token, and proxy and gold so far, whenever there is a new evaluation."""
        points = [] if self.evaluation is None else self.evaluation.points
        if len(points) <= self._drawn:
            return
        self._drawn = len(points)
        if len(points) > 1:
            figure = proxy_and_gold_figure(points)
            self.logger.record("eval/proxy_and_gold", Figure(figure, close=False), exclude=_ONLY_TENSORBOARD)
        detailed = [i for i, tokens in enumerate(samples.get("tokens", ())) if tokens]
        if detailed:
            row = {name: values[detailed[0]] for name, values in samples.items()}
            picture = Figure(episode_strip(row), close=False)
            self.logger.record("samples/episode", picture, exclude=_ONLY_TENSORBOARD)


def kinds_of_prompts(env: Any) -> dict[str, dict[str, str]]:
    """The columns of an env's prompts that sort them into kinds, each with its value by prompt.

    Those are columns of texts with fewer values than there are prompts; empty where an env has no list of prompts.
    """
    prompts = getattr(getattr(env, "dynamics", None), "prompts", None)
    columns = getattr(prompts, "columns", {})
    return {
        name: dict(zip(prompts.texts, values, strict=True))
        for name, values in columns.items()
        if all(isinstance(value, str) for value in values) and len(set(values)) < len(values)
    }


def samples_of(agent: Any, rollout: Rollout) -> dict[str, list[Any]]:
    """Columns of the samples that a rollout holds, see :mod:`agents.runs.samples`; empty where nothing was scored.

    Args:
        agent: That has collected it.
        rollout: Its advantages set.
    """
    text = agent.episodes.text
    count = len(text.get("response", ()))
    if not count or not text.get("prompt"):
        return {}
    rows = min(count, len(rollout))
    lengths = rollout.lengths.cpu().numpy()
    columns = {
        name: list(values[-rows:])
        for name, values in text.items()
        if len(values) == count and not name.startswith(METRIC)
    }
    token_ids = columns.pop("token_ids", [])
    # A method may leave out rows (groups without variance), and then nothing says which token belongs to which text.
    fits = rollout.advantages is not None and rows == len(rollout) == len(token_ids)
    fits = fits and np.array_equal(np.array(columns["response_length"]), lengths)
    if fits:
        actions = rollout.actions.cpu().numpy()
        rows_of_text = zip(token_ids, actions, lengths, strict=True)
        fits = all(np.array_equal(ids[:n], acted[:n]) for ids, acted, n in rows_of_text)
    found: dict[str, list[Any]] = {
        _shown_as(name, columns): [(float if _is_number(name, values) else str)(value) for value in values]
        for name, values in columns.items()
    }
    if fits:
        found |= _of_steps(agent, rollout, lengths)
    return found


def _shown_as(name: str, columns: dict[str, list[Any]]) -> str:
    """What a reward has logged goes by its own name, unless a column of ours has it."""
    own = name.removeprefix(EXTRA)
    return name if own in columns or own in OWN or own.startswith(OF_PROMPTS) else own


def _is_number(name: str, values: list[Any]) -> bool:
    if name.startswith(EXTRA):
        return all(isinstance(value, numbers.Real) for value in values)
    return name in ("score", "response_length", "kl_sum") or name.startswith("score/")


def _of_steps(agent: Any, rollout: Rollout, lengths: np.ndarray) -> dict[str, list[Any]]:
    """Return and advantage of every response, and the tokens of a few."""
    mask = rollout.mask.cpu()
    steps: dict[str, torch.Tensor | None] = {
        "log_probs": rollout.log_probs,
        "ref_log_probs": rollout.ref_log_probs,
        "kls": None if rollout.ref_log_probs is None else rollout.log_probs - rollout.ref_log_probs,
        "rewards": rollout.rewards,
        "values": rollout.values if agent.policy.has_critic else None,
        "advantages": rollout.advantages,
    }
    arrays = {name: (x.cpu() * mask).double().numpy() for name, x in steps.items() if x is not None}
    found: dict[str, list[Any]] = {
        "return": arrays["rewards"].sum(1).tolist(),
        "advantage": (arrays["advantages"].sum(1) / np.maximum(lengths, 1)).tolist(),
    }
    detailed = set(range(0, len(rollout), max(-(-len(rollout) // DETAILED), 1)))
    tokenizer = agent.policy.lm.tokenizer
    actions = rollout.actions.cpu().numpy()
    found["tokens"] = [
        [tokenizer.decode([token]) for token in actions[i, : lengths[i]]] if i in detailed else None
        for i in range(len(rollout))
    ]
    for name, array in arrays.items():
        found[name] = [
            array[i, : lengths[i]].tolist() if i in detailed else None for i in range(len(rollout))
        ]
    return found
