"""A run's own files, damaged in any way, are read or refused by file, line and column; nothing else comes out."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.runs import run_directory as runs
from agents.runs.whole import TornCheckpointError, check_whole, seal

CONFIG = runs.new_config(agent="ppo", env="ToyBandit-v0", total_timesteps=100, seed=0, n_envs=2)
LOG = "rollout/ep_rew_mean,time/total_timesteps,train/loss\n0.5,8,\n0.25,16,-1e-3\n,24,nan\n"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fast = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


@st.composite
def damaged(draw, whole: bytes):
    """Bytes with a piece taken out, put in, changed or doubled."""
    start = draw(st.integers(0, len(whole)))
    end = min(start + draw(st.integers(0, 40)), len(whole))
    middle = draw(st.sampled_from([b"", whole[start:end] * 2]) | st.binary(max_size=6))
    return whole[:start] + middle + whole[end:] * draw(st.sampled_from([0, 1, 1, 1]))


@fast
@given(data=st.data())
def test_a_damaged_configuration_is_read_or_refused_by_name(data, tmp_path):
    file = tmp_path / "config.json"
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged(json.dumps(CONFIG, indent=2).encode())))
    else:
        name = data.draw(st.sampled_from(sorted(CONFIG)))
        file.write_text(json.dumps(CONFIG | {name: data.draw(JSON)}))
    try:
        config = runs.read_config(tmp_path)
    except ValueError as error:
        assert "config.json" in str(error)
    else:
        assert isinstance(config["env"], str) and isinstance(config["total_timesteps"], int)


@fast
@given(content=damaged(LOG.encode()) | st.binary(max_size=60))
def test_a_damaged_log_is_read_or_refused_by_line_and_column(content, tmp_path):
    (tmp_path / "progress.csv").write_bytes(content)
    try:
        columns = runs.read_progress(tmp_path)
    except ValueError as error:
        assert "progress.csv" in str(error) and ("line " in str(error) or "UTF-8" in str(error))
    else:
        assert not columns or len({len(column) for column in columns.values()}) == 1


@fast
@given(content=damaged(LOG.encode()))
def test_a_run_goes_on_whatever_its_log_looks_like(content, tmp_path):
    import warnings

    (tmp_path / "progress.csv").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs.open_logger(tmp_path, resume_at=16).close()
    for steps in runs.read_progress(tmp_path).get("time/total_timesteps", []):
        assert steps <= 16
    for file in tmp_path.glob("events*"):
        file.unlink()


@fast
@given(data=st.data())
def test_no_damage_to_a_sealed_folder_goes_unnoticed(data, tmp_path):
    files = {"a.json": b'{"x": 1}' * 4, "b.safetensors": bytes(range(64))}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    seal(tmp_path)
    check_whole(tmp_path)
    name = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(damaged(files[name]).filter(lambda new: new != files[name]))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TornCheckpointError, match=name):
        check_whole(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,a\n1,2\n", "line 1: expected the names of different columns"),
        (LOG + "0.5,32\n", "line 5: 2 cells, and line 1 names 3 columns"),
        (LOG + "0.5,many,1\n", "line 5, column 'time/total_timesteps': 'many' is no number"),
        (LOG + '"0.5,8,1\n', "line 5: unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_log_is_said(content, said, tmp_path):
    (tmp_path / "progress.csv").write_text(content)
    with pytest.raises(ValueError, match=r"progress\.csv") as error:
        runs.read_progress(tmp_path)
    assert said in str(error.value)


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    (tmp_path / "progress.csv").write_text(LOG + "0.75,3")
    assert runs.read_progress(tmp_path)["time/total_timesteps"] == [8, 16, 24]


def test_a_setting_of_another_type_is_named_with_what_was_expected(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"n_envs": "two"}))
    with pytest.raises(ValueError, match=r"config\.json has n_envs='two'; expected int or null"):
        runs.read_config(tmp_path)
