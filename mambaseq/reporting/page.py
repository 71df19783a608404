"""The report's page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from mambaseq.atomic import atomic_file
from mambaseq.reporting.sections import Section

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; max-width: 100%; }
figcaption { color: #666; font-size: .85rem; max-width: 40rem; } img { max-width: 100%; }
pre { background: #f6f6f6; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.won { color: #176b2c; } .lost { color: #9a3412; }
</style></head><body>
<h1>{{ title }}</h1>
{{ lead | safe }}
<ul>{% for section in sections %}
<li><a href="#{{ loop.index }}">{{ section.title }}</a>: {{ section.summary }}</li>
{% endfor %}</ul>
{% for section in sections %}<h2 id="{{ loop.index }}">{{ section.title }}</h2>
{{ section.body | safe }}
{% endfor %}
</body></html>
"""


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """One self-contained HTML file."""
    template = Environment(autoescape=True).from_string(_PAGE)
    text = template.render(title=title, lead=f"<p>{html.escape(lead)}</p>", sections=sections)
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(text)
