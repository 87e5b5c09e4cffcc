"""How good a text policy is: its score, gold score and KL on given prompts, and its win rate over another.

    env = heldout_env()
    before, after = evaluate_policy(env.lm, env), evaluate_policy(agent, env)
    rate, low, high = win_rate(after.gold, before.gold)

Answers are sampled as in training, not decoded greedily, and the KL is against the env's own model. Left out:
judges that compare two answers directly, and environments that are not text.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

from reward_models import RunningNormalizer
from textrl_env import embedded
from textrl_env.data.prompts import load_prompts
from textrl_env.envs.text_rlhf import Episodes, TextRLHFEnv
from textrl_env.errors import check_range
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import DecodedSequences, generate
from textrl_env.lm.sequences import Sequences
from textrl_env.protocols import TextEnv

#: Responses that are generated at once.
_BATCH = 512
_RESAMPLES = 2000
#: Starts that are played where nobody says which.
_MOST_PROMPTS = 50_000


@dataclasses.dataclass
class EvaluationResult:
    """``n_samples`` answers to each of ``P`` prompts, one row for each prompt.

    Attributes:
        prompts: ``P`` texts.
        responses: ``P`` lists of ``n_samples`` texts.
        score: float64 ``[P, n_samples]``, what the policy was trained on, before the KL; NaN where no reward applied.
        gold: float64 ``[P, n_samples]``, the gold judge's; None where the env has none.
        parts: Each of several rewards by name, float64 ``[P, n_samples]``.
        kl: float64 ``[P, n_samples]``, ``log pi - log pi_ref`` summed over the response, in nats.
        length: int64 ``[P, n_samples]``, tokens, the end token included.
        ended: bool ``[P, n_samples]``, true where the response (or the game) ended within the budget.
        prompt_ids: int64 ``[P]``, the prompts' places in their source.
        columns: What came with the prompts, by name, ``P`` values each.
    """

    prompts: list[str]
    responses: list[list[str]]
    score: np.ndarray
    gold: np.ndarray | None
    parts: dict[str, np.ndarray]
    kl: np.ndarray
    length: np.ndarray
    ended: np.ndarray
    prompt_ids: np.ndarray
    columns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    @property
    def unscored(self) -> int:
        """Answers to which no reward applied; means leave them out, as training does."""
        return int(np.isnan(self.score).sum())

    def summary(self) -> dict[str, float]:
        """Means over all answers, JSON-able; ``unscored`` is there where no reward applied to some."""
        means = {
            "score": mean_of_known(self.score),
            "kl": self.kl.mean(),
            "length": self.length.mean(),
            "ended": self.ended.mean(),
        }
        if self.gold is not None:
            means["gold"] = mean_of_known(self.gold)
        means |= {"unscored": self.unscored} if self.unscored else {}
        # A reward may give None for rows that it does not apply to: its mean is over the others, as in training.
        applied = {name: part[~np.isnan(part)] for name, part in self.parts.items()}
        means |= {f"rewards/{name}": part.mean() for name, part in applied.items() if part.size}
        return {name: float(value) for name, value in means.items()}


def mean_of_known(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN where all is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def means_of_known(values: np.ndarray) -> np.ndarray:
    """The mean of each row over what is not NaN, ``[P, n] -> [P]``; NaN for a row where all is."""
    known = ~np.isnan(values)
    count = known.sum(1)
    return np.divide(
        np.where(known, values, 0.0).sum(1), count, out=np.full(len(values), np.nan), where=count > 0
    )


def evaluate_policy(
    policy_or_lm: Any,
    env: Any,
    n_samples: int = 4,
    seed: int = 0,
    deterministic: bool = False,
    prompt_ids: Any = None,
) -> EvaluationResult:
    """Sample answers to the env's prompts and score them.

    Args:
        policy_or_lm: An agent, a :class:`~agents.policies.factory.CausalLMPolicy`, a
            :class:`~textrl_env.lm.causal_lm.CausalLM`, or the folder of one.
        env: A ``TextRLHF-v0`` or ``TextGame-v0`` env with the prompts to answer, wrapped or not. Only its reward,
            gold judge, games and reference are used; its episode and its random stream are left alone.
        n_samples: Answers to each prompt.
        seed: Of the sampling.
        deterministic: Take the most likely token instead of sampling.
        prompt_ids: Which prompts; None takes all, in their order.

    Raises:
        TypeError: ``env`` is no text environment, or ``policy_or_lm`` no language model.
    """
    env = getattr(env, "unwrapped", env)
    if not isinstance(env, TextEnv):
        raise TypeError(f"evaluate_policy wants a TextRLHF-v0 or TextGame-v0 env, got {type(env).__name__}")
    if prompt_ids is None and env.num_prompts > _MOST_PROMPTS:
        raise ValueError(
            f"this env has {env.num_prompts:,} starts, too many to play them all; say which with prompt_ids, or make "
            "it with a smaller num_seeds"
        )
    check_range(1, n_samples=n_samples)
    lm = language_model(policy_or_lm, env.lm.temperature)
    generator = torch.Generator(lm.device).manual_seed(seed)

    has_turns = hasattr(env, "max_turns")

    def sample(memory: DecodedSequences | None, prompts: list[np.ndarray]) -> Sequences:
        how = {"stop": env.stop, "memory": memory} if has_turns else {}
        sequences = generate(lm, prompts, env.max_new_tokens, generator, deterministic, **how)
        if not lm.autocast:
            return sequences
        # Decoded in bfloat16; the KL is that of the model that the update trains.
        return sequences.with_values(log_probs=sequences.spread(lm.log_probs(sequences)))

    ids = np.arange(env.num_prompts) if prompt_ids is None else np.asarray(prompt_ids)
    columns = getattr(getattr(env.dynamics, "prompts", None), "columns", {})
    columns = {name: [values[i] for i in ids] for name, values in columns.items()}
    rows = np.repeat(ids, n_samples)  # the answers to one prompt are neighbours
    chunks = []
    for i in range(0, len(rows), _BATCH):
        memory = DecodedSequences(env.max_length) if has_turns else None
        chunks.append(env.run_episodes(functools.partial(sample, memory), rows[i : i + _BATCH]))
    return dataclasses.replace(_result(chunks, n_samples), prompt_ids=ids, columns=columns)


def sample_texts(
    policy_or_lm: Any, env: Any, n_samples: int, seed: int, prompt_ids: Any
) -> tuple[list[list[str]], int]:
    """Sample answers without scoring them.

    Args:
        policy_or_lm: As for :func:`evaluate_policy`.
        env: A ``TextRLHF-v0`` env with the prompts.
        n_samples: Answers to each prompt.
        seed: Of the sampling.
        prompt_ids: Which prompts.

    Returns:
        A list of texts for each prompt, and the tokens generated.
    """
    env = getattr(env, "unwrapped", env)
    lm = language_model(policy_or_lm, env.lm.temperature)
    prompts = [env.dynamics.prompt_tokens[i] for i in prompt_ids for _ in range(n_samples)]
    generator = torch.Generator(lm.device).manual_seed(seed)
    texts, tokens = [], 0
    for i in range(0, len(prompts), _BATCH):
        sequences = generate(lm, prompts[i : i + _BATCH], env.max_new_tokens, generator)
        texts += [env.encoder.decode(response, True) for response in sequences.responses]
        tokens += int(sequences.num_actions.sum())
    return [texts[i : i + n_samples] for i in range(0, len(texts), n_samples)], tokens


def language_model(policy_or_lm: Any, temperature: float) -> CausalLM:
    """The language model of what :func:`evaluate_policy` takes; a folder is loaded."""
    policy = getattr(policy_or_lm, "policy", policy_or_lm)  # of an agent
    lm = getattr(policy, "lm", policy)  # of a policy
    if isinstance(lm, CausalLM):
        return lm
    if isinstance(lm, str) or hasattr(lm, "__fspath__"):
        return CausalLM.load(lm, temperature=temperature)
    raise TypeError(
        "evaluate_policy wants an agent or policy with a language model, a CausalLM or its folder, "
        f"got {type(policy_or_lm).__name__}"
    )


def _result(chunks: list[Episodes], n_samples: int) -> EvaluationResult:
    def rows(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values).reshape(-1, n_samples)  # [P, n_samples]

    names = chunks[0].parts
    parts = {name: rows([chunk.parts[name] for chunk in chunks]) for name in names}
    responses = [text for chunk in chunks for text in chunk.responses]
    prompts = [text for chunk in chunks for text in chunk.prompts]
    return EvaluationResult(
        prompts=prompts[::n_samples],
        responses=[responses[i : i + n_samples] for i in range(0, len(responses), n_samples)],
        score=rows([c.score if c.scored is None else np.where(c.scored, c.score, np.nan) for c in chunks]),
        gold=parts.pop("gold", None),
        parts=parts,
        kl=rows([((c.log_prob - c.ref_logprob) * c.mask).sum(1) for c in chunks]),
        length=rows([chunk.mask.sum(1) for chunk in chunks]),
        ended=rows(
            [np.array([reason in ("eos", "game") for reason in chunk.stop_reason]) for chunk in chunks]
        ),
        prompt_ids=np.arange(len(prompts) // n_samples),
    )


def win_rate(
    gold_a: np.ndarray,
    gold_b: np.ndarray,
    confidence: float = 0.95,
    seed: int = 0,
    leave_out_missing: bool = False,
) -> tuple[float, float, float]:
    """How often ``a`` beats ``b``, ties counting half, with a bootstrap confidence interval over prompts.

    Answers to one prompt are not independent of each other, so prompts are resampled, not answers
    (percentile bootstrap, 2,000 resamples).

    Args:
        gold_a: Scores ``[P]``, or ``[P, n]`` for several answers to each prompt.
        gold_b: Scores of the other side, ``[P]`` or ``[P, m]``, the same prompts in the same order. Every
            answer of ``a`` is compared with every answer of ``b`` to the same prompt.
        confidence: Of the interval.
        seed: Of the resampling.
        leave_out_missing: Compare answers that have scores, and leave NaN and prompts without any other out; an error
            otherwise.

    Returns:
        The win rate in [0, 1] and the lower and upper end of its interval.

    Raises:
        ValueError: The prompts differ in number, a score is NaN, or no two answers to one prompt have scores.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (gold_a, gold_b))
    a, b = (x[:, None] if x.ndim == 1 else x for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or not a.size or not b.size:
        raise ValueError(
            f"win_rate wants [P] or [P, n] scores of the same P prompts, got {np.shape(gold_a)} and {np.shape(gold_b)}"
        )
    if not leave_out_missing and (np.isnan(a).any() or np.isnan(b).any()):
        raise ValueError(
            "win_rate cannot compare scores that are NaN; leave_out_missing=True leaves them out"
        )
    difference = (a[:, :, None] - b[:, None, :]).reshape(len(a), -1)  # [P, n * m]
    wins = np.where(np.isnan(difference), np.nan, (difference > 0) + 0.5 * (difference == 0))
    by_prompt = means_of_known(wins)
    by_prompt = by_prompt[~np.isnan(by_prompt)]
    if not by_prompt.size:
        raise ValueError("win_rate wants two answers to one prompt that have scores, and there are none")
    return mean_interval(by_prompt, confidence, seed)


def mean_interval(values: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """The mean of one value for each prompt and its percentile bootstrap interval over prompts (2,000 resamples).

    Args:
        values: float ``[P]``, finite.
        confidence: Of the interval.
        seed: Of the resampling.

    Returns:
        The mean and the lower and upper end of its interval.
    """
    draws = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values[draws].mean(1), [tail, 100 - tail])
    return float(values.mean()), float(low), float(high)


def evaluation_env(env: Any, prompts: Any = None) -> tuple[TextRLHFEnv, bool]:
    """An env to evaluate on beside a text env that is trained in: its model, rewards and budget, prompts of its own.

    A reward that is normalised by running figures is taken as it is before that.

    Args:
        env: The env that is trained in, wrapped or not.
        prompts: Anything that ``TextRLHF-v0`` takes as prompts. None is the held-out ones in the embedded world, and
            elsewhere those of the training themselves.

    Returns:
        The env, and whether its prompts are held out.
    """
    dynamics = getattr(env, "unwrapped", env).dynamics
    if not hasattr(dynamics, "reward"):
        raise ValueError(
            "evaluation on the way makes an env of its own for TextRLHF-v0 only; for a game, make one and pass it: "
            "EvalCallback(eval_env)"
        )
    own = dynamics.prompts
    held_out = prompts is not None
    if prompts is None:
        held_out = own.texts == load_prompts(embedded.path("prompts_train")).texts
        prompts = embedded.path("prompts_heldout") if held_out else own
    names = ("reward", "gold", "max_new_tokens", "missing_eos_penalty", "kl_coef", "kl_estimator")
    kwargs = {name: getattr(dynamics, name) for name in names}
    while isinstance(kwargs["reward"], RunningNormalizer):  # its scale moves, and points must compare
        kwargs["reward"] = kwargs["reward"].reward
    template = dynamics.encoder.template
    kwargs["chat_template_kwargs"] = template.kwargs
    kwargs["allow_control_tokens"] = template.allow_control_tokens
    return TextRLHFEnv(model=dynamics.lm, prompts=prompts, **kwargs), held_out


def heldout_env(env: Any = None, **kwargs: Any) -> TextRLHFEnv:
    """The embedded world's held-out prompts, with the gold judge.

    Args:
        env: A text env whose model, reward and budget are used; None takes the embedded world's.
        **kwargs: More arguments of ``TextRLHF-v0``.
    """
    if env is not None:
        dynamics = getattr(env, "unwrapped", env).dynamics
        names = ("reward", "max_new_tokens", "missing_eos_penalty", "kl_coef", "kl_estimator")
        kwargs = {"model": dynamics.lm} | {name: getattr(dynamics, name) for name in names} | kwargs
    kwargs = {"prompts": embedded.path("prompts_heldout"), "gold": embedded.gold_score} | kwargs
    return TextRLHFEnv(**kwargs)
