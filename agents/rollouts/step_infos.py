"""What stable-baselines3's callbacks read of one step, made only when one of them looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from agents.rollouts.episode_log import EpisodeLog
from agents.rollouts.observations import row_of
from textrl_env.sb3.vec_env import split_infos


class StepInfos(Sequence):
    """A list of dicts that is made when somebody looks at it; most callbacks never do.

    Args:
        length: Number of slots.
        make: Makes the list.
    """

    def __init__(self, length: int, make: Callable[[], list[dict[str, Any]]]) -> None:
        self._length, self._make = length, make
        self._rows: list[dict[str, Any]] | None = None

    def _list(self) -> list[dict[str, Any]]:
        if self._rows is None:
            self._rows = self._make()
        return self._rows

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index):
        return self._list()[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._list())

    def __repr__(self) -> str:
        return repr(self._list())


def step_infos(
    log: EpisodeLog,
    same_step: bool,
    following: Any,
    infos: dict[str, Any],
    done: np.ndarray,
    cut: np.ndarray,
) -> StepInfos:
    """The infos of a step, slot by slot, with what stable-baselines3 adds at the end of an episode.

    Args:
        log: Has just noted the episodes that ended.
        same_step: Whether the vector env resets within the step (SAME_STEP autoreset).
        following: The observations that the step returned.
        infos: Its infos, in Gymnasium's form.
        done: bool ``[N]``, episodes that ended.
        cut: bool ``[N]``, those that a time limit ended.
    """
    count = int(done.sum())
    kept = list(log.infos)[-count:] if count else []
    episodes = [{}] * (count - len(kept)) + kept

    def rows() -> list[dict[str, Any]]:
        ended = ("final_obs", "_final_obs", "final_info", "_final_info")
        made = split_infos({name: value for name, value in infos.items() if name not in ended}, len(done))
        last = split_infos(infos.get("final_info", {}), len(done)) if same_step else made
        of_slot = dict(zip(np.flatnonzero(done).tolist(), episodes, strict=False))
        for slot in of_slot:
            final = infos.get("final_obs", {}) if same_step else None
            observation = row_of(following, slot) if final is None else final[slot]
            made[slot] = last[slot] | {"terminal_observation": observation}
            made[slot].setdefault("episode", of_slot[slot])
        for row, limit in zip(made, cut.tolist(), strict=True):
            row["TimeLimit.truncated"] = limit
        return made

    return StepInfos(len(done), rows)


def fused_step(log: EpisodeLog, episodes: Any, done: np.ndarray, t: int) -> dict[str, Any]:
    """What a callback reads of token ``t`` of all episodes, an episode standing for a slot."""
    count = len(done)
    seconds = log.infos[-1]["t"] if log.infos else 0.0

    def rows() -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(count)]
        for i in np.flatnonzero(episodes.mask[:, t]):
            made[i] |= {"ref_logprob": float(episodes.ref_logprob[i, t]), "kl": float(episodes.kl[i, t])}
        for i in np.flatnonzero(done[:, t]):
            length = int(episodes.mask[i].sum())
            made[i] |= {
                "prompt": episodes.rendered[i],
                "response": episodes.responses[i],
                "response_length": length,
                "score": float(episodes.score[i]),
                **({} if episodes.scored is None else {"scored": bool(episodes.scored[i])}),
                "kl_sum": float(episodes.kl[i].sum()),
                "stop_reason": episodes.stop_reason[i],
                "episode": {"r": float(episodes.rewards[i].sum()), "l": length, "t": seconds},
            }
        return made

    return {
        "actions": episodes.tokens[:, t],
        "rewards": episodes.rewards[:, t],
        "log_probs": episodes.log_prob[:, t],
        "new_obs": FusedObservations(episodes, t + 1),
        "infos": StepInfos(count, rows),
    }


class FusedObservations(Mapping):
    """``input_ids`` and ``attention_mask`` after ``t`` tokens, made when somebody looks at them."""

    def __init__(self, episodes: Any, t: int) -> None:
        self._episodes, self._t = episodes, t
        self._arrays: dict[str, np.ndarray] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        if self._arrays is None:
            prompts, tokens, mask = self._episodes.prompt_tokens, self._episodes.tokens, self._episodes.mask
            rows = [
                np.concatenate([p, x[: self._t][m[: self._t]]])
                for p, x, m in zip(prompts, tokens, mask, strict=True)
            ]
            width = max(map(len, rows))
            ids, attention = np.zeros((2, len(rows), width), dtype=np.int64)
            for i, row in enumerate(rows):
                ids[i, width - len(row) :], attention[i, width - len(row) :] = row, 1
            self._arrays = {"input_ids": ids, "attention_mask": attention}
        return self._arrays[name]

    def __iter__(self):
        return iter(("input_ids", "attention_mask"))

    def __len__(self) -> int:
        return 2
