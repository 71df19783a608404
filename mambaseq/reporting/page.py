"""The report's page: one HTML file without a network, readable on a phone, light or dark as its reader has it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, Template

from mambaseq.atomic import atomic_file
from mambaseq.reporting import charts
from mambaseq.reporting.sections import Section

_STYLE = (
    f"""
:root {{ color-scheme: light dark; {charts.LIGHT} --card: #f6f8fa; --good: #176b2c; --bad: #b42318; }}
@media (prefers-color-scheme: dark) {{
  :root {{ {charts.DARK} --card: #18212a; --good: #6fce87; --bad: #ff9d8a; }}
}}
"""
    + """
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0; background: var(--ground); color: var(--ink); }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 3rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 0 0 .6rem; }
p { margin: .5rem 0; max-width: 52rem; }
a { color: var(--first); text-decoration: none; } a:hover { text-decoration: underline; }
.lead { font-size: 1.12rem; color: var(--soft); }
.badge { display: inline-block; padding: .1rem .6rem; margin: 0 .4rem .4rem 0; border: 1px solid; border-radius: 1rem;
  font-size: .85rem; } .good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--soft); }
.note { border-left: 3px solid var(--bad); padding: .2rem .8rem; overflow-wrap: anywhere; }
.tiles, .pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
  margin: 1.2rem 0; }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 31rem), 1fr)); }
.tile { background: var(--card); border-radius: .7rem; padding: 1rem; min-width: 0; }
.tile p { color: var(--soft); font-size: .92rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .8rem 1rem; }
.tiles .pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 8rem), 1fr)); }
.tiles .pair text { display: none; } .tiles .pair audio { height: 2rem; }
.wide > .pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.pair > *, .body > * { min-width: 0; }
.scroll { overflow-x: auto; max-width: 100%; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .95rem; }
.body > table { display: block; overflow-x: auto; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td { max-width: 26rem; }
td + td { overflow-wrap: anywhere; min-width: 9rem; } td.number { min-width: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
figure { margin: .5rem 0; max-width: 40rem; } .pair figure { margin: 0; }
figcaption { color: var(--soft); font-size: .88rem; }
img { max-width: 100%; height: auto; border-radius: .4rem; } audio { width: 100%; max-width: 100%; height: 2.4rem; }
pre { background: var(--card); border-radius: .5rem; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .88rem/1.5 ui-monospace, monospace; margin: .6rem 0; } .tile pre { background: none; padding: 0; }
.chart { display: block; width: 100%; height: auto; }
summary { cursor: pointer; color: var(--first); margin: .6rem 0; }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: .5rem 1rem; }
.tabs { display: flex; flex-wrap: wrap; max-width: 40rem; } .tabs input { position: absolute; opacity: 0; }
.tabs label { padding: .15rem .7rem; border-radius: 1rem; font-size: .88rem; color: var(--soft); cursor: pointer; }
.tabs input:checked + label { background: var(--card); color: var(--ink); }
.tabs input:focus-visible + label { outline: 2px solid var(--first); }
.tabs figure { order: 1; width: 100%; display: none; } .tabs input:checked + label + figure { display: block; }
"""
    + charts.STYLE
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ style | safe }}</style></head><body><main>
<header>
<h1>{{ title }}</h1>
{% for kind, words in badges %}<span class="badge {{ kind }}">{{ words }}</span>{% endfor %}
<p class="lead">{{ lead }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
{% if tiles %}<div class="tiles">{% for section in tiles %}
<article class="tile"><h3><a href="#part-{{ loop.index }}">{{ section.title }}</a></h3>
{{ section.highlight | safe }}
<p>{{ section.summary }}</p></article>
{% endfor %}</div>{% endif %}
</header>
{% for section in sections %}<section><h2 id="part-{{ loop.index }}">{{ section.title }}</h2>
{% if not section.highlight and section.summary %}<p class="lead">{{ section.summary }}</p>{% endif %}
<div class="body">{{ section.body | safe }}</div></section>
{% endfor %}
</main></body></html>
"""


@functools.cache
def _template() -> Template:
    return Environment(autoescape=True).from_string(_PAGE)


def write_page(
    path: Path,
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    badges: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> None:
    """One self-contained HTML file.

    Sections with a highlight come first, and stand in its head as well. badges: short words below the title, each with
    "good", "bad" or "soft". notes: paragraphs that must be seen.

    Raises UserError when the disk is full or not writable.
    """
    tiles = [section for section in sections if section.highlight]
    sections = [*tiles, *(section for section in sections if not section.highlight)]
    text = _template().render(
        title=title, lead=lead, sections=sections, tiles=tiles, badges=badges, notes=notes, style=_STYLE
    )
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(text)
