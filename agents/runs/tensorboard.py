"""What TensorBoard is told beside the numbers: what each means, which belong together, and the settings of the run."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.logger import HParam
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

#: What a tag means, shown beside its chart.
DESCRIPTIONS = {
    "objective/scores": "Mean score of the rollout's responses: what is trained on, before the KL penalty.",
    "objective/gold_scores": "Mean gold score of the same responses: a judge that is not trained on.",
    "objective/unscored": "Share of responses to which no reward applied; nothing is learned from them.",
    "objective/kl": "log pi - log pi_ref summed over a response, nats, mean over responses.",
    "objective/kl_coef": "Weight of the KL in the reward.",
    "objective/entropy": "-log pi summed over a response, nats, mean over responses.",
    "objective/non_score_reward": "What the KL penalty adds to the reward of a response (it takes away).",
    "objective/rlhf_reward": "Score minus the KL penalty, mean over responses.",
    "completions/mean_length": "Tokens of a response, the end token included.",
    "completions/min_length": "Tokens of the shortest response.",
    "completions/max_length": "Tokens of the longest response.",
    "completions/clipped_ratio": "Share of responses that reach the budget without an end.",
    "completions/distinct_2": "Share of distinct pairs of words among 256 of them.",
    "completions/mean_turns": "Turns of the policy in a response.",
    "completions/context_full_ratio": "Share of responses that ended because the model reads no more tokens.",
    "eval/scores": "Score on the fixed evaluation prompts, sampled answers.",
    "eval/gold_scores": "Gold score on the fixed evaluation prompts, sampled answers.",
    "eval/greedy_scores": "Score on the fixed evaluation prompts, the likeliest token each time.",
    "eval/greedy_gold_scores": "Gold score on the fixed evaluation prompts, the likeliest token each time.",
    "eval/unscored": "Share of sampled answers to which no reward applied.",
    "eval/kl": "KL to the reference on the fixed evaluation prompts, nats in an answer.",
    "eval/mean_length": "Tokens of a sampled answer to the evaluation prompts.",
    "eval/win_rate": "How often an answer beats one of the first policy to the same prompt, ties counting half.",
    "eval/win_rate_low": "Lower end of the win rate's 95 % bootstrap interval over prompts.",
    "eval/win_rate_high": "Upper end of the win rate's 95 % bootstrap interval over prompts.",
    "eval/pass_at_k": "How often one at least of the answers sampled to a prompt passes.",
    "eval/distinct_of_10": "Different answers among ten to the same prompt.",
    "eval/eos_rate": "Share of answers that end within the budget.",
    "eval/held_out": "1 where the evaluation prompts are not trained on, 0 where they are.",
    "eval/seconds": "Seconds of an evaluation.",
    "eval/skipped": "Evaluations left out so far, since they may generate only a share of what learning does.",
    "eval/proxy_and_gold": (
        "Score that is trained on (proxy) and gold score on the evaluation prompts over the square root of the KL to "
        "the reference: changes since the first policy in standard deviations of its answers, bars the 95 % interval."
    ),
    "samples/episode": (
        "A response that was learned from, token by token; in each line the stronger the colour, the further from 0."
    ),
    "samples/table": "Some responses that were learned from, with score and KL.",
    "histogram/advantage": "Advantages of the tokens of an update.",
    "histogram/value": "What the critic expected at each token of an update, before the update.",
    "histogram/token_kl": "log pi - log pi_ref of the tokens of an update, nats.",
    "histogram/ratio": "Probability after the update over the probability when acting, of its tokens.",
    "rollout/ep_rew_mean": "Mean return of the last episodes.",
    "rollout/ep_len_mean": "Mean length of the last episodes, steps.",
    "rollout/success_rate": "Share of the last episodes that succeeded, as the environment says.",
    "rollout/masked_truncated": "Share of responses that were cut off and left out of the loss.",
    "exact/gap": "Distance from the exact optimum: 1 at the reference, 0 at the optimum.",
    "exact/kl_to_optimum": "Exact KL from the policy to the optimal one, nats.",
    "exact/J": "Exact objective: score minus the KL penalty.",
    "train/loss": "What is minimised; the loss of a policy says little of how well it does.",
    "train/policy_gradient_loss": "The part of the loss that moves the policy; about 0 where advantages are centred.",
    "train/value_loss": "Loss of the critic.",
    "train/kl_loss": "KL to the reference in the loss, nats a token.",
    "train/approx_kl": "KL of an update, from the policy that acted to the new one, nats.",
    "train/clip_fraction": "Share of actions whose ratio has left the clip range.",
    "train/clip_range": "Half width of the interval around 1 in which ratios are not clipped.",
    "train/entropy_loss": "Minus the entropy of an action, nats.",
    "train/ent_coef": "Weight of the entropy bonus.",
    "train/explained_variance": "Share of the returns' variance that the critic knew; 1 is all, below 0 misleads.",
    "train/grad_norm": "Norm of the gradient before it is clipped.",
    "train/learning_rate": "Of the optimiser.",
    "train/weight_growth": "Norm of the weights after the updates of a rollout over that before; 1 is no growth.",
    "train/lm_loss": "Loss of imitating good answers, beside that of the policy.",
    "train/ptx_loss": "Loss on demonstrations, beside that of the policy.",
    "train/off_policy_masked": "Share of tokens left out because the policy has moved too far from what wrote them.",
    "train/divergence": "Divergence from the teacher, nats a token.",
    "val/ratio": "Mean ratio of new to old probability of an action.",
    "val/ratio_var": "Variance of that mean over the minibatches of an update.",
    "val/clipfrac": "Share of values that the critic's clip range holds back.",
    "group/frac_zero_std": "Share of groups whose responses all score alike; they teach nothing.",
    "group/frac_informative": "Share of the sampled groups whose responses do not all score alike.",
    "group/reward_std": "Standard deviation of the reward within a group.",
    "group/best_score": "Mean score of the responses that are imitated.",
    "group/imitated": "Responses of a group that are imitated.",
    "group/shared_turns": "Share of turns whose state other episodes of the group have been in too.",
    "distillation/taught": "Share of responses about which the teacher knew more than the student.",
    "distillation/solved_groups": "Share of groups with a right answer.",
    "distillation/too_long": "Share of responses that with the teacher's hint are longer than the model reads.",
    "guard/early_kl": "1 where the KL was large after very few updates: the steps are too large.",
    "guard/cut_off": "1 where most answers are cut off by the budget.",
    "guard/entropy": "1 where the entropy has fallen to a small share of what it was at first.",
    "guard/equal_groups": "1 where the answers of nearly every group score alike.",
    "guard/score_falls": "1 where the score is below that of the start, beyond noise.",
    "guard/kl_loss": "1 where the KL in the loss outweighs the reward.",
    "guard/gibberish": "1 where the score has risen while answers went far from the reference, or repeat themselves.",
    "guard/step_size": "1 where the weights have grown many times over in the updates of a rollout.",
    "guard/reward_scale": "1 where rewards are so large that small differences are lost.",
    "guard/skipped_updates": "Gradient steps skipped so far because their gradient was not finite.",
    "sampling/sampling_logp_difference/mean": "How far the generator's log-probabilities are from the policy's, nats.",
    "sampling/sampling_logp_difference/max": "The furthest that one of the generator's is from the policy's, nats.",
    "sampling/importance_sampling_ratio/min": "Smallest weight of the correction for another generator.",
    "sampling/importance_sampling_ratio/mean": "Mean weight of the correction for another generator.",
    "sampling/importance_sampling_ratio/max": "Largest weight of the correction for another generator.",
    "sampling/masked_share": "Share of what was sampled that the correction leaves out.",
    "memory/peak_mb": "Most memory of the process, or of the accelerator, so far, MB.",
    "memory/offloaded_gb": "Frozen weights that lie in the host's memory during an update, GB.",
    "time/fps": "Steps a second since the run was started or resumed, updates included.",
    "time/tokens_per_second": "Tokens a second since the run was started or resumed, updates included.",
    "time/rollout_seconds": "Seconds of collecting a rollout.",
    "time/score_seconds": "Seconds of them that the reward took.",
    "time/update_seconds": "Seconds of learning from it.",
}
#: Figures by kind of prompt, ``eval/<kind>/<figure>``.
_OF_A_KIND = {
    "scores": "Score of sampled answers",
    "gold_scores": "Gold score of sampled answers",
    "kl": "KL to the reference, nats in an answer,",
    "refuses": "Share of sampled answers that refuse",
    "does_not_know": 'Share of sampled answers that say "I do not know"',
}
#: Pages of charts with the handful that matters; tags are regular expressions that have to match from the beginning.
LAYOUT = {
    "Did it improve the model?": {
        "Held out: proxy and gold": ["Multiline", ["eval/scores$", "eval/gold_scores$"]],
        "Held out: win rate over the first policy": ["Multiline", ["eval/win_rate$"]],
        "KL to the reference": ["Multiline", ["objective/kl$", "eval/kl$"]],
        "While training: proxy and gold": ["Multiline", ["objective/scores$", "objective/gold_scores$"]],
    },
    "Which answers decline? By kind of prompt": {
        "Held out: refuses": ["Multiline", ["eval/[^/]+/refuses$"]],
        "Held out: says that it does not know": ["Multiline", ["eval/[^/]+/does_not_know$"]],
    },
    "Is it healthy?": {
        "Return": ["Multiline", ["rollout/ep_rew_mean$"]],
        "Minus the entropy of an action": ["Multiline", ["train/entropy_loss$"]],
        "Tokens of a response": ["Multiline", ["completions/mean_length$"]],
        "Responses cut off": ["Multiline", ["completions/clipped_ratio$"]],
        "Different answers in ten": ["Multiline", ["eval/distinct_of_10$"]],
        "KL of an update": ["Multiline", ["train/approx_kl$"]],
        "Explained variance": ["Multiline", ["train/explained_variance$"]],
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
#: Settings that stand first in the table of runs, beside those that were given.
_FIRST = ("agent", "learning_rate", "kl_coef", "seed")


def describe(tag: str) -> str:
    """What a tag means; empty for one that nothing here writes, such as a metric of a reward."""
    match tag.split("/"):
        case ["eval", kind, figure] if figure in _OF_A_KIND:
            return f"{_OF_A_KIND[figure]} to evaluation prompts of the kind {kind!r}."
        case ["rewards", *name]:
            return f"Mean score by {'/'.join(name)!r}, one of several rewards."
        case ["guard", name] if name.endswith("_text"):
            return f"What was said when guard/{name.removesuffix('_text')} became 1."
    return DESCRIPTIONS.get(tag.removesuffix("/text_summary"), "")


class Settings(HParam):
    """The settings of a run and the figures that runs are compared by, for TensorBoard's table of runs.

    TensorBoard shows five columns of settings at first, by name: those come before that differ between runs. Which do
    it reads in one run's events, so each run marks those that were given.

    Args:
        config: See :func:`agents.runs.run_directory.new_config`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(hyper_parameters(config), dict.fromkeys(METRICS, 0.0))
        given = [
            name for nested in ("agent_kwargs", "env_kwargs", "policy_kwargs") for name in config[nested]
        ]
        self.first = {*_FIRST, *given}

    def summaries(self) -> list[Summary]:
        """What stands for them in a file of events."""
        experiment, *session = hparams(self.hparam_dict, self.metric_dict)
        content = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(content.content)
        for info in data.experiment.hparam_infos:
            info.differs = info.name in self.first
        content.content = data.SerializeToString()
        return [experiment, *session]


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
