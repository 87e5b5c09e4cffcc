"""A reward changes no data, cannot end a run and says where it failed; time limits, attempts and fallbacks."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from agents import GRPO, REINFORCE
from agents.cli import main
from reward_models import Ensemble, Guarded, Reward, RewardResult, RunningNormalizer, load_reward
from tests.tiny import count_a, make_env, make_lm


def length(prompts, completions):
    return [float(len(c)) for c in completions]


def spoil(prompts, completions, tags, completion_ids):
    completions[:] = [c.upper() for c in completions]
    prompts.clear()
    for row in tags:
        row["words"].append("x")
    completion_ids[0].clear()
    return [0.0] * len(completions)


class Spoiler(Reward):
    name = "spoiler"

    def evaluate(self, batch, optional=False):
        spoil(batch.prompts, batch.completions, batch.columns["tags"], batch.completion_ids)
        return RewardResult(np.zeros(2), {"spoiler": np.zeros(2)})


@pytest.mark.parametrize("spoiler", [spoil, Spoiler()], ids=["function", "class"])
@pytest.mark.parametrize("within", [lambda r: r, RunningNormalizer, lambda r: Ensemble([r]), Guarded])
def test_a_reward_changes_neither_the_next_one_s_arguments_nor_the_data(spoiler, within):
    seen = []
    prompts, completions, ids = ["p", "q"], ["a b", "c"], [[1, 2], [3]]
    tags = [{"words": ["s"]}, {"words": []}]
    watch = load_reward(
        lambda prompts, completions, tags, completion_ids: (
            seen.append((list(prompts), list(completions), [list(t["words"]) for t in tags], completion_ids))
            or [0.0, 0.0]
        )
    )
    arguments = {"completion_ids": ids, "columns": {"tags": tags}}
    load_reward([within(spoiler), watch]).score(prompts, completions, **arguments)
    load_reward(within(spoiler)).score(prompts, completions, **arguments)
    whole = (["p", "q"], ["a b", "c"], [["s"], []], [[1, 2], [3]])
    assert seen == [whole]
    assert (prompts, completions, [t["words"] for t in tags], ids) == whole


def test_data_are_whole_in_every_rollout_whatever_a_reward_does_to_them():
    sizes = []

    def eats(prompts, completions, answer):
        sizes.extend(len(each) for each in answer)
        for each in answer:
            each.clear()
        return [0.0] * len(prompts)

    env = make_env(lm=make_lm(), reward=eats, prompts=[{"prompt": "a", "answer": list(range(20))}])
    GRPO("auto", env, n_episodes=8, group_size=8, seed=0).learn(1).learn(1)
    assert len(sizes) >= 16 and set(sizes) == {20}


def test_what_cannot_be_copied_is_handed_over_as_it_is():
    lock = threading.Lock()
    got = []
    load_reward(lambda prompts, completions, lock: got.extend(lock) or [0.0]).score(
        ["p"], ["c"], columns={"lock": [lock]}
    )
    assert got == [lock]


def leaves(prompts, completions):
    sys.exit(0)


async def leaves_later(prompts, completions):
    sys.exit(3)


@pytest.mark.parametrize(("function", "code"), [(leaves, "0"), (leaves_later, "3")])
def test_a_reward_that_leaves_the_program_is_an_error_of_that_reward(function, code):
    with pytest.raises(
        RuntimeError, match=f"reward '{function.__name__}' tried to leave .* SystemExit: {code}"
    ):
        load_reward(function).score(["p"], ["c"])


def test_an_interrupt_still_gets_through_a_reward():
    def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_reward(interrupted).score(["p"], ["c"])


def picky(prompts, completions):
    return [1.0 / len(c.split()) for p, c in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize(
    ("prompts", "completions", "where"),
    [
        (["only"], [""], "scored the completion '' to the prompt 'only'"),
        (["one", "two", "three"], ["a", "b", " "], "completion ' ' to the prompt 'three' (row 2 of 3)"),
    ],
)
def test_an_error_names_the_reward_the_prompt_and_the_response(prompts, completions, where):
    with pytest.raises(ZeroDivisionError) as caught:
        load_reward(picky).score(prompts, completions)
    assert "the reward 'picky'" in caught.value.__notes__[0] and where in caught.value.__notes__[0]


def test_where_no_variable_shows_the_row_the_batch_is_named():
    def opaque(prompts, completions):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        load_reward(opaque).score(["p", "q"], ["a", "b"])
    assert (
        "2 completions, the first of them the completion 'a' to the prompt 'p'" in caught.value.__notes__[0]
    )


def test_the_command_line_names_the_reward_the_prompt_and_the_response_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "failing_reward.py").write_text(
        "def fails(prompts, completions):\n    raise OSError('the disk')\n"
    )
    args = [
        "--reward",
        "failing_reward.py:fails",
        "--n-episodes",
        "2",
        "--total-timesteps",
        "9",
        "--run-dir",
        "r",
    ]
    assert main(["train", "--no-progress", *args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "the disk" in line and "the reward 'fails' scored" in line and "to the prompt '" in line


# -- time, attempts, fallback -------------------------------------------------------------------------------


def test_rows_that_fail_get_the_fallback_and_the_others_keep_their_scores():
    reward = Guarded(picky, fallback=-1.0)
    result = reward.score(["p"] * 5, ["a", "a b", "", "a b c d", " "])
    assert result.total.tolist() == [1.0, 0.5, -1.0, 0.25, -1.0]
    assert result.parts["picky/failed"].tolist() == [0, 0, 1, 0, 1] and reward.failed == 2
    assert np.isnan(result.parts["picky"]).tolist() == [False, False, True, False, True]


def test_rows_that_fail_can_be_left_without_a_score():
    reward = Guarded(picky, fallback="drop")
    with pytest.warns(
        UserWarning, match=r"1 completions so far have no score of the reward 'picky'.*ZeroDiv"
    ):
        result = reward.score(["p"] * 3, ["a", "", "a b"])
    assert result.total.tolist() == [1.0, 0.0, 0.5] and result.scored.tolist() == [True, False, True]
    assert reward.failed == 1
    both = load_reward([Guarded(picky, fallback="drop"), (length, 10.0)]).score(["p", "p"], ["a", ""])
    assert both.total.tolist() == [11.0, 0.0] and both.scored is None
    members = Ensemble([Guarded(picky, fallback="drop"), length]).score(["p", "p"], ["a", ""])
    assert members.scored.tolist() == [True, False]  # a mean over members needs each of them


def test_falling_back_is_warned_about_with_the_error():
    reward = Guarded(picky, fallback=0.0)
    with pytest.warns(
        UserWarning, match=r"1 completions so far got the fallback 0 of the reward 'picky'.*ZeroDiv"
    ):
        reward.score(["p", "p"], ["a", ""])


def test_a_reward_that_never_scored_anything_raises_instead_of_falling_back():
    with pytest.raises(TypeError, match="asks for 'answer'"):
        Guarded(lambda prompts, completions, answer: [0.0], fallback=0.0).score(["p"], ["c"])


def test_another_attempt_may_cure_it():
    calls = []

    def flaky(prompts, completions):
        calls.append(len(completions))
        if len(calls) < 3:
            raise ConnectionError("busy")
        return [7.0] * len(completions)

    assert Guarded(flaky, retries=2, retry_wait=0.0).score(["p"], ["c"]).total.tolist() == [7.0]
    calls.clear()
    with pytest.raises(ConnectionError, match="busy"):
        Guarded(flaky, retries=1, retry_wait=0.0).score(["p"], ["c"])
    assert calls == [1, 1]


def test_a_reward_that_takes_too_long_is_given_up_and_named():
    release = threading.Event()

    def slow(prompts, completions):
        release.wait(10)
        return [0.0] * len(completions)

    started = time.monotonic()
    try:
        with pytest.raises(
            TimeoutError, match=r"reward 'slow' did not score 1 completions within 0\.05 seconds"
        ):
            Guarded(slow, timeout=0.05).score(["p"], ["c"])
        assert time.monotonic() - started < 5
    finally:
        release.set()


def test_a_guard_is_named_on_the_command_line_and_keeps_its_counts():
    spec = "reward_models:Guarded('tests.tiny:count_a', timeout=5, fallback=0.0)"
    reward = load_reward(spec)
    assert reward.score(["p"], ["a a"]).total.tolist() == [2.0]
    other = Guarded(count_a, fallback=0.0)
    other.set_state(reward.get_state())
    assert other.get_state() == {"scored": 1, "failed": 0, "reward": {}}
    with pytest.raises(ValueError, match="failed, reward and scored"):
        other.set_state({"scored": 1})


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"retries": -1}, {"fallback": float("nan")}, {"fallback": "leave"}]
)
def test_a_guard_refuses_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Guarded(count_a, **wrong)


def fails_on_long(prompts, completions):
    if any(len(c.split()) > 2 for c in completions):
        raise ValueError("too long")
    return [1.0] * len(completions)


def test_the_share_of_fallbacks_is_in_the_log():
    env = make_env(lm=make_lm(), reward=Guarded(fails_on_long, fallback=0.0))
    agent = GRPO("auto", env, n_episodes=16, seed=0)
    with pytest.warns(UserWarning, match="got the fallback"):
        agent.learn(10)
    assert 0 < agent.latest["rewards/fails_on_long/failed"] < 1


def test_episodes_whose_reward_failed_are_dropped_and_counted():
    agent = REINFORCE(
        "auto", make_env(lm=make_lm(), reward=Guarded(fails_on_long, fallback="drop")), n_episodes=16, seed=0
    )
    sizes = []
    learn = agent.train
    agent.train = lambda rollout: (sizes.append(len(rollout)), learn(rollout))
    with pytest.warns(UserWarning, match="have no score"):
        agent.learn(10)
    share = agent.latest["rewards/fails_on_long/failed"]
    assert 0 < share < 1 and agent.latest["objective/unscored"] == share
    assert sizes[-1] == round(16 * (1 - share))
    assert agent.latest["objective/scores"] == 1.0  # of those that have one
