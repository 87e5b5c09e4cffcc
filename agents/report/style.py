"""How the report looks: the type of the reader's own system, aligned digits, few colours, and it prints."""

CSS = """
:root { color-scheme: light dark; --ink: #222; --lead: #3b4045; --quiet: #6f757b; --line: #e4e6e8; --axis: #c9ccd0;
  --paper: #fff; --soft: #f5f6f7; --warn: #fcf8ee; --warn-edge: #b8860b; --good: #eef7ef; --good-edge: #3c8a48;
  --bad: #fbefef; --bad-edge: #b03a48; --blue: #1f6fb4; --gold: #b8860b; --red: #b03a48; --teal: #2a8c82;
  --purple: #77549c; --green: #5d8a3a; --grey: #66707a; }
@media screen and (prefers-color-scheme: dark) { :root {
  --ink: #e6e8ea; --lead: #c4c9ce; --quiet: #98a0a8; --line: #33383d;
  --axis: #4a5056; --paper: #16191c; --soft: #212529; --warn: #2b2617; --warn-edge: #d9a92c; --good: #17281b;
  --good-edge: #62b56f; --bad: #301c1f; --bad-edge: #e0717f; --blue: #63aeea; --gold: #e0b040; --red: #e57d89;
  --teal: #5cc3b7; --purple: #b695d8; --green: #9cc877; --grey: #a4adb6; } }
@media print { :root { color-scheme: light; --ink: #222; --lead: #3b4045; --quiet: #6f757b; --line: #e4e6e8;
  --axis: #c9ccd0; --paper: #fff; --soft: #f5f6f7; --warn: #fcf8ee; --warn-edge: #b8860b; --good: #eef7ef;
  --good-edge: #3c8a48; --bad: #fbefef; --bad-edge: #b03a48; --blue: #1f6fb4; --gold: #b8860b; --red: #b03a48;
  --teal: #2a8c82; --purple: #77549c; --green: #5d8a3a; --grey: #66707a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 0 0 10px; }
section { margin-top: 36px; }
.lead { font-size: 17px; margin: 0; color: var(--lead); }
.quiet, small { color: var(--quiet); font-size: 13px; font-weight: normal; }
p.quiet { margin: 6px 0 10px; }
small { display: block; line-height: 1.35; white-space: nowrap; }
.two { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 48px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 20px; margin: 0; }
dt { color: var(--quiet); }
dt.code, code, pre {
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: 13px; }
dt.code { padding-top: 1px; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; }
table.narrow { max-width: 560px; }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--quiet);
  vertical-align: bottom; line-height: 1.3; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; }
th.num { white-space: normal; }
.wide { overflow-x: auto; }
.findings { list-style: none; margin: 0; padding: 0; }
.findings li { border-left: 3px solid var(--warn-edge); background: var(--warn); padding: 8px 14px;
  margin-bottom: 8px; max-width: 860px; }
.verdict { border-left: 3px solid var(--warn-edge); background: var(--warn); padding: 10px 16px; margin: 0 0 18px;
  max-width: 860px; }
.verdict.good { border-color: var(--good-edge); background: var(--good); }
.verdict.bad { border-color: var(--bad-edge); background: var(--bad); }
svg.toy { display: block; width: 100%; height: auto; }
.narrow-only { display: none; }
figure.main { max-width: 860px; margin-bottom: 18px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
td.flag { color: var(--bad-edge); font-weight: 700; }
.name { white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 22px 26px; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 14px; margin-bottom: 4px; }
figcaption span { display: block; color: var(--quiet); font-size: 13px; line-height: 1.3; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.legend { margin: 0 0 12px; }
.legend span { margin-right: 24px; white-space: nowrap; }
i { display: inline-block; width: 18px; vertical-align: 4px; margin-right: 7px; }
.samples td { padding-top: 8px; padding-bottom: 8px; }
.samples td:not(.num) { min-width: 170px; overflow-wrap: anywhere; }
.samples .num + :not(.num) { padding-left: 22px; }
@media screen and (max-width: 560px) {
  .samples, .samples tbody, .samples tr, #browser thead, #browser thead tr { display: block; }
  .samples thead, #browser thead th:not(.num) { display: none; }
  #browser thead tr::before { content: "Sort by "; color: var(--quiet); font-size: 13px; }
  #browser thead th { display: inline-block; padding: 0 14px 6px 0; border: 0; vertical-align: baseline; }
  .samples tbody tr { border-bottom: 1px solid var(--line); padding: 8px 0; }
  .samples td, .samples td.num, .samples td:not(.num), .samples .num + td:not(.num) {
    display: block; border: 0; padding: 1px 0; min-width: 0; }
  .samples td.num { display: inline-block; padding-right: 14px; } .samples td.none { display: none; }
  .samples td::before { content: attr(data-label) " "; color: var(--quiet); font-size: 12.5px; } }
.controls { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; }
input, select, button { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--axis);
  border-radius: 4px; padding: 3px 8px; max-width: 100%; }
th button { border: 0; padding: 0; font-weight: 600; font-size: 13px; color: var(--quiet); cursor: pointer; }
th[aria-sort=descending] button::after { content: " \2193"; }
th[aria-sort=ascending] button::after { content: " \2191"; }
[hidden] { display: none !important; }
.strip { margin: 0 0 22px; }
.strip table { width: auto; }
.strip th, .strip td { padding: 3px 7px; border: 1px solid var(--paper); font-size: 12px; white-space: nowrap; }
.strip thead th { color: var(--ink); text-align: right; }
.strip th[scope=row] { text-align: left; position: sticky; left: 0; background: var(--paper); }
details dl { margin-top: 10px; }
summary { cursor: pointer; }
pre { background: var(--soft); padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
@media (max-width: 900px) { .two { grid-template-columns: minmax(0, 1fr); gap: 32px; }
  .plots { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 560px) { .wide-only { display: none; } .narrow-only { display: block; }
  th, td { padding-right: 8px; } .kinds th, .kinds td { padding-right: 6px; font-size: 12.5px; }
  .strip th[scope=row] { white-space: normal; max-width: 92px; }
  .kinds th { font-size: 11.5px; } .kinds th:nth-child(2), .kinds td:nth-child(2) { display: none; }
  main { padding: 24px 16px 40px; } .plots { grid-template-columns: minmax(0, 1fr); } }
@media print { #browser { display: none; } .wide { overflow: visible; } p { break-inside: avoid; }
  .samples { font-size: 12px; } .samples td:not(.num) { min-width: 0; }
  .samples th, .samples td { padding-right: 8px; } .samples .num + :not(.num) { padding-left: 10px; }
  .strip th, .strip td { padding: 2px 4px; font-size: 9px; } .strip th[scope=row] { position: static; }
  /* a cell of a grid is torn between two pages, a letter of a line is not */
  .plots { display: block; }
  .plots figure { display: inline-block; vertical-align: top; width: 47%; margin: 0 2% 18px 0; }
  .strip { display: inline-block; width: 100%; }
  main { max-width: none; padding: 0; } section { margin-top: 24px; } h2, h3, p.quiet, .legend { break-after: avoid; }
  tr { break-inside: avoid; }
  .findings li, .verdict, pre, .strip td { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
