"""PPO in one file, in the manner of CleanRL: everything that happens is in this loop.

    python examples/other_agents/cleanrl_ppo.py

What is not in CleanRL's own files is marked: the environment is told who acts (``ActingPolicy``), and here a step that
is only the reset of a slot (NEXT_STEP autoreset) is no experience to learn from.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from common import ENV_ID, ENV_KWARGS, SLOTS, Acted, TokenNet, VectorAudit, arguments, report
from torch import nn
from torch.distributions import Categorical

import textrl_env

num_steps, update_epochs, num_minibatches = 32, 4, 4
learning_rate, gamma, gae_lambda, clip_coef, ent_coef, vf_coef, max_grad_norm = (
    3e-3,
    1.0,
    0.95,
    0.2,
    0.0,
    0.5,
    0.5,
)
args = arguments(steps=40_000)

acted = Acted()  # not in CleanRL
envs = gym.make_vec(ENV_ID, num_envs=SLOTS, autoreset_mode="next-step", **ENV_KWARGS)
envs = VectorAudit(textrl_env.ActingPolicy(envs, acted))  # not in CleanRL: the wrapper that tells who acts

agent = TokenNet(envs.single_observation_space, int(envs.single_action_space.n))
optimizer = torch.optim.Adam(agent.parameters(), lr=learning_rate, eps=1e-5)


def get_action_and_value(obs, action=None):
    logits, value = agent(obs["input_ids"], obs["attention_mask"])
    probs = Categorical(logits=logits)
    action = probs.sample() if action is None else action
    return action, probs.log_prob(action), probs.entropy(), value


def tensors(observation):
    return {name: torch.from_numpy(np.array(value)) for name, value in observation.items()}


shape = (num_steps, SLOTS)
next_obs = tensors(envs.reset(seed=args.seed)[0])
next_done = torch.zeros(SLOTS)
written = []
for iteration in range(args.steps // (num_steps * SLOTS)):
    optimizer.param_groups[0]["lr"] = learning_rate * (1 - iteration * num_steps * SLOTS / args.steps)
    obs = {
        name: torch.zeros((*shape, *value.shape[1:]), dtype=value.dtype) for name, value in next_obs.items()
    }
    actions, logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(5))
    for step in range(num_steps):
        for name, value in next_obs.items():
            obs[name][step] = value
        dones[step] = next_done
        with torch.no_grad():
            action, logprob, _, values[step] = get_action_and_value(next_obs)
        actions[step], logprobs[step] = action, logprob
        acted.latest = logprob.numpy().astype(np.float64)  # not in CleanRL
        observation, reward, terminated, truncated, infos = envs.step(action.numpy())
        rewards[step] = torch.tensor(reward)
        next_obs, next_done = tensors(observation), torch.tensor(terminated | truncated).float()

    with torch.no_grad():  # the generalised advantage estimate
        next_value = get_action_and_value(next_obs)[3]
        advantages, last = torch.zeros(shape), torch.zeros(SLOTS)
        for t in reversed(range(num_steps)):
            following = next_value if t == num_steps - 1 else values[t + 1]
            alive = 1 - (next_done if t == num_steps - 1 else dones[t + 1])
            delta = rewards[t] + gamma * following * alive - values[t]
            advantages[t] = last = delta + gamma * gae_lambda * alive * last
        returns = advantages + values

    # Not in CleanRL: after an end comes a step that only resets the slot; its action did nothing.
    real = torch.nonzero(dones.flatten() == 0)[:, 0]
    written.append(np.where(dones.numpy() == 0, logprobs.numpy(), np.nan))
    b_obs = {name: value.flatten(0, 1) for name, value in obs.items()}
    b_actions, b_logprobs, b_advantages, b_returns = (
        x.flatten() for x in (actions, logprobs, advantages, returns)
    )
    for _ in range(update_epochs):
        for mb in real[torch.randperm(len(real))].chunk(num_minibatches):
            mb_obs = {name: value[mb] for name, value in b_obs.items()}
            _, newlogprob, entropy, newvalue = get_action_and_value(mb_obs, b_actions[mb])
            ratio = (newlogprob - b_logprobs[mb]).exp()
            adv = (b_advantages[mb] - b_advantages[mb].mean()) / (b_advantages[mb].std() + 1e-8)
            pg_loss = torch.max(-adv * ratio, -adv * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()
            v_loss = 0.5 * ((newvalue - b_returns[mb]) ** 2).mean()
            loss = pg_loss - ent_coef * entropy.mean() + vf_coef * v_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
            optimizer.step()

report("textrl-env", "PPO in the manner of CleanRL", [envs.audit], np.concatenate(written))
