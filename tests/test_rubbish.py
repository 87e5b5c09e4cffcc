"""A run's own files, damaged in any way, are read or refused by file, line and column; nothing else comes out."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import PPO
from agents.offline.demonstration_data import load_demonstrations
from agents.offline.preference_data import load_preferences
from agents.runs import run_directory as runs
from agents.runs.logs import open_logger, read_progress
from agents.runs.whole import TornCheckpointError, check_whole, seal
from reward_models.comparisons import read_comparisons
from reward_models.warning import warn
from tests.tiny import make_tokenizer
from textrl_env.data.prompts import load_prompts

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
        columns = read_progress(tmp_path)
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
    for steps in read_progress(tmp_path).get("time/total_timesteps", []):
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
        read_progress(tmp_path)
    assert said in str(error.value)


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    (tmp_path / "progress.csv").write_text(LOG + "0.75,3")
    assert read_progress(tmp_path)["time/total_timesteps"] == [8, 16, 24]


def test_a_setting_of_another_type_is_named_with_what_was_expected(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"n_envs": "two"}))
    with pytest.raises(ValueError, match=r"config\.json has n_envs='two'; expected int or null"):
        runs.read_config(tmp_path)


# -- records ------------------------------------------------------------------------------------------------

VALUES = st.sampled_from(["w", "", " ", "\ud800", None, 10**400, [{"role": "user"}]]) | JSON
RECORDS = st.lists(
    st.builds(
        lambda good, name, value: good | {name: value},
        st.just({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": True}),
        st.sampled_from(["prompt", "chosen", "rejected", "completion", "label", "margin", "messages"]),
        VALUES,
    ),
    max_size=3,
)
READERS = {
    "demonstrations": lambda file: load_demonstrations(file),
    "comparisons": lambda file: read_comparisons(file),
    "pairs": lambda file: load_preferences(file, make_tokenizer()),
    "judged": lambda file: load_preferences(file, make_tokenizer(), paired=False),
    "prompts": lambda file: load_prompts(file),
}


def as_csv(rows):
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(["prompt", *(name for row in rows for name in row)]))
    csv.writer(text).writerows([names, *([str(row.get(name, "")) for name in names] for row in rows)])
    return text.getvalue().encode(errors="surrogatepass")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("reader", READERS)
@settings(fast, max_examples=60)
@given(data=st.data())
def test_records_of_any_kind_are_read_or_refused_with_file_and_place(reader, ending, data, tmp_path):
    rows = data.draw(RECORDS)
    whole = {
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "json": json.dumps(rows).encode(),
        "csv": as_csv(rows),
    }[ending]
    file = tmp_path / f"data.{ending}"
    file.write_bytes(whole if data.draw(st.booleans()) else data.draw(damaged(whole)))
    try:
        READERS[reader](file)
    except ValueError as error:
        place = (
            r"line \d|item \d|comparison \d|column|nothing in it|expected a list|columns differ|hold columns"
        )
        assert "data." in str(error) and re.search(place, str(error)), str(error)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"prompt": ' * 50_000, "it is nested too deeply"),
        ('[{"prompt": ' + "7" * 5000 + "}]", "it holds a number of more than 4,300 digits"),
    ],
    ids=["lists", "objects", "digits"],
)
def test_json_that_python_does_not_read_is_refused_with_file_and_line(content, why, ending, tmp_path):
    file = tmp_path / f"data.{ending}"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"data\.{ending}, line 1.*: cannot be read: {why}"):
        load_prompts(file)


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": "a \ud800"}, {"role": "\ud800", "content": "a"}]
)
def test_half_a_character_in_a_message_is_refused_with_its_place(message, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": [message]}) + "\n")
    with pytest.raises(
        ValueError, match=r"data\.jsonl, line 1, column 'prompt': message 0.*: character \d is half"
    ):
        load_prompts(file)


def test_pairs_beside_empty_cells_for_judged_answers_are_pairs(tmp_path):
    (tmp_path / "data.csv").write_text("completion,prompt,chosen,rejected\n,a,b,c\n,d,e,f\n")
    items, skipped = load_preferences(tmp_path / "data.csv", make_tokenizer(), paired=False)
    assert [item.label for item in items] == [True, False, True, False] and skipped == 0


@pytest.mark.parametrize(
    ("name", "value"), [("rng", None), ("action_space", None), ("episodes", 3), ("kwargs", {"n_steps": "x"})]
)
def test_a_document_without_checksums_that_says_nonsense_is_named(name, value, tmp_path):
    agent = PPO("MlpPolicy", "ToyBandit-v0", n_steps=8, seed=0)
    agent.save(tmp_path)
    file = tmp_path / "agent.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sealed": False, name: value}))
    with pytest.raises(
        TornCheckpointError, match=r"cannot be loaded, what its agent\.json says may be wrong"
    ):
        PPO.load(tmp_path)


def test_a_percent_sign_in_what_a_warning_tells_is_one(tmp_path):
    with pytest.warns(UserWarning, match=r"100% of %s and 5 %d"):
        warn("100% of %s and 5 %d")
    (tmp_path / "progress.csv").write_text("rollout/ep_rew_mean,time/total_timesteps\n0.5,8\n%d,x%s\n")
    with pytest.warns(UserWarning, match="the 1 rows before it are kept"):
        open_logger(tmp_path, resume_at=16, report_to=["csv"]).close()
