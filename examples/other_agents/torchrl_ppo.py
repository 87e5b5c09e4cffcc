"""TorchRL's collector, advantage and clipped loss, on a vector env.

    python examples/other_agents/torchrl_ppo.py

TorchRL resets environments itself and prefers a vector env that leaves that to it: ``autoreset_mode="disabled"``, a
keyword of ``make_vec``. Its actor writes ``action_log_prob`` beside the action; a hook hands that to the environment.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from common import ENV_ID, ENV_KWARGS, SLOTS, Acted, TokenNet, VectorAudit, arguments, report
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.envs.libs.gym import GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import textrl_env

args = arguments(steps=10_000)
STEPS, EPOCHS, ROWS = 32, 4, 128
KEYS = ["input_ids", "attention_mask"]


class Logits(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, attention_mask):
        return self.net(input_ids, attention_mask)[0]


class Values(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, attention_mask):
        return self.net(input_ids, attention_mask)[1][..., None]


acted = Acted()
envs = gym.make_vec(ENV_ID, num_envs=SLOTS, autoreset_mode="disabled", **ENV_KWARGS)
envs = VectorAudit(textrl_env.ActingPolicy(envs, acted))
env = GymWrapper(envs, categorical_action_encoding=True)
nets = [TokenNet(envs.single_observation_space, int(envs.single_action_space.n)) for _ in range(2)]
actor = ProbabilisticActor(
    TensorDictModule(Logits(nets[0]), in_keys=KEYS, out_keys=["logits"]),
    in_keys=["logits"],
    distribution_class=Categorical,
    return_log_prob=True,
    spec=env.action_spec,
)
actor.register_forward_hook(
    lambda module, inputs, output: setattr(acted, "latest", output["action_log_prob"].double().numpy())
)
critic = ValueOperator(Values(nets[1]), in_keys=KEYS)
advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
loss_module = ClipPPOLoss(actor, critic, entropy_coeff=0.0, normalize_advantage=True)
optimizer = torch.optim.Adam(loss_module.parameters(), lr=3e-3)
collector = Collector(env, actor, frames_per_batch=STEPS * SLOTS, total_frames=args.steps // 512 * 512)

written = []
for data in collector:  # [N, T]
    written.append(data["action_log_prob"].numpy().T.copy())
    advantage(data)
    rows = data.reshape(-1)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(rows)).split(ROWS):
            losses = loss_module(rows[chosen])
            loss = losses["loss_objective"] + losses["loss_critic"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), 0.5)
            optimizer.step()
report("torchrl", "PPO", [envs.audit], np.concatenate(written))
