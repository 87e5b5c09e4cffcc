"""Evaluation while an agent learns: always the same prompts, and as many samples, so that points compare.

    PPO("auto", "TextRLHF-v0").learn(100_000, EvalCallback(eval_freq=10_000, log_path="runs/mine",
                                                           best_model_save_path="runs/mine/best"))

The conventions are those of stable-baselines3's ``EvalCallback``, but for language models: a point has the proxy (the
reward that is trained on), the gold score where there is a judge, the KL, lengths and ends, sampled and greedy, and the
win rate over the policy that learning began with. Evaluations come right after an update, draw from a random stream of
their own and leave the environment and the rewards' running figures as they were: weights are bitwise those of a run
without them. When learning ends, the first, the best and the last policy answer once more, with more and fresh samples:
the best of many noisy points looks better than it is.

Left out: environments that are no texts; stable-baselines3's own ``EvalCallback`` goes with those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EventCallback

from agents.callbacks.kl_control import check_budget
from agents.evaluation.alignment_tax import perplexity, pretraining_texts
from agents.evaluation.best_of_n import pass_at_k
from agents.evaluation.diversity import distinct_of
from agents.evaluation.evaluation import (
    EvaluationResult,
    evaluate_policy,
    evaluation_env,
    language_model,
    mean_of_known,
    means_of_known,
    sample_texts,
)
from agents.evaluation.kinds import by_kind, column_of
from agents.evaluation.records import (
    BEST,
    FINAL,
    REFERENCE,
    START,
    EvaluationRecord,
    drop_after,
    read_ends,
    read_evaluations,
    write_evaluation,
)
from agents.evaluation.verdict import compare
from agents.runs.best import best_timesteps, save_best
from reward_models.warning import warn
from textrl_env.errors import check_range
from textrl_env.lm.causal_lm import CausalLM

#: Prompts of an evaluation; a longer list is thinned out evenly.
MAX_PROMPTS = 128
#: Prompts that are answered ten times, and how often answers come in the evaluation at the end.
_TEN_TIMES, _SAMPLES_AT_THE_END = 12, 4
#: Prompts that the reference answers for its best-of-n where there is no gold judge, and how often.
_PROMPTS_OF_REFERENCE, _ANSWERS_OF_REFERENCE = 32, 32
#: Kinds of prompts that are logged one by one, at most.
_KINDS = 20


class EvalCallback(EventCallback):
    """Evaluates a language model every so many timesteps, keeps the best one, and compares it with the last.

    Args:
        eval_env: A ``TextRLHF-v0`` env whose prompts are answered. None is made from the one that is trained in, with
            the held-out prompts in the embedded world and the training's own elsewhere.
        callback_on_new_best: Called when ``best_model_save_path`` has been written anew.
        callback_after_eval: Called after every evaluation.
        n_eval_episodes: Sampled answers of an evaluation, rounded down to a whole number for each prompt and up to one;
            a greedy answer to each comes on top.
        eval_freq: Timesteps between two evaluations.
        log_path: A folder, usually the run directory; every answer goes to ``evaluations/`` in it.
        best_model_save_path: The folder of the best checkpoint: of the highest gold score; where there is no gold
            judge, of the highest score within ``kl_budget``, and none where there is no budget.
        kl_budget: The KL in nats that the best model of a run without a gold judge may have.
        max_share: Tokens generated for evaluations may come to this share of the timesteps; an evaluation beyond it is
            skipped and counted. The first and the last always take place.
        pretraining_texts: Texts whose perplexity tells what the first, best and last policy have unlearned; None is
            the embedded world's for its vocabulary, and none for others.
        seed: Of the sampling.
        verbose: As in stable-baselines3.

    Attributes:
        best_mean_reward: The highest mean so far of what the best model is chosen by.
        last_mean_reward: That of the last evaluation.
        evaluations_timesteps: When evaluations took place.
        evaluations_results: Each's mean by prompt.
        skipped: Evaluations that would have cost too much.
        latest: The last evaluation.
        points: All of them, oldest first.
        ends: Evaluations of more answers, "start", "best" (unless it is the last) and "final"; without a gold judge
            "reference" too, many answers of the env's own model to some of the prompts.
    """

    def __init__(
        self,
        eval_env: Any = None,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        n_eval_episodes: int = 256,
        eval_freq: int = 10_000,
        log_path: str | Path | None = None,
        best_model_save_path: str | Path | None = None,
        kl_budget: float | None = None,
        max_share: float = 0.5,
        pretraining_texts: Sequence[str] | None = None,
        seed: int = 0,
        verbose: int = 1,
    ) -> None:
        super().__init__(callback_after_eval, verbose=verbose)
        check_range(1, n_eval_episodes=n_eval_episodes, eval_freq=eval_freq)
        check_budget(kl_budget)
        self.callback_on_new_best = callback_on_new_best
        if callback_on_new_best is not None:
            callback_on_new_best.parent = self
        self.eval_env, self.held_out = eval_env, True
        self.n_eval_episodes, self.eval_freq, self.seed = n_eval_episodes, eval_freq, seed
        self.log_path = None if log_path is None else Path(log_path)
        self.best_model_save_path = None if best_model_save_path is None else Path(best_model_save_path)
        self.kl_budget, self.max_share = kl_budget, max_share
        self.pretraining_texts = pretraining_texts
        self.best_mean_reward = self.last_mean_reward = -math.inf
        self.evaluations_timesteps: list[int] = []
        self.evaluations_results: list[np.ndarray] = []
        self.latest: EvaluationRecord | None = None
        self.ends: dict[str, EvaluationRecord] = {}
        #: Those on the way, oldest first.
        self.points: list[EvaluationRecord] = []
        self.skipped = self._tokens = 0

    def _init_callback(self) -> None:
        if self.callback_on_new_best is not None:
            self.callback_on_new_best.init_callback(self.model)

    def _on_training_start(self) -> None:
        if self.model.text_env is None:
            raise ValueError(
                "EvalCallback evaluates language models in TextRLHF-v0; for other environments take "
                "stable_baselines3.common.callbacks.EvalCallback"
            )
        if self.eval_env is None:
            self.eval_env, self.held_out = evaluation_env(self.model.text_env)
        self.eval_env = getattr(self.eval_env, "unwrapped", self.eval_env)
        count = self.eval_env.num_prompts
        self._prompts = np.unique(np.linspace(0, count - 1, min(count, MAX_PROMPTS)).astype(np.int64))
        self._samples = max(self.n_eval_episodes // len(self._prompts), 1)
        self.ends = {}
        if self.model.num_timesteps and self.log_path is not None:
            self._take_up(self.log_path)
        if START not in self.ends:
            # A run that goes on without its first evaluation began with the env's own model.
            self._begin(self.eval_env.lm if self.model.num_timesteps else self.model)
        self._next = self._following_multiple()

    def get_state(self) -> dict[str, Any]:
        """How many evaluations were skipped; those that were not are in files of their own."""
        return {"skipped": self.skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self.skipped = int(state["skipped"])

    def _take_up(self, folder: Path) -> None:
        """Go on from the evaluations of the run that is resumed."""
        drop_after(folder, self.model.num_timesteps)
        start = read_ends(folder).get(START)
        if start is None or not np.array_equal(start.sampled.prompt_ids, self._prompts):
            return
        self.ends[START] = start
        for evaluation in read_evaluations(folder):
            self._note(evaluation, write=False)

    def _begin(self, policy: Any) -> None:
        """Evaluate the policy that learning begins with, twice: as later ones on the way, and as those at the end."""
        self._end(START, policy, 0)
        first = self._evaluate(policy, 0, self._samples, self.seed)
        self._note(first, write=True)
        for name, value in (first.means() | _means_by_kind(first.sampled)).items():
            self.logger.record(f"eval/{name}", value)
        self.logger.record("eval/held_out", float(self.held_out))
        self.logger.dump(0)

    def _following_multiple(self) -> int:
        return (self.model.num_timesteps // self.eval_freq + 1) * self.eval_freq

    def _on_step(self) -> bool:
        return True

    # -- evaluating ------------------------------------------------------------------------------------------

    def on_update_end(self) -> bool:
        """Evaluate if it is time; the learning loop calls it after each update, before the line of the log."""
        is_last = self.model.stopped or self.model.num_timesteps >= self.model.total_timesteps
        if self.model.num_timesteps < self._next and not is_last:
            return True
        self._next = self._following_multiple()
        cost = self.latest.tokens if self.latest is not None else 0
        if not is_last and self._tokens + cost > self.max_share * self.model.num_timesteps:
            self.skipped += 1
            self.logger.record("eval/skipped", self.skipped)
            return True
        evaluation = self._evaluate(self.model, self.model.num_timesteps, self._samples, self.seed)
        self._note(evaluation, write=True)
        means = evaluation.means() | self._win_rate(evaluation.sampled)
        judged = _judged(evaluation.sampled)
        judged = judged[~np.isnan(judged).any(1)]
        if judged.size and np.isin(judged, (0.0, 1.0)).all():  # answers pass or fail
            means["pass_at_k"] = pass_at_k(judged > 0, self._samples)
        for name, value in (means | _means_by_kind(evaluation.sampled)).items():
            self.logger.record(f"eval/{name}", value)
        self.logger.record("eval/seconds", evaluation.seconds)
        self._keep_best()
        if self.verbose >= 2:
            print(f"evaluation at {evaluation.timesteps:,} timesteps: {means}")
        return self._on_event()

    def _evaluate(
        self, policy: Any, timesteps: int, samples: int, seed: int, prompts: np.ndarray | None = None
    ) -> EvaluationRecord:
        """A policy's answers to the fixed prompts; nothing that learning depends on is different afterwards."""
        started = time.perf_counter()
        env, prompts = self.eval_env, self._prompts if prompts is None else prompts
        with keeping_state(getattr(env, "rewards", ())):
            env.trainer_state = self.model.text_env.trainer_state
            sampled = evaluate_policy(policy, env, samples, seed, prompt_ids=prompts)
            greedy = evaluate_policy(policy, env, 1, seed, deterministic=True, prompt_ids=prompts)
        texts, tokens = sampled.responses, 0
        if hasattr(env.dynamics, "prompt_tokens"):  # a game would have to be played again
            tenfold = prompts[:: -(-len(prompts) // _TEN_TIMES)]
            texts, tokens = sample_texts(policy, env, 10, seed, tenfold)
        return EvaluationRecord(
            timesteps=timesteps,
            sampled=sampled,
            greedy=greedy,
            held_out=self.held_out,
            distinct_of_10=distinct_of(texts, 10),
            tokens=int(sampled.length.sum() + greedy.length.sum()) + tokens,
            seconds=time.perf_counter() - started,
        )

    def _note(self, evaluation: EvaluationRecord, write: bool) -> None:
        self.latest = evaluation
        self.points.append(evaluation)
        self._tokens += evaluation.tokens if evaluation.timesteps else 0
        self.last_mean_reward = self._choice(evaluation)
        self.evaluations_timesteps.append(evaluation.timesteps)
        self.evaluations_results.append(means_of_known(_judged(evaluation.sampled)))
        if write and self.log_path is not None:
            write_evaluation(self.log_path, evaluation)

    def _choice(self, evaluation: EvaluationRecord) -> float:
        """What the best model is chosen by."""
        if evaluation.has_gold:
            gold = mean_of_known(evaluation.sampled.gold)
            return -math.inf if math.isnan(gold) else gold
        within = self.kl_budget is not None and evaluation.sampled.kl.mean() <= self.kl_budget
        score = mean_of_known(evaluation.sampled.score)
        return score if within and not math.isnan(score) else -math.inf

    def _keep_best(self) -> None:
        score = self.last_mean_reward
        self.best_mean_reward = max(self.best_mean_reward, score)
        if self.best_model_save_path is None or score == -math.inf:
            return
        if save_best(self.model, self.best_model_save_path, score) and self.callback_on_new_best is not None:
            self.callback_on_new_best.on_step()

    def _win_rate(self, sampled: EvaluationResult) -> dict[str, float]:
        """Over the first policy; nothing where no answers have scores."""
        found = compare(sampled, self.ends[START].sampled).win_rate.mean
        return {} if math.isnan(found) else {"win_rate": found}

    # -- at the end ------------------------------------------------------------------------------------------

    def _on_training_end(self) -> None:
        """The best and the last policy answer once more, with fresh samples."""
        now, best = self.model.num_timesteps, self.best_model_save_path
        if best is not None and best.is_dir() and best_timesteps(best) != now:
            own = self.model.policy.lm
            lm = CausalLM.load(best, temperature=own.temperature, device=own.device, autocast=own.autocast)
            self._end(BEST, lm, best_timesteps(best))
        self._end(FINAL, self.model, now)
        if not self.ends[FINAL].has_gold and hasattr(self.eval_env.dynamics, "prompt_tokens"):
            self._answer_by_reference()
        if self.skipped:
            warn(
                f"{self.skipped} evaluation{'s were' if self.skipped > 1 else ' was'} skipped: they may generate "
                f"{self.max_share:g} times as many tokens as learning; a larger eval_freq (--eval-every) spreads "
                "them evenly"
            )

    def _answer_by_reference(self) -> None:
        """Many answers of the reference: what choosing among them buys is what the same KL could have bought."""
        every = -(-len(self._prompts) // _PROMPTS_OF_REFERENCE)
        prompts, seed = self._prompts[::every], self.seed + 4
        evaluation = self._evaluate(self.eval_env.lm, 0, _ANSWERS_OF_REFERENCE, seed, prompts)
        self.ends[REFERENCE] = evaluation
        if self.log_path is not None:
            write_evaluation(self.log_path, evaluation, REFERENCE)

    def _end(self, name: str, policy: Any, timesteps: int) -> None:
        """An evaluation of more answers, by random numbers of its own: sides that are compared share none."""
        seed = self.seed + 1 + (START, BEST, FINAL).index(name)
        evaluation = self._evaluate(policy, timesteps, _SAMPLES_AT_THE_END, seed)
        lm = language_model(policy, self.eval_env.lm.temperature)
        texts = pretraining_texts(lm.tokenizer) if self.pretraining_texts is None else self.pretraining_texts
        if texts:
            evaluation = dataclasses.replace(evaluation, perplexity=perplexity(lm, texts))
        self.ends[name] = evaluation
        if self.log_path is not None:
            write_evaluation(self.log_path, self.ends[name], name)


def _judged(result: EvaluationResult) -> np.ndarray:
    """The gold scores, or the scores where there is no gold judge, ``[P, n]``; NaN where an answer has none."""
    return result.score if result.gold is None else result.gold


def _means_by_kind(result: EvaluationResult) -> dict[str, float]:
    """Figures by kind of prompt, ``<kind>/scores`` and so on; empty where there are no kinds, or too many to chart."""
    column = column_of([result])
    kinds = by_kind(result, column) if column is not None else []
    if not 2 <= len(kinds) <= _KINDS:
        return {}
    found = {}
    for kind in kinds:
        figures = {"scores": kind.score, "gold_scores": kind.gold, "kl": kind.kl, "refuses": kind.refuses}
        figures["does_not_know"] = kind.does_not_know
        name = kind.name.replace("/", "-")
        found |= {f"{name}/{figure}": value for figure, value in figures.items() if not math.isnan(value)}
    return found


@contextlib.contextmanager
def keeping_state(rewards: Sequence[Any]) -> Iterator[None]:
    """Inside, rewards may score anything; afterwards what they count (running means, failures) is as it was."""
    states = [reward.get_state() for reward in rewards]
    try:
        yield
    finally:
        for reward, state in zip(rewards, states, strict=True):
            reward.set_state(state)
