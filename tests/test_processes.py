"""One run in one process and in two: the same tokens, gradients, files; errors that name who failed."""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents.parallel.processes import ALONE, Processes, SharedError, deal
from agents.runs.whole import check_whole
from tests import shared_runs
from tests.tiny import make_lm
from textrl_env.lm.next_tokens import sample_actions
from textrl_env.lm.streams import Streams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, and a run of one process that stopped on the way."""
    folder = tmp_path_factory.mktemp("shared")
    shared_runs.write_inputs(folder)
    assert shared_runs.command_line(folder, "one", *shared_runs.new_run(folder))[0] == 0
    return folder


def start(work, folder):
    """``work(rank, 2, port, folder)`` in two processes, which share one start of Python; how they ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.shared_runs"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=work, args=(rank, 2, port, folder)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(400)
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def seen(folder):
    """What each of two processes saw; they share one start of Python."""
    shared_runs.keep_first(folder / "one", folder / "two-of-one")
    ended = start(shared_runs.several, folder)
    assert ended == [0, 0]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", shared_runs.RUNS)
def test_two_processes_write_the_tokens_and_take_the_steps_of_one(name, seen):
    one = shared_runs.run(shared_runs.RUNS[name])
    two, other = (rank[name] for rank in seen)
    assert two["tokens"] == one["tokens"] and len(one["gradients"]) >= 3
    for step, (ours, theirs) in enumerate(zip(two["gradients"], one["gradients"], strict=True)):
        # After the first step Adam has divided tiny gradients by their own size, rounding and all.
        close = 1e-6 if step == 0 else 2e-5
        assert np.abs(theirs).max() > 1e-3 and ours == pytest.approx(theirs, abs=close)
    assert two["weights"] == pytest.approx(one["weights"], abs=2e-5)
    assert two["weights"] == other["weights"], "the processes have drifted apart"
    assert two["timesteps"] == other["timesteps"] == one["timesteps"]
    for figure, value in one["latest"].items():
        if not figure.startswith(("time/", "memory/")):
            assert two["latest"][figure] == pytest.approx(value, abs=1e-4, nan_ok=True), figure


@pytest.fixture(scope="module")
def trained_alone(folder):
    return shared_runs.trainings(folder)


@pytest.mark.parametrize("name", ["sft", "sft with lora", "dpo", "kto", "reward"])
def test_trainers_on_files_train_the_same_model_in_two_processes(name, seen, trained_alone):
    one, (two, other) = trained_alone[name], (rank["trainings"][name] for rank in seen)
    assert two["figures"] == other["figures"]
    flat = {k: v for k, v in one["figures"].items() if isinstance(v, (int, float))}
    assert {k: two["figures"][k] for k in flat} == pytest.approx(flat, abs=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], abs=2e-5)


def test_a_process_learns_a_part_of_split_weights_alone(seen):
    whole = len(seen[0]["split weights"]["weights"])
    held = [rank["split weights"]["held"] for rank in seen]
    assert sum(held) == whole and max(held) < 0.55 * whole
    assert {rank["reinforce"]["held"] for rank in seen} == {len(seen[0]["reinforce"]["weights"])}


def test_of_a_policy_with_adapters_these_are_split_and_what_lies_under_them_is_not(seen):
    under = sum(p.numel() for p in make_lm().model.parameters())
    under_critic = sum(p.numel() for p in make_lm().model.base_model.parameters())
    whole = len(seen[0]["lora"]["weights"]) - under - under_critic
    split = [rank["split adapters"]["held"] - under - under_critic for rank in seen]
    assert sum(split) == whole > 0 and max(split) < 0.55 * whole


def test_the_main_process_alone_calls_callbacks_and_the_others_follow(seen):
    for name in shared_runs.RUNS:
        main, other = (rank[name] for rank in seen)
        assert (main["calls"], other["calls"]) == (2, 0)
        assert main["kl_coef"] == other["kl_coef"] == pytest.approx(0.4)


def test_a_run_that_cannot_be_shared_is_refused_everywhere_with_the_reason(seen):
    main, other = (rank["refusals"] for rank in seen)
    assert main.keys() == other.keys() == {"episodes", "minibatch", "steps", "seeds", "weights", "reward"}
    for said in (main, other):
        assert "n_episodes=7 cannot be shared by 2 processes" in said["episodes"]
        assert "batch_size=3 cannot be shared" in said["minibatch"]
        assert "is stepped" in said["steps"] and "n_envs" in said["steps"]
        assert "rank 1 of 2" in said["seeds"] and "has seed 1 and rank 0" in said["seeds"]
        assert "has weights" in said["weights"]
    assert main["reward"].startswith("OSError: the judge does not answer")
    assert other["reward"].startswith("SharedError: the judge does not answer")


def test_a_process_with_other_versions_is_named_with_both(monkeypatch):
    processes = Processes()
    processes.count, processes._places = 2, [("here", 11), ("there", 12)]
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, mine | {"transformers": "5.1.0"}])
    with pytest.raises(
        SharedError, match=r"rank 1 of 2 \(process 12 on there\) has transformers '5\.1\.0' and rank 0"
    ):
        processes.check_alike({"seed": 1})


# -- the command line ---------------------------------------------------------------------------------------


def final_weights(run):
    return load_file(run / "final" / "model.safetensors")


def rows(run):
    with (run / "progress.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_the_command_line_runs_the_same_run_and_one_process_writes_it(folder, seen):
    assert [rank["first"][0] for rank in seen] == [0, 0]
    assert "checkpoint every" in seen[0]["first"][1] and seen[1]["first"][1] == ""
    one, two = final_weights(folder / "one"), final_weights(folder / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    ours, theirs = rows(folder / "two"), rows(folder / "one")
    assert len(ours) == len(theirs) > 3
    for mine, single in zip(ours, theirs, strict=True):
        for figure in ("time/total_timesteps", "objective/scores", "objective/kl", "group/reward_std"):
            assert float(mine[figure]) == pytest.approx(float(single[figure]), abs=1e-4)
    assert len([*(folder / "two").glob("events.out*")]) == 1


def test_a_folder_that_holds_a_run_is_refused_once(seen):
    codes, said = zip(*(rank["again"] for rank in seen), strict=True)
    assert codes == (2, 2)
    assert "already holds a run" in said[0] and said[1] == ""


def test_a_checkpoint_of_one_process_goes_on_in_two(folder, seen):
    assert [rank["resumed"][0] for rank in seen] == [0, 0], seen[0]["resumed"][1]
    one, two = final_weights(folder / "one"), final_weights(folder / "two-of-one")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert len(rows(folder / "two-of-one")) == len(rows(folder / "one"))


def test_as_many_processes_as_before_go_on_to_the_bit(folder, seen):
    assert [rank["resumed alike"][0] for rank in seen] == [0, 0], seen[0]["resumed alike"][1]
    never_stopped, resumed = final_weights(folder / "two"), final_weights(folder / "two-of-two")
    assert all(torch.equal(never_stopped[name], resumed[name]) for name in never_stopped)


def test_split_weights_are_saved_whole_and_split_again(folder, seen):
    for what in ("split", "split, resumed"):
        assert [rank[what][0] for rank in seen] == [0, 0], seen[0][what][1]
    one, two = final_weights(folder / "one"), final_weights(folder / "split")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert len(rows(folder / "split")) == len(rows(folder / "one"))


def test_split_adapters_are_saved_whole_and_go_on_to_the_bit(folder, seen):
    assert [
        rank[name][0] for rank in seen for name in ("split adapters, run", "split adapters, resumed")
    ] == [0] * 4
    through, again = (
        load_file(folder / run / "final" / "adapter" / "adapter_model.safetensors")
        for run in ("adapters", "adapters-again")
    )
    assert through.keys() == again.keys() and any(
        x.abs().max() > 0 for n, x in through.items() if "lora_B" in n
    )
    assert all(torch.equal(through[name], again[name]) for name in through)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_run_by_name_and_the_last_checkpoint_is_whole(victim, folder):
    ended = start(functools.partial(shared_runs.dying, victim), folder)
    assert ended[victim] == -signal.SIGKILL and ended[1 - victim] == 0
    code, said = json.loads((folder / f"survivor-of-{victim}.json").read_text())
    gone = rf"rank {victim} of 2 \(process \d+ on \S+\) is gone, killed or crashed"
    assert code == 2 and re.search(gone, said)
    stands = re.search(r"the last checkpoint is (\S+); go on with: textrl train --resume", said)
    check_whole(Path(stands[1]))
    run = folder / f"dying-{victim}"
    assert not (run / "final").exists()
    code, said = shared_runs.command_line(folder, "", *shared_runs.resuming(run))
    assert code == 0, said
    one, resumed = final_weights(folder / "one"), final_weights(run)
    assert all(torch.allclose(one[name], resumed[name], atol=1e-5) for name in one)


def test_torchrun_starts_the_command_line(folder, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "agents.cli", "train"]
    run = [*shared_runs.new_run(folder, 40), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *launch, *run], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "manifest.json").is_file() and len(rows(tmp_path / "run")) >= 1


# -- streams and shares -------------------------------------------------------------------------------------


def test_a_sequences_random_numbers_do_not_depend_on_its_neighbours():
    streams = Streams.draw(torch.Generator().manual_seed(0), 6)
    again = Streams.draw(torch.Generator().manual_seed(0), 2)
    for place in (0, 1, 700):
        whole = streams.uniform(place)
        assert streams[[4, 1]].uniform(place).tolist() == whole[[4, 1]].tolist()
        assert again.uniform(place).tolist() == whole[:2].tolist()


def test_random_numbers_are_uniform_along_a_sequence_and_across_sequences():
    streams = Streams.draw(torch.Generator().manual_seed(1), 400)
    table = np.stack([streams.uniform(place) for place in range(400)])
    assert table.min() >= 0 and table.max() < 1 and len(np.unique(table)) == table.size
    for numbers in (table, table.T):
        counts = np.apply_along_axis(lambda row: np.histogram(row, 10, (0, 1))[0], 1, numbers)
        assert ((counts - 40) ** 2 / 40).sum(1).mean() == pytest.approx(9, abs=0.7)  # chi-squared of 10 bins
        close = np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]
        assert abs(close) < 0.01


def test_the_two_ways_of_looking_up_a_number_choose_the_same_action():
    from textrl_env.lm import next_tokens

    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 700:] = -torch.inf
    numbers = np.append(np.random.default_rng(0).random(62), [0.0, np.nextafter(1.0, 0.0)])
    expected = sample_actions(logits, None, uniform=numbers)
    got = next_tokens._sample_in_blocks(logits, torch.from_numpy(numbers))
    assert got.tolist() == expected.tolist() and got.max() < 700


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_are_dealt_once_evenly_and_in_whole_groups(count):
    lengths, group = np.random.default_rng(0).integers(1, 60, 48), np.arange(48) // 4
    hands = deal(lengths, group, count)
    assert sorted(np.concatenate(hands).tolist()) == list(range(48))
    assert {len(hand) for hand in hands} == {48 // count}
    assert max(lengths[hand].sum() for hand in hands) < 1.2 * lengths.sum() / count
    owners = [set(group[hand].tolist()) for hand in hands]
    assert sum(map(len, owners)) == 12, "a group is split"
    parts = deal(lengths[:3], np.zeros(3, dtype=int), count)  # one group, several processes
    assert sorted(np.concatenate(parts).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("count, group_size", [(16, 4), (12, 4), (7, 1), (2, 1)])
def test_shares_of_a_rollout_are_neighbours_and_all_of_it(count, group_size):
    class Rank(Processes):
        def gather(self, value):
            return [value] * self.count

    slices = [Rank(rank, 3).rows(count, group_size) for rank in range(3)]
    assert [row for part in slices for row in range(count)[part]] == list(range(count))
    assert ALONE.rows(count, group_size) == slice(0, count)
    if count == 12:
        assert [part.start % 4 for part in slices] == [0, 0, 0]
