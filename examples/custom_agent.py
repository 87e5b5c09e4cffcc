"""A new method in a few lines, on every environment.

What it does: defines an agent of your own, the cross-entropy method (imitate the best quarter of the episodes),
and runs it unchanged on a bandit, a gridworld and a language model.

How to run: ``python examples/custom_agent.py``, about two minutes on two cores. From the command line:
``textrl train --agent examples/custom_agent.py:CrossEntropyMethod --env GridWorld-v0 --run-dir runs/cem``.

Left out: a critic, an entropy bonus, hyper-parameters of its own (add an ``__init__`` with visible defaults; for
settings of a base class the tables ``fixed`` and ``defaults`` are enough).
"""

from __future__ import annotations

from agents import Agent


class CrossEntropyMethod(Agent):
    """Imitate the best quarter of the episodes (Rubinstein 1999; on text: rejection sampling, RAFT)."""

    whole_episodes = True

    def advantages(self, rollout):
        totals = rollout.rewards.sum(1)  # [B]
        elite = totals > totals.quantile(0.75)
        return elite[:, None] * rollout.mask.float()  # [B, T]

    def loss(self, batch, new):
        imitation = -batch.advantages * new.log_probs
        return imitation, {"policy_gradient_loss": imitation}


def main() -> None:
    runs = [
        ("ToyBandit-v0", "MlpPolicy", 4_000, {"learning_rate": 1e-2, "n_episodes": 64}),
        ("GridWorld-v0", "MlpPolicy", 100_000, {"learning_rate": 1e-2, "n_episodes": 32}),
        ("TextRLHF-v0", "auto", 60_000, {"learning_rate": 1e-3, "n_episodes": 128}),
    ]
    for env_id, policy, steps, arguments in runs:
        agent = CrossEntropyMethod(policy, env_id, seed=0, **arguments)
        agent.learn(total_timesteps=1)  # one update, to see where it starts
        before = agent.latest["rollout/ep_rew_mean"]
        agent.learn(total_timesteps=steps, reset_num_timesteps=False)
        print(f"{env_id:14} mean episode reward {before:6.2f} -> {agent.latest['rollout/ep_rew_mean']:6.2f}")


if __name__ == "__main__":
    main()
