"""RLlib's PPO on the native vector env.

    python examples/other_agents/rllib_ppo.py

RLlib makes its environments itself, also in other processes, and each of its env runners has a copy of the module. So
each is told in RLlib's own callback, ``on_environment_created``, where the env and the module that acts in it meet.
"""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import ray
import torch
from common import ENV_ID, ENV_KWARGS, SLOTS, Audit, TokenNet, arguments, report
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule

import textrl_env  # noqa: F401, registers the environments


class Tokens(TorchRLModule, ValueFunctionAPI):
    def setup(self):
        self.net = TokenNet(self.observation_space, int(self.action_space.n))

    def _forward(self, batch, **kwargs):
        return {Columns.ACTION_DIST_INPUTS: self._run(batch)[0]}

    def compute_values(self, batch, embeddings=None):
        return self._run(batch)[1]

    def _run(self, batch):
        return self.net(batch[Columns.OBS]["input_ids"], batch[Columns.OBS]["attention_mask"])


@torch.no_grad()
def log_prob(env_runner, observations, actions):
    """What the module of this env runner, with the weights that it has now, thinks of its actions."""
    batch = {Columns.OBS: {name: torch.from_numpy(value) for name, value in observations.items()}}
    logits = env_runner.module.forward_exploration(batch)[Columns.ACTION_DIST_INPUTS]
    chosen = torch.from_numpy(np.asarray(actions))[:, None]
    return logits.double().log_softmax(-1).gather(-1, chosen)[:, 0].numpy()


charged, acted, returns = [], [], []


class TellsWhoActs(RLlibCallback):
    def on_environment_created(self, *, env_runner, env, **kwargs):
        env.unwrapped.bind_policy(functools.partial(log_prob, env_runner))

    def on_sample_end(self, *, env_runner, samples, **kwargs):
        for episode in samples:  # of this example alone: what was charged, and what RLlib itself wrote down
            infos = episode.get_infos()[1:]
            charged.extend(info["kl"] + info["ref_logprob"] for info in infos)
            acted.extend(episode.get_extra_model_outputs(Columns.ACTION_LOGP))
            if episode.is_done:
                returns.append(infos[-1]["score"] - ENV_KWARGS["kl_coef"] * infos[-1]["kl_sum"])


def make_envs(context):
    return gym.make_vec(ENV_ID, num_envs=context.get("num_envs", 1), autoreset_mode="next-step", **ENV_KWARGS)


args = arguments(steps=8_000)
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
tune.register_env("tokens", make_envs)
config = (
    PPOConfig()
    .environment("tokens")
    .env_runners(
        num_env_runners=0,
        num_envs_per_env_runner=SLOTS,
        gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
        rollout_fragment_length=32,
    )
    .callbacks(TellsWhoActs)
    .rl_module(rl_module_spec=RLModuleSpec(module_class=Tokens))
    .training(
        lr=3e-3,
        gamma=1.0,
        lambda_=0.95,
        train_batch_size_per_learner=32 * SLOTS,
        minibatch_size=128,
        num_epochs=4,
        use_kl_loss=False,
        entropy_coeff=0.0,
        vf_loss_coeff=0.5,
        grad_clip=0.5,
    )
    .debugging(seed=args.seed)
)
algorithm = config.build_algo()
for _ in range(args.steps // (32 * SLOTS)):
    algorithm.train()
audit = Audit()
audit.charged, audit.returns = [np.array([value]) for value in charged], returns
report("ray", "RLlib's PPO", [audit], np.array(acted)[:, None])
