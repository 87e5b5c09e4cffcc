"""Every agent learns, on every kind of environment, in seconds and with a fixed seed."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE, Agent
from tests.tiny import make_env, make_lm

AGENTS = {
    "PPO": (PPO, {"n_steps": 16, "n_envs": 32, "batch_size": 256, "n_epochs": 4}),
    "REINFORCE": (REINFORCE, {"n_episodes": 32, "n_envs": 32}),
    "REINFORCE-learned": (REINFORCE, {"n_episodes": 32, "n_envs": 32, "baseline": "learned"}),
    "GRPO": (GRPO, {"n_episodes": 32, "n_envs": 32}),
    "GRPO-leave-one-out": (GRPO, {"n_episodes": 32, "n_envs": 32, "scale": "leave-one-out"}),
}
every_agent = pytest.mark.parametrize("agent", AGENTS)


def make(agent: str, env, **kwargs) -> Agent:
    cls, settings = AGENTS[agent]
    return cls("auto", env, **({"learning_rate": 1e-2, "seed": 0} | settings | kwargs))


def greedy_episode(agent: Agent, env: gym.Env, **reset) -> tuple[float, int]:
    """Return and length of one episode of most likely actions."""
    observation, _ = env.reset(**reset)
    total, steps, done = 0.0, 0, False
    while not done:
        action, _ = agent.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, steps, done = total + reward, steps + 1, terminated or truncated
    return total, steps


@every_agent
def test_the_best_arm_of_every_context_is_found(agent):
    agent = make(agent, "ToyBandit-v0", env_kwargs={"contexts": 2, "arms": 5}).learn(5000)
    means = gym.make("ToyBandit-v0", contexts=2, arms=5).unwrapped.dynamics.means
    chosen, _ = agent.predict(np.arange(2), deterministic=True)
    assert chosen.tolist() == means.argmax(1).tolist()


@every_agent
def test_the_end_of_the_line_is_reached_by_the_shortest_way(agent):
    agent = make(agent, "LineWorld-v0").learn(10_000)
    assert greedy_episode(agent, gym.make("LineWorld-v0"), seed=0) == (pytest.approx(0.95), 6)


def test_ppo_finds_the_short_way_past_the_pit():
    agent = PPO(
        "MlpPolicy",
        "GridWorld-v0",
        n_steps=64,
        n_envs=32,
        batch_size=512,
        n_epochs=6,
        learning_rate=5e-3,
        ent_coef=0.02,
        seed=0,
    ).learn(26_000)
    assert greedy_episode(agent, gym.make("GridWorld-v0"), seed=0) == (pytest.approx(0.94), 7)


class Target(gym.Env):
    """One continuous action, best at half the observation."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.place, {}

    def step(self, action):
        return self.place, -float((action[0] - 0.5 * self.place[0]) ** 2), True, False, {}


@pytest.mark.parametrize("agent", ["PPO", "REINFORCE", "GRPO"])
def test_continuous_actions_are_learnt(agent):
    envs = gym.vector.SyncVectorEnv([Target] * 16, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    settings = {"n_envs": None, "policy_kwargs": {"log_std_init": -1.0}}
    agent = make(agent, envs, **settings, **({"batch_size": 64} if agent == "PPO" else {})).learn(6000)
    places = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    actions, _ = agent.predict(places, deterministic=True)
    assert np.abs(actions - 0.5 * places).max() < 0.2


def test_ppo_gets_clearly_better_at_cartpole():
    agent = PPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=128,
        n_envs=8,
        batch_size=256,
        n_epochs=8,
        learning_rate=3e-3,
        seed=0,
    ).learn(12_000)
    # A random policy keeps the pole up for about 22 steps.
    assert agent.latest["rollout/ep_rew_mean"] > 70


TEXT_AGENTS = {
    "PPO": (PPO, {"batch_size": 32, "n_epochs": 2, "learning_rate": 3e-3}),
    "PPO-separate": (PPO, {"batch_size": 32, "n_epochs": 2, "learning_rate": 3e-3, "critic": "separate"}),
    "REINFORCE": (REINFORCE, {"learning_rate": 5e-3}),
    "REINFORCE-learned": (REINFORCE, {"learning_rate": 5e-3, "baseline": "learned"}),
    "GRPO": (GRPO, {"learning_rate": 5e-3}),
    "GRPO-kl-in-the-loss": (GRPO, {"learning_rate": 5e-3, "kl_in": "loss", "average": "token"}),
}


@pytest.mark.parametrize("agent", TEXT_AGENTS)
def test_every_agent_raises_the_reward_of_a_text(agent):
    cls, settings = TEXT_AGENTS[agent]
    learner = cls("auto", make_env(kl_coef=0.02), n_episodes=32, seed=0, **settings)
    scores = []
    learner.learn(6000, callback=lambda *_: scores.append(learner.latest.get("objective/scores")) or True)
    scores = [score for score in scores if score is not None]
    assert scores[0] < 1.0
    assert learner.latest["objective/scores"] > 3.5  # of 6 words


def test_stepping_token_by_token_learns_as_the_fused_way_does():
    class Stepped(gym.vector.VectorWrapper):
        """Hides the fused way."""

    learner = REINFORCE(
        "auto", Stepped(make_env(32, kl_coef=0.02)), n_episodes=32, learning_rate=5e-3, seed=0
    )
    assert learner.text_env is None
    learner.learn(4000)
    assert learner.latest["objective/scores"] > 3.5


def test_a_larger_kl_coefficient_stays_closer_to_the_reference():
    kls = []
    for kl_coef in (0.01, 3.0):
        learner = GRPO("auto", make_env(kl_coef=kl_coef), n_episodes=32, learning_rate=5e-3, seed=0).learn(
            3000
        )
        kls.append(learner.latest["objective/kl"])
    assert kls[1] < 0.5 * kls[0]


def test_a_prompt_decides_what_is_right():
    """The reward asks for the prompt's own first word, so the policy has to read it."""

    def echo(prompts, completions):
        return [float(c.split()[:1] == p.split()[:1]) for p, c in zip(prompts, completions, strict=True)]

    env = make_env(lm=make_lm(), prompts=["a b", "c d", "e f"], reward=echo, kl_coef=0.0, max_new_tokens=2)
    learner = GRPO("auto", env, n_episodes=48, group_size=8, learning_rate=5e-3, seed=0).learn(4000)
    assert learner.latest["objective/scores"] > 0.9


def test_lr_zero_learns_nothing():
    learner = PPO("auto", make_env(), n_episodes=8, batch_size=8, n_epochs=2, learning_rate=0.0, seed=0)
    before = [weight.clone() for weight in learner.policy.parameters()]
    learner.learn(100)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))
