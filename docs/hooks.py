"""What MkDocs is told beside mkdocs.yml: links to source files lead to pages that show them, so the site stands alone.

A page of docs/ may link to a file of the repository (``../examples/custom_agent.py``). On a site there is no repository
around it, so every such file becomes a page of its own under ``source/``.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: A Markdown link that leaves docs/: one or more "../", then a path, without an anchor.
OUTWARD = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)\)")
_LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".md": "markdown"}


def outward_links(markdown: str, page: str) -> dict[str, str]:
    """Links of a page that leave docs/, and the paths from the root of the repository that they lead to.

    Args:
        markdown: The page.
        page: Its path in docs/.
    """
    found = {}
    for link in OUTWARD.findall(markdown):
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
        if not path.startswith("docs/") and (ROOT / path).is_file():
            found[link] = path
    return found


def on_files(files, config):
    """A page for every source file that some page links to."""
    sources = set()
    for file in files.documentation_pages():
        sources |= set(
            outward_links(Path(file.abs_src_path).read_text(encoding="utf-8"), file.src_uri).values()
        )
    for path in sorted(sources):
        files.append(File.generated(config, f"source/{path}.md", content=_show(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links out of docs/ to the pages that show what they lead to."""
    for link, path in outward_links(markdown, page.file.src_uri).items():
        here = posixpath.dirname(page.file.src_uri) or "."
        markdown = markdown.replace(f"]({link})", f"]({posixpath.relpath(f'source/{path}.md', here)})")
    return markdown


def _show(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        cells = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"````python\n{source}\n````" if is_code else source for source, is_code in cells)
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text}\n````\n"
