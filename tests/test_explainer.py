"""The explainer pages: their numbers are what the code computes, their functions exist, and a browser opens them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.chromium import Browser, find_chromium
from tests.test_docs import resolve

HERE = Path(__file__).parents[1] / "docs" / "explainer"
PAGES = re.findall(r'^  \["(\w+\.html)"', (HERE / "explainer.js").read_text(encoding="utf-8"), re.MULTILINE)
#: Functions by page, as "module:name".
FUNCTIONS = {
    page: " ".join(
        re.findall(r'data-(?:made|function)="([^"]+)"', (HERE / page).read_text(encoding="utf-8"))
    ).split()
    for page in PAGES
}


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("explainer_build", HERE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.skip("no Chromium is installed")
    with Browser() as opened:
        yield opened


def leaves(tree, path=""):
    """Every number and text of nested lists and dicts, with where it is."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, tree


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", ["sft", "discount", "clip", "bradley_terry", "slips"])
def test_the_numbers_on_the_pages_are_what_the_code_computes(build, section):
    stored = dict(leaves(build.read_numbers()[section]))
    found = dict(leaves(build.rounded(build.SECTIONS[section]())))
    assert stored.keys() == found.keys()
    for path, value in found.items():
        if isinstance(value, float):
            assert stored[path] == pytest.approx(value, rel=1e-3, abs=1e-6), path
        else:
            assert stored[path] == value, path


def test_the_numbers_of_the_lectures_come_out(build):
    numbers = build.read_numbers()
    assert numbers["sft"]["worked"]["loss"] == pytest.approx(0.299001, abs=1e-5)
    assert numbers["kl"]["worked"]["kl"] == pytest.approx(0.0385908, abs=1e-6)
    assert numbers["slips"]["loss_wrong_order"] == pytest.approx(0.913015, abs=1e-5)
    assert numbers["slips"]["probability"] == pytest.approx(0.845535, abs=1e-5)


def test_ppo_is_drawn_where_the_exact_optimum_is_and_dpo_is_not(build):
    for row in build.read_numbers()["ppo_dpo"]["by_beta"]:
        assert row["ppo"]["objective"] == pytest.approx(row["optimum"]["objective"], abs=0.01)
        assert row["dpo"]["objective"] < row["optimum"]["objective"] - 0.2


def test_the_proxy_goes_on_rising_where_gold_has_fallen(build):
    run = build.read_numbers()["goodhart"]["runs"]["grpo"]
    best, last = run["points"][run["best"]], run["points"][-1]
    assert last["proxy"] > best["proxy"] + 0.2 and last["gold"] < best["gold"] - 0.03


def test_every_page_has_its_numbers_and_every_number_a_page(build):
    sections = set(build.read_numbers())
    assert sections == set(build.SECTIONS)
    used = {
        name
        for page in PAGES
        for name in re.findall(r"NUMBERS\.(\w+)", (HERE / page).read_text(encoding="utf-8"))
    }
    assert used == sections


def test_a_script_of_numbers_is_read_as_it_was_written(build, tmp_path):
    sections = {"clip": build.rounded({"a": [1.23456789, True, "\u2212", None], "b": 1e-17}), "kl": {}}
    build.write_numbers(sections, tmp_path / "numbers.js")
    assert (
        build.read_numbers(tmp_path / "numbers.js")
        == sections
        == {"clip": {"a": [1.2346, True, "\u2212", None], "b": 0}, "kl": {}}
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_a_page_names_exists(page):
    assert FUNCTIONS[page]
    for path in FUNCTIONS[page]:
        assert callable(resolve(path.replace(":", ".")))


def test_links_to_the_reference_lead_to_what_it_shows():
    script = (HERE / "explainer.js").read_text(encoding="utf-8")
    table = re.search(r"const REFERENCE = \{(.*?)\};", script, re.DOTALL)[1]
    pages = dict(re.findall(r'"([\w.]+)": "(\w+)"', table))
    for path in {path for paths in FUNCTIONS.values() for path in paths}:
        module, name = path.split(":")
        if module in pages:
            text = (HERE.parent / "reference" / f"{pages[module]}.md").read_text(encoding="utf-8")
            shown = dict(re.findall(r"^::: (\S+)(?:\n    options: \{members: (.*)\})?", text, re.MULTILINE))
            whole = module in shown and (not shown[module] or name in re.findall(r"\w+", shown[module]))
            assert whole or f"{module}.{name}" in shown, path


STEPS = "document.querySelector('main').innerText + document.querySelector('main').innerHTML.length"


@pytest.mark.parametrize("page", ["index.html", *PAGES])
def test_a_page_opens_without_a_complaint_and_obeys_the_keyboard(browser, page):
    browser.open((HERE / page).as_uri(), width=390, dark=True)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    before = browser.evaluate(STEPS)
    if browser.evaluate("keys.step !== null"):
        browser.press("End")
        browser.press("ArrowLeft")
        assert browser.evaluate(STEPS) != before, "the arrow keys change nothing"
    if browser.evaluate("keys.choose !== null"):
        before = browser.evaluate(STEPS)
        browser.press("2")
        assert browser.evaluate(STEPS) != before, "the number keys change nothing"
    assert "NaN" not in browser.evaluate("document.body.innerText") + browser.evaluate(
        "document.body.innerHTML"
    )
    assert "undefined" not in browser.evaluate("document.body.innerText")
    assert browser.errors == [] and browser.requests == []


def test_a_browser_hears_of_errors_and_of_requests(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<script>fetch('http://127.0.0.1:9/x').catch(() => 0); missing();</script><img src='gone.png'>"
    )
    browser.open(page.as_uri())
    assert any("missing is not defined" in error for error in browser.errors)
    assert browser.requests == ["http://127.0.0.1:9/x"]


def test_n_leads_to_the_next_page_and_to_the_last(browser):
    browser.open((HERE / PAGES[0]).as_uri())
    browser.press("n")
    assert browser.wait_for(f"location.pathname.endsWith({json.dumps(PAGES[1])})")
