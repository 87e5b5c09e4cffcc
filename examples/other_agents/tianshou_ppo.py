"""Tianshou's PPO, with its own collector and buffer, over single environments.

    python examples/other_agents/tianshou_ppo.py

Each env is wrapped in ``ActingPolicy`` and asks for its own slot's log-probability; the policy has them at hand, since
its forward pass returns the distribution that it acts with.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from common import ENV_ID, ENV_KWARGS, SLOTS, SingleAudit, TokenNet, arguments, report
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.utils.torch_utils import policy_within_training_step
from torch import nn
from torch.distributions import Categorical

import textrl_env

args = arguments(steps=8_000)
latest = np.zeros(SLOTS)  # log-probabilities of the actions that are about to be taken


class Actor(nn.Module):
    """Logits, as Tianshou calls an actor."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, obs, state=None, info=None):
        return self.net(torch.as_tensor(obs.input_ids), torch.as_tensor(obs.attention_mask))[0], state


class Critic(nn.Module):
    """Values."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, obs, act=None, info=None):
        return self.net(torch.as_tensor(obs.input_ids), torch.as_tensor(obs.attention_mask))[1]


class Policy(ProbabilisticActorPolicy):
    """Hands the log-probabilities of its actions on, to the environments and to the buffer."""

    def forward(self, batch, state=None, **kwargs):
        result = super().forward(batch, state, **kwargs)
        if len(result.act) == SLOTS and not torch.is_grad_enabled():
            latest[:] = result.dist.log_prob(result.act).numpy()
            written.append(latest.copy())
        return result


def make_env(slot):
    env = gym.make(ENV_ID, **ENV_KWARGS)
    return SingleAudit(textrl_env.ActingPolicy(env, lambda observation, action: latest[slot]))


written = []
singles = [make_env(slot) for slot in range(SLOTS)]
envs = DummyVectorEnv([lambda env=env: env for env in singles])
actor_net, critic_net = (
    TokenNet(singles[0].observation_space, int(singles[0].action_space.n)) for _ in range(2)
)
policy = Policy(
    actor=Actor(actor_net),
    dist_fn=lambda logits: Categorical(logits=logits),
    action_space=singles[0].action_space,
    observation_space=singles[0].observation_space,
    action_scaling=False,
)
algorithm = PPO(
    policy=policy,
    critic=Critic(critic_net),
    optim=AdamOptimizerFactory(lr=3e-3),
    gamma=1.0,
    ent_coef=0.0,
    max_grad_norm=0.5,
)
buffer = VectorReplayBuffer(64 * SLOTS, SLOTS)
collector = Collector(policy, envs, buffer)
collector.reset()
for _ in range(args.steps // (32 * SLOTS)):
    with torch.no_grad():
        collector.collect(n_step=32 * SLOTS)
    with policy_within_training_step(policy):
        algorithm.update(buffer, batch_size=128, repeat=4)
    collector.reset_buffer(keep_statistics=True)
report("tianshou", "PPO", [env.audit for env in singles], np.array(written))
