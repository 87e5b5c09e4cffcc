"""Loading prompts and records: what is read, and how errors name the place."""

from __future__ import annotations

import json

import pytest

from agents.offline.demonstration_data import load_demonstrations
from textrl_env.data.prompts import PromptSet, RecordSet, load_prompts, load_records

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
ROWS = [{"prompt": "2 + 2 =", "answer": 4}, {"prompt": "Über 3?", "answer": None}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# -- what is read ---------------------------------------------------------------------------------------


def test_a_list_of_texts_is_prompts_without_columns():
    assert load_prompts(["a", "b"]) == PromptSet(["a", "b"])
    assert len(load_prompts(("a", "b", "a"))) == 3


def test_dicts_bring_columns_and_missing_entries_are_none():
    prompts = load_prompts([{"prompt": "a", "answer": 1}, {"prompt": "b", "level": 2}])
    assert prompts.texts == ["a", "b"]
    assert prompts.columns == {"answer": [1, None], "level": [None, 2]}
    assert prompts.messages is None


def test_message_lists_are_kept_beside_readable_texts():
    prompts = load_prompts([CHAT, {"prompt": CHAT[1:]}, "plain"])
    assert prompts.texts == ["system: Be brief.\nuser: 2 + 2?", "2 + 2?", "plain"]
    assert prompts.messages == [CHAT, CHAT[1:], None]


def make_source(kind, folder):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    if kind == "list":
        return ROWS
    if kind == "dataset":
        return dataset
    if kind == "streaming dataset":
        return dataset.to_iterable_dataset()
    if kind == "columns":
        return {"prompt": [row["prompt"] for row in ROWS], "answer": [4, None]}
    path = folder / f"data{kind}"
    if kind == ".parquet":
        dataset.to_parquet(path)
    elif kind == ".json":
        write(path, json.dumps(ROWS, indent=1))
    else:
        write_jsonl(path, ROWS)
    return str(path)


@pytest.mark.parametrize(
    "kind", ["list", "dataset", "streaming dataset", "columns", ".parquet", ".json", ".jsonl"]
)
def test_every_kind_of_source_gives_the_same_prompts(kind, tmp_path):
    prompts = load_prompts(make_source(kind, tmp_path))
    assert prompts.texts == ["2 + 2 =", "Über 3?"]
    assert prompts.columns == {"answer": [4, None]}


def test_text_files_hold_one_prompt_per_line_and_blank_lines_do_not_count(tmp_path):
    path = write(tmp_path / "p.txt", "\ufeffone\r\n\r\ntwo, still\u2028two\n\nthree")
    assert load_prompts(path).texts == ["one", "two, still\u2028two", "three"]


def test_csv_keeps_quoted_lines_together_and_cells_as_texts(tmp_path):
    path = write(tmp_path / "p.csv", 'prompt,answer\n"one,\ntwo\u2028",4\nthree,\n')
    prompts = load_prompts(path)
    assert prompts.texts == ["one,\ntwo\u2028", "three"]
    assert prompts.columns == {"answer": ["4", ""]}


def test_records_have_the_columns_asked_for_and_the_others(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "", "rater": 3}]
    records = load_records(write_jsonl(tmp_path / "pairs.jsonl", rows), ("prompt", "chosen", "rejected"))
    assert isinstance(records, RecordSet)
    assert len(records) == 1
    assert records["chosen"] == ["a"]
    assert list(records.rows()) == rows
    with pytest.raises(KeyError, match="Did you mean 'rejected'"):
        records["reject"]


def test_labels_become_bools(tmp_path):
    path = write(tmp_path / "kto.csv", "prompt,completion,label\na,b,True\na,c,0\n")
    assert load_records(path, ("prompt", "completion", "label"))["label"] == [True, False]
    assert load_records([{"label": 1}, {"label": False}], ("label",))["label"] == [True, False]


def test_a_prompt_set_is_a_source_too():
    prompts = load_prompts(["a"])
    assert load_prompts(prompts) is prompts


# -- errors name the place ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a"}, {"promt": "b"}],
            r"line 2: there is no column 'prompt', only 'promt'.*Did you mean",
        ),
        ([{"prompt": "a"}, {}], r"line 2: there is no column 'prompt', only nothing"),
        ([{"prompt": "a"}, {"prompt": " \n"}], r"line 2, column 'prompt': the text is empty"),
        ([{"prompt": None}], r"line 1, column 'prompt': it is empty"),
        ([{"prompt": 7}], r"line 1, column 'prompt': expected a text or a list of messages, got int 7"),
        ([{"prompt": []}], r"line 1, column 'prompt': the list of messages is empty"),
        ([{"prompt": ["hi"]}], r"column 'prompt': message 0: expected \{'role'.*got str 'hi'"),
        ([{"prompt": [{"role": "user"}]}], r"message 0: expected a text as 'content', got only \['role'\]"),
        ([["a", "b"]], r"line 1, column 'prompt': message 0"),
        ([7], r"line 1: expected a text, a list of messages or a dict, got int 7"),
        ([], r"there is nothing in it"),
        ([{"prompt": "a", "completions": "b"}], r"cannot be called 'completions'"),
    ],
)
def test_errors_in_prompts_name_file_line_and_column(rows, message, tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", rows)
    with pytest.raises(ValueError, match=r"^my\.jsonl.*" + message):
        load_prompts(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": 3}, r"data\[0\], column 'chosen': expected a text"),
        ({"prompt": "p", "label": "maybe"}, r"data\[0\], column 'label': expected true or false"),
        ({"prompt": "p", "messages": "hi"}, r"data\[0\], column 'messages': expected a list of messages"),
    ],
)
def test_optional_columns_are_checked_where_they_are_there(row, message):
    assert len(load_records([{"prompt": "p"}], ("prompt",), ("chosen", "label", "messages"))) == 1
    with pytest.raises(ValueError, match=message):
        load_records([row], ("prompt",), ("chosen", "label", "messages"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "x"}\n\n{"prompt": "y"\n',
            r"^a\.jsonl, line 3: not JSON: .* at character 15",
        ),
        ("a.json", '[\n{"prompt": "x"}\n{"prompt": "y"}]', r"^a\.json, line 3: not JSON"),
        ("a.json", "7", r"^a\.json: expected a list of rows"),
        ("a.json", '{"prompt": ["x"], "answer": [1, 2]}', r"^a\.json: the columns differ in length"),
        ("a.csv", "prompt,answer\nx,1\ny,2,3\n", r"^a\.csv, line 3: 1 more cells than the 2 columns"),
        ("a.csv", "question,answer\nx,1\n", r"^a\.csv, line 2: there is no column 'prompt'"),
        ("a.parquet", "no", r"^a\.parquet: not a parquet file"),
        ("a.yaml", "no", r"^a\.yaml: files ending in '\.yaml' cannot be read; expected one of \.jsonl"),
        ("a.txt", "\n\n", r"^a\.txt: there is nothing in it"),
    ],
)
def test_files_that_cannot_be_read_say_where(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_a_file_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ntwo\nÜber\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, line 3: not UTF-8 text at character 1"):
        load_prompts(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_a_byte_order_mark_says_how_a_file_is_read(encoding, tmp_path):
    text = (
        "\ufeff" * (encoding == "utf-16-be") + json.dumps({"prompt": "Über 3?"}, ensure_ascii=False) + "\r\n"
    )
    (tmp_path / "p.jsonl").write_bytes(text.encode(encoding))
    assert load_prompts(tmp_path / "p.jsonl").texts == ["Über 3?"]


def test_a_saved_dataset_is_read_and_several_splits_are_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "two"))
    assert load_prompts(tmp_path / "one").texts == [row["prompt"] for row in ROWS]
    assert load_prompts(str(tmp_path / "two" / "test")).texts == [row["prompt"] for row in ROWS]
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        load_prompts(str(tmp_path / "two"))


def test_json_lines_under_the_name_of_json_and_a_table_with_semicolons_are_read(tmp_path):
    lines = write_jsonl(tmp_path / "lines.json", ROWS)
    assert load_prompts(lines).texts == ["2 + 2 =", "Über 3?"]
    table = write(tmp_path / "table.csv", "prompt;answer\n0,5 + 0,5 = ;1\n")
    assert load_prompts(table) == PromptSet(["0,5 + 0,5 = "], {"answer": ["1"]})
    long = write(tmp_path / "long.csv", "prompt\n" + "a" * 200_000 + "\n")
    assert len(load_prompts(long).texts[0]) == 200_000


def test_a_bad_row_of_a_table_is_placed_where_it_begins(tmp_path):
    path = write(tmp_path / "p.csv", 'prompt,answer\n"one\ntwo\nthree",4\n"five\nsix",7,8\n')
    with pytest.raises(ValueError, match=r"^p\.csv, line 5: 1 more cells"):
        load_prompts(path)


def test_a_cell_of_parquet_that_is_no_text_is_named_and_can_be_left_out(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = pa.array([b"fine", b"\xb0 torn"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"prompt": cells}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"^p\.parquet, row 1, column 'prompt': it cannot be read: .* 0xb0"):
        load_prompts(tmp_path / "p.parquet")
    found = load_prompts(tmp_path / "p.parquet", skip_bad_rows=True)
    assert found.texts == ["fine"] and found.skipped[0].startswith("p.parquet, row 1, column 'prompt'")


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "ab\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"line 1, column 'prompt': character 3 is half of a surrogate pair"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("tools", {"x": False}, r"expected a list of tools, each a JSON schema, got dict \{'x': False\}"),
        ("tools", [5], r"tool 0: expected a JSON schema \(an object\), got int 5"),
        ("tools", "{add", r"expected a list of tools, got a text that is no JSON"),
        ("chat_template_kwargs", ["on"], r"expected an object, the template's variables by name, got list"),
        ("chat_template_kwargs", "on", r"expected an object of variables, got a text that is no JSON"),
        ("chat_template_kwargs", {"messages": []}, r"'messages' is set for the template already"),
    ],
)
def test_what_a_template_cannot_take_is_named_where_it_stands(column, value, problem, tmp_path):
    chat = {"prompt": [{"role": "user", "content": "hi"}], "completion": "yo"}
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(chat)}\n{json.dumps(chat | {column: value})}\n")
    for load in (load_prompts, load_demonstrations):
        with pytest.raises(ValueError, match=rf"data.jsonl, line 2, column '{column}': {problem}"):
            load(file)
    plain = {"prompt": "hi", "completion": "yo", column: value}  # no template: the column may hold anything
    assert load_prompts([plain]).texts == ["hi"]
    assert load_prompts([chat | {column: ""}]).texts == ["hi"]  # an empty cell


def test_a_generator_is_a_source_and_a_table_of_pandas_says_how():
    pandas = pytest.importorskip("pandas")
    assert load_prompts(row for row in ROWS).columns == {"answer": [4, None]}
    with pytest.raises(TypeError, match=r"frame\.to_dict\('records'\)"):
        load_prompts(pandas.DataFrame(ROWS))


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    write(tmp_path / "prompts.jsonl", "")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'prompts\.jsonl'"):
        load_prompts(tmp_path / "promts.jsonl")
    with pytest.raises(FileNotFoundError, match=r"is a folder.*It holds prompts\.jsonl"):
        load_prompts(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_prompts(str(tmp_path / "nowhere" / "a.txt"))
    with pytest.raises(FileNotFoundError, match=r"a single prompt goes into a list"):
        load_prompts("What is 2 + 2?")


def test_a_source_of_the_wrong_kind_says_what_would_work():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(TypeError, match=r"prompts has to be a list.*\.jsonl.*datasets\.Dataset; got int 7"):
        load_prompts(7)
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    with pytest.raises(TypeError, match=r"several splits \(train\)"):
        load_prompts(splits)
    with pytest.raises(ValueError, match=r"pairs\[0\]: expected a dict of columns"):
        load_records(["a"], ("chosen", "rejected"), name="pairs")


# -- skipping -------------------------------------------------------------------------------------------


def test_bad_rows_can_be_skipped_and_are_told(tmp_path):
    path = write(
        tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\noops\n{"prompt": "b", "answer": 1}\n'
    )
    prompts = load_prompts(path, skip_bad_rows=True)
    assert prompts.texts == ["a", "b"]
    assert prompts.columns == {"answer": [None, 1]}
    assert [reason.split(":")[0] for reason in prompts.skipped] == [
        "p.jsonl, line 2, column 'prompt'",
        "p.jsonl, line 3",
    ]


def test_nothing_but_bad_rows_is_an_error():
    with pytest.raises(ValueError, match=r"nothing in it but bad rows \(prompts\[0\], column 'prompt'"):
        load_prompts(["", " "], skip_bad_rows=True)
