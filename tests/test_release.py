"""What a release says of itself, said once or the same everywhere."""

import re
import sys
from pathlib import Path

import pytest

import flatmin

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_version_stands_once_and_in_citation_and_recipe():
    assert 'version = { attr = "flatmin.__version__" }' in PYPROJECT
    assert f"\nversion: {flatmin.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    recipe = (ROOT / "recipe" / "meta.yaml").read_text()
    assert f'set version = "{flatmin.__version__}"' in recipe
    least = re.search(r"torch>=([\d.]+)", PYPROJECT)[1]
    assert f"- pytorch >={least}\n" in recipe


def test_the_workflow_runs_what_continuous_integration_runs_on_every_python():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert "- run: .ci/run\n" in workflow
    matrix = re.search(r"python: \[(.*)\]", workflow)[1]
    assert re.findall(r'"([\d.]+)"', matrix) == re.findall(r"Python :: (3\.\d+)", PYPROJECT)


def test_the_workflow_builds_the_site():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert "- run: make docs\n" in workflow


def test_the_types_are_in_the_package():
    assert (Path(flatmin.__file__).parent / "py.typed").exists()
    assert '"py.typed"' in PYPROJECT


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_every_extra_that_a_message_names_exists():
    import tomllib

    extras = set(tomllib.loads(PYPROJECT)["project"]["optional-dependencies"])
    texts = [path.read_text() for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]]
    named = {name for text in texts for found in re.findall(r"flatmin\[([\w,]+)\]", text) for name in found.split(",")}
    assert "lightning" in named
    assert named - {"NAME"} <= extras
