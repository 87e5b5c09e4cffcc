"""What TensorBoard is told beside the numbers: what each means, which belong together, and the settings of the run."""

from __future__ import annotations

from typing import Any

#: What a tag means, shown beside its chart.
DESCRIPTIONS = {
    "objective/scores": "Mean score of the rollout's responses: what is trained on, before the KL penalty.",
    "objective/gold_scores": "Mean gold score of the same responses: a judge that is not trained on.",
    "objective/kl": "log pi - log pi_ref summed over a response, nats, mean over responses.",
    "objective/kl_coef": "Weight of the KL in the reward.",
    "objective/entropy": "-log pi summed over a response, nats, mean over responses.",
    "objective/non_score_reward": "What the KL penalty adds to the reward of a response (it takes away).",
    "objective/rlhf_reward": "Score minus the KL penalty, mean over responses.",
    "completions/mean_length": "Tokens of a response, the end token included.",
    "completions/clipped_ratio": "Share of responses that reach the budget without an end.",
    "completions/distinct_2": "Share of distinct pairs of words among 256 of them.",
    "eval/scores": "Score on the fixed evaluation prompts, sampled answers.",
    "eval/gold_scores": "Gold score on the fixed evaluation prompts, sampled answers.",
    "eval/kl": "KL to the reference on the fixed evaluation prompts, nats in an answer.",
    "eval/win_rate": "How often an answer beats one of the first policy to the same prompt, ties counting half.",
    "eval/distinct_of_10": "Different answers among ten to the same prompt.",
    "eval/eos_rate": "Share of answers that end within the budget.",
    "rollout/ep_rew_mean": "Mean return of the last episodes.",
    "rollout/ep_len_mean": "Mean length of the last episodes, steps.",
    "train/approx_kl": "KL of an update, from the policy that acted to the new one, nats.",
    "train/clip_fraction": "Share of actions whose ratio has left the clip range.",
    "train/entropy_loss": "Minus the entropy of an action, nats.",
    "train/explained_variance": "Share of the returns' variance that the critic knew; 1 is all, below 0 misleads.",
    "train/grad_norm": "Norm of the gradient before it is clipped.",
    "train/value_loss": "Loss of the critic.",
    "val/ratio": "Mean ratio of new to old probability of an action.",
    "group/frac_zero_std": "Share of groups whose responses all score alike; they teach nothing.",
    "group/reward_std": "Standard deviation of the reward within a group.",
}
#: The page that opens first: the handful that matters.
LAYOUT = {
    "Did it improve the model?": {
        "Held out: proxy and gold": ["Multiline", ["eval/scores", "eval/gold_scores"]],
        "Held out: win rate over the first policy": ["Multiline", ["eval/win_rate"]],
        "KL to the reference": ["Multiline", ["objective/kl", "eval/kl"]],
        "While training: proxy and gold": ["Multiline", ["objective/scores", "objective/gold_scores"]],
    },
    "Is it healthy?": {
        "Return": ["Multiline", ["rollout/ep_rew_mean"]],
        "Entropy of an action": ["Multiline", ["train/entropy_loss"]],
        "Length and ends": ["Multiline", ["completions/mean_length"]],
        "Different answers in ten": ["Multiline", ["eval/distinct_of_10"]],
        "KL of an update": ["Multiline", ["train/approx_kl"]],
        "Explained variance": ["Multiline", ["train/explained_variance"]],
    },
}
#: What sweeps are compared by.
METRICS = (
    "eval/gold_scores",
    "eval/scores",
    "eval/win_rate",
    "eval/kl",
    "objective/scores",
    "rollout/ep_rew_mean",
)


def hyper_parameters(config: dict[str, Any]) -> dict[str, bool | str | float | int]:
    """The settings of a run that tell it from others, flat and plain."""
    found: dict[str, Any] = {
        name: config[name] for name in ("agent", "env", "policy", "seed", "total_timesteps")
    }
    found |= config.get("in_force", {}).get("agent", {}) | config.get("in_force", {}).get("env", {})
    for nested in ("agent_kwargs", "env_kwargs", "policy_kwargs"):
        found |= config[nested]
    return {
        name: value if isinstance(value, bool | int | float) else str(value) for name, value in found.items()
    }
