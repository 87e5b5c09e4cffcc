"""Numbers that are not finite are named and never kept; an update that does not fit into memory is done in parts."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file

from agents import GRPO, PPO, REINFORCE, Agent
from agents.algorithms.schedules import schedule_value
from agents.callbacks.scale_guards import ScaleGuards
from agents.cli import main
from agents.commands import envs as envs_verb
from agents.report.findings import examine
from agents.report.reading import read_run
from tests.tiny import id_sum, make_env, make_lm
from textrl_env.lm.out_of_memory import is_out_of_memory
from textrl_env.lm.self_check import find_ways


class Stumbling(Agent):
    """REINFORCE without a baseline whose loss is infinite in some updates, counted from 1."""

    def __init__(self, policy, env, bad=(), **kwargs):
        super().__init__(policy, env, **kwargs)
        self.bad, self.count = set(bad), 0

    def update(self, batch, fresh=False):
        self.count += 1
        return super().update(batch, fresh)

    def loss(self, batch, new):
        scale = torch.ones_like(batch.advantages)
        if self.count in self.bad:
            scale[2, 0] = math.inf
        return -new.log_probs * (1 + batch.advantages) * scale, {}


def stumbling(bad, **kwargs):
    return Stumbling("MlpPolicy", "ToyBandit-v0", bad=bad, n_episodes=4, n_envs=4, seed=0, **kwargs)


def weights(agent):
    return {name: w.clone() for name, w in agent.policy.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_an_update_that_is_not_finite_is_skipped_counted_and_leaves_no_trace():
    agent = stumbling(bad=[2])
    agent.learn(4)
    before = weights(agent)
    with pytest.warns(UserWarning, match=r"an update was skipped.*at 8 timesteps in gradient step 2"):
        agent.learn(4, reset_num_timesteps=False)
    assert same(before, weights(agent)) and agent.latest["guard/skipped_updates"] == 1
    assert not any(math.isnan(v) for n, v in agent.latest.items() if n.startswith("train/"))
    agent.learn(4, reset_num_timesteps=False)
    assert not same(before, weights(agent)) and agent.latest["guard/skipped_updates"] == 1


def test_so_many_skipped_in_a_row_stop_with_tensor_step_and_episode():
    agent = stumbling(bad=[2, 4, 5, 6], max_skipped_updates=3)
    with pytest.warns(UserWarning), pytest.raises(FloatingPointError) as error:
        agent.learn(100)
    said = str(error.value)
    assert "gradient of 3 updates in a row was not finite, at 24 timesteps in gradient step 3" in said
    assert "the loss of row 2 of 4 (1 steps, rewards that add up to" in said
    assert "the gradient of trunk.0.weight and" in said and "lower learning_rate" in said
    assert agent.n_gradient_steps == 2


def test_rewards_too_large_for_float32_are_named_as_such():
    agent = stumbling(bad=())
    agent.learn(4)
    collect = agent.collect

    def huge():
        rollout = collect()
        rollout.rewards = rollout.rewards + 1e39
        return rollout

    agent.collect = huge
    with pytest.warns(UserWarning, match=r"rewards of row 0 of 4 .*the first of 4"):
        agent.learn(4, reset_num_timesteps=False)


def test_the_count_of_skipped_updates_is_in_the_checkpoint(tmp_path):
    agent = stumbling(bad=[1])
    with pytest.warns(UserWarning):
        agent.learn(8).save(tmp_path)
    assert json.loads((tmp_path / "agent.json").read_text())["skipped_updates"] == 1
    loaded = Stumbling.load(tmp_path, env="ToyBandit-v0")
    assert loaded.learn(4, reset_num_timesteps=False).latest["guard/skipped_updates"] == 2


@pytest.mark.parametrize("world", ["toy", "text"])
def test_weights_that_are_not_finite_are_named_before_anything_is_sampled_from_them(world):
    agent = PPO("auto", "ToyBandit-v0" if world == "toy" else make_env(), n_steps=8, n_episodes=4, seed=0)
    name, weight = list(agent.policy.named_parameters())[1]
    with torch.no_grad():
        weight.view(-1)[3] = math.nan
    with pytest.raises(
        FloatingPointError, match=rf"1 of the .* weights in {name} are NaN or infinite before learning"
    ):
        agent.learn(8)


def test_weights_that_an_update_has_made_infinite_are_named():
    agent = stumbling(bad=())
    step = agent.optimizer.step

    def overflow():
        step()
        if agent.n_gradient_steps == 2:
            next(agent.policy.parameters()).data.fill_(math.inf)

    agent.optimizer.step = overflow
    with pytest.raises(
        FloatingPointError, match=r"weights in trunk.0.weight are .* after the update at 8 timesteps"
    ):
        agent.learn(100)


@pytest.mark.parametrize("rate", [1e15, 1e30])
def test_a_language_model_ruined_by_its_learning_rate_is_named_and_is_no_index_error(rate):
    settings = {"n_episodes": 8, "group_size": 4, "batch_size": None, "learning_rate": rate, "seed": 0}
    agent = GRPO("auto", make_env(lm=make_lm(), reward=id_sum), **settings)
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=r"NaN or infinite|not finite"):
        warnings.simplefilter("ignore")
        agent.learn(400)


@pytest.mark.parametrize(
    "rate", [math.inf, math.nan, "linear:inf", lambda progress: 1 / 0.0 if progress < 1 else 1e-3]
)
def test_a_learning_rate_that_is_not_finite_is_refused(rate):
    with pytest.raises(
        (ValueError, ZeroDivisionError),
        match=r"learning_rate must be a number >= 0, got .*(inf|nan)|division",
    ):
        PPO("MlpPolicy", "ToyBandit-v0", learning_rate=rate, n_steps=4, seed=0).learn(8)
    with pytest.raises(
        ValueError, match=r"gives inf at a remaining progress of 0\.5; expected a finite number"
    ):
        schedule_value(lambda progress: math.inf, 0.5)


def reward_of(scale):
    return lambda prompts, completions: [scale * (1 + len(c.split())) for c in completions]


@pytest.mark.parametrize("cls", [PPO, GRPO, REINFORCE])
@pytest.mark.parametrize(("rate", "is_told"), [(10.0, True), (3e-4, False)])
def test_a_learning_rate_that_throws_the_weights_about_is_told_once(cls, rate, is_told):
    guard = ScaleGuards(emit=lambda line: None)
    cls("MlpPolicy", "ToyBandit-v0", n_envs=4, learning_rate=rate, seed=0).learn(400, guard)
    told = [line for _, line in guard.messages if line.startswith("guard step_size at ")]
    assert len(told) == is_told and len(guard.messages) == is_told
    assert not is_told or f"Lower --learning-rate (now {rate})" in told[0]


@pytest.mark.parametrize(("scale", "is_told"), [(1e8, True), (1e-8, False), (100.0, False)])
def test_rewards_out_of_scale_are_told_with_what_float32_loses(scale, is_told):
    guard = ScaleGuards(emit=lambda line: None)
    GRPO("auto", make_env(lm=make_lm(), reward=reward_of(scale)), n_episodes=8, seed=0).learn(20, guard)
    assert len(guard.messages) == is_told
    assert not is_told or "apart in float32" in guard.messages[0][1]
    assert not is_told or re.search(
        r"rewards of up to [3-7]e\+08 in one step.* (32|64) apart", guard.messages[0][1]
    )


def test_settings_out_of_scale_are_said_on_the_way_and_in_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "huge.py").write_text(
        "def reward(prompts, completions):\n    return [1e8 * len(c) for c in completions]\n"
    )
    text = ["--reward", "huge.py:reward", "--n-episodes", "4", "--batch-size", "4", "--n-epochs", "1"]
    runs = {
        "fast": [
            "--env",
            "ToyBandit-v0",
            "--n-steps",
            "8",
            "--total-timesteps",
            "80",
            "--learning-rate",
            "10",
        ],
        "huge": [*text, "--max-new-tokens", "4", "--total-timesteps", "32"],
    }
    for name, args in runs.items():
        assert main(["train", "--no-progress", *args, "--run-dir", name]) == 0
    told = capsys.readouterr().err
    assert "guard step_size at 8 steps" in told and "guard reward_scale at " in told
    found = {name: [finding.name for finding in examine(read_run(tmp_path / name))] for name in runs}
    assert "steps out of scale" in found["fast"] and "rewards out of scale" not in found["fast"]
    assert "rewards out of scale" in found["huge"]


# -- memory -------------------------------------------------------------------------------------------------


def starve(policy, most, message="CUDA out of memory"):
    """Let a policy evaluate at most so many rows at once, as a full GPU would."""
    evaluate, sizes = policy.evaluate, []

    def limited(rollout):
        sizes.append(len(rollout))
        if len(rollout) > most:
            raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)
        return evaluate(rollout)

    policy.evaluate = limited
    return sizes


def learner(**kwargs):
    env = make_env(lm=make_lm(), reward=id_sum, kl_coef=0.1)
    return GRPO("auto", env, n_episodes=8, group_size=4, learning_rate=1e-2, seed=0, **kwargs)


@pytest.mark.parametrize(
    "message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_an_update_that_does_not_fit_is_done_in_halves_with_the_same_gradient(message):
    easy, tight = learner(micro_batch_size=2), learner()
    easy.learn(1)
    sizes = starve(tight.policy, 2, message)
    with pytest.warns(
        UserWarning, match=r"an update of \d rows at once ran out of memory.*the same gradient"
    ):
        tight.learn(1)
    assert tight.micro_batch_size == 2 and max(sizes) == 8
    ones, others = weights(easy), weights(tight)
    for name in ones:
        assert torch.allclose(ones[name], others[name], atol=1e-6), name
    sizes.clear()
    tight.learn(1, reset_num_timesteps=False)
    assert max(sizes) == 2, "what was learned about memory is kept"


#: Runs one update whose memory is really limited, and prints what came of it.
CAPPED = """
import resource
import sys
import warnings
from pathlib import Path

import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import GRPO
from tests.tiny import id_sum, make_env, make_lm

ROOM = int(sys.argv[1]) * 2**20
HARD = resource.getrlimit(resource.RLIMIT_AS)[1]


class Cap(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_end(self):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, HARD))

    def _on_training_end(self):
        resource.setrlimit(resource.RLIMIT_AS, (HARD, HARD))


def learner(**kwargs):
    env = make_env(lm=make_lm(), reward=id_sum, max_new_tokens=16)
    return GRPO("auto", env, n_episodes=2048, group_size=4, learning_rate=1e-2, seed=0, batch_size=None, **kwargs)


tight = learner()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    tight.learn(1, Cap())
easy = learner(micro_batch_size=tight.micro_batch_size)
easy.learn(1)
for (name, one), other in zip(tight.policy.state_dict().items(), easy.policy.state_dict().values()):
    assert torch.allclose(one, other, atol=1e-6), name
print(tight.micro_batch_size, sum("ran out of memory" in str(each.message) for each in told))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's account of memory")
def test_a_limit_of_the_operating_system_halves_the_rows_until_they_fit_with_the_same_gradient():
    command = [sys.executable, "-c", CAPPED, "16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows, times = map(int, ended.stdout.split())
    assert times >= 1 and rows == 2048 // 2**times


def test_what_was_learned_about_memory_is_in_the_checkpoint(tmp_path):
    agent = learner()
    starve(agent.policy, 4)
    with pytest.warns(UserWarning):
        agent.learn(1).save(tmp_path)
    assert GRPO.load(tmp_path).micro_batch_size == 4


def test_where_a_single_episode_does_not_fit_the_remedies_are_named():
    agent = learner()
    starve(agent.policy, 0)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match="out of memory") as error:
        agent.learn(1)
    assert "a single episode of" in error.value.__notes__[0] and "lora_rank" in error.value.__notes__[0]


def test_other_errors_of_an_update_are_no_lack_of_memory():
    agent = learner()
    before = agent.micro_batch_size
    starve(agent.policy, 4, "shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        agent.learn(1)
    assert agent.micro_batch_size == before
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("out of memory"))


def test_a_lack_of_memory_in_a_self_check_gives_no_fast_way_up(monkeypatch):
    lm = make_lm("llama")
    whole = find_ways(lm, lambda name: True)
    calls = iter(range(1000))
    forward = type(lm.model).forward

    def once(self, *args, **kwargs):
        if next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(lm.model), "forward", once)
    with pytest.raises(torch.OutOfMemoryError):
        find_ways(lm, lambda name: True)
    assert find_ways(lm, lambda name: True) == whole


# -- interrupts ---------------------------------------------------------------------------------------------


@pytest.fixture
def default_sigterm():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "aborted")]
)
def test_a_signal_ends_any_verb_in_order(number, code, said, monkeypatch, capsys, default_sigterm):
    closed = []

    def table():
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(5)
        finally:
            closed.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(envs_verb, "table", table)
    try:
        assert main(["envs"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert closed and f"textrl: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_says_what_is_waited_for_and_the_second_what_is_lost(
    number, tmp_path, monkeypatch, capfd, default_sigterm
):
    from agents.runs import run_directory as runs

    def twice(self):
        if self.model.num_timesteps > 30:
            os.kill(os.getpid(), number)
            if self.model.num_timesteps > 40:
                os.kill(os.getpid(), number)
        return True

    monkeypatch.setattr(runs.SaveRunCallback, "_on_step", twice)
    args = ["--env", "ToyBandit-v0", "--n-steps", "32", "--save-every", "8", "--total-timesteps", "640"]
    assert main(["train", "--no-progress", *args, "--run-dir", str(tmp_path / "run")]) == 128 + number
    said = capfd.readouterr().err
    assert "waiting for the update under way, then a checkpoint is written; once more leaves at once" in said
    assert f"textrl: {'terminated' if number == signal.SIGTERM else 'aborted'}" in said


ROWS = [{"prompt": p, "chosen": "a b", "rejected": c} for p, c in zip("abcdefgh", "cdefghia", strict=True)]
DEMOS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("verb", ["sft", "reward", "dpo"])
def test_a_signal_saves_what_learns_from_files_and_the_line_it_prints_goes_on_to_the_same_weights(
    verb, number, model_folder, tmp_path, monkeypatch, capfd
):
    from agents.offline.callbacks import StopOnSignals

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (DEMOS if verb == "sft" else ROWS))
    )
    line = [verb, "--model", str(model_folder), "--data", "data.jsonl", "--batch-size", "2", "--epochs", "2"]
    line += ["--learning-rate", "0.01", "--report-to", "none"]
    assert main([*line, "--output", "whole"]) == 0
    assert "whole: a checkpoint every 15 minutes; a kill loses" in capfd.readouterr().out

    def asked(self):
        if self.num_timesteps == 3:
            os.kill(os.getpid(), number)
        return on_step(self)

    on_step = StopOnSignals._on_step
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignals, "_on_step", asked)
        assert main([*line, "--output", "stopped"]) == 128 + number
    told = capfd.readouterr()
    assert "waiting for the step under way, then a checkpoint is written" in told.err
    assert [path.name for path in (tmp_path / "stopped").glob("*/")] == ["checkpoint-3"]
    _, _, command = told.out.strip().splitlines()[-1].partition("go on with: ")
    words = shlex.split(command)
    assert words[0] == "textrl" and main(words[1:]) == 0
    assert "resuming at step 3 of 8" in capfd.readouterr().out
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert same(one, other)


def test_the_second_signal_says_how_many_steps_of_a_trainer_are_lost(
    model_folder, tmp_path, monkeypatch, capfd
):
    from agents.offline.callbacks import StopOnSignals

    def twice(self):
        if self.num_timesteps == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr(StopOnSignals, "_on_step", twice)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMOS))
    line = ["sft", "--model", str(model_folder), "--data", "data.jsonl", "--batch-size", "1"]
    assert main([*line, "--save-every", "2", "--report-to", "none", "--output", "out"]) == 130
    assert "leaving at once; 1 steps since out/checkpoint-4 are lost" in capfd.readouterr().err


def test_where_there_is_no_checkpoint_yet_going_on_says_that_it_begins(
    model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMOS))
    line = [
        "sft",
        "--model",
        str(model_folder),
        "--data",
        "data.jsonl",
        "--report-to",
        "none",
        "--output",
        "out",
    ]
    assert main([*line, "--resume"]) == 0
    assert "there was no checkpoint yet: starting at the first step" in capsys.readouterr().out
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    assert main([*line, "--overwrite"]) == 2
    assert "(learning from data.jsonl)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_comparisons_that_were_judged_before_a_signal_are_kept_and_told(
    number, model_folder, tmp_path, monkeypatch, capsys, default_sigterm
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "prompts.txt").write_text("a\nb c\nd\ne\n")
    (tmp_path / "asked").touch()
    (tmp_path / "stopping.py").write_text(
        "import os\nCALLS = []\n"
        "def judge(prompts, completions):\n"
        "    CALLS.append(1)\n"
        f"    if len(CALLS) == 3 and os.path.exists('asked'): os.kill(os.getpid(), {int(number)})\n"
        "    return [float(sum(map(ord, c))) for c in completions]\n"
    )
    line = ["preferences", "--model", str(model_folder), "--prompts", "prompts.txt", "--batch-size", "1"]
    line += ["--judge", "stopping.py:judge", "--max-new-tokens", "4", "--answers-per-prompt", "4"]
    try:
        assert main([*line, "--output", "pairs.jsonl"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    kept = [json.loads(row) for row in (tmp_path / "pairs.part.jsonl").read_text().splitlines()]
    assert f"the {len(kept)} comparisons until then are in pairs.part.jsonl" in capsys.readouterr().err
    assert {row["prompt"] for row in kept} == {"a", "b c"}
    assert main([*line, "--output", "pairs.jsonl"]) == 2
    assert "pairs.part.jsonl holds the comparisons of a run that ended early" in capsys.readouterr().err
    (tmp_path / "asked").unlink()
    assert main([*line, "--output", "pairs.jsonl", "--overwrite"]) == 0
    assert [path.name for path in tmp_path.glob("pairs*")] == ["pairs.jsonl"]
