"""What some of GRPO's options do: their checks, an entropy that is steered, a reference that follows the policy."""

from __future__ import annotations

import math
from typing import Any

from agents.algorithms import maths
from agents.algorithms.schedules import Schedule, check_numbers
from agents.rollouts.vector_envs import movable_references
from reward_models.warning import warn
from textrl_env.errors import ArgumentError, check_choice, check_range, is_finite


class EntropyTarget:
    """Raises the coefficient of the entropy bonus while the entropy of a token is low (Skywork-OR1, arXiv 2505.22312).

    Args:
        target: In nats.
        step: By how much the coefficient changes with each gradient step.
        low: The least that it falls to.
        high: The most that it rises to.
    """

    def __init__(self, target: float, step: float, low: float, high: float) -> None:
        self.target, self.step, self.low, self.high = target, step, low, high
        #: Of a token, as the last gradient step found it; before the first there is no bonus.
        self.entropy = math.inf

    def bonus(self, coefficient: float) -> float:
        """The weight of the bonus in the step that comes."""
        return coefficient if self.entropy <= self.target else 0.0

    def updated(self, coefficient: float, record: dict[str, float]) -> float:
        """The coefficient after a gradient step that logged ``record``; only tokens with a surrogate count."""
        share = record.get("kept", 1.0)
        self.entropy = record["kept_entropy"] / share if 0 < share < 1 else record["entropy"]
        step = self.step if self.entropy <= self.target else -self.step
        return min(max(coefficient + step, self.low), self.high)


def check_options(
    average: str,
    entropy_average: str,
    kl_in: str,
    off_policy_mask_threshold: float | None,
    top_entropy_quantile: float,
    entropy_target: float | None,
    ent_coef_delta: float,
    ent_coef_min: float,
    ent_coef_max: float,
    ref_model_sync_steps: int,
    ref_model_mixup_alpha: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> None:
    """Raise a ValueError for options of GRPO that mean nothing."""
    if (average, entropy_average) == ("prompt", "token"):
        raise ArgumentError('entropy_average="token" does not go with average="prompt"; leave it at "loss"')
    check_numbers(
        off_policy_mask_threshold=off_policy_mask_threshold or 0.0,
        entropy_target=entropy_target or 0.0,
        ent_coef_delta=ent_coef_delta,
        ent_coef_min=ent_coef_min,
        ent_coef_max=ent_coef_max,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
    )
    if not (is_finite(top_entropy_quantile) and 0 <= top_entropy_quantile <= 1):
        raise ArgumentError(
            f"top_entropy_quantile is a share of tokens, in [0, 1], got {top_entropy_quantile!r}"
        )
    if not ent_coef_min <= ent_coef_max:
        raise ArgumentError(
            f"ent_coef_min must not be above ent_coef_max, got {ent_coef_min} and {ent_coef_max}"
        )
    check_range(1, ref_model_sync_steps=ref_model_sync_steps)
    if not (is_finite(ref_model_mixup_alpha) and 0 < ref_model_mixup_alpha <= 1):
        raise ArgumentError(f"ref_model_mixup_alpha must be in (0, 1], got {ref_model_mixup_alpha}")
    check_choice("f_divergence_type", f_divergence_type, maths.F_DIVERGENCES)
    if f_divergence_type != "reverse_kl" and kl_in == "loss":
        raise ArgumentError(
            f"f_divergence_type={f_divergence_type!r} is of whole responses, in their score; leave kl_in at "
            '"reward"'
        )


#: Options that act only beside another, and that other.
_BESIDE = {
    "kl_loss_estimator": ("kl_in", ("loss",)),
    "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
    "ref_model_sync_steps": ("sync_ref_model", (True,)),
    "ref_model_mixup_alpha": ("sync_ref_model", (True,)),
}


def warn_of_idle(given: dict[str, Any], agent: Any) -> None:
    """Say which options were given and do nothing, because the one that they belong to is off."""
    for name, (master, values) in _BESIDE.items():
        if name in given and getattr(agent, master) not in values:
            warn(f"{name}={given[name]!r} does nothing without {master}={values[0]!r}")
    if not agent.ent_coef and "entropy_average" in given and agent.entropy_target is None:
        warn(
            f"entropy_average={given['entropy_average']!r} does nothing without an ent_coef or an entropy_target"
        )
    steered = [n for n in ("ent_coef_delta", "ent_coef_min", "ent_coef_max") if n in given]
    if steered and agent.entropy_target is None:
        warn(f"without an entropy_target there is nothing for {', '.join(steered)} to do")


def check_delta(delta: float | None, high: Schedule) -> None:
    """Raise an ArgumentError for a bound of ratios that PPO's own clip would hide."""
    if delta is None:
        return
    check_numbers(delta=delta)
    bound = 1 + high if isinstance(high, (int, float)) else 1.0
    if delta <= bound:
        raise ArgumentError(
            "delta bounds the ratios that the clip leaves unbounded, so it must be above 1 + clip_range_high = "
            f"{bound:g}, got {delta}"
        )


def check_reference(envs: Any, text_env: Any, policy: Any, kl_coef: float | None) -> None:
    """Raise an ArgumentError where there is no reference that could follow the policy."""
    if not movable_references(envs, text_env):
        why = f"{envs} charges no KL against a language model in this process"
    elif getattr(policy, "lora_rank", None) is not None:
        why = "with lora_rank the reference is the model under the adapters, and both hold its weights"
    elif not kl_coef:
        why = "kl_coef is 0, so nothing depends on the reference"
    else:
        return
    raise ArgumentError(
        f"sync_ref_model=True moves the reference towards the policy, but {why}; leave it out"
    )


def move_reference(envs: Any, text_env: Any, policy: Any, alpha: float) -> None:
    """Mix ``alpha`` of the policy into the reference of its environments."""
    if policy.is_split:
        policy.weights_changed()  # which puts them together
    first, *others = movable_references(envs, text_env)
    first.move_reference(dict(policy.lm.model.named_parameters()), alpha)
    for each in others:
        each.share_reference(first)
