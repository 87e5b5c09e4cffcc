"""Files that hypothesis makes up and damages, for every format and verb: read, or refused with file and place."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from table import Table

_WORDS = st.sampled_from(
    ["w2", "w3 w4", "w5 w6 w7", " ", "", "w8\nw9", '"w1", w2', "ü\u2028é", "\ud800", "\x00\x1b[0m"]
)
_NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 0.0, 1, 2**63])
_SCALARS = st.none() | st.booleans() | _NUMBERS | _WORDS | st.text(max_size=12)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_ROLES = st.sampled_from(["user", "assistant", "system", "tool", "User", "", None])
_MESSAGES = st.lists(st.fixed_dictionaries({"role": _ROLES, "content": _WORDS | _VALUES}), max_size=3)
_CELLS = st.one_of(_WORDS, _WORDS, _WORDS, _MESSAGES, _VALUES)
#: Columns of the records of each verb; the first are what it needs.
_COLUMNS = {
    "sft": ("prompt", "completion", "messages", "text", "tools"),
    "reward": ("prompt", "chosen", "rejected", "margin", "chosen_ended"),
    "dpo": ("prompt", "chosen", "rejected", "completion", "label", "rejected_ended"),
    "prompts": ("prompt", "answer", "tools", "completions"),
}
#: What an error has to tell beside the file: a place in it, or a setting by its name, or that it is no such file.
_PLACE = re.compile(
    r"\[\d+\]: |(line|row|item|byte|comparison|character|record) \d+|column '|has \w+=|does not say|has format|"
    r"cannot be called|names code of the module|"
    r"there is nothing in it|not a parquet file|holds a |nested too deeply|is not the configuration|a \.txt file|"
    r"cannot be loaded, what its |expected a list of rows|the columns differ|is torn: |has no column|all \d+ |"
    r"none of the \d+ |a dict has to hold columns"
)


class Target(NamedTuple):
    """One format as one verb reads it.

    Attributes:
        name: In the table.
        file: What the file is called.
        contents: Makes its bytes.
        read: Reads the file.
        errors: What it may raise.
    """

    name: str
    file: str
    contents: st.SearchStrategy[bytes]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = (ValueError,)


def fuzz_all(
    place: Path,
    table: Table,
    examples: int,
    number: int,
    only: list[str] | None = None,
    keep: Path | None = None,
) -> None:
    """Make up ``examples`` files for every target whose name holds one of the words in ``only``.

    The table is written to ``keep`` after each target.
    """
    logging.disable(logging.CRITICAL)  # tensorboard's own warnings about its files
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for target in targets(place):
                if only is None or any(word in target.name for word in only):
                    _fuzz(target, place / "fuzz", table, examples, number)
                    if keep:
                        table.write(keep)
    finally:
        logging.disable(logging.NOTSET)


def _fuzz(target: Target, folder: Path, table: Table, examples: int, number: int) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / target.file
    kept = file.read_bytes() if file.is_file() else None
    row = table.row(target.name)

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=target.contents)
    def one(content: bytes) -> None:
        file.write_bytes(content)
        try:
            target.read(file)
        except target.errors as error:
            message = f"{error} {' '.join(getattr(error, '__notes__', ()))}"
            named = file.name in message or str(folder) in message
            placed = named and _PLACE.search(message)
            row.add("refused, with file and place", "" if placed else f"{content[:300]!r}\n{message[:600]}")
        except Exception:
            row.add("another error", f"{content[:300]!r}\n{traceback.format_exc(limit=-3)}")
        else:
            row.add("read")

    one()
    if kept is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(kept)


# -- contents -----------------------------------------------------------------------------------------------


@st.composite
def _rows(draw: st.DrawFn, verb: str) -> list[dict[str, Any]]:
    columns = _COLUMNS[verb]
    good = st.fixed_dictionaries(
        {name: st.sampled_from(["w2", "w3 w4", "w5"]) for name in columns[: 2 if verb == "sft" else 3]},
    )
    any_row = st.dictionaries(st.sampled_from(columns) | st.text(max_size=4), _CELLS, max_size=5)
    changed = st.builds(lambda row, more: row | more, good, any_row)
    most = st.one_of(good, good, good, changed)
    return draw(
        st.lists(good, min_size=1, max_size=3) | st.lists(most, max_size=3) | st.lists(any_row, max_size=3)
    )


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes, a piece of them perhaps taken out, put in, changed or doubled."""
    content = draw(whole)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        start = draw(st.integers(0, len(content)))
        end = min(start + draw(st.integers(0, 30)), len(content))
        middle = draw(st.sampled_from([b"", content[start:end] * 2]) | st.binary(max_size=5))
        content = content[:start] + middle + content[end:] * draw(st.sampled_from([0, 1, 1, 1, 1]))
    return content


def _json(value: Any, escaped: bool = True) -> str:
    return json.dumps(value, ensure_ascii=escaped)


def _encoded(text: str, mark: bytes = b"") -> bytes:
    return mark + text.encode("utf-8", errors="surrogatepass")


#: Nested more deeply, and a number longer, than Python's reader takes.
_TOO_MUCH = st.integers(0, 9).map(
    lambda kind: [b"[" * 100_000, b'{"prompt":' * 5_000, b'[{"prompt": ' + b"7" * 5_000 + b"}]"][kind % 3]
)


def _jsonl(verb: str) -> st.SearchStrategy[bytes]:
    bare = st.lists(_CELLS, max_size=3)
    lines = st.builds(
        lambda rows, end, escaped, mark: _encoded(end.join(_json(row, escaped) for row in rows), mark),
        _rows(verb) | bare,
        st.sampled_from(["\n", "\r\n", "\n\n"]),
        st.booleans(),
        st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    )
    return st.one_of(*[damaged(lines)] * 8, st.binary(max_size=40), _TOO_MUCH)


def _json_file(verb: str) -> st.SearchStrategy[bytes]:
    columns = st.dictionaries(st.sampled_from(_COLUMNS[verb]), st.lists(_CELLS, max_size=3), max_size=4)
    whole = st.builds(lambda value: _encoded(_json(value)), _rows(verb) | columns | _VALUES)
    return st.one_of(*[damaged(whole)] * 8, st.binary(max_size=40), _TOO_MUCH)


def _csv(verb: str) -> st.SearchStrategy[bytes]:
    def write(rows: list[dict[str, Any]], delimiter: str, header: list[str]) -> bytes:
        text = io.StringIO(newline="")
        names = list(dict.fromkeys([*header, *(name for row in rows for name in row)]))
        writer = csv.writer(text, delimiter=delimiter, escapechar="\\")
        writer.writerow(names)
        writer.writerows([str(row.get(name, "")) for name in names] for row in rows)
        return _encoded(text.getvalue())

    header = st.lists(st.sampled_from(_COLUMNS[verb]), max_size=4)
    whole = st.builds(write, _rows(verb), st.sampled_from(",;\t"), header)
    return st.one_of(*[damaged(whole)] * 8, st.binary(max_size=40))


def _parquet(verb: str) -> st.SearchStrategy[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(rows: list[dict[str, Any]]) -> bytes:
        stream = pa.BufferOutputStream()
        try:
            table = pa.Table.from_pylist(rows)
        except (
            pa.ArrowException,
            OverflowError,
            UnicodeError,
            ValueError,
            TypeError,
        ):  # kinds that do not mix
            texts = [{n: repr(v) for n, v in row.items() if "\ud800" not in n} for row in rows]
            table = pa.Table.from_pylist(texts)
        try:
            pq.write_table(table, stream)
        except (pa.ArrowException, OSError, NotImplementedError):  # a struct without fields
            stream = pa.BufferOutputStream()
            pq.write_table(pa.table({"prompt": ["w2"]}), stream)
        return stream.getvalue().to_pybytes()

    rows = _rows(verb)
    return st.one_of(*[damaged(st.builds(write, rows))] * 4, st.binary(max_size=40))


_TEXT = st.builds(_encoded, st.lists(_WORDS | st.text(max_size=20), max_size=4).map("\n".join))


# -- what reads them ------------------------------------------------------------------------------------------


def targets(place: Path) -> list[Target]:
    """Every format as every verb reads it."""
    from transformers import AutoTokenizer

    from agents.commands.offline import naming
    from agents.offline.demonstration_data import load_demonstrations
    from agents.offline.preference_data import load_preferences
    from agents.offline.sft import encode_all
    from reward_models.comparisons import encode_sides, read_comparisons
    from reward_models.data.encoding import TextEncoder
    from reward_models.data.lengths import Lengths
    from textrl_env.data.prompts import load_prompts

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    encoder = TextEncoder(tokenizer)

    def sft(file: Path) -> None:
        rows, _ = load_demonstrations(file)
        with naming(file):
            encode_all(rows, encoder, Lengths(24, "cut"))

    def reward(file: Path) -> None:
        rows, _ = read_comparisons(file)
        with naming(file):
            encode_sides(rows, encoder, Lengths(24, "cut"))

    def dpo(file: Path) -> None:
        with naming(file):
            load_preferences(file, encoder, lengths=Lengths(24, "cut"))

    def kto(file: Path) -> None:
        with naming(file):
            load_preferences(file, encoder, paired=False, lengths=Lengths(24, "cut"))

    def prompts(file: Path) -> None:
        found = load_prompts(file)
        for row, text in enumerate(found.texts):
            messages = found.messages[row] if found.messages else None
            encoder.prompt(text if messages is None else messages)

    formats: dict[str, Callable[[str], st.SearchStrategy[bytes]]] = {
        "jsonl": _jsonl,
        "json": _json_file,
        "csv": _csv,
        "parquet": _parquet,
    }
    readers = {
        "demonstrations of `sft`": ("sft", sft),
        "comparisons of `reward`": ("reward", reward),
        "comparisons of `dpo`": ("dpo", dpo),
        "judged answers of `dpo --loss kto`": ("dpo", kto),
        "prompts of `train`, `preferences`, `evaluate`": ("prompts", prompts),
    }
    found = [
        Target(f"{name}, .{ending}", f"data.{ending}", make(verb), read)
        for name, (verb, read) in readers.items()
        for ending, make in formats.items()
    ]
    for name in ("demonstrations of `sft`", "prompts of `train`, `preferences`, `evaluate`"):
        found.append(
            Target(f"{name}, .txt", "data.txt", damaged(_TEXT) | st.binary(max_size=40), readers[name][1])
        )
    return [*found, *_own_files(place)]


def _own_files(place: Path) -> list[Target]:
    """The files that a run leaves behind."""
    from agents import PPO
    from agents.report.samples import read_tables
    from agents.runs import run_directory as runs
    from agents.runs.checkpoint import read_document
    from agents.runs.logs import open_logger, read_progress
    from agents.runs.whole import check_whole

    config = runs.new_config(agent="ppo", env="ToyBandit-v0", total_timesteps=100, seed=0, n_envs=2)
    log = b"rollout/ep_rew_mean,time/total_timesteps,train/loss\n0.5,8,\n0.25,16,-1e-3\n,24,nan\n"
    saved = PPO("MlpPolicy", "ToyBandit-v0", n_steps=8, seed=0)
    folder = place / "fuzz"
    saved.save(folder)
    document, manifest = ((folder / name).read_bytes() for name in ("agent.json", "manifest.json"))
    logger = open_logger(place / "events", report_to=["tensorboard"])
    for step in (8, 16):
        logger.record("samples/table", f"| response | score |\n| --- | --- |\n| w{step} | 0.5 |")
        logger.record("rollout/ep_rew_mean", step / 7)
        logger.dump(step)
    logger.close()
    (events,) = (place / "events").iterdir()

    def changed(whole: dict[str, Any]) -> st.SearchStrategy[bytes]:
        one = st.builds(
            lambda name, value: _encoded(_json(whole | {name: value})),
            st.sampled_from(sorted(whole)),
            _VALUES,
        )
        return one | damaged(st.just(json.dumps(whole, indent=2).encode()))

    def go_on(file: Path) -> None:
        open_logger(file.parent, resume_at=16, report_to=["csv"]).close()

    def load(file: Path) -> None:
        PPO.load(file.parent)

    def unsealed(file: Path) -> None:
        (file.parent / "manifest.json").write_bytes(manifest)
        PPO.load(file.parent)

    older = json.loads(document) | {"sealed": False}
    return [
        Target(
            "`config.json` at `train --resume`",
            "config.json",
            changed(config),
            lambda f: runs.read_config(f.parent),
        ),
        Target(
            "`progress.csv` in `report`",
            "progress.csv",
            damaged(st.just(log)),
            lambda f: read_progress(f.parent),
        ),
        Target("`progress.csv` at `train --resume`", "progress.csv", damaged(st.just(log)), go_on),
        Target("`agent.json` in `Agent.load`", "agent.json", changed(json.loads(document)), load),
        Target(
            "`agent.json` of 0.1.0, without checksums",
            "agent.json",
            changed(older),
            unsealed,
            (ValueError, ImportError),
        ),
        Target(
            "`agent.json` at `train --resume`",
            "agent.json",
            damaged(st.just(document)),
            lambda f: read_document(f.parent),
        ),
        Target(
            "`manifest.json`", "manifest.json", damaged(st.just(manifest)), lambda f: check_whole(f.parent)
        ),
        Target(
            "TensorBoard events in `report`",
            events.name,
            damaged(st.just(events.read_bytes())),
            lambda f: read_tables(f.parent),
        ),
    ]
