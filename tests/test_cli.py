"""Claims about the command line: flags, errors, run directories, and resuming bitwise."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from agents import GRPO, PPO, DrGRPO
from agents.callbacks.progress import ProgressBar
from agents.cli import main
from agents.commands import VERBS, flags
from agents.runs import run_directory as runs
from agents.runs.logs import read_progress
from agents.runs.registry import find_agent
from tests.tiny import make_model, make_tokenizer
from textrl_env import embedded

GRID = ["--env", "GridWorld-v0", "--agent", "grpo", "--learning-rate", "linear:1e-3"]
CARTPOLE = ["--env", "CartPole-v1", "--n-envs", "3", "--n-steps", "40", "--clip-range", "linear:0.3"]

OWN_AGENT = '''
from agents import PPO


class Steady(PPO):
    """PPO that takes its time.

    Args:
        patience: How much of it.
        bold: Whether it is bold.
    """

    def __init__(self, policy, env, patience=3, bold: bool = False, **kwargs):
        self.patience = patience
        super().__init__(policy, env, **kwargs)


class Inherits(PPO):
    pass
'''
REWARD = """
def count_a(prompts, completions):
    return [float(text.split().count("a")) for text in completions]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory of its own, importable from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def text(here):
    """Flags of a tiny text world in files."""
    make_model("llama").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    (here / "tiny_reward.py").write_text(REWARD)
    (here / "prompts.txt").write_text("a\nb c\nd e f g\n")
    world = ["--model", "model", "--reward", "tiny_reward.py:count_a", "--prompts", "prompts.txt"]
    return [*world, "--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4", "--n-epochs", "2"]


def run(*args):
    return main([str(arg) for arg in args])


def train(*args):
    return run("train", "--no-progress", *args)


def error_of(capsys, *args):
    """The one line that a wrong command line prints."""
    capsys.readouterr()
    assert run(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# -- help and errors ----------------------------------------------------------------------------------------


def test_help_and_verbs_load_without_torch():
    code = (
        "import sys; from agents.cli import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'transformers', 'stable_baselines3'} & set(sys.modules), 'too much is loaded'"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(verb in shown.stdout for verb in VERBS)


@pytest.mark.parametrize("agent", ["ppo", "grpo", "reinforce"])
def test_help_lists_every_hyper_parameter_with_help_and_default(agent, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    assert run("train", "--agent", agent, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for flag in flags.hyper_parameters(find_agent(agent)):
        assert flag.help, f"{flag.name} has no help"
        assert flag.option in shown


def test_hyper_parameters_are_those_of_the_class_then_of_its_bases():
    names = [flag.name for flag in flags.hyper_parameters(PPO)]
    assert names[:2] == ["learning_rate", "n_steps"] and "micro_batch_size" in names
    assert not {"env", "policy", "seed", "kwargs", "self"} & set(names)
    assert len(names) == len(set(names))


def test_what_a_class_fixes_for_its_base_is_no_flag():
    assert "average" not in [flag.name for flag in flags.hyper_parameters(DrGRPO)]
    assert "average" in [flag.name for flag in flags.hyper_parameters(GRPO)]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "linear:3e-4", "linear:3e-4"),
        ("learning_rate", "3e-4", 3e-4),
        ("n_steps", "1e3", 1000),
        ("batch_size", "none", None),
        ("target_kl", "0.1", 0.1),
        ("critic", "shared", "shared"),
    ],
)
def test_values_have_the_types_of_the_signature(name, text, value):
    flag = next(flag for flag in flags.hyper_parameters(PPO) if flag.name == name)
    parsed = flags.parse_value(flag, text)
    assert parsed == value and type(parsed) is type(value)


def test_none_is_a_word_where_none_is_not_allowed():
    scale = next(flag for flag in flags.hyper_parameters(GRPO) if flag.name == "scale")
    assert flags.parse_value(scale, "none") == "none"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "--agent", "gprpo"], "Did you mean 'grpo'"),
        (["train", "--learning-rte", "1"], "Did you mean '--learning-rate'"),
        (["train", "--n-steps", "many"], "--n-steps takes INT, got 'many'"),
        (["train", "--n-steps", "0.5"], "--n-steps takes INT, got '0.5'"),
        (["train", "--total-timesteps", "many"], "--total-timesteps"),
        (["train", "--env", "CartPol-v1"], "CartPole"),
        (["train", "--env", "GridWorld-v0", "--env-arg", "slipery=1"], "Did you mean 'slippery'"),
        (["train", "--env-arg", "slippery"], "key=value, got 'slippery'"),
        (["train", "--reward-weight", "1"], "1 --reward-weight for 0 --reward"),
        (["train", "--policy", "MlpPolic"], "Did you mean 'MlpPolicy'"),
        (["train", "--agent", "no_such_module:Agent"], "there is no module 'no_such_module'"),
        (["train", "--agent", "agents:Rollout"], "is not a subclass of agents.base.Agent"),
        (["train", "--agent", "agents.algorithms.ppo:PPOO"], "Did you mean 'PPO'"),
        (["train", "--resume", "nowhere"], "is not a run directory"),
        (["envs", "GridWord-v0"], "Did you mean 'GridWorld-v0'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest_right_thing(args, said, here, capsys):
    assert said in error_of(capsys, *args)
    assert not list(here.iterdir()), "a mistake leaves nothing behind"


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no command"):
        run("trian", "--debug")


def test_envs_lists_every_id_and_prints_the_page_of_one(capsys):
    from textrl_env import ENV_IDS

    assert run("envs") == 0
    shown = capsys.readouterr().out
    assert all(env_id in shown for env_id in ENV_IDS)
    assert run("envs", "GridWorld-v0") == 0
    shown = capsys.readouterr().out
    assert "## Action Space" in shown and "## Version History" in shown


# -- run directories ----------------------------------------------------------------------------------------


def test_a_run_directory_holds_what_it_should(text, here, capsys):
    assert train(*text, "--total-timesteps", 150, "--run-dir", "runs/one", "--seed", 3) == 0
    folder = here / "runs" / "one"
    config = json.loads((folder / "config.json").read_text())
    assert config["env_kwargs"]["model"] == str(here / "model"), "paths are absolute"
    assert config["agent_kwargs"] == {"n_episodes": 8, "batch_size": 4, "n_epochs": 2}
    assert config["seed"] == 3 and config["versions"]["torch"] and "--seed 3" in config["command"]
    assert list(folder.glob("events.out.tfevents.*"))
    assert read_progress(folder)["time/total_timesteps"][-1] >= 150
    assert len(list(folder.glob("checkpoint-*"))) == 2, "the last two are kept"
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "final")
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".zip")]
    shown = capsys.readouterr().out
    assert "tensorboard --logdir runs/one" in shown and "before" in shown


def test_rewards_have_weights_in_their_order(text, here):
    extra = ["--reward", "tiny_reward:count_a", "--reward-weight", "1", "--reward-weight", "0.5"]
    assert train(*text, *extra, "--total-timesteps", 20, "--run-dir", "two") == 0
    first, second = json.loads((here / "two" / "config.json").read_text())["env_kwargs"]["reward"]
    assert first == [f"{here}/tiny_reward.py:count_a", 1.0] and second == ["tiny_reward:count_a", 0.5]


def test_a_run_is_not_overwritten_unless_asked(here, capsys):
    assert train(*GRID, "--total-timesteps", 100, "--run-dir", "grid") == 0
    again = ["train", *GRID, "--total-timesteps", 100, "--run-dir", "grid"]
    assert "--resume grid, or start anew with --overwrite" in error_of(capsys, *again)
    (here / "grid" / "notes.txt").write_text("mine")
    assert run(*again, "--overwrite", "--no-progress") == 0
    assert (here / "grid" / "notes.txt").read_text() == "mine", "only what a run wrote is deleted"


def test_a_folder_that_is_no_run_is_never_overwritten(here, capsys):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").write_text("all of it")
    args = ["train", *GRID, "--run-dir", "thesis", "--overwrite"]
    assert "is not a run directory" in error_of(capsys, *args)


def test_an_agent_from_a_file_has_its_own_flags_and_resumes(here, capsys):
    (here / "steady_agent.py").write_text(OWN_AGENT)
    spec = ["--agent", "steady_agent.py:Steady", "--env", "ToyBandit-v0"]
    options = ["--patience", "5", "--bold", "--n-steps", "16", "--batch-size", "8"]
    assert train(*spec, *options, "--total-timesteps", 32, "--run-dir", "own") == 0
    config = json.loads((here / "own" / "config.json").read_text())
    assert config["agent_kwargs"] == {"patience": 5, "bold": True, "n_steps": 16, "batch_size": 8}
    allowed = ["--allow-module", "steady_agent.py"]
    assert train("--resume", "own", "--total-timesteps", 64, *allowed) == 0
    assert read_progress(here / "own")["time/total_timesteps"] == [16, 32, 48, 64]
    inherits = {flag.name for flag in flags.hyper_parameters(find_agent("steady_agent:Inherits"))}
    assert {"clip_range", "micro_batch_size"} <= inherits
    assert "Did you mean '--patience'" in error_of(capsys, "train", *spec, "--patiense", "3")


# -- stopping and resuming ----------------------------------------------------------------------------------


@pytest.fixture
def signal_at(monkeypatch):
    """Sends this process a signal at some timestep, as a user's Ctrl-C would."""
    pending: list[int] = []
    monkeypatch.setattr(runs.SaveRunCallback, "_on_step", lambda self: _send(self.model, pending))
    return pending.append


def _send(model, pending):
    if pending and model.num_timesteps >= pending[0]:
        pending.clear()
        os.kill(os.getpid(), signal.SIGINT)
    return True


def assert_same_runs(first, second):
    for file in ("agent.safetensors", "env.safetensors", "model.safetensors"):
        if (first / "final" / file).is_file():
            a, b = (load_file(folder / "final" / file) for folder in (first, second))
            assert a.keys() == b.keys()
            assert not [name for name in a if not np.array_equal(a[name], b[name])]
    rows, others = read_progress(first), read_progress(second)
    for name in rows:
        if not name.startswith(("time/r", "time/s", "time/u", "time/f", "time/to", "time/time", "memory")):
            assert np.array_equal(rows[name], others[name], equal_nan=True), name
    assert rows["time/total_timesteps"] == others["time/total_timesteps"]


@pytest.mark.parametrize("world", ["text", "cartpole", "grid"])
def test_an_interrupted_run_resumes_to_bitwise_the_same_end(world, text, here, signal_at, capsys):
    text = [*text, "--learning-rate", "linear:1e-3"]
    args, total = {"text": (text, 250), "cartpole": (CARTPOLE, 700), "grid": (GRID, 1500)}[world]
    args = [*args, "--total-timesteps", total]
    assert train(*args, "--run-dir", "whole") == 0
    signal_at(0.4 * total)
    assert train(*args, "--run-dir", "broken") == 130
    assert "go on with: textrl train --resume broken" in capsys.readouterr().out
    assert not (here / "broken" / "final").exists()
    assert train("--resume", "broken", "--allow-module", "tiny_reward.py") == 0
    assert_same_runs(here / "whole", here / "broken")


@pytest.mark.parametrize("world", ["text", "grid"])
def test_a_run_that_is_stopped_before_its_first_rollout_goes_on_to_the_same_end(
    world, text, here, monkeypatch
):
    args = [*{"text": text, "grid": GRID}[world], "--total-timesteps", 100]
    assert train(*args, "--run-dir", "whole") == 0

    def stop(self):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runs.SaveRunCallback, "_on_training_start", stop)
        assert train(*args, "--run-dir", "broken") == 143
    assert (here / "broken" / "checkpoint-0").is_dir()
    assert train("--resume", "broken", "--allow-module", "tiny_reward.py") == 0
    assert_same_runs(here / "whole", here / "broken")


def test_resuming_after_a_crash_drops_the_rows_after_the_checkpoint(here, monkeypatch):
    args = [*GRID, "--total-timesteps", 1500, "--save-every", 600]
    assert train(*args, "--run-dir", "whole") == 0

    def crash(self):
        if self.model.num_timesteps > 1200:
            raise RuntimeError("the power is gone")
        return True

    with monkeypatch.context() as patch:
        patch.setattr(runs.SaveRunCallback, "_on_step", crash)
        assert train(*args, "--run-dir", "broken") == 2
    assert train("--resume", "broken") == 0
    assert_same_runs(here / "whole", here / "broken")


def test_a_second_interrupt_aborts_at_once(here, monkeypatch):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return True

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    monkeypatch.setattr(runs.SaveRunCallback, "_on_step", twice)
    assert train(*GRID, "--total-timesteps", 200, "--run-dir", "grid") == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_refuses_other_settings_and_a_finished_run_says_so(here, capsys):
    assert train(*GRID, "--total-timesteps", 100, "--run-dir", "grid") == 0
    assert "--seed cannot be changed" in error_of(capsys, "train", "--resume", "grid", "--seed", "1")
    assert train("--resume", "grid") == 0
    assert "is complete at 100 timesteps" in capsys.readouterr().out


def test_progress_is_printed_line_by_line_where_there_is_no_terminal(capsys):
    GRPO("auto", "GridWorld-v0", seed=0).learn(600, progress_bar=True)
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) >= 2
    assert "GRPO" in shown and "steps/s" in shown and "return" in shown


def test_speed_counts_the_time_of_learning_and_is_not_told_before_the_first_update(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    shown = Console(file=io.StringIO(), width=200)
    bar = ProgressBar("PPO", 1000, "tokens", console=shown)
    moments = [(10, 400, False), (40, 400, True), (50, 800, False), (80, 800, True), (90, 1000, False)]
    for seconds, done, complete in moments:
        clock[0] = 100.0 + seconds
        bar.show(done, complete=complete)
    lines = shown.file.getvalue().splitlines()
    assert lines[0].split("tokens  ")[1] == "10 s, first update"
    assert [line.split("tokens  ")[1] for line in lines[1:]] == ["10 tokens/s", "10 tokens/s"]
    clock[0] += 30
    bar.show(1000)
    bar._print_line()
    assert "8 tokens/s" in shown.file.getvalue().splitlines()[-1]  # 1,000 in 120 seconds


def test_evaluate_compares_a_model_with_another_and_writes_the_figures(here, capsys):
    sft = str(embedded.path("sft"))
    assert main(["evaluate", "--model", sft, "--samples", "2", "--output", "figures.json"]) == 0
    figures = json.loads((here / "figures.json").read_text())
    low, high = figures["confidence_interval"]
    assert low < 0.5 < high and low < figures["win_rate"] < high  # a model is as good as itself
    assert figures["judge"] == "gold" and figures["model"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert main(["evaluate", "--model", str(embedded.path("base")), "--output", "base.json"]) == 0
    assert json.loads((here / "base.json").read_text())["confidence_interval"][1] < 0.4


def test_evaluate_judges_a_run_by_kind_and_by_the_best_of_several_answers(here, capsys):
    lines = embedded.path("prompts_heldout").read_text().splitlines(keepends=True)
    (here / "few.jsonl").write_text("".join(lines[::16]))
    train = ["train", "--run-dir", "run", "--no-progress", "--total-timesteps", "600", "--n-episodes", "32"]
    watch = [
        "--eval-every",
        "300",
        "--eval-prompts",
        "few.jsonl",
        "--eval-episodes",
        "16",
        "--kl-budget",
        "50",
    ]
    assert main([*train, *watch]) == 0
    config = runs.read_config(here / "run")
    assert config["eval_every"] == 300 and config["eval_prompts"] == str(here / "few.jsonl")
    assert config["eval_episodes"] == 16 and config["kl_budget"] == 50.0
    assert (here / "run" / "best" / "model.safetensors").is_file()
    capsys.readouterr()
    args = ["evaluate", "run", "--best-of", "1", "4", "--samples", "4", "--passes-from", "0.9"]
    # The run's own prompts are a file, so its reward and model are named: those of the embedded world.
    args += ["--reward", str(embedded.path("reward")), "--against", str(embedded.path("sft"))]
    gold = ["--gold", "textrl_env.embedded:gold_score", "--output", "figures.json"]
    assert main([*args, *gold]) == 0
    shown = capsys.readouterr().out
    assert "run/best by gold" in shown and "at equal lengths" in shown and "By kind" in shown
    figures = json.loads((here / "figures.json").read_text())
    assert set(figures["by_kind"]["model"]) == {json.loads(line)["kind"] for line in lines[::16]}
    one, four = figures["best_of"]
    assert (one["n"], four["n"]) == (1, 4) and one["score"] == pytest.approx(figures["model"]["score"])
    assert four["score"] > one["score"] and 0 < four["kl"] <= four["kl_bound"] == pytest.approx(
        0.636, abs=1e-3
    )
    assert 0 <= figures["pass_at_k"]["1"] <= figures["pass_at_k"]["4"] <= 1
    assert figures["against"]["perplexity"] == pytest.approx(2.53, abs=0.01)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["evaluate"], "give a RUN_DIR, or --model"),
        (["evaluate", "nowhere"], "nowhere is not a run directory"),
        (
            ["evaluate", "--model", "m", "--best-of", "8", "--samples", "4"],
            "--best-of 8 wants as many answers",
        ),
        (["evaluate", "--model", "m", "--best-of", "some"], "--best-of takes numbers of answers"),
        (["train", "--eval-every", "often"], "--eval-every takes timesteps (10000) or none, got 'often'"),
        (["train", "--eval-every", "none", "--eval-prompts", "x"], "--eval-prompts goes with --eval-every"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(args, said, here, capsys):
    assert main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def test_evaluate_on_prompts_of_ones_own_asks_for_a_reward(here, capsys):
    (here / "prompts.txt").write_text("a b\n")
    assert main(["evaluate", "--model", str(embedded.path("sft")), "--prompts", "prompts.txt"]) == 2
    assert "--reward" in capsys.readouterr().err


# -- loading, precision and memory --------------------------------------------------------------------------


def test_every_verb_that_loads_a_model_has_the_flags_of_loading(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    for verb in ("train", "sft", "reward", "dpo", "preferences", "evaluate"):
        assert run(verb, "--help") == 0
        shown = " ".join(capsys.readouterr().out.split())
        for flag in flags.loading_flags():
            assert flag.help and flag.option in shown, (verb, flag.name)
        assert "--chat-template-kwargs" in shown and "--allow-control-tokens" in shown, verb
        if verb in ("train", "sft", "reward", "dpo"):
            for flag in flags.trainer_flags():
                own = {"eval_every", "resume", "keep", "log_dir"} if verb == "train" else set()
                assert flag.option in shown or flag.name in own, (verb, flag.name)


def test_flags_of_loading_and_of_the_policy_reach_the_model_and_stay_when_resumed(text, here):
    given = [
        "--attn-implementation",
        "eager",
        "--dtype",
        "bfloat16",
        "--autocast",
        "false",
        "--lora-rank",
        "2",
    ]
    given += ["--lora-alpha", "3", "--lora-targets", "q_proj,v_proj", "--gradient-checkpointing"]
    given += ["--allow-control-tokens", "--chat-template-kwargs", '{"enable_thinking": false}']
    given += ["--report-to", "csv"]
    assert train(*text, *given, "--total-timesteps", 40, "--run-dir", "run") == 0
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["policy_kwargs"] == {
        "lora_rank": 2,
        "lora_alpha": 3.0,
        "lora_targets": ["q_proj", "v_proj"],
        "gradient_checkpointing": True,
    }
    assert (
        not list((here / "run").glob("events.out.tfevents.*")) and (here / "run" / "progress.csv").is_file()
    )
    resume = ["--resume", "run", "--allow-module", "tiny_reward.py", "--total-timesteps", 80]
    assert train(*resume, "--report-to", "tensorboard") == 0
    assert list((here / "run").glob("events.out.tfevents.*"))
    agent = runs.load_agent(config, here / "run" / "final", ["tiny_reward.py"])
    model = agent.policy.model
    assert model.config._attn_implementation == "eager" and model.dtype.itemsize == 2
    assert not agent.policy.autocast and agent.policy.lm.reference.model.dtype.itemsize == 2
    adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}
    assert all(layer.gradient_checkpointing for layer in agent.policy.lm.body.layers)
    encoder = agent.env.unwrapped.encoder
    assert encoder.template.allow_control_tokens and encoder.template.kwargs == {"enable_thinking": False}


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(text, here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    line = error_of(capsys, "train", *text, "--report-to", "csv,trackio", "--run-dir", "run")
    assert "pip install trackio" in line and not (here / "run").exists()
    line = error_of(capsys, "train", *text, "--report-to", "tensorbord", "--run-dir", "run")
    assert "Did you mean 'tensorboard'" in line
    line = error_of(capsys, "sft", "--data", "prompts.txt", "--report-to", "trackio")
    assert "pip install trackio" in line


def test_a_resumed_run_runs_the_code_of_a_model_only_if_that_is_said_again(text, here, capsys):
    assert train(*text, "--trust-remote-code", "--total-timesteps", 20, "--run-dir", "run") == 0
    resume = ["train", "--resume", "run", "--total-timesteps", 90, "--allow-module", "tiny_reward.py"]
    line = error_of(capsys, *resume)
    assert "names code of the module 'transformers_modules'" in line
    assert "--allow-module transformers_modules" in line
    assert run(*resume, "--no-progress", "--allow-module", "transformers_modules") == 0
