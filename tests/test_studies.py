"""Claims about the studies' frame and numbers: what was done is not done again, fits find what was put in."""

from __future__ import annotations

import numpy as np
import pytest

from agents.algorithms.maths import gae
from agents.evaluation.best_of_n import best_of_n
from benchmarks.studies import exploration, frame, overoptimisation, variance, verdict
from benchmarks.studies.policies import Answers, accuracy
from textrl_env.exact import solver


def job(name, done, seed=0, fails=False):
    def run(arrays):
        if fails:
            raise RuntimeError("out of luck")
        done.append(name)
        return {"name": name}

    return frame.Job(name, run, seed)


def test_what_was_done_is_not_done_again_and_low_seeds_come_first(tmp_path):
    done = []
    jobs = [job("b", done, 1), job("a", done, 0), job("c", done, 2, fails=True)]
    with pytest.raises(RuntimeError):
        frame.do(jobs, folder=tmp_path)
    assert done == ["a", "b"] and list(frame.read(jobs, tmp_path)) == ["b", "a"]
    found = frame.do([*jobs[:2], job("d", done)], folder=tmp_path)
    assert done == ["a", "b", "d"] and list(found) == ["b", "a", "d"]
    assert not list(tmp_path.glob(".*")), "nothing half written is left"


def test_no_job_is_begun_that_would_end_too_late(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 40.0))  # every look at the clock is 40 seconds later
    monkeypatch.setattr(frame.time, "monotonic", lambda: float(next(clock)))
    done = []
    jobs = [job(name, done) for name in "abcdef"]
    frame.do(jobs, minutes=4, folder=tmp_path)
    assert done == ["a", "b"], "a third would begin after 160 s and the longest took 40, and 240 is the end"


def test_a_table_replaces_what_stood_between_its_marks_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n<!-- y -->\nother\n<!-- end of y -->\n"
    )
    frame.put_into(page, "x", frame.markdown(["a", "#b"], [["one", 2]]))
    frame.put_into(page, "x", frame.markdown(["a", "#b"], [["two", 3]]))
    text = page.read_text()
    assert "old" not in text and "| one |" not in text and "| two | 3 |" in text and "---:" in text
    assert text.startswith("before\n<!-- x -->") and "other" in text and "after" in text
    with pytest.raises(ValueError, match="no marks"):
        frame.put_into(page, "z", "")


@pytest.mark.parametrize("law", frame.LAWS)
def test_a_law_is_fitted_with_its_errors_and_is_highest_where_it_is_said_to_be(law):
    a, b = 0.4, 0.11
    d = np.linspace(0.2, 3.0, 40)
    exact = d * (a - b * frame.LAWS[law](d))
    found = frame.fit(law, d, exact)
    assert (found.a, found.b) == pytest.approx((a, b)) and found.residual < 1e-12
    fine = np.linspace(0.01, 60, 600_001)
    highest = fine[np.argmax(fine * (a - b * frame.LAWS[law](fine)))]
    assert frame.peak(law, found) == pytest.approx(highest**2, rel=1e-3)
    rng = np.random.default_rng(0)
    noisy = [frame.fit(law, d, exact + 0.02 * rng.standard_normal(40)) for _ in range(200)]
    assert np.std([each.a for each in noisy]) == pytest.approx(
        np.mean([each.a_error for each in noisy]), rel=0.2
    )
    assert np.std([each.b for each in noisy]) == pytest.approx(
        np.mean([each.b_error for each in noisy]), rel=0.2
    )
    assert frame.peak(law, frame.fit(law, d, d * a)) > 1e6, "what never bends has no peak"
    with pytest.raises(ValueError, match="three points"):
        frame.fit(law, [0.0, 1.0, 2.0], [0.0, 1.0, 2.0])


def test_a_budget_keeps_what_was_there_before_the_kl_left_it():
    points = [{"kl": kl, "gold_scores": gold} for kl, gold in ((0, 0.5), (1.5, 0.7), (3.1, 0.8), (2.9, 0.6))]
    stopped = [overoptimisation.stopped({"points": points}, budget) for budget in (1.0, 2.0, 3.0, 4.0)]
    assert stopped == [0.5, 0.7, 0.7, 0.6], "a run that was stopped does not come back"


def answers(prompts=6, count=8):
    rng = np.random.default_rng(1)
    gold, score = rng.random((2, prompts, count))
    texts = [
        [f"{i} {j % 7}" for j in range(count)] for i in range(prompts)
    ]  # the first and the last are alike
    return Answers([f"p{i}" for i in range(prompts)], texts, np.ones((prompts, count), bool), gold, score)


def test_comparisons_are_of_answers_that_differ_and_fewer_are_a_part_of_more():
    there = answers()
    pairs = there.pairs(300, seed=3)
    assert pairs[:40] == there.pairs(40, seed=3) and len(pairs) == 300
    assert all({one, other} != {0, 7} for _, one, other in pairs)
    certain = there.compared(300, seed=3, scale=1e6)
    assert there.right(certain) == 1.0 and 0.6 < there.right(there.compared(300, seed=3)) < 1.0
    record = there.records(certain)[0]
    prompt, chosen, _ = certain[0]
    assert record["prompt"] == f"p{prompt}" and record["chosen"] == f"{prompt} {chosen % 7}"


def test_accuracy_is_over_pairs_that_gold_tells_apart():
    gold = np.array([[0.0, 1.0, 1.0]])
    assert accuracy(np.array([[0.0, 1.0, 2.0]]), gold) == 1.0
    assert accuracy(np.array([[1.0, 1.0, 0.0]]), gold) == 0.25


def test_rungs_of_the_ladder_are_drawn_as_best_of_n_chooses(monkeypatch):
    monkeypatch.setattr(verdict, "TOP", 8)
    monkeypatch.setattr(verdict, "_DRAWS", 40)
    there = answers(prompts=40)
    rung = verdict.Rung(2, there.score, there.score)
    drawn = [since.gold.mean for since in rung.draws()]
    expected = best_of_n(there.score, there.score, 2).gold - best_of_n(there.score, there.score, 8).gold
    assert rung.change == pytest.approx(expected) and expected < -0.1
    assert np.mean(drawn) == pytest.approx(expected, abs=0.015)


def test_the_true_change_of_a_run_has_the_error_of_its_answers():
    rng = np.random.default_rng(0)
    hard = rng.standard_normal((100, 1))  # what all answers to a prompt share is no error
    changes = []
    for _ in range(200):
        best, last = (hard + 0.3 * rng.standard_normal((100, 4)) for _ in range(2))
        pool = verdict.Pool((best, best), (last - 0.1, last - 0.1))
        changes.append(pool.change)
    assert np.mean(changes) == pytest.approx(-0.1, abs=0.01)
    assert pool.error == pytest.approx(np.std(changes), rel=0.2)


def test_pools_are_drawn_without_an_answer_in_both_sides(monkeypatch):
    monkeypatch.setattr(verdict, "_DRAWS", 25)
    gold = np.random.default_rng(0).random((64, 16))
    pool = verdict.Pool((gold, gold), (gold, gold - 0.2))
    assert pool.change == pytest.approx(-0.2)
    assert all(since.gold.mean == pytest.approx(-0.2, abs=0.15) for since in pool.draws())
    null = list(pool.draws(null=True))
    assert (
        np.std([since.gold.mean for since in null]) > 0.01
        and abs(np.mean([s.gold.mean for s in null])) < 0.02
    )


def test_returns_over_n_steps_meet_gae_at_both_ends():
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal((2, 5, 4))
    following = np.concatenate([values[:, 1:], np.zeros((5, 1))], 1)
    mask, done = np.ones((5, 4), bool), np.zeros((5, 4), bool)
    done[:, -1] = True
    for n, gae_lambda in ((1, 0.0), (4, 1.0), (9, 1.0)):
        expected = gae(rewards, values, following, mask, done, 1.0, gae_lambda)
        assert variance.n_step(rewards, values, following, n) == pytest.approx(expected)


def test_every_response_of_a_tree_has_its_rows_and_its_chance():
    rng = np.random.default_rng(0)
    policy = [solver.log_softmax(rng.standard_normal((2 * 3**t, 3))) for t in range(3)]
    rows, tokens, chance = variance.every_response(policy)
    assert chance.sum() == pytest.approx(1.0) and len(chance) == 2 * 27
    for t in range(2):  # the row of the next step is that of the child
        assert np.array_equal(rows[t + 1], rows[t] * 3 + tokens[t])


def test_advantages_have_no_bias_with_returns_and_less_noise_without(monkeypatch, tmp_path):
    monkeypatch.setattr(variance, "ADVANTAGES", variance.ADVANTAGES | {"horizon": 4})
    found = variance.advantages(0, tmp_path)
    assert found["lambda 1"]["bias"] < 1e-9 and found["lambda 0"]["bias"] > 0.1
    assert found["lambda 0"]["std"] == pytest.approx(0, abs=1e-6), "a step of a tree is certain"
    assert found["lambda 1"]["std"] > found["lambda 0.9"]["std"] > 0.1
    assert found["n = 1"] == pytest.approx(found["lambda 0"])


def test_a_table_that_learns_from_every_pair_of_answers_finds_the_optimum(monkeypatch):
    monkeypatch.setattr(
        exploration, "TREE", exploration.TREE | {"vocab_size": 3, "horizon": 2, "kl_coef": 1.0}
    )
    import gymnasium as gym

    env = gym.make_vec("textrl_env:TokenTree-v0", num_envs=2, **exploration.TREE)
    monkeypatch.setattr(exploration, "STEPS", 300)
    exploration.shape(env.unwrapped.dynamics, 2.0, 0)
    mdp = solver.from_token_tree(env)
    table = exploration.dpo(mdp, 500, 1, 0)
    best = np.concatenate(solver.solve(mdp).policy)
    assert np.abs(np.exp(table) - np.exp(best)).max() < 0.02
