"""skrl's PPO, with its own memory and trainer, on a vector env.

    python examples/other_agents/skrl_ppo.py

A model of skrl returns the log-probabilities of the actions that it draws, so handing them to the environment is one
line. skrl flattens a Dict observation; its own ``unflatten_tensorized_space`` takes it apart again.
"""

from __future__ import annotations

import gymnasium as gym
from common import ENV_ID, ENV_KWARGS, SLOTS, Acted, TokenNet, VectorAudit, arguments, report
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer
from skrl.utils.spaces.torch import unflatten_tensorized_space

import textrl_env

args = arguments(steps=12_000)
ROLLOUTS = 32
acted = Acted()


class Tokens(Model):
    """What actor and critic share: the network, and a Dict observation out of a flat one."""

    def __init__(self, observation_space, action_space):
        Model.__init__(self, observation_space=observation_space, action_space=action_space, device="cpu")
        self.net = TokenNet(observation_space, int(action_space.n))

    def read(self, inputs):
        observations = unflatten_tensorized_space(self.observation_space, inputs["observations"])
        return self.net(observations["input_ids"], observations["attention_mask"])


class Actor(CategoricalMixin, Tokens):
    def __init__(self, observation_space, action_space):
        Tokens.__init__(self, observation_space, action_space)
        CategoricalMixin.__init__(self)

    def compute(self, inputs, role=""):
        return self.read(inputs)[0], {}

    def act(self, inputs, *, role=""):
        actions, outputs = super().act(inputs, role=role)
        if "taken_actions" not in inputs:
            acted.latest = outputs["log_prob"].detach().double().numpy()[:, 0]
        return actions, outputs


class Critic(DeterministicMixin, Tokens):
    def __init__(self, observation_space, action_space):
        Tokens.__init__(self, observation_space, action_space)
        DeterministicMixin.__init__(self)

    def compute(self, inputs, role=""):
        return self.read(inputs)[1][:, None], {}


envs = VectorAudit(textrl_env.ActingPolicy(gym.make_vec(ENV_ID, num_envs=SLOTS, **ENV_KWARGS), acted))
wrapped = wrap_env(envs, wrapper="gymnasium")
memory = RandomMemory(memory_size=ROLLOUTS, num_envs=SLOTS, device="cpu")
agent = PPO(
    models={
        "policy": Actor(wrapped.observation_space, wrapped.action_space),
        "value": Critic(wrapped.observation_space, wrapped.action_space),
    },
    memory=memory,
    observation_space=wrapped.observation_space,
    action_space=wrapped.action_space,
    device="cpu",
    cfg={
        "rollouts": ROLLOUTS,
        "learning_epochs": 4,
        "mini_batches": 4,
        "learning_rate": 3e-3,
        "discount_factor": 1.0,
        "experiment": {"directory": "/tmp/skrl", "write_interval": 0, "checkpoint_interval": 0},
    },
)
timesteps = args.steps // SLOTS // ROLLOUTS * ROLLOUTS
trainer = SequentialTrainer(
    env=wrapped,
    agents=agent,
    cfg={
        "timesteps": timesteps,
        "headless": True,
        "disable_progressbar": True,
        "close_environment_at_exit": False,
    },
)
trainer.train()
report("skrl", "PPO", [envs.audit], memory.get_tensor_by_name("log_prob")[..., 0].numpy())
