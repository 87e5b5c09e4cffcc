"""Do the tests notice? Bugs planted one at a time in a copy of the project, and which test finds each.

    python benchmarks/mutations.py [--only NAME ...] [--minutes 10]
    python benchmarks/mutations.py --again      # also those that have been planted before

Every bug is one that people have really made: a sign, a shift by one token, a forgotten mask, a state that a
checkpoint leaves out. The project's tracked files are copied to a temporary folder, a bug is planted there, the
tests that should notice run, and the file is put back. What was found is kept in benchmarks/mutations.json, so a
pass may be stopped and gone on with, and docs/mutations.md is written of all that is there; a bug that is changed is
planted again. Only tests that fail count as noticing: a file that no longer imports does not. Left out: generated
mutations, of which most change nothing that anyone would call behaviour.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, STORED = ROOT / "docs" / "mutations.md", Path(__file__).with_suffix(".json")
PACKAGES = ("agents", "textrl_env", "reward_models")
#: What importing costs more than most tests.
LIBRARIES = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "stable_baselines3",
    "peft",
    "datasets",
    "trl.trainer.grpo_trainer",
    "pytest",
)
#: Seconds after which a run of tests is given up.
TIMEOUT = 600


class Bug(NamedTuple):
    """A planted bug.

    Attributes:
        name: What is wrong.
        file: Where, from the root of the project.
        old: Text that the file holds exactly once.
        new: What takes its place.
        tests: Names of the test files that should notice, ``test_<name>.py``, the likeliest first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


KL, TEXT, CORE = "textrl_env/kl.py", "textrl_env/envs/text_rlhf.py", "textrl_env/core.py"
WRITING, GAME = "textrl_env/envs/writing.py", "textrl_env/envs/text_game.py"
SEQUENCES = "textrl_env/lm/sequences.py"
LM, DECODING, EXACT = "textrl_env/lm/causal_lm.py", "textrl_env/lm/decoding.py", "textrl_env/exact/solver.py"
SLOTS, NEXT = "textrl_env/lm/slot_decoder.py", "textrl_env/lm/next_tokens.py"
MATHS, BASE, COLLECT = "agents/algorithms/maths.py", "agents/base.py", "agents/rollouts/collectors.py"
GRADIENT, PPO_FILE = "agents/algorithms/gradient_step.py", "agents/algorithms/ppo.py"
CHECKPOINT, CAUSAL = "agents/runs/checkpoint.py", "agents/policies/causal_lm.py"
#: Followed by the name of a method's file.
METHOD, DISTILLATION = "agents/algorithms/methods/", "agents/distillation/"
TEACHER, SHARED = "textrl_env/lm/teacher_forcing.py", "textrl_env/lm/shared_prompts.py"
SEQUENCES = "textrl_env/lm/sequences.py"
IMPORTANCE = "agents/algorithms/importance.py"
ANSWERS, KNOBS = (f"textrl_env/generators/{name}.py" for name in ("answers", "sampling"))
LLAMA, MASKS = "textrl_env/lm/fused_llama.py", "textrl_env/lm/attention_masks.py"
CHECK, DIVERGENCE = "textrl_env/lm/self_check.py", "textrl_env/lm/divergence.py"
GRPO, PPO, REINFORCE = (f"agents/algorithms/{name}.py" for name in ("grpo", "ppo", "reinforce"))
OPTIONS = "agents/algorithms/grpo_options.py"
PTX, KL_CONTROL = "agents/algorithms/ppo_ptx.py", "agents/callbacks/kl_control.py"
DPO, SFT, LORA = "agents/offline/preference_losses.py", "agents/offline/sft.py", "agents/policies/lora.py"

# fmt: off
BUGS = [
    # -- the environment and its KL --------------------------------------------------------------------------
    Bug("KL with the wrong sign", KL, "return KL_ESTIMATORS[estimator](log_ratio)",
        "return KL_ESTIMATORS[estimator](-log_ratio)", ("text_env", "step_equals_fused")),
    Bug("KL with the wrong sign in the step way only", WRITING, "np.where(active, estimate_kl(log_prob - ref_logprob",
        "np.where(active, estimate_kl(ref_logprob - log_prob", ("text_env", "step_equals_fused")),
    Bug("k3 in place of k1", KL, '"k1": lambda log_ratio: log_ratio,',
        '"k1": lambda log_ratio: np.expm1(-log_ratio) + log_ratio,', ("text_env", "step_equals_fused")),
    Bug("KL one token late in the fused way", WRITING, "self.reference_log_probs(sequences)",
        "np.roll(self.reference_log_probs(sequences), 1)", ("step_equals_fused",)),
    Bug("padded passes' logits one token late", TEACHER, "sequences.starts[rows] - 1  # of what predicts",
        "sequences.starts[rows]  # of what predicts", ("sequences", "teacher_forcing")),
    Bug("score on the last but one token", WRITING, "rewards[ends] += ", "rewards[np.maximum(ends - 1, 0)] += ",
        ("text_env", "step_equals_fused")),
    Bug("score on the first token", TEXT, "self.charge(sequences, ends, scored",
        "self.charge(sequences, ends - sequences.num_actions + 1, scored",
        ("text_env", "step_equals_fused")),
    Bug("temperature in sampling only", LM, "scaled = states if self.temperature == 1.0 else states / self.temperature",
        "scaled = states", ("language_model",)),
    Bug("logits beyond the vocabulary are sampled", LM, "logits[..., : self.vocab_size].float()", "logits.float()",
        ("language_model",)),
    Bug("positions go on from the sequence before in the row", TEACHER,
        "positions.ravel()[filled] = ranges(skipped, lengths)", "positions.ravel()[filled] = filled % width",
        ("teacher_forcing",)),
    Bug("end token left out of the response", DECODING, "lengths[episodes[ended]] = t + 1",
        "lengths[episodes[ended]] = max(t, 1)", ("language_model",)),
    Bug("one token more after the end token", DECODING, "lengths[episodes[ended]] = t + 1",
        "lengths[episodes[ended]] = min(t + 2, max_new_tokens)", ("language_model",)),
    Bug("cache rows stay when finished rows leave", DECODING, "decoder, episodes, alive = decoder.fork(rows),",
        "decoder, episodes, alive = decoder.fork(np.arange(len(rows))),", ("language_model",)),
    Bug("prefill sees the future", SLOTS, "visible = keys[:, None] <= at.columns[:, :, None]",
        "visible = keys[:, None] <= at.columns[:, -1:, None].expand(-1, at.columns.shape[1], -1)",
        ("language_model",)),
    Bug("a window shows one token too many", MASKS, "> queries[:, :, None] - limit.width)",
        ">= queries[:, :, None] - limit.width)", ("families", "sequences")),
    Bug("a chunk is taken for a window", MASKS, 'if limit.layer_type == "chunked_attention":', "if False:",
        ("families",)),
    Bug("what rounds alike in bfloat16 counts as right", CHECK, "with lm.in_float32() as exact:",
        "with contextlib.nullcontext(lm) as exact:", ("self_check",)),
    Bug("parts that a Llama has not are overlooked", CHECK, "check_parts(self.lm.body)", "pass", ("self_check",)),
    Bug("a model that sees later tokens is let in", CHECK,
        "if not self._close(self._truth(cut), self.truth[: max(count - 1, 1)]):",
        "if False:", ("self_check",)),
    Bug("hooks on modules that are not called go unheard", LLAMA, 'return any(hooks) or "forward" in vars(module)',
        "return False", ("self_check",)),
    Bug("missing end token is rewarded", TEXT, "result.total - self.missing_eos_penalty",
        "result.total + self.missing_eos_penalty", ("text_env",)),
    Bug("reward gets the ids without the end token", TEXT, "[r.tolist() for r in responses]}",
        "[r.tolist() for r in bodies]}", ("text_env", "step_equals_fused")),
    Bug("reward gets re-tokenised ids", TEXT, "[r.tolist() for r in responses]}",
        '[self.lm.tokenizer(c)["input_ids"] for c in completions]}', ("text_env",)),
    Bug("end of an episode reported as truncation", CORE, "float(rewards[0]), done, cut, info",
        "float(rewards[0]), False, done, info", ("text_env",)),
    Bug("slots share one random stream", CORE, "self.key[slots] = keys", "self.key[:] = keys[0]", ("envs",)),
    Bug("drawing in one slot advances all", CORE, "self.counter[slots] += np.uint64(1)",
        "self.counter += np.uint64(1)", ("envs",)),
    Bug("KL sum carried into the slot's next episode", WRITING, "self.kl_sum[slot] = 0.0",
        "self.kl_sum[slot] += 0.0", ("text_env", "step_equals_fused")),
    # -- several turns -------------------------------------------------------------------------------------
    Bug("loss on the game's tokens, step way", CAUSAL, "written_by = np.full(len(tokens), ENVIRONMENT)",
        "written_by = np.full(len(tokens), POLICY)", ("text_game",)),
    Bug("loss and KL on the game's tokens", SEQUENCES, "np.flatnonzero(self.written_by == POLICY)",
        "np.flatnonzero(self.written_by >= POLICY)", ("text_game", "exact_turns")),
    Bug("KL on the game's tokens", GAME, "            self._append(slot, ids)\n",
        "            self._append(slot, ids)\n            self.kl_sum[slot] += len(ids) * kl[slot]\n", ("text_game",)),
    Bug("a turn's reward one token late", GAME, "self.charge(sequences, ends, np",
        "self.charge(sequences, np.minimum(ends + 1, lengths.sum() - 1), np", ("text_game", "exact_turns")),
    Bug("a turn's reward at the end of the episode", GAME,
        "self.charge(sequences, ends, np.concatenate([each.rewards for each in played]))",
        "self.charge(sequences, np.cumsum(sequences.num_actions) - 1, [sum(each.rewards) for each in played])",
        ("text_game",)),
    Bug("value after a cut-off from before the game's answer", COLLECT, "    lengths = sequences.lengths\n    column",
        "    lengths = sequences.last + 1\n    column", ("turns",)),
    Bug("no value after a turn", COLLECT, "next_values = maths.shift_values(values, last_values, mask, ends) * mask",
        "next_values = maths.shift_values(values, last_values, mask, ends) * mask * (np.diff(sequences.padded("
        "episodes.turn), axis=1, append=0) == 0)", ("turns",)),
    Bug("mask of the policy's tokens shifted by one", GAME, "self.written_by[slots, self.length[slots] - 1] = POLICY",
        "self.written_by[slots, self.length[slots] - 2] = POLICY", ("text_game",)),
    Bug("another turn begins without room", GAME, "after + self.max_new_tokens > self.max_length",
        "after > self.max_length", ("text_game",)),
    Bug("a discount by turn counts within the turn", MATHS, "ends[:, :-1] = turn[:, 1:] > turn[:, :-1]",
        "ends[:, :-1] = turn[:, 1:] >= turn[:, :-1]", ("turns",)),
    # -- collecting ----------------------------------------------------------------------------------------
    Bug("groups ABAB instead of AABB, fused way", COLLECT, "np.repeat(env.draw_prompts(n_episodes // group_size),",
        "np.tile(env.draw_prompts(n_episodes // group_size),", ("pitfalls",)),
    Bug("groups ABAB instead of AABB, step way", COLLECT,
        "starts = [start for start in starts for _ in range(group_size)]", "starts = starts * group_size",
        ("pitfalls",)),
    Bug("no bootstrap on truncation", COLLECT, 'next_values = next_values + stack("bootstrap")', "pass",
        ("pitfalls",)),
    Bug("bootstrap from the next episode's observation", COLLECT,
        "final = _final_observations(infos, cut, following) if same_step else following", "final = following",
        ("pitfalls",)),
    Bug("bootstrap past a termination", COLLECT, "cut = truncated & ~terminated & alive",
        "cut = (truncated | terminated) & alive", ("pitfalls",)),
    Bug("value of the next episode after a termination", MATHS,
        "last_values[:, None]], axis=1)\n        return following * ~terminated",
        "last_values[:, None]], axis=1)\n        return following", ("maths",)),
    Bug("environment is not told who acts", BASE,
        "bind_policy(self.envs, self.policy.log_prob, self.policy.slot_log_prob)", "pass", ("pitfalls",)),
    # -- the equations -------------------------------------------------------------------------------------
    Bug("mean over padding too", MATHS, "return (x * mask).sum() / mask.sum().clamp(min=1)", "return x.mean()",
        ("maths",)),
    Bug("advantages normalised by an unmasked deviation", MATHS, "(((exact - mean) ** 2 * mask).sum()",
        "(((exact - mean) ** 2).sum()", ("maths",)),
    Bug("padding counts in the loss", MATHS, "weights = mask.float()", "weights = torch.ones_like(mask).float()",
        ("maths",)),
    Bug("what a policy says of padding is heard", GRADIENT, "torch.where(micro.mask, x, 0.0) for x in new",
        "x for x in new", ("pitfalls",)),
    Bug("GAE flows across the end of an episode", MATHS, " * ~(done & mask)", "", ("maths",)),
    Bug("lambda ignored in GAE", MATHS, "np.where(mask, gamma * gae_lambda, 1.0)", "np.where(mask, gamma, 1.0)",
        ("maths",)),
    Bug("discount ignored in GAE's deltas", MATHS, "rewards + gamma * next_values", "rewards + next_values",
        ("maths",)),
    Bug("no clip in PPO", MATHS, "clipped = (ratio.clamp(1 - clip_low, 1 + clip_high)", "clipped = (ratio", ("maths",)),
    Bug("upper clip ignored", MATHS, "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(1 - clip_low, 1 + clip_low)", ("maths",)),
    Bug("max in place of min in PPO's clip", MATHS, "surrogate <= clipped", "surrogate >= clipped", ("maths",)),
    Bug("optimistic value clip", MATHS, "return torch.maximum(loss,", "return torch.minimum(loss,", ("maths",)),
    Bug("one deviation for all groups", MATHS, "groups.std(1, keepdim=True)", "groups.std()", ("maths",)),
    Bug("equal rewards divided by their rounding", MATHS, "centred.masked_fill(flat[:, None], 0.0)", "centred",
        ("equal_at_any_scale",)),
    Bug("a tolerance that takes signal for noise", MATHS, "_ROUNDING = 4", "_ROUNDING = 40", ("equal_at_any_scale",)),
    Bug("leave-one-out factor upside down", MATHS, "(number / others)", "(others / number)",
        ("maths",)),
    Bug("k2 without its half in the loss", MATHS, "return 0.5 * log_ratio**2", "return log_ratio**2", ("maths",)),
    Bug("Dr. GRPO divides by the batch's own length", MATHS, "(max_length or mask.shape[1])", "mask.shape[1]",
        ("maths",)),
    # -- agents --------------------------------------------------------------------------------------------
    Bug("KL counted twice with kl_in='loss'", GRPO,
        'if self.kl_in == "loss":\n            return self.scores', "if False:\n            return self.scores",
        ("pitfalls",)),
    Bug("REINFORCE's baseline knows its own return", REINFORCE, "(returns.sum(0) - returns) / others",
        "returns.sum(0) / mask.sum(0)", ("agents",)),
    Bug("PPO's entropy bonus as a penalty", PPO, "- self.ent_coef * new.entropy",
        "+ self.ent_coef * new.entropy", ("pitfalls",)),
    Bug("GRPO's entropy bonus as a penalty", GRPO, "losses - self._entropy_bonus(",
        "losses + self._entropy_bonus(", ("pitfalls",)),
    Bug("weight of the value loss ignored", PPO, "self.vf_coef * value_loss", "value_loss", ("agents",)),
    Bug("old log-probabilities renewed in every minibatch", BASE, "fresh = False\n", "pass\n", ("agents",)),
    Bug("last minibatch dropped", "agents/rollouts/rollout.py", "range(0, len(self), batch_size)",
        "range(0, len(self) - batch_size, batch_size)", ("agents",)),
    Bug("weights of the wrong rows in micro-batches", GRADIENT, "(losses * weights[at])",
        "(losses * weights[: len(losses)])", ("pitfalls",)),
    Bug("gradients not clipped", BASE, "self.policy, self.max_grad_norm)",
        "self.policy, math.inf)", ("pitfalls",)),
    Bug("gradients not clipped, small networks", "agents/algorithms/flat_adam.py", "if norm > max_norm:", "if False:",
        ("flat_adam", "agents")),
    Bug("gradients not forgotten, small networks", "agents/algorithms/flat_adam.py", "self.vector.grad.zero_()", "pass",
        ("flat_adam", "agents")),
    Bug("acting with the weights of another copy", "agents/policies/mlp.py",
        "self._arrays is None or self._arrays[0] != address", "self._arrays is None", ("policies",)),
    Bug("learning-rate schedule ignored", BASE, "self._learning_rates(self._progress_remaining)",
        "self._learning_rates(1.0)", ("pitfalls",)),
    Bug("the policy does not wait for its critic", PPO_FILE, "                    parameter.grad = None",
        "                    pass", ("presets",)),
    Bug("values shorten the policy's step", GRADIENT, "    if not critic:", "    if True:", ("presets",)),
    Bug("the critic learns its own guesses", PPO_FILE, "self.estimate_advantages(rollout, self.critic_gae_lambda)",
        "advantages", ("presets",)),
    Bug("lr_scheduler_type ignored", BASE, "rates[group[\"critic\"]] * multiplier", "rates[group[\"critic\"]]",
        ("presets",)),
    Bug("warm-up counts rollouts", BASE, "        self.n_gradient_steps += 1\n", "", ("presets",)),
    Bug("a model of one's own gets the embedded world's rate", "agents/presets.py",
        "    if embedded.is_embedded_tokenizer(tokenizer):", "    if True:", ("presets",)),
    Bug("columns of a skipped prompt stay", TEXT, "[column[k] for k in keep]", "column", ("presets",)),
    Bug("reference trained along with the policy", LM, "twin.model = copy.deepcopy(self.model)",
        "twin.model = self.model", ("language_model", "policies")),
    Bug("dropout on", LM, "self.model = model.eval()", "self.model = model.train()", ("pitfalls",)),
    Bug("cached keys of old weights", CAUSAL, "            self._decoder.clear()", "            pass",
        ("policies", "agents")),
    Bug("entropy without its second term", LM, "log_z - ((logits - log_z.unsqueeze(-1)).exp() * logits).sum(-1)",
        "log_z", ("teacher_forcing",)),
    # -- one pass over what was written, and prompts held once ------------------------------------------------
    Bug("responses in one row see each other", TEACHER,
        "mask = mask & (self._sequence[:, :, None] == self._sequence[:, None, :])",
        "mask = mask.expand(len(self._sequence), -1, -1)", ("teacher_forcing",)),
    Bug("positions start anew after a shared prompt", TEACHER, "positions.ravel()[filled] = ranges(skipped, lengths)",
        "positions.ravel()[filled] = ranges(0 * skipped, lengths)", ("teacher_forcing",)),
    Bug("padding of shorter prompts is seen", TEACHER, "seen = before < self._known[:, None]",
        "seen = before < self._known[:, None] + 99", ("teacher_forcing",)),
    Bug("the first token is predicted by the first prompt", TEACHER, "ends[owners[rows[after_prompt]]]",
        "ends[0 * owners[rows[after_prompt]]]", ("teacher_forcing",)),
    Bug("what the environment wrote counts as the policy's", SEQUENCES, "np.flatnonzero(self.written_by == POLICY)",
        "np.flatnonzero(self.written_by != PROMPT)", ("sequences",)),
    Bug("a response ends with the policy's first turn", SEQUENCES,
        "self.policy[np.cumsum(self.num_actions)[some] - 1] - self.starts[some]",
        "self.policy[(np.cumsum(self.num_actions) - self.num_actions)[some]] - self.starts[some]", ("sequences",)),
    Bug("steps of the wrong rows", SEQUENCES, "blank.index_copy(0, row * width + step, values)",
        "blank.index_copy(0, row.flip(0) * width + step, values)", ("sequences", "policies")),
    Bug("another generator's log-probabilities are believed", COLLECT, " or not sequences.native:", ":",
        ("generators",)),
    Bug("what is out of bounds counts by the bound", IMPORTANCE,
        "torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)", "ratio.clamp(low, high)", ("generators",)),
    Bug("a token's ratio where that of the response was asked for", IMPORTANCE,
        'exact.sum(1, keepdim=True) if level == "sequence" else exact', "exact", ("generators",)),
    Bug("importance weights upside down", BASE, "log_ratio = batch.log_probs - batch.sampling_log_probs",
        "log_ratio = batch.sampling_log_probs - batch.log_probs", ("generators",)),
    Bug("lies are corrected by", IMPORTANCE, "return share > bound +", "return share > 9 + bound +", ("generators",)),
    Bug("an outside generator keeps its first weights", CAUSAL,
        "        self._engine_waits = True\n        if self._decoder", "        if self._decoder", ("generators",)),
    Bug("sampling is cut and reported as if it were not", DECODING, "native=limit is None", "native=True",
        ("generators",)),
    Bug("ends are sampled too early", KNOBS, "if written < sampling.min_new_tokens:", "if False:", ("generators",)),
    Bug("a generator's own temperature comes on top of the model's", KNOBS, "sampling.temperature / model_temperature",
        "sampling.temperature", ("generators",)),
    Bug("tokens after an end are learned from", ANSWERS, "if len(ends) and ends[0] + 1 < len(tokens):", "if False:",
        ("generators",)),
    Bug("gradient of the entropy with the wrong sign", TEACHER, "grad = probability.mul_(pull).neg_()",
        "grad = probability.mul_(2 * slope - pull).neg_()", ("teacher_forcing",)),
    Bug("gradient of the last chunk only", TEACHER, "total.addmm_(left, right)", "total.copy_(left @ right)",
        ("teacher_forcing",)),
    Bug("prompt and own tokens weighted the wrong way round", SHARED, "torch.sigmoid(mass - own_mass)",
        "torch.sigmoid(own_mass - mass)", ("language_model",)),
    Bug("rows read each other's prompts", SHARED, "return apart[self._owner, self._rank]",
        "return apart[self._owner.flip(0), self._rank.flip(0)]", ("language_model",)),
    Bug("a prompt's gradient counts unused places too", SHARED, "prompts.gather(grad, blank=True)",
        "prompts.gather(grad)", ("teacher_forcing",)),
    Bug("the gradient of own tokens knows nothing of the prompt", SHARED, "common = torch.logaddexp(mass, own_mass)",
        "common = own_mass", ("teacher_forcing",)),
    Bug("responses in one row see each other beside a prompt", TEACHER,
        'inputs["mask"] = (own, self._positions, self._positions)', "pass", ("teacher_forcing",)),
    Bug("samples up to and not above the number drawn", NEXT, "torch.minimum(at, below), right=True)",
        "0 * torch.minimum(at, below), right=False)", ("teacher_forcing",)),
    Bug("RLOO's ratio is of single tokens", METHOD + "rloo.py",
        "log_ratio.sum(1, keepdim=True).exp().expand_as(log_ratio)", "log_ratio.exp()", ("variants",)),
    Bug("REINFORCE++ credits every token with the whole return", METHOD + "reinforce_plus_plus.py",
        "masked_whiten(to_go, rollout.mask)", "masked_whiten(to_go[:, :1].expand_as(to_go), rollout.mask)",
        ("variants",)),
    Bug("Dr. GRPO divides by the standard deviation", METHOD + "dr_grpo.py", '{"scale": "none"', '{"scale": "std"',
        ("variants",)),
    Bug("GiGPO forgets the weight of the turns", METHOD + "gigpo.py", "self.turn_weight * relative", "relative",
        ("turns",)),
    Bug("pass@k counts an answer once and not G times", METHOD + "pass_at_k.py", "self.group_size * maths.best_of_k",
        "maths.best_of_k", ("estimators",)),
    Bug("VC-PPO's critic has the advantages' lambda", METHOD + "vc_ppo.py", '"critic_gae_lambda": 1.0',
        '"critic_gae_lambda": 0.95', ("estimators",)),
    Bug("GSPO without the length", METHOD + "gspo.py",
        "keepdim=True) / batch.lengths.clamp(min=1)[:, None]", "keepdim=True)", ("variants",)),
    Bug("gradient through CISPO's weight", METHOD + "cispo.py", "ratio.detach().clamp(", "ratio.clamp(",
        ("variants",)),
    Bug("DAPO keeps the groups that teach nothing", METHOD + "dapo.py", "differs = ~self.equal_groups(rollout)",
        "differs = torch.ones_like(self.equal_groups(rollout))", ("variants",)),
    Bug("SAPO's temperatures the other way round", METHOD + "sapo.py", "torch.where(batch.advantages > 0,",
        "torch.where(batch.advantages < 0,", ("variants",)),
    Bug("DPPO stops what comes back", METHOD + "dppo.py", "(batch.advantages > 0) & (p > q)",
        "(batch.advantages > 0) & (p < q)", ("ratios",)),
    Bug("DPPO's KL the other way round", METHOD + "dppo.py", "moved = q * (before - now) + (1 - q) * others",
        "moved = p * (now - before) - (1 - p) * others", ("ratios",)),
    Bug("an outside generator is corrected for twice", METHOD + "dppo.py",
        "return self.loss_weights(batch)  # the ratio", "return super().step_weights(batch)  # the ratio", ("ratios",)),
    Bug("GMPO clips what comes back too", METHOD + "gmpo.py",
        "torch.where(batch.advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))",
        "log_ratio.clamp(-low, high)", ("variants",)),
    Bug("LUSPO without the length", METHOD + "luspo.py", '{"average": "sum"}', '{"average": "sequence"}',
        ("variants",)),
    Bug("VESPO's ratio of a response is a mean", METHOD + "vespo.py", "log_ratio.sum(1, keepdim=True).clamp",
        "log_ratio.mean(1, keepdim=True).clamp", ("variants",)),
    Bug("gradient through VESPO's weight", METHOD + "vespo.py", "batch.advantages >= 0, ratio.detach()",
        "batch.advantages >= 0, ratio", ("variants",)),
    Bug("GPG scales down for groups that are all alike", METHOD + "gpg.py",
        "super().advantages(rollout) / max(share, _LEAST)", "super().advantages(rollout) * max(share, _LEAST)",
        ("ratios",)),
    Bug("Clip-Cov keeps the few and leaves out the rest", METHOD + "clip_cov.py", "ratio) * ~batch.chosen",
        "ratio) * batch.chosen", ("ratios",)),
    Bug("KL-Cov holds the tokens of lowest covariance", METHOD + "kl_cov.py",
        'maths.largest(covariance.masked_fill(~batch.mask, -float("inf"))',
        'maths.largest(-covariance.masked_fill(~batch.mask, float("inf"))', ("ratios",)),
    Bug("covariance with a mean over padding too", MATHS, "(advantages - masked_mean(advantages, mask))",
        "(advantages - advantages.mean())", ("ratios",)),
    Bug("two-sided clipping on the wrong side", MATHS, "ratio.clamp(max=delta)) * advantages",
        "ratio.clamp(min=1 / delta)) * advantages", ("variants",)),
    Bug("the off-policy mask drops good answers", MATHS, "return (advantages >= 0) | (mean_over_steps",
        "return (advantages <= 0) | (mean_over_steps", ("variants",)),
    Bug("off-policy distance with the wrong sign", GRPO, "self.behaviour(batch) - new.log_probs.detach()",
        "new.log_probs.detach() - self.behaviour(batch)", ("variants",)),
    Bug("answers that were cut off teach", GRPO, "rollout.mask & whole[:, None]", "rollout.mask & rollout.mask",
        ("ratios",)),
    Bug("complete answers count as cut off, fused way", COLLECT, "np.isin(episodes.stop_reason, CUT_OFF)[:, None]",
        "~np.isin(episodes.stop_reason, CUT_OFF)[:, None]", ("ratios",)),
    Bug("complete answers count as cut off, step way", COLLECT, "reasons[i] in CUT_OFF for i",
        "reasons[i] not in CUT_OFF for i", ("ratios",)),
    Bug("the least uncertain tokens are kept", MATHS, "place = (1 - share) * (count - 1)",
        "place = share * (count - 1)", ("ratios",)),
    Bug("tokens that are left out have a bonus", GRPO, "self._bonus * entropy * self.counted(batch)",
        "self._bonus * entropy", ("ratios",)),
    Bug("the entropy bonus rises above its target", OPTIONS, "if self.entropy <= self.target else -self.step",
        "if self.entropy > self.target else -self.step", ("ratios",)),
    Bug("the coefficient of the entropy bonus not restored", GRPO, 'self.ent_coef = state["ent_coef"]', "pass",
        ("ratios",)),
    Bug("a mean over prompts counts prompts by their tokens", MATHS,
        "steps.clamp(min=1)[place][:, None] / len(names)", "steps.sum()", ("ratios",)),
    Bug("ScaleRL keeps the prompts whose answers are all alike", METHOD + "scale_rl.py", "if 0 < share < 1:",
        "if False:", ("ratios",)),
    Bug("ScaleRL's mean is over tokens", METHOD + "scale_rl.py", '"average": "prompt"', '"average": "token"',
        ("ratios",)),
    Bug("the worst of n is imitated", METHOD + "raft.py", "scores.view(-1, self.group_size).argmax(1",
        "scores.view(-1, self.group_size).argmin(1", ("ratios",)),
    Bug("answers that are too bad are imitated", METHOD + "raft.py", "chosen &= raw >= self.min_score", "pass",
        ("ratios",)),
    Bug("the best of n among the tokens of all", METHOD + "raft.py",
        "return rollout[rows] if 0 < len(rows) < len(rollout) else rollout", "return rollout", ("ratios",)),
    Bug("student and teacher the other way round", DIVERGENCE, "        return _kl(log_t, log_s)\n",
        "        return _kl(log_s, log_t)\n", ("distillation",)),
    Bug("weights of the mixture swapped", DIVERGENCE, "log_s + torch.log1p(-share), log_t + share.log()",
        "log_s + share.log(), log_t + torch.log1p(-share)", ("distillation",)),
    Bug("the teacher is read one token off", DIVERGENCE, "target = others(rows)", "target = others(rows).roll(1, 0)",
        ("distillation",)),
    Bug("demonstrations teach their prompts too", DISTILLATION + "demonstrations.py", "written = labels != IGNORE",
        "written = labels != IGNORE - 1", ("distillation",)),
    Bug("demonstrations are never drawn", METHOD + "gkd.py", "self.rng.random() < self.lmbda",
        "self.rng.random() >= -self.lmbda", ("distillation",)),
    Bug("one's own right answer is shown", DISTILLATION + "hints.py", "if j != place]", "]", ("self_distillation",)),
    Bug("self-distillation the other way round", METHOD + "sdpo.py", "sequences, 1.0, shown)", "sequences, 0.0, shown)",
        ("self_distillation",)),
    Bug("who was shown nothing is pulled too", METHOD + "sdpo.py", "new.divergence * batch.chosen", "new.divergence",
        ("self_distillation",)),
    Bug("the teacher is shown nothing", DISTILLATION + "hints.py", "shown.append(prompt if fits else own)",
        "shown.append(own)", ("self_distillation",)),
    Bug("shares of policy and reference swapped", WRITING,
        "mul_(1.0 - alpha).add_(weights[name].detach().to(parameter), alpha=alpha)",
        "mul_(alpha).add_(weights[name].detach().to(parameter), alpha=1.0 - alpha)", ("moving_reference",)),
    Bug("a moved reference is moved for everybody", WRITING, "self.moved = self.lm.clone()", "self.moved = self.lm",
        ("moving_reference",)),
    Bug("the step way charges the first reference", WRITING, "SlotDecoder(self.reference.for_decoding(),",
        "SlotDecoder(self.lm.for_decoding(),", ("moving_reference",)),
    Bug("the fused way charges the first reference", WRITING, "return self.reference.log_probs(sequences) if",
        "return self.lm.log_probs(sequences) if", ("moving_reference",)),
    Bug("the step way goes on with what the old reference has read", WRITING,
        "        self._reference = None  # which has read", "        # which has read", ("moving_reference",)),
    Bug("the reference moves after every step", GRPO, "self.n_gradient_steps % self.ref_model_sync_steps == 0",
        "self.n_gradient_steps % 1 == 0", ("moving_reference",)),
    Bug("callbacks forget what they knew", "agents/loop.py",
        "        give_states(callback, self.callback_states)\n", "", ("checkpoint",)),
    Bug("what waits for callbacks is not saved again", CHECKPOINT,
        "agent.callback_states or states_of(agent.callback)", "states_of(agent.callback)", ("checkpoint",)),
    Bug("a run stopped before its first rollout begins its episode again", "agents/runs/run_directory.py",
        "agent.num_timesteps == 0 and agent.last_obs is None", "agent.num_timesteps == 0", ("cli",)),
    Bug("a failed attempt logs too", "reward_models/function.py", "call = replace(batch, notes=Notes())",
        "call = batch", ("chat_rewards",)),
    Bug("of two rewards with one column the earlier one's", "reward_models/notes.py", "values[-count:]",
        "values[:count]", ("chat_rewards",)),
    Bug("a moved reference is left out of checkpoints", CHECKPOINT,
        "_optimizer_tensors(agent.optimizer) | _moved_reference(agent)", "_optimizer_tensors(agent.optimizer)",
        ("moving_reference",)),
    Bug("a moved reference is not restored", CHECKPOINT, "        _restore_reference(agent, tensors)\n", "",
        ("moving_reference",)),
    Bug("an f-divergence is charged by f and not by its slope", MATHS, "return math.log(2.0) + F.logsigmoid(log_ratio)",
        "return math.log(2.0) + log_ratio - F.softplus(log_ratio) - torch.exp(-log_ratio)", ("ratios",)),
    Bug("alpha-divergence the other way round", MATHS, "((alpha - 1.0) * log_ratio).clamp(",
        "((1.0 - alpha) * log_ratio).clamp(", ("ratios",)),
    Bug("an f-divergence of the last token", GRPO, "rollout.ref_log_probs).double() * rollout.mask",
        "rollout.ref_log_probs).double() * rollout.done", ("ratios",)),
    Bug("a KL alone is divided by its own deviation", GRPO, "relative = torch.where(equal.repeat",
        "torch.where(equal.repeat", ("variants",)),
    Bug("adaptive KL steers the wrong way", KL_CONTROL, "kl / self.target - 1.0", "1.0 - kl / self.target",
        ("kl_control",)),
    Bug("MaxRL divides by the mean of the batch", METHOD + "maxrl.py", "mean = scores.mean(1, keepdim=True)",
        "mean = scores.mean()", ("estimators",)),
    Bug("pass@k counts the sets of one score too many", MATHS, "math.comb(m, k - 2)", "math.comb(m + 1, k - 2)",
        ("estimators",)),
    Bug("pass@k credits wrong answers in the order they came", MATHS, ".scatter(1, order, gains)", " + gains",
        ("estimators",)),
    Bug("steps are credited with the rewards before them", METHOD + "process_grpo.py",
        "relative.flip(1).cumsum(1).flip(1)", "relative.cumsum(1)", ("process_rewards",)),
    Bug("steps are compared with those of their own answer", METHOD + "process_grpo.py",
        "shape = -1, self.group_size * rollout.mask.shape[1]", "shape = -1, rollout.mask.shape[1]",
        ("process_rewards",)),
    Bug("a process reward sees the last step alone", "textrl_env/games/steps.py", '"".join(self.written)',
        "self.written[-1]", ("process_rewards",)),
    Bug("answers to two turns that ended early are mixed up", "agents/evaluation/worlds.py",
        "endings + node * int(can_end.sum())", "node * int(can_end.sum())", ("measuring",)),
    Bug("OPO's baseline of the batch and not the group", METHOD + "opo.py", "lengths.sum(1, keepdim=True).clamp(min=1)",
        "lengths.sum().clamp(min=1)", ("estimators",)),
    Bug("OTB's energy one token late", METHOD + "otb.py", ".cumsum(1) * mask", ".cumsum(1).roll(1, 1) * mask",
        ("estimators",)),
    Bug("OTB forgets the probabilities of the other actions", METHOD + "otb.py",
        "1 - 2 * rollout.log_probs.exp() + squares", "1 - 2 * rollout.log_probs.exp()", ("estimators",)),
    Bug("probabilities are added and not their squares", TEACHER, "logits.softmax(-1).square_().sum(-1)",
        "logits.softmax(-1).sum(-1)", ("estimators",)),
    Bug("GDPO ignores the weights of its rewards", METHOD + "gdpo.py", "total += weight * maths", "total += maths",
        ("estimators",)),
    Bug("GDPO is not whitened over the batch", METHOD + "gdpo.py", 'len(total), "std"', 'len(total), "none"',
        ("estimators",)),
    Bug("scores of the batch divided by the deviation of their group", MATHS, "centred / (own.std() + 1e-4)",
        "centred / (deviation + 1e-4)", ("estimators",)),
    Bug("the KL beside divided scores raises them", GRPO, "charged = -self._charged(", "charged = self._charged(",
        ("estimators",)),
    Bug("VAPO's lambda is that of the longest answer", METHOD + "vapo.py", "rollout.lengths.double().clamp(min=1)",
        "rollout.lengths.max().double().expand(len(rollout))", ("estimators",)),
    Bug("VAPO unlearns right answers", METHOD + "vapo.py", "imitation = -new.log_probs", "imitation = new.log_probs",
        ("estimators",)),
    Bug("VAPO imitates wrong answers too", METHOD + "vapo.py", "(scores > self.right_above) & batch.mask", "batch.mask",
        ("estimators",)),
    Bug("VAPO's critic learns with the advantages' lambda", METHOD + "vapo.py",
        "return self.estimate_advantages(rollout, self.critic_gae_lambda) + rollout.values",
        "return advantages + rollout.values", ("estimators",)),
    Bug("clip-higher ignored in PPO", PPO_FILE, "batch.advantages, clip, self.clip_range_high)",
        "batch.advantages, clip)", ("estimators",)),
    Bug("PPO-ptx's coefficient ignored", PTX, "return self.ptx_coef * loss", "return loss", ("ptx",)),
    # -- resume --------------------------------------------------------------------------------------------
    Bug("optimiser's state not restored", CHECKPOINT, "    _restore_optimizer(agent.optimizer, tensors)\n", "",
        ("checkpoint",)),
    Bug("order of minibatches not restored", CHECKPOINT, '    agent.rng.bit_generator.state = document["rng"]\n', "",
        ("checkpoint",)),
    Bug("sampling not restored", CHECKPOINT, '    agent.policy.generator.set_state(tensors["rng.policy"])\n', "",
        ("checkpoint",)),
    Bug("environment's state not restored", CHECKPOINT,
        'env_state.restore(agent.envs, document["env_state"], arrays)', "pass", ("checkpoint",)),
    Bug("changed kl_coef not restored", CHECKPOINT, '            agent.kl_coef = saved', "        pass",
        ("checkpoint",)),
    # -- preferences, supervised, rewards ------------------------------------------------------------------
    Bug("Bradley-Terry with the wrong sign", "reward_models/bradley_terry.py", "loss = -F.logsigmoid(gap)",
        "loss = -F.logsigmoid(-gap)", ("bradley_terry",)),
    Bug("DPO prefers what was rejected", DPO, "return _smoothed_logistic(beta * gap, label_smoothing)",
        "return _smoothed_logistic(-beta * gap, label_smoothing)", ("dpo",)),
    Bug("IPO's target twice as far", DPO, "(gap - 1 / (2 * beta)) ** 2", "(gap - 1 / beta) ** 2", ("dpo",)),
    Bug("gradient through KTO's baseline", DPO, ".clamp(min=0).detach()", ".clamp(min=0)", ("dpo",)),
    Bug("SFT holds logits against their own token", SFT, "logits[:, :-1][keep]", "logits[:, 1:][keep]", ("sft",)),
    Bug("SFT learns the prompt too", "reward_models/data/encoding.py",
        "[False] * len(before) + [True] * len(after)", "[True] * (len(before) + len(after))", ("sft",)),
    Bug("weights of rewards ignored", "reward_models/contract.py", "total += weight * np", "total += np", ("rewards",)),
    Bug("reward read at the padding", "reward_models/classifier.py",
        "hidden[torch.arange(len(rows), device=device), lengths - 1]", "hidden[:, -1]", ("rewards",)),
    # -- the exact solver ----------------------------------------------------------------------------------
    Bug("soft Bellman equation without beta", EXACT, "values = beta * log_z", "values = log_z", ("exact",)),
    Bug("best of n - 1", EXACT, "gain = n * np.log(cumulative)", "gain = (n - 1) * np.log(cumulative)", ("exact",)),
    Bug("exact gradient without the chance of getting there", EXACT, "weight = visits[t][:, None] * probs",
        "weight = probs", ("exact",)),
    # -- LoRA -------------------------------------------------------------------------------------------------
    Bug("adapters over a copy of the weights", LORA, "nn.Parameter(p.detach(), requires_grad=False)",
        "nn.Parameter(p.detach().clone(), requires_grad=False)", ("lora",)),
    Bug("adapters in the tree of the reference too", LORA, "inject_adapter_in_model(config, share(model))",
        "inject_adapter_in_model(config, model)", ("lora",)),
    Bug("adapter left out of the merged folder", LORA, "plain.state_dict() | merged", "plain.state_dict()", ("lora",)),
    Bug("decoding without the adapter under autocast", LORA, ".get_parameter(name).copy_(weight)",
        ".get_parameter(name)", ("lora",)),
    Bug("checkpoint without the adapter", CHECKPOINT, "if name in learned}",
        'if name in learned and "lora_" not in name}', ("lora",)),
    Bug("adapter twice in a policy loaded without an env", CHECKPOINT, "agent.policy.lm.take_out_of_base()",
        "agent.policy.lm.base_digest()", ("lora",)),
    Bug("adapter put onto another model", CHECKPOINT, "not in (None, agent.policy.lm.base_digest())",
        "in ()", ("lora",)),
    Bug("the gradient of a rotation turns on instead of back", LLAMA,
        "_rotated(grad, cos, -sin)", "_rotated(grad, cos, sin)", ("llama",)),
    Bug("the gradient of a norm keeps what lies along its input", LLAMA,
        "inner = unit.mul_(along)", "inner = unit.mul_(0 * along)", ("llama",)),
    Bug("the gradient of a norm's weight is that of one token", LLAMA,
        "product.sum(0).to(weight.dtype)", "product[0].to(weight.dtype)", ("llama",)),
    Bug("keys are not rotated", LLAMA,
        "query, key = rotation(query), rotation(key)", "query, key = rotation(query), key", ("llama",)),
    Bug("a given mask is ignored beside the causal one", LLAMA,
        "causal = self.mask is None", "causal = self.mask is None or width == key.shape[2]", ("llama",)),
    Bug("the norms of queries and keys are left out", LLAMA,
        "if self.query_norm is not None:", "if self.query_norm is None and False:", ("llama",)),
]
# fmt: on


class Verdict(NamedTuple):
    """What became of a bug.

    Attributes:
        outcome: "killed" by a test, "survived", or "broken" (no test could run).
        test: Which test, ``test_<name>.py::<test>``; of "broken" what was printed.
        seconds: How long it took.
        case: The same with its parameters, as pytest takes it.
    """

    outcome: str
    test: str
    seconds: float
    case: str = ""


def copy_project(folder: Path) -> Path:
    """The tracked files, as they are in the working tree, in ``folder``."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def preload(names: Iterable[str]) -> None:
    """Import what tests import of other people's, once: each run of tests is a fork of this process."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def run_in(folder: Path, function: Callable[..., int], *arguments: Any) -> tuple[int | None, str]:
    """Call a function in a process of its own that imports the packages of a copy, installed or not.

    Returns:
        What it returned, None if it had no end, and all that was printed.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = multiprocessing.get_context("fork").Process(
            target=_inside, args=(folder, log.fileno(), function, *arguments)
        )
        process.start()
        process.join(TIMEOUT)
        ended = process.exitcode
        if ended is None:
            process.kill()
            process.join()
        log.seek(0)
        return ended, log.read()


def _inside(folder: Path, log: int, function: Callable[..., int], *arguments: Any) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", COLUMNS="250")
    sys.path[:] = [str(folder), *(path for path in sys.path if not _is_ours(path))]
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what libraries do at exit is for the process that imported them


def _is_ours(path: str) -> bool:
    return Path(path).resolve() in (ROOT, ROOT / "benchmarks")


def check_imports(folder: Path) -> None:
    """Raise a RuntimeError unless the copy's packages are the ones that tests import."""
    code, printed = run_in(folder, _print_packages)
    found = printed.split()
    if code or len(found) != len(PACKAGES) or not all(Path(f).is_relative_to(folder) for f in found):
        raise RuntimeError(f"expected {PACKAGES} to be imported from {folder}, got {printed}")


def _print_packages() -> int:
    for name in PACKAGES:
        print(importlib.import_module(name).__file__)
    return 0


def run_tests(folder: Path, tests: tuple[str, ...], learn: bool = False) -> Verdict:
    """Run test files, or cases of them, up to the first failure.

    Args:
        folder: The copy.
        tests: Names of files, or ``test_<name>.py::<test>``.
        learn: Import what they have imported of other people's, for the runs that follow.
    """
    files = [f"tests/{name}" if "::" in name else f"tests/test_{name}.py" for name in tests]
    started = time.perf_counter()
    code, printed = run_in(folder, _pytest, ["-x", "-q", "-p", "no:cacheprovider", "-rfE", *files])
    seconds = time.perf_counter() - started
    if learn:
        preload(re.findall(r"^imported (\S+)$", printed, re.MULTILINE))
    if code is None:
        return Verdict("broken", f"no end after {TIMEOUT} s", seconds)
    failed = re.search(r"^FAILED tests/((\S+?)(?:\[.*?\])?)(?: - .*)?$", printed, re.MULTILINE)
    if code == 0:
        return Verdict("survived", "", seconds)
    if code == 1 and failed:
        return Verdict("killed", failed[2], seconds, failed[1])
    return Verdict(
        "broken", re.sub(r"^imported .*\n?", "", printed, flags=re.MULTILINE).strip()[-500:], seconds
    )


def _pytest(arguments: list[str]) -> int:
    import pytest

    code = int(pytest.main(arguments))
    for name, module in list(sys.modules.items()):
        if "site-packages" in (getattr(module, "__file__", None) or ""):
            print(f"imported {name}")
    return code


def check_bug(bug: Bug) -> None:
    """Raise a ValueError for a bug that cannot be planted unambiguously."""
    count = (ROOT / bug.file).read_text(encoding="utf-8").count(bug.old)
    if count != 1:
        raise ValueError(f"{bug.name!r}: {bug.file} holds {bug.old!r} {count} times, expected once")


def try_bug(bug: Bug, folder: Path, likely: str = "") -> Verdict:
    """Plant a bug in a copy, run its tests, and put the file back.

    Args:
        bug: Which.
        folder: The copy.
        likely: A test that is run before all others, ``test_<name>.py::<test>``.
    """
    path = folder / bug.file
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(bug.old, bug.new), encoding="utf-8")
    try:
        first = run_tests(folder, (likely,)) if likely else None
        return first if first and first.outcome == "killed" else run_tests(folder, bug.tests)
    finally:
        path.write_text(right, encoding="utf-8")


def try_all(
    bugs: list[Bug], minutes: float | None, found: dict[str, dict[str, str]]
) -> Iterator[tuple[Bug, Verdict]]:
    """Every bug on its own, those that the same tests should notice one after another.

    Args:
        bugs: Which.
        minutes: None is planted later than this; None is no limit.
        found: What is stored; the test that noticed a bug of a name before is run first.

    Raises:
        RuntimeError: A test that notices a bug fails without it too, or the tests do not import the copy.
    """
    started, sound = time.monotonic(), set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_project(Path(temporary).resolve())
        # Checked by what the source holds: a time and a size would not tell a bug that was planted fast.
        compileall.compile_dir(folder, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        preload(LIBRARIES)
        check_imports(folder)
        for _, same in groupby(sorted(bugs, key=lambda bug: bug.tests), key=lambda bug: bug.tests):
            group = list(same)
            likely = {bug.name: found.get(bug.name, {}).get("test", "") for bug in group}
            asked = tuple(sorted(set(filter(None, likely.values()))))
            # Only the tests that notice have to pass without a bug; all of their files would take much longer.
            if len(asked) > 1 and run_tests(folder, asked, learn=True).outcome == "survived":
                sound.update(asked)
            for bug in group:
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    return
                verdict = try_bug(bug, folder, likely[bug.name])
                print(f"{verdict.outcome:8} {verdict.seconds:4.0f} s  {bug.name}: {verdict.test}", flush=True)
                if verdict.outcome == "killed" and not sound & {verdict.test, verdict.case}:
                    without = run_tests(folder, (verdict.case,))
                    if without.outcome != "survived":
                        raise RuntimeError(f"{verdict.case} fails without a bug too: {without.test}")
                    sound.add(verdict.case)
                yield bug, verdict


def fingerprint(bug: Bug) -> str:
    """What was planted, in short: another change of the same name is another bug."""
    return hashlib.sha256(repr((bug.file, bug.old, bug.new)).encode()).hexdigest()[:12]


def stored() -> dict[str, dict[str, str]]:
    """What has been found, by the names of the bugs; an entry that was never planted says which test to ask first."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else {}


def keep(bug: Bug, verdict: Verdict) -> None:
    """Add what was found of a bug, and forget those that are no longer in the list."""
    found = stored() | {
        bug.name: {"planted": fingerprint(bug), "outcome": verdict.outcome, "test": verdict.test}
    }
    lines = [f"{json.dumps(b.name)}: {json.dumps(found[b.name])}" for b in BUGS if b.name in found]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def document(bugs: list[Bug], found: dict[str, dict[str, str]]) -> str:
    """The page, in Markdown."""
    planted = [bug for bug in bugs if found.get(bug.name, {}).get("planted") == fingerprint(bug)]
    killed = sum(found[bug.name]["outcome"] == "killed" for bug in planted)
    lines = [
        "# Bugs planted, bugs noticed",
        "",
        "Written by `python benchmarks/mutations.py`, which plants one bug at a time in a copy of the project and",
        "runs the test files that should notice, up to the first failure.",
        "",
        f"{killed} of {len(planted)} bugs that have been planted are noticed; the list has {len(bugs)}. What has no",
        "test beside it has been added or changed since, and waits for the next pass.",
        "",
        "| bug | file | noticed by |",
        "|---|---|---|",
    ]
    for bug in bugs:
        row = found[bug.name] if bug in planted else {"outcome": ""}
        by = {"killed": f"`{row.get('test')}`", "": ""}.get(row["outcome"], f"**{row['outcome']}**")
        lines.append(f"| {bug.name} | `{bug.file}` | {by} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="bugs whose name holds this")
    parser.add_argument("--tests", nargs="+", metavar="NAME", help="bugs that these test files should notice")
    parser.add_argument("--again", action="store_true", help="also those that have been planted before")
    parser.add_argument("--minutes", type=float, help="plant none later than this")
    parser.add_argument("--list", action="store_true", help="list the bugs and run nothing")
    args = parser.parse_args()
    found = stored()
    bugs = [bug for bug in BUGS if not args.only or any(name in bug.name for name in args.only)]
    bugs = [bug for bug in bugs if not args.tests or set(args.tests) & set(bug.tests)]
    if not bugs:
        parser.error("no bug is called that; --list lists them")
    for bug in bugs:
        check_bug(bug)
    if args.list:
        print("\n".join(f"{bug.file:32} {bug.name}" for bug in bugs))
        return
    if not args.again:
        bugs = [bug for bug in bugs if found.get(bug.name, {}).get("planted") != fingerprint(bug)]
    verdicts = []
    for bug, verdict in try_all(bugs, args.minutes, found):
        verdicts.append(verdict)
        keep(bug, verdict)
    DOCUMENT.write_text(document(BUGS, stored()), encoding="utf-8")
    left = sum(verdict.outcome != "killed" for verdict in verdicts)
    print(f"{len(verdicts) - left} of {len(verdicts)} noticed, {len(bugs) - len(verdicts)} not planted")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
