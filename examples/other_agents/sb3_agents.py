"""stable-baselines3's and sb3-contrib's agents on one vector env: PPO, TRPO, RecurrentPPO, MaskablePPO, QRDQN.

    python examples/other_agents/sb3_agents.py

``TextRLHFCallback`` tells the environment who acts, also where the policy has a hidden state or a mask of tokens.
QRDQN acts by values, so it has no KL and plays a grid world.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from common import ENV_ID, ENV_KWARGS, SLOTS, VectorAudit, arguments, report
from sb3_contrib import QRDQN, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from textrl_env.sb3 import GymVecEnv, TextRLHFCallback


class SomeTokens(gym.vector.VectorWrapper):
    """A mask of tokens: token 7 is never written, and the end (token 0) never first."""

    def __init__(self, envs):
        super().__init__(envs)
        self.written = np.zeros(envs.num_envs, dtype=int)

    def reset(self, **kwargs):
        observations, infos = self.env.reset(**kwargs)
        self.written = np.asarray(observations["attention_mask"]).sum(1) - 1
        return observations, infos

    def step(self, actions):
        observations, *rest = self.env.step(actions)
        self.written = np.asarray(observations["attention_mask"]).sum(1) - 1
        return observations, *rest

    def action_masks(self):
        """Which tokens may be written next, bool ``[N, V]``."""
        mask = np.ones((self.num_envs, int(self.single_action_space.n)), dtype=bool)
        mask[:, 7:] = False
        mask[self.written == 0, 0] = False
        return mask


class Written(BaseCallback):
    """Collects the log-probabilities in the rollout buffer, before each update."""

    def _on_training_start(self):
        self.log_probs = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.log_probs.append(self.model.rollout_buffer.log_probs.copy())


def train(algorithm, policy, steps, seed, wrapper=None, **kwargs):
    """One of them on the token tree, and its line."""
    envs = VectorAudit(gym.make_vec(ENV_ID, num_envs=SLOTS, **ENV_KWARGS))
    model = algorithm(
        policy,
        GymVecEnv(envs if wrapper is None else wrapper(envs)),
        n_steps=32,
        batch_size=128,
        gamma=1.0,
        seed=seed,
        device="cpu",
        **kwargs,
    )
    written = Written()
    model.learn(steps, callback=[TextRLHFCallback(), written])
    package = "stable-baselines3" if algorithm is PPO else "sb3-contrib"
    report(package, algorithm.__name__, [envs.audit], np.concatenate(written.log_probs))


args = arguments(steps=12_000)
train(PPO, "MultiInputPolicy", args.steps, args.seed, learning_rate=3e-3, n_epochs=4)
train(TRPO, "MultiInputPolicy", args.steps, args.seed, target_kl=0.03)
train(RecurrentPPO, "MultiInputLstmPolicy", args.steps // 3, args.seed, learning_rate=3e-3, n_epochs=2)
train(MaskablePPO, "MultiInputPolicy", args.steps, args.seed, SomeTokens, learning_rate=3e-3, n_epochs=4)

envs = VectorAudit(gym.make_vec("GridWorld-v0", num_envs=8))
model = QRDQN(
    "MlpPolicy",
    GymVecEnv(envs),
    learning_rate=3e-3,
    learning_starts=500,
    train_freq=4,
    exploration_fraction=0.5,
    target_update_interval=500,
    seed=args.seed,
    device="cpu",
)
model.learn(args.steps)
report("sb3-contrib", "QRDQN", [envs.audit], None, "GridWorld-v0")
