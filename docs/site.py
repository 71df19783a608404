"""What MkDocs does beside its configuration: pages from files elsewhere in the repository, and links between all."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# the file of each page that is not in docs/
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "data/README.md": "data.md",
    **{f"domains/mambaseq_{name}/README.md": f"domains/{name}.md" for name in ("dna", "audio", "text", "synthetic")},
    **{str(path.relative_to(ROOT)): f"examples/{path.parent.name}.md" for path in ROOT.glob("examples/*/README.md")},
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they lead in the repository, made those of the site; what has no page there is named without one."""
    sources = {page: source for source, page in PAGES.items()}
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def there(link: re.Match[str]) -> str:
        picture, text, target, part = link[1], link[2], link[3], link[4] or ""
        if ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        path = next((one for one in (path, f"{path}/README.md") if one in PAGES), path)
        found = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            return f"`{path}`" if text.rstrip("/") in path else f"{text} (`{path}`)"
        return f"{picture}[{text}]({posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or '.')}{part})"

    return _LINK.sub(there, markdown)
