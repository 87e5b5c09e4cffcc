"""How sure a language model is of every token of an answer, as a page.

    scored = {"before": score_tokens(model, tokenizer, records)}
    ...                                                      # fine-tune the model
    scored["after"] = score_tokens(model, tokenizer, records)
    Path("tokens.html").write_text(heatmap_html(scored))

Each token of the response is coloured by the probability that the model gave it, from green (near 1: sure, and
right) over yellow to red (near 0: surprised); the number under it is that probability in per cent, a dashed line
marks a token that was not the model's own first choice, and prompts are grey. The page is one file without scripts,
fonts or links; pointing at a token shows the model's own choice. The same as a picture:
:func:`agents.evaluation.token_heatmap_image.heatmap_image`. Left out: whole distributions and attention.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.offline.sft import IGNORE, encode_demonstration, fit, load_model
from reward_models.data.encoding import TextEncoder
from reward_models.data.lengths import Lengths

#: Colours of probability 0, 1/4, 1/2, 3/4 and 1.
_SCALE = ((232, 106, 90), (246, 165, 106), (250, 221, 133), (178, 216, 134), (104, 190, 117))
_GREY = (232, 233, 236)


class TokenScore(NamedTuple):
    """One token of a record.

    Attributes:
        text: The token, as text.
        prob: The model's probability of it; None for a token that carries no loss (the prompt).
        choice: The model's own first choice in its place, as text.
        choice_prob: The probability of that.
    """

    text: str
    prob: float | None = None
    choice: str = ""
    choice_prob: float = 0.0

    @property
    def is_first_choice(self) -> bool:
        """Whether the token is the model's most likely one."""
        return self.prob is not None and self.prob >= self.choice_prob


Scored = Sequence[Sequence[TokenScore]]


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | TextEncoder,
    records: Sequence[dict[str, Any]],
    max_length: int | None = None,
) -> list[list[TokenScore]]:
    """Every token of every record with the probability that the model gives it.

    Args:
        model: A causal language model; dropout is off here.
        tokenizer: Its tokenizer, or an encoder with settings of its own.
        records: Of any form that :func:`agents.offline.sft.encode_demonstration` takes. One without a token to
            score is left out.
        max_length: Longer records are cut as in fine-tuning; None is the length the model can hold.
    """
    encoder = TextEncoder.of(tokenizer)
    tokenizer = encoder.tokenizer
    lengths = Lengths.of(max_length, model.config, tokenizer)
    was_training = model.training
    model.eval()
    scored = []
    for record in records:
        example = fit(encode_demonstration(record, encoder), lengths)
        if example is not None:
            scored.append(_score(model, tokenizer, *example))
    model.train(was_training)
    return scored


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]
) -> list[TokenScore]:
    first = next(t for t, label in enumerate(labels) if t and label != IGNORE)
    tensor = torch.tensor([ids], device=model.device)
    # With a large vocabulary the logits of a long prompt would be the memory peak.
    logits = model(input_ids=tensor, use_cache=False, logits_to_keep=len(ids) - first + 1).logits
    probs = (
        logits[0, first - len(ids) - 1 : -1].float().softmax(-1)
    )  # [T - first, V], of the tokens from first on
    best, choice = (x.tolist() for x in probs.max(-1))
    given = probs.gather(-1, tensor[0, first:, None]).squeeze(-1).tolist()
    tokens = [TokenScore(_show(tokenizer, i)) for i in ids]
    for k, t in enumerate(range(first, len(ids))):
        if labels[t] != IGNORE:
            tokens[t] = TokenScore(tokens[t].text, given[k], _show(tokenizer, choice[k]), best[k])
    return tokens


def token_heatmap(
    model: Any, records: Sequence[dict[str, Any]], tokenizer: Any = None, device: str = "auto"
) -> str:
    """The page of one model: how sure it is of every token of these records.

    Args:
        model: A folder, a hub id, or a live model, which needs ``tokenizer``.
        records: Of any form that :func:`agents.offline.sft.encode_demonstration` takes.
        tokenizer: None takes the one that lies beside the model.
        device: "auto" or any torch device.
    """
    name = str(model) if not isinstance(model, PreTrainedModel) else "model"
    model, tokenizer = load_model(model, tokenizer, device)
    return heatmap_html({name: score_tokens(model, tokenizer, records)})


def _show(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as people can see it, also where it is white space or half a character."""
    text = tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥")
    if not text.strip():
        return "␣" * len(text) if text else str(tokenizer.convert_ids_to_tokens(token))
    return text.strip()


def summary(scored: Scored) -> dict[str, float]:
    """``loss`` in nats per token, ``perplexity``, and ``accuracy``: how often the token was the first choice."""
    tokens = [token for record in scored for token in record if token.prob is not None]
    loss = -sum(math.log(max(token.prob, 1e-30)) for token in tokens) / len(tokens)
    accuracy = sum(token.is_first_choice for token in tokens) / len(tokens)
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}


def colour(prob: float | None) -> tuple[int, int, int]:
    """Red, green and blue in [0, 255] of a probability; grey for None."""
    if prob is None:
        return _GREY
    place = min(max(prob, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    pairs = zip(_SCALE[low], _SCALE[low + 1], strict=True)
    return tuple(round(a + (b - a) * (place - low)) for a, b in pairs)


def prompt_length(record: Sequence[TokenScore]) -> int:
    """How many tokens come before the first that is scored."""
    return next(i for i, token in enumerate(record) if token.prob is not None)


def _percent(prob: float) -> str:
    return "<1" if 0 < prob < 0.005 else f"{100 * prob:.0f}"


def check_scored(scored: Mapping[str, Scored]) -> None:
    """Raise a ValueError unless every model has scored the same number of records, and at least one."""
    lengths = {name: len(records) for name, records in scored.items()}
    if not scored or len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"a heatmap wants the same records, one or more, for every model, got {lengths}")


# -- the page -----------------------------------------------------------------------------------------------

_STYLE = """
:root { --ink: #1f2328; --quiet: #6b7280; --page: #fbfbfa; --card: #fff; --line: #e5e7eb; --grey: rgb(232,233,236) }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; letter-spacing: -.01em }
p.lead { margin: 0 0 1.4rem; color: var(--quiet); max-width: 46rem }
.top { display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; align-items: flex-end; margin-bottom: 1.8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .22rem 0 .22rem 1.8rem; font-weight: 400; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600 }
thead th { color: var(--quiet); font-size: .82rem }
.legend { font-size: .82rem; color: var(--quiet); width: 19rem }
.bar { height: .8rem; border-radius: .4rem; margin: .25rem 0 .15rem }
.ends { display: flex; justify-content: space-between }
section { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: 1rem 1.2rem .7rem;
          margin-bottom: 1rem }
.row { display: grid; grid-template-columns: 5.2rem 1fr 4.6rem; align-items: start; padding: .35rem 0 }
.row + .row { border-top: 1px solid var(--line) }
.name, .loss { font-size: .82rem; color: var(--quiet); padding-top: .3rem; overflow-wrap: anywhere }
.loss { text-align: right; font-variant-numeric: tabular-nums }
.tokens { display: flex; flex-wrap: wrap; gap: .25rem .2rem }
.t { position: relative; text-align: center; cursor: default; outline: none }
.t b { display: block; font-weight: 500; color: #1f2328; padding: .08rem .42rem; border-radius: .35rem;
       background: rgb(var(--c)); border-bottom: 2px solid transparent; white-space: pre }
.t.off b { border-bottom: 2px dashed #1f2328aa }
.t i { display: block; font-style: normal; font-size: .68rem; line-height: 1.2; color: var(--quiet);
       font-variant-numeric: tabular-nums }
.p b { background: var(--grey); color: #4b5563 }
.t[data-tip]:hover::after, .t[data-tip]:focus::after { content: attr(data-tip); position: absolute; z-index: 2; left: 0;
       top: calc(100% + .2rem); width: max-content; max-width: 20rem; white-space: pre-line; text-align: left;
       background: #1f2328; color: #fff; font-size: .8rem; line-height: 1.45; padding: .45rem .65rem;
       border-radius: .45rem; box-shadow: 0 4px 14px #0003 }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr } .loss { text-align: left } }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --quiet: #9aa1ab; --page: #15181c; --card: #1c2025; --line: #2d333b;
          --grey: rgb(201,204,209) } }
@media print { body { background: #fff } section { break-inside: avoid }
       * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""


def heatmap_html(scored: Mapping[str, Scored], title: str = "How sure the model is of every token") -> str:
    """A page that shows the same records under one or more models, one below the other.

    Args:
        scored: What :func:`score_tokens` returned for the records, by the name to show, such as "before" and "after".
        title: The heading.

    Raises:
        ValueError: The models have scored different numbers of records, or none.
    """
    check_scored(scored)
    records = [_html_record(i, scored) for i in range(len(next(iter(scored.values()))))]
    stops = ", ".join(f"rgb{stop}" for stop in _SCALE)
    rows = "".join(_html_summary(name, summary(found)) for name, found in scored.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body><main>
<h1>{html.escape(title)}</h1>
<p class="lead">Each token of an answer is coloured by the probability that the model gave it, with what came before
it known; the number below is that probability in per cent. A dashed line marks a token that was not the model's own
first choice: point at it to see what that was. Prompts are grey and carry no loss.</p>
<div class="top"><table><thead><tr><th></th><th>nats per token</th><th>perplexity</th><th>first choice</th></tr></thead>
<tbody>{rows}</tbody></table>
<div class="legend">probability of the token<div class="bar" style="background: linear-gradient(90deg, {stops})"></div>
<div class="ends"><span>surprised 0 %</span><span>50 %</span><span>sure 100 %</span></div></div></div>
{"".join(records)}
</main></body></html>
"""


def _html_summary(name: str, figures: dict[str, float]) -> str:
    return (
        f"<tr><td>{html.escape(name)}</td><td>{figures['loss']:.3f}</td><td>{figures['perplexity']:.2f}</td>"
        f"<td>{figures['accuracy']:.0%}</td></tr>"
    )


def _html_record(index: int, scored: Mapping[str, Scored]) -> str:
    first = next(iter(scored.values()))[index]
    rows = [("prompt", first[: prompt_length(first)], "")]
    for name, found in scored.items():
        rest = found[index][prompt_length(found[index]) :]
        rows.append((name, rest, f"{summary([rest])['loss']:.2f} nats"))
    cells = "".join(
        f'<div class="row"><div class="name">{html.escape(name)}</div>'
        f'<div class="tokens">{"".join(map(_html_token, tokens))}</div><div class="loss">{loss}</div></div>'
        for name, tokens, loss in rows
    )
    return f"<section>{cells}</section>\n"


def _html_token(token: TokenScore) -> str:
    text = html.escape(token.text)
    if token.prob is None:
        return f'<span class="t p"><b>{text}</b></span>'
    own = "its first choice"
    if not token.is_first_choice:
        own = f"its own choice: “{token.choice}” at {100 * token.choice_prob:.1f} %"
    tip = html.escape(f"“{token.text}” at {100 * token.prob:.1f} %\n{own}")
    red, green, blue = colour(token.prob)
    style = "t" if token.is_first_choice else "t off"
    return (
        f'<span class="{style}" tabindex="0" style="--c:{red},{green},{blue}" data-tip="{tip}">'
        f"<b>{text}</b><i>{_percent(token.prob)}</i></span>"
    )
