"""Checkpoints that were torn are named and never read; the one before is taken, and nothing whole is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

from agents import GRPO, PPO
from agents.cli import main
from agents.report.samples import read_tables
from agents.runs import checkpoint, logs, saving, whole
from agents.runs import run_directory as runs
from agents.runs.lock import HOLDER, RunInUseError, locked
from agents.runs.logs import open_logger, read_progress
from agents.runs.saving import parse_save_every
from agents.runs.whole import TornCheckpointError
from reward_models import RunningNormalizer, load_reward
from tests.tiny import count_a, id_sum, make_env, make_lm

TOY = ("agent.json", "agent.safetensors", "env.safetensors", "manifest.json")
TEXT = (
    *(*TOY, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    "tokenizer_config.json",
)
LORA = (*TEXT, "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
FILES = {"toy": TOY, "text": TEXT, "lora": LORA}
AGENTS = {
    "toy": lambda: PPO("MlpPolicy", "ToyBandit-v0", n_steps=8, seed=0),
    "text": lambda: GRPO("auto", make_env(reward=id_sum), n_episodes=4, group_size=4, seed=0),
    "lora": lambda: GRPO(
        "auto", make_env(reward=id_sum), n_episodes=4, group_size=4, policy_kwargs={"lora_rank": 2}, seed=0
    ),
}


def missing(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each kind a run with two checkpoints, made when it is first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            agent = AGENTS[kind]()
            for _ in range(2):
                agent.learn(8, reset_num_timesteps=False)
                agent.save(made[kind] / f"checkpoint-{agent.num_timesteps}")
        return made[kind]

    return get


def newest(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


@pytest.mark.parametrize("kind", FILES)
def test_a_checkpoint_has_these_files_and_no_others(kind, saved):
    folder = newest(saved(kind))
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {*FILES[kind]}


@pytest.mark.parametrize("tear", [missing, empty, cut, flipped], ids=lambda tear: tear.__name__)
@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(kind, file, tear, saved, tmp_path):
    folder = shutil.copytree(saved(kind), tmp_path / "run")
    torn = newest(folder)
    tear(torn / file)
    timesteps, path, (said,) = runs.newest_whole(folder)
    assert path != torn and path.name == f"checkpoint-{timesteps}"
    assert f"{torn} is torn: " in said and file in said
    with pytest.raises(TornCheckpointError) as error:
        GRPO.load(torn) if kind != "toy" else PPO.load(torn)
    assert str(error.value) == said


def test_where_every_checkpoint_is_torn_each_is_named(saved, tmp_path):
    folder = shutil.copytree(saved("toy"), tmp_path / "run")
    for path in folder.glob("checkpoint-*"):
        missing(path / "agent.safetensors")
    with pytest.raises(
        TornCheckpointError, match=r"no checkpoint of .* is whole: .*checkpoint-16 .*checkpoint-8 "
    ):
        runs.newest_whole(folder)


def test_an_old_text_checkpoint_without_its_model_is_not_the_untrained_model(tmp_path):
    from tests.test_saved_before import SAVED

    folder = shutil.copytree(SAVED / "text", tmp_path / "text")
    (folder / "config.json").unlink()
    with pytest.raises(TornCheckpointError, match=r"config\.json is missing"):
        PPO.load(folder, env=make_env(4))


@pytest.mark.parametrize("left", [".final.new", ".final.old"])
def test_a_replacement_that_was_killed_between_two_renames_leaves_one_that_is_read(left, saved, tmp_path):
    shutil.copytree(newest(saved("toy")), tmp_path / left)
    assert PPO.load(tmp_path / "final").num_timesteps == 16
    assert runs.newest_whole(tmp_path)[:2] == (16, tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_half_written_replacement_does_not_stand_for_anything(saved, tmp_path):
    half = shutil.copytree(newest(saved("toy")), tmp_path / ".final.new")
    (half / "manifest.json").unlink()
    shutil.copytree(min(saved("toy").iterdir(), key=lambda p: int(p.name[11:])), tmp_path / ".final.old")
    assert runs.newest_whole(tmp_path)[0] == 8


def test_saving_over_a_checkpoint_leaves_the_new_one_and_files_that_are_not_its_own(saved, tmp_path):
    agent = AGENTS["toy"]().learn(8)
    agent.save(tmp_path / "here")
    agent.learn(8).save(tmp_path / "here")
    (tmp_path / "here" / "notes.txt").write_text("mine")
    agent.learn(8, reset_num_timesteps=False).save(tmp_path / "here")
    assert (tmp_path / "here" / "notes.txt").read_text() == "mine"
    assert PPO.load(tmp_path / "here").num_timesteps == agent.num_timesteps
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_full_disk_names_the_folder_and_leaves_the_one_before(saved, tmp_path, monkeypatch):
    agent = AGENTS["toy"]().learn(8)
    agent.save(tmp_path / "final")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_arrays", full)
    with pytest.raises(OSError, match=r"cannot write .*/final; the one before is whole: .*No space left"):
        agent.learn(8, reset_num_timesteps=False).save(tmp_path / "final")
    assert PPO.load(tmp_path / "final").num_timesteps == 8
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(value, tmp_path):
    agent = AGENTS["toy"]().learn(8)
    agent.save(tmp_path / "final")
    with torch.no_grad():
        agent.policy.action_head.weight.view(-1)[0] = value
    with pytest.raises(ValueError, match=r"1 of the \d+ numbers in action_head\.weight are NaN or infinite"):
        agent.save(tmp_path / "final")
    assert torch.isfinite(PPO.load(tmp_path / "final").policy.action_head.weight).all()


def test_a_file_is_whole_or_the_old_one_stays(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    runs.write_json(file, {"a": 1})

    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(whole.os, "fsync", fails)
        with pytest.raises(OSError, match=r"cannot write .*config\.json: No space left"):
            runs.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == [
        "config.json"
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"is no JSON \(it has 0 bytes\).*line 1, column 1"),
        ('{"agent": ', "line 1, column 11"),
        ("[]", "holds a list, expected an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 1, "agent": "ppo"}', "does not say agent_kwargs, "),
    ],
    ids=["empty", "cut", "list", "deep", "short"],
)
def test_a_torn_configuration_is_named_and_may_be_overwritten(content, said, tmp_path, capsys):
    folder = tmp_path / "run"
    args = ["train", "--env", "ToyBandit-v0", "--n-steps", "8", "--total-timesteps", "8", "--no-progress"]
    assert main([*args, "--run-dir", str(folder)]) == 0
    (folder / "config.json").write_text(content)
    capsys.readouterr()
    assert main(["train", "--resume", str(folder)]) == 2
    shown = capsys.readouterr().err
    assert "config.json" in shown and re.search(said, shown), shown
    assert main([*args, "--run-dir", str(folder), "--overwrite"]) == 0


def test_a_configuration_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(b'{"agent": "\xff"}')
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "byte 11 is not UTF-8" in capsys.readouterr().err


# -- what a checkpoint must not forget ----------------------------------------------------------------------


@pytest.mark.parametrize("slots", [None, 3])
def test_the_running_state_of_rewards_comes_back_also_with_other_slots(slots, tmp_path):
    def normalised():
        return load_reward([(RunningNormalizer(count_a), 1.0), (id_sum, 0.5)])

    agent = PPO("auto", make_env(reward=normalised()), n_episodes=4, n_epochs=1, seed=0).learn(20)
    agent.save(tmp_path)
    state = agent.text_env.rewards[0].get_state()
    assert state["0"]["count"] >= 4
    loaded = PPO.load(tmp_path, env=make_env(slots, reward=normalised()))
    assert loaded.text_env.rewards[0].get_state() == state


def test_a_reward_state_that_does_not_fit_is_said(tmp_path):
    PPO("auto", make_env(reward=RunningNormalizer(count_a)), n_episodes=4, seed=0).learn(8).save(tmp_path)
    with pytest.warns(UserWarning, match="state of the reward 'count_a' does not fit, it starts anew"):
        PPO.load(tmp_path, env=make_env())


@pytest.mark.parametrize("settings", [{"autocast": True}, {"dtype": "bfloat16"}, {}], ids=str)
def test_the_precision_of_the_env_s_model_comes_back(settings, tmp_path):
    kwargs = {"env_kwargs": settings | {"max_new_tokens": 4}, "n_episodes": 4, "n_epochs": 1, "seed": 0}
    agent = PPO("auto", "TextRLHF-v0", **kwargs).learn(1)
    agent.save(tmp_path)
    loaded = PPO.load(tmp_path, env="TextRLHF-v0")
    assert loaded.policy.lm.autocast == loaded.policy.autocast == agent.policy.lm.autocast == bool(settings)
    agent.learn(1, reset_num_timesteps=False)
    loaded.learn(1, reset_num_timesteps=False)
    for name, weight in agent.policy.state_dict().items():
        assert torch.equal(weight, loaded.policy.state_dict()[name]), name
    assert PPO.load(tmp_path).policy.lm.autocast == bool(settings)


def test_a_new_env_keeps_its_own_settings_and_the_difference_is_said(tmp_path):
    PPO("auto", make_env(lm=make_lm(temperature=0.7), kl_coef=0.05), n_episodes=4, seed=0).learn(8).save(
        tmp_path
    )
    other = make_env(lm=make_lm(temperature=0.9), kl_coef=0.5)
    with pytest.warns(UserWarning) as warned:
        loaded = PPO.load(tmp_path, env=other)
    said = " ".join(str(w.message) for w in warned)
    assert "made with kl_coef=0.5" in said and "ended with kl_coef=0.05" in said
    assert "temperature=0.9" in said and "temperature=0.7" in said
    assert other.kl_coef == 0.5 and loaded.policy.lm.temperature == 0.9
    loaded.learn(8, reset_num_timesteps=False)
    assert loaded.latest["val/ratio"] == pytest.approx(1.0, abs=0.2)


# -- runs ---------------------------------------------------------------------------------------------------

BANDIT = ["train", "--env", "ToyBandit-v0", "--n-steps", "8", "--no-progress"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_resuming_tells_what_is_torn_and_goes_on_from_the_one_before(here, capsys):
    assert main([*BANDIT, "--total-timesteps", "80", "--save-every", "24", "--run-dir", "run"]) == 0
    whole_run = shutil.copytree(here / "run", here / "again")
    cut(whole_run / "final" / "agent.safetensors")
    flipped(newest(whole_run) / "env.safetensors")
    assert main(["train", "--resume", "again", "--no-progress"]) == 0
    shown = capsys.readouterr().out
    assert "again/final is torn: agent.safetensors has" in shown
    assert "again/checkpoint-72 is torn: env.safetensors is not what was written" in shown
    assert "from checkpoint-48" in shown
    for file in ("agent.safetensors", "env.safetensors"):
        assert (here / "run" / "final" / file).read_bytes() == (whole_run / "final" / file).read_bytes()


def test_an_error_in_a_rollout_leaves_a_checkpoint_from_before_it(here, capsys):
    (here / "brittle.py").write_text(
        "import os\nCALLS = []\n"
        "def reward(prompts, completions):\n"
        "    CALLS.append(1)\n"
        "    if len(CALLS) == 3 and not os.path.exists('mended'): raise OSError('the judge is gone')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    args = ["train", "--reward", "brittle.py:reward", "--n-episodes", "2", "--no-progress"]
    args += ["--batch-size", "2", "--n-epochs", "1", "--total-timesteps", "60", "--max-new-tokens", "8"]
    assert main([*args, "--run-dir", "broken"]) == 2
    shown = capsys.readouterr().err
    saved = newest(here / "broken")
    assert (
        "the judge is gone" in shown and f"saved as it was before this rollout: broken/{saved.name}" in shown
    )
    assert f"--resume broken --allow-module {here}/brittle.py" in shown
    (here / "mended").touch()
    assert main([*args, "--run-dir", "smooth"]) == 0
    assert main(["train", "--resume", "broken", "--allow-module", "brittle.py", "--no-progress"]) == 0
    for file in ("model.safetensors", "agent.safetensors"):
        assert (here / "broken/final" / file).read_bytes() == (here / "smooth/final" / file).read_bytes()


def test_an_error_in_an_update_names_the_checkpoint_that_stands(here, monkeypatch, capsys):
    def fails(self, rollout):
        if self.num_timesteps > 30:
            raise RuntimeError("the update broke")
        train(self, rollout)

    train = PPO.train
    monkeypatch.setattr(PPO, "train", fails)
    assert main([*BANDIT, "--total-timesteps", "80", "--save-every", "16", "--run-dir", "run"]) == 2
    assert (
        "the last checkpoint is run/checkpoint-16; go on with: textrl train --resume run"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (500, (500, None)),
        ("500", (500, None)),
        ("90s", (None, 90)),
        ("5_000,15m", (5000, 900)),
        ("2h", (None, 7200)),
    ],
)
def test_checkpoints_are_written_by_steps_and_by_time(given, expected):
    assert parse_save_every(given) == expected


@pytest.mark.parametrize("wrong", ["", "0", "often", "1.5m", "5000,,1m", "-3"])
def test_a_schedule_of_checkpoints_that_is_none_is_refused_with_the_forms(wrong, capsys):
    with pytest.raises(ValueError, match=r"must be steps \(5000\), a time"):
        parse_save_every(wrong)


def test_time_alone_makes_checkpoints(tmp_path, monkeypatch):
    saver = runs.SaveRunCallback(tmp_path, "60s", keep=10)
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(saving, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    PPO("MlpPolicy", "ToyBandit-v0", n_steps=8, seed=0).learn(80, saver)
    kept = sorted(int(p.name[11:]) for p in tmp_path.glob("checkpoint-*"))
    assert len(kept) > 1 and 8 not in kept


def test_the_best_is_kept_whatever_comes_after_it(tmp_path):
    agent = PPO("MlpPolicy", "ToyBandit-v0", n_steps=8, seed=0).learn(8)
    saver = runs.SaveRunCallback(tmp_path, 1000)
    saver.init_callback(agent)
    assert saver.save_best(0.5)
    agent.learn(8, reset_num_timesteps=False)
    assert not saver.save_best(0.4) and PPO.load(tmp_path / "best").num_timesteps == 8
    assert saver.save_best(0.6)
    assert PPO.load(tmp_path / "best").num_timesteps == 16


def test_a_run_tells_what_a_kill_would_lose(here, capsys):
    assert main([*BANDIT, "--total-timesteps", "16", "--save-every", "2000,10m", "--run-dir", "run"]) == 0
    assert "run: a checkpoint every 2,000 timesteps or 10 minutes; a kill loses" in capsys.readouterr().out


# -- one process at a time ------------------------------------------------------------------------------------


def test_a_run_in_use_is_refused_with_process_and_host(here, capsys):
    assert main([*BANDIT, "--total-timesteps", "8", "--run-dir", "run"]) == 0
    capsys.readouterr()
    with locked(here / "run"):
        for args in (["train", "--resume", "run"], [*BANDIT, "--run-dir", "run", "--overwrite"]):
            assert main(args) == 2
            said = capsys.readouterr().err
            assert f"run is in use by process {os.getpid()} on {socket.gethostname()} since" in said
    assert main(["train", "--resume", "run"]) == 0


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    code = f"import os, sys; sys.path.insert(0, {os.getcwd()!r})\nfrom pathlib import Path\n"
    code += "from agents.runs.lock import locked\n"
    code += f"with locked(Path({str(tmp_path)!r})): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert (tmp_path / HOLDER).is_file()
    with locked(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["process"] == os.getpid()
    assert not (tmp_path / HOLDER).exists()


def test_a_process_of_another_machine_is_believed_until_its_note_is_deleted(tmp_path):
    (tmp_path / HOLDER).write_text(json.dumps({"process": 7, "host": "elsewhere", "since": "yesterday"}))
    with (
        pytest.raises(RunInUseError, match=r"process 7 on elsewhere since yesterday.*delete .*lock\.json"),
        locked(tmp_path),
    ):
        pass
    (tmp_path / HOLDER).unlink()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_launcher_of_several_processes_is_refused(variable, here, monkeypatch, capsys):
    monkeypatch.setenv(variable, "2")
    assert main([*BANDIT, "--run-dir", "run"]) == 2
    assert "one of 2 processes that a launcher has started" in capsys.readouterr().err
    assert not (here / "run").exists()


def test_the_module_of_the_command_line_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cli.py", "train", "--no-such-flag"])
    monkeypatch.delitem(sys.modules, "agents.cli")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("agents.cli", run_name="__main__")
    assert left.value.code == 2 and "there is no flag --no-such-flag" in capsys.readouterr().err


# -- the log ------------------------------------------------------------------------------------------------


def log_rows(folder, resume_at, steps):
    logger = open_logger(folder, resume_at)
    for step in steps:
        logger.record("time/total_timesteps", step)
        logger.record("samples/table", f"| answer |\n| --- |\n| at {step} |", exclude=("csv",))
        logger.record(f"late/{step}", 1.0)  # a column that comes later
        logger.dump(step)
    logger.close()


@pytest.mark.parametrize("cut_off", [0, 5], ids=["whole", "cut by a kill"])
def test_a_resumed_run_has_each_table_of_samples_once(cut_off, tmp_path):
    log_rows(tmp_path, 0, [8, 16, 24, 32])
    (file,) = tmp_path.glob("events.out.tfevents.*")
    os.truncate(file, file.stat().st_size - cut_off)
    log_rows(tmp_path, 16, [24, 32, 40])
    log_rows(tmp_path, 32, [40, 48])
    tables, _ = read_tables(tmp_path)
    steps = [8, 16, 24, 32, 40, 48]
    assert [table.timesteps for table in tables] == steps
    assert [table.rows for table in tables] == [[{"answer": f"at {step}"}] for step in steps]
    assert read_progress(tmp_path)["time/total_timesteps"] == steps


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_samples_that_cannot_be_read_any_more_are_missed_aloud(damage, tmp_path):
    log_rows(tmp_path, 0, [8, 16, 24, 32])
    (file,) = tmp_path.glob("events.out.tfevents.*")
    with file.open("r+b") as stream:
        if damage == "cut":
            stream.truncate(file.stat().st_size - 5)
        else:
            stream.seek(stream.read().index(b"at 16"))
            stream.write(b"at 17")
    with pytest.warns(UserWarning, match=rf"{file.name}: the last [\d,]+ of [\d,]+ bytes cannot be read"):
        tables, started = read_tables(tmp_path)
    assert [table.timesteps for table in tables] == ([8, 16, 24, 32] if damage == "cut" else [8])
    assert started is not None


def test_a_new_column_of_the_log_comes_in_one_step(tmp_path, monkeypatch):
    log_rows(tmp_path, 0, [8, 16])
    before = (tmp_path / "progress.csv").read_text()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(logs.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log_rows(tmp_path, 16, [24])
    assert (tmp_path / "progress.csv").read_text() == before
    columns = before.splitlines()[0].split(",")
    assert columns == ["time/total_timesteps", "late/8", "late/16"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_under_the_log_is_said_with_its_path(tmp_path):
    logger = open_logger(tmp_path, report_to=["csv"])
    (output,) = logger.output_formats
    output.file.close()
    output.file = open("/dev/full", "r+")  # noqa: SIM115
    output.keys = ["time/total_timesteps"]
    logger.record("time/total_timesteps", 8)
    with pytest.raises(OSError, match=r"cannot write .*progress\.csv: No space left"):
        logger.dump(8)


def test_a_position_does_not_move_with_the_agent():
    agent = PPO("MlpPolicy", "ToyBandit-v0", n_steps=8, seed=0).learn(8)
    before = checkpoint.take_position(agent)
    kept = json.dumps(before.document), {n: a.copy() for n, a in before.arrays.items()}
    agent.learn(8, reset_num_timesteps=False)
    assert json.dumps(before.document) == kept[0]
    assert all(np.array_equal(before.arrays[n], a) for n, a in kept[1].items())
    assert json.dumps(checkpoint.take_position(agent).document) != kept[0]


def test_learning_in_another_thread_needs_no_signal_handlers(tmp_path):
    config = runs.new_config(
        agent="ppo", env="ToyBandit-v0", total_timesteps=8, seed=0, agent_kwargs={"n_steps": 8}
    )
    errors = []

    def work():
        try:
            runs.train(runs.make_agent(config), tmp_path, config)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and (tmp_path / "final").is_dir()
