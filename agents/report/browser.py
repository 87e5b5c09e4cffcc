"""The samples of a run: searched, filtered and sorted in the page, and a few of them token by token.

The rows are JSON in the page and a script of a few lines shows them; nothing is loaded from anywhere, and the page
allows this script alone, by its hash. Without scripts the tables of first and last answers are still there.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from agents.evaluation.plots import STRIP
from agents.evaluation.records import BEST, FINAL, START
from agents.report.metrics import write_number
from agents.report.reading import Run
from agents.report.tables import num
from agents.runs.samples import read_samples, sample_files
from textrl_env.printable import printable

#: Rows that a page holds at most, and characters of a text.
_MOST, _LONGEST = 1500, 400
#: Episodes under the microscope, and tokens of one.
_EPISODES, _TOKENS = 6, 80
#: Of a strip's numbers, which have two decimals, the smallest that counts as one: rounding is not coloured in.
_SHOWN = 0.05
_SOURCES = {START: "held out, first policy", BEST: "held out, best policy", FINAL: "held out, last policy"}
_NUMBERS = ("score", "gold", "KL", "tokens", "advantage")

SCRIPT = """
(function () {
  var box = document.getElementById('browser');
  var rows = JSON.parse(document.getElementById('samples').textContent);
  var q = function (id) { return document.getElementById(id); };
  var first = window.innerWidth > 560 ? 25 : 8, shown = first, by = null, down = true;
  function options(select, column) {
    var seen = {};
    rows.forEach(function (r) { if (r[column]) seen[r[column]] = true; });
    Object.keys(seen).forEach(function (v) {
      var o = document.createElement('option'); o.value = o.textContent = v; select.appendChild(o);
    });
    if (Object.keys(seen).length < 2) select.parentNode.hidden = true;
  }
  function found() {
    var text = q('find').value.toLowerCase(), kind = q('kind').value, from = q('from').value;
    var list = rows.filter(function (r) {
      return (!kind || r.kind === kind) && (!from || r.from === from) &&
        (!text || (r.prompt + ' ' + r.response).toLowerCase().indexOf(text) >= 0);
    });
    if (by) list.sort(function (a, b) {
      var x = a[by], y = b[by];
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    return list;
  }
  function cell(tr, name, text, style) {
    var td = document.createElement('td'); td.textContent = text; td.dataset.label = name;
    if (style) td.className = style;
    tr.appendChild(td);
  }
  function show() {
    var list = found(), body = q('rows');
    body.textContent = '';
    list.slice(0, shown).forEach(function (r) {
      var tr = document.createElement('tr');
      ['prompt', 'response', 'from'].forEach(function (n) { cell(tr, n, r[n]); });
      NUMBERS.forEach(function (n) {
        var v = r[n], none = v === null || v === undefined;
        var places = n === 'tokens' ? 0 : 2;
        cell(tr, n, none ? '\\u2013' : v.toFixed(places).replace('-', '\\u2212'), none ? 'num none' : 'num');
      });
      body.appendChild(tr);
    });
    q('count').textContent = Math.min(shown, list.length) + ' of ' + list.length + ' samples';
    q('more').hidden = shown >= list.length;
  }
  ['find', 'kind', 'from'].forEach(function (id) {
    q(id).addEventListener('input', function () { shown = first; show(); });
  });
  box.querySelectorAll('th button').forEach(function (b) {
    b.addEventListener('click', function () {
      down = by === b.value ? !down : true; by = b.value;
      box.querySelectorAll('th').forEach(function (th) { th.removeAttribute('aria-sort'); });
      b.parentNode.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      show();
    });
  });
  q('more').addEventListener('click', function () { shown += 100; show(); });
  options(q('kind'), 'kind'); options(q('from'), 'from');
  box.hidden = false; show();
})();
""".replace("NUMBERS", json.dumps(list(_NUMBERS)))


def script_hash() -> str:
    """What a content security policy allows :data:`SCRIPT` by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()


def rows_of(run: Run) -> list[dict[str, Any]]:
    """The samples of a run as the page shows them: held-out answers, and those of the first and the last update."""
    found = []
    for end in (end for end in _SOURCES if end in run.ends):
        evaluation = run.ends[end]
        result, column = evaluation.sampled, run.kind_column
        for i, texts in enumerate(result.responses):
            kind = "" if column is None else str(result.columns[column][i])
            for j, text in enumerate(texts):
                gold = None if result.gold is None else _number(result.gold[i, j])
                found.append(
                    {
                        "prompt": _cut(result.prompts[i]),
                        "response": _cut(text),
                        "kind": kind,
                        "from": _SOURCES[end],
                        "score": _number(result.score[i, j]),
                        "gold": gold,
                        "KL": _number(result.kl[i, j]),
                        "tokens": int(result.length[i, j]),
                    }
                )
    found = _thinned(found, _MOST // 2) + _thinned(_trained_on(run), _MOST // 2)
    return found


def _trained_on(run: Run) -> list[dict[str, Any]]:
    files = sample_files(run.folder)
    chosen = dict.fromkeys([files[0], files[-1]]) if files else {}
    column = run.kind_column or run.by or "kind"
    return [
        {
            "prompt": _cut(row["prompt"]),
            "response": _cut(row["response"]),
            "kind": row.get(f"prompt/{column}") or "",
            "from": f"learned from at {at:,}",
            "score": _number(row["score"]),
            "gold": _number(row.get("score/gold")),
            "KL": _number(row.get("kl_sum")),
            "tokens": int(row["response_length"]),
            "advantage": _number(row.get("advantage")),
        }
        for at, file in chosen
        for row in read_samples(file)
    ]


def _thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many rows, evenly taken."""
    return rows[:: -(-len(rows) // most)] if len(rows) > most else rows


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 3)


def _cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} \N{HORIZONTAL ELLIPSIS}"


def section(run: Run) -> str:
    """The browser; nothing for a run without samples."""
    rows = rows_of(run)
    if not rows:
        return ""
    # "<" would let a text end the element that holds it.
    data = json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c")
    sortable = "".join(
        f"<th class=num><button type=button value='{name}'>{name}</button></th>" for name in _NUMBERS
    )
    return (
        "<section id=browser hidden><h2>Samples</h2><p class=controls>"
        "<label>Search <input id=find type=search></label>"
        "<label>Kind <select id=kind><option value=''>all</option></select></label>"
        "<label>From <select id=from><option value=''>all</option></select></label>"
        "<span id=count class=quiet></span></p>"
        "<div class=wide><table class=samples><thead><tr><th>prompt</th><th>response</th><th>from</th>"
        f"{sortable}</tr></thead><tbody id=rows></tbody></table></div>"
        "<p><button type=button id=more>more</button></p></section>"
        f"<script type='application/json' id=samples>{data}</script><script>{SCRIPT}</script>"
    )


# -- under the microscope -----------------------------------------------------------------------------------


def microscope(run: Run) -> str:
    """A few episodes of the last update token by token, folded away; nothing where no tokens were kept."""
    files = sample_files(run.folder)
    rows = [row for row in read_samples(files[-1][1]) if row.get("tokens")] if files else []
    if not rows:
        return ""
    chosen = sorted(rows, key=lambda row: -abs(row["advantage"]))[:_EPISODES]
    scales = {name: _largest(chosen, name) for name, *_ in STRIP}
    strips = "".join(_strip(row, scales) for row in chosen)
    note = (
        f"Episodes of the last update, at {files[-1][0]:,} {run.unit}: those with the largest advantages first. Green "
        "is above 0, red below; the stronger, the further, by one scale for all of these."
    )
    return f"<section><h2>Episodes under the microscope</h2><p class=quiet>{note}</p>{strips}</section>"


def _largest(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The number that gets the full colour in one line of all strips."""
    return max([_SHOWN, *(abs(value) for row in rows for value in row.get(name) or ())])


def _strip(row: Mapping[str, Any], scales: Mapping[str, float]) -> str:
    tokens = [token.strip() or repr(token) for token in row["tokens"]][:_TOKENS]
    heads = "".join(f"<th>{escape(printable(token))}</th>" for token in tokens)
    lines = []
    for name, label, signed in STRIP:
        if row.get(name):
            values = row[name][:_TOKENS]
            cells = "".join(_cell(value, abs(value) / scales[name], signed) for value in values)
            lines.append(f"<tr><th scope=row>{label}</th>{cells}</tr>")
    gold = row.get("score/gold")
    judged = f"score {write_number(row['score'], 2)}" + (
        "" if gold is None or not np.isfinite(gold) else f", gold {gold:.2f}"
    )
    left = f", {len(row['tokens']) - _TOKENS} more tokens" if len(row["tokens"]) > _TOKENS else ""
    judged += f", advantage {write_number(row['advantage'], 2)}"
    caption = f"{escape(_cut(row['prompt']))} <span>{judged}{left}</span>"
    return (
        f"<figure class=strip><figcaption>{caption}</figcaption><div class=wide tabindex=0><table><thead><tr><th></th>"
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></figure>"
    )


def _cell(value: float, share: float, signed: bool) -> str:
    colour = "60,138,72" if signed and value > 0 else "192,80,77"
    strength = 0.06 + 0.6 * min(share, 1.0)
    return f'<td class=num style="background:rgba({colour},{strength:.2f})">{write_number(value, 2)}</td>'


def first_and_last(run: Run, count: int) -> list[tuple[str, str, str, dict[str, float], dict[str, float]]]:
    """Prompts with an answer of the first and of the last policy, and what both are worth, spread over the prompts."""
    if START not in run.ends or FINAL not in run.ends:
        return []
    first, last = (run.ends[end].sampled for end in (START, FINAL))
    chosen = np.unique(np.linspace(0, len(first.prompts) - 1, count).astype(int))
    return [
        (first.prompts[i], first.responses[i][0], last.responses[i][0], _worth(first, i), _worth(last, i))
        for i in chosen
    ]


def _worth(result: Any, prompt: int) -> dict[str, float]:
    found = {"score": float(result.score[prompt, 0]), "KL": float(result.kl[prompt, 0])}
    return found if result.gold is None else found | {"gold": float(result.gold[prompt, 0])}


def sample_table_rows(
    found: Sequence[tuple[str, str, str, dict[str, float], dict[str, float]]], names: Sequence[str]
) -> list[list[str]]:
    """Rows of the table of first and last answers, cells as HTML."""
    rows = []
    for prompt, first, last, worth_first, worth_last in found:
        row = [escape(_cut(prompt))]
        for text, worth in ((first, worth_first), (last, worth_last)):
            row.append(escape(_cut(text)))
            for name in names:
                row.append(num(write_number(worth[name], 2)))
        rows.append(row)
    return rows
