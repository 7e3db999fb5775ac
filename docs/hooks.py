"""What mkdocs is told beyond mkdocs.yml: how files of the repository, and the messages in its source, become pages.

Pages link to files as they lie in the repository, so that every link works where the repository is read, too. Here each
link that leaves docs/ is led to a copy within the site: a page for those of `PAGES`, the file itself for all others.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for docs, which is no package that is installed

from docs import messages, notebooks  # noqa: E402

# Files outside of docs/ that are pages of the site.
PAGES = {
    "CHANGELOG.md": "about/changelog.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "README.md": "README.md",
    "SECURITY.md": "about/security.md",
    "benchmarks/README.md": "about/benchmarks.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")


def place(path: Path) -> str:
    """Where a file of the repository lies in the site, as mkdocs names its source."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".ipynb":
        return f"notebooks/{path.stem}.md"
    part_of_docs = name.startswith("docs/") and path.suffix != ".py"
    return PAGES.get(name, name.removeprefix("docs/") if part_of_docs else f"repository/{name}")


def target(link: str, page: Path) -> Path:
    """The file that a link on a page leads to."""
    return Path(os.path.normpath(page.parent / link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere, and every file that a page links to."""
    for name, uri in PAGES.items():
        if not files.get_file_from_path(uri):
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for path in sorted(notebooks.FOLDER.glob("*.ipynb")):
        files.append(File.generated(config, place(path), content=notebooks.page(path)))
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            path = target(link, Path(page.abs_src_path or ROOT / "docs" / page.src_uri))
            if path.is_file() and not files.get_file_from_path(place(path)):
                files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Leads the links of a page to where their files lie in the site."""
    here = Path(page.file.abs_src_path or ROOT / "docs" / page.file.src_uri)

    def led(found: re.Match[str]) -> str:
        path = target(found[1], here)
        if not (path.is_file() and path.is_relative_to(ROOT)):
            return found[1]  # mkdocs says that it leads nowhere
        return os.path.relpath(place(path), os.path.dirname(page.file.src_uri) or ".")

    if page.file.src_uri == "troubleshooting/messages.md":
        markdown += "\n" + messages.page(messages.messages())
    return LINK.sub(led, markdown.replace(" ± ", "\u00a0±\u00a0"))  # an interval is never broken in two
