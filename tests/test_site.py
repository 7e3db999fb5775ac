"""The site is built without a warning, has every public name, and asks the network for nothing."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from docs import messages
from tests.test_package import PUBLIC

ROOT = Path(__file__).parent.parent

pytest.importorskip("material", reason="needs mkdocs-material")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    return folder


class Page(HTMLParser):
    """What a page loads, its anchors, and its text."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.anchors, self.text = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.add(given.get("id"))
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        if tag != "a" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads += [
                given[name] for name in ("src", "href", "srcset", "poster", "data", "action") if given.get(name)
            ]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def pages(site):
    """Each page by its place; that of what is not found is left out, whose links are a server's."""
    return {str(path.relative_to(site)): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_no_page_asks_the_network_for_anything(site, pages):
    assert len(pages) > 50
    assert {load for page in pages.values() for load in page.loads if re.match(r"(\w+:)?//", load)} == set()
    styles = [*site.rglob("*.css")]
    assert styles
    for style in styles:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_link_within_the_site_leads_somewhere(site, pages):
    """Strict mkdocs sees those of pages to pages; not those to files, and not those of mkdocstrings."""
    wrong, seen = [], 0
    for name, page in pages.items():
        for link in {unquote(link) for link in page.links if not re.match(r"\w+:", link)}:
            path, _, anchor = link.partition("#")
            target = (site / name).parent.joinpath(path).resolve() if path else site / name
            known = pages.get(os.path.relpath(target, site))
            seen += 1
            if not target.exists() or (anchor and known and anchor not in known.anchors):
                wrong.append((name, link))
    assert seen > 1000
    assert wrong == []


def test_every_public_name_is_in_the_reference(pages):
    anchors = {anchor for name, page in pages.items() if name.startswith("api/") for anchor in page.anchors}
    assert missing(anchors) == []
    assert missing(anchors - {"flatmin.losses.SAF"}) == ["flatmin.losses.SAF"]


def missing(anchors):
    """The public names without an entry; modules have pages of their own, in which stands what `flatmin` has."""
    found = []
    for name in PUBLIC[1:]:
        base = ROOT.joinpath("src", *name.split("."))
        source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        (symbols,) = re.findall(r"^__all__ = (\[.*?\])$", source.read_text(), re.MULTILINE | re.DOTALL)
        modules = {path.stem for path in base.glob("*")}
        found += [f"{name}.{symbol}" for symbol in ast.literal_eval(symbols) if symbol not in modules]
    return [symbol for symbol in found if symbol not in anchors]


def raised():
    """Each place of the source that raises an error of flatmin's, or warns: file, line and kind."""
    own = {*messages.kinds(), "warn"}
    for path in sorted(messages.SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            name = ast.unparse(call.func).rpartition(".")[2] if isinstance(call, ast.Call) else ""
            if name in own and (isinstance(node, ast.Raise) or name == "warn"):
                yield path.relative_to(messages.SOURCE).as_posix(), call.lineno


def test_every_message_is_on_the_page_of_messages(pages):
    """A message is read from the source where it is a text; those that pass on another's words are known by name."""
    found = {(message.file, message.line): message for message in messages.messages()}
    places = set(raised())
    assert len(places) > 400
    assert places <= set(found)
    text = " ".join("".join(pages["troubleshooting/messages.html"].text).split())
    assert [each for each in found.values() if " ".join(each.text.split()) not in text] == []
    passing_on = {found[place].file for place in places if not found[place].text}
    optimizers = {"integrations/opacus/_dpsat.py", "optim/_squat.py", "optim/_stepping.py"}
    assert passing_on == {"lab/comparison/warned.py", "lab/runs/resume.py", "lab/runs/run.py", *optimizers}


def test_every_kind_of_error_has_its_way_out():
    page = (ROOT / "docs" / "troubleshooting" / "README.md").read_text()
    for kind in messages.kinds():
        assert re.search(rf"^\| `{kind}`[^|]*\| [^|]+ \| [^|]+ \|$", page, re.MULTILINE), kind
