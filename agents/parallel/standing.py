"""Where the main process stands after its callbacks, for the others to stand there too.

Callbacks may stop learning, change a hyper-parameter or the KL coefficient, or draw random numbers. They are called in
the main process alone, so what they change there has to be told.
"""

from __future__ import annotations

from typing import Any

from agents.rollouts.vector_envs import kl_envs

#: How many rows fit into a process's memory is its own affair.
_OWN = ("micro_batch_size", "verbose", "tensorboard_log")


def take_standing(agent: Any) -> dict[str, Any]:
    """Everything that a callback may have changed: plain attributes, coefficients, random streams."""
    plain = {
        name: value
        for name, value in vars(agent).items()
        if not name.startswith("_")
        and name not in _OWN
        and isinstance(value, bool | int | float | str | None)
    }
    return {
        "attributes": plain,
        "kl_coef": agent.kl_coef,
        "rng": agent.rng.bit_generator.state,
        "policy_rng": agent.policy.generator.get_state(),
        "rewards": [reward.get_state() for reward in _rewards(agent)],
    }


def give_standing(agent: Any, standing: dict[str, Any]) -> None:
    """Put an agent where :func:`take_standing` found another."""
    for name, value in standing["attributes"].items():
        setattr(agent, name, value)
    if standing["kl_coef"] is not None and standing["kl_coef"] != agent.kl_coef:
        agent.kl_coef = standing["kl_coef"]
    agent.rng.bit_generator.state = standing["rng"]
    agent.policy.generator.set_state(standing["policy_rng"])
    for reward, state in zip(_rewards(agent), standing["rewards"], strict=True):
        if state != reward.get_state():
            reward.set_state(state)


def _rewards(agent: Any) -> list[Any]:
    """The rewards of the agent's environments, each once."""
    found = [reward for env in kl_envs(agent.envs) for reward in getattr(env, "rewards", ())]
    return list({id(reward): reward for reward in found}.values())
