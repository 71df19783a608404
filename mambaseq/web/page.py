"""The page to type into: one HTML file without a network but the server's."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from mambaseq.reporting.charts import DARK, LIGHT


def make_page() -> tuple[str, dict[str, str]]:
    """The page, in the colours of reports, and its headers: it runs its own script alone and reaches this server
    alone."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = text.replace("/* LIGHT */", LIGHT).replace("/* DARK */", DARK)
    parts = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style")}
    allowed = "; ".join(f"{tag}-src {' '.join(map(_hash, found))}" for tag, found in parts.items())
    policy = (
        f"default-src 'none'; connect-src 'self'; {allowed}; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
