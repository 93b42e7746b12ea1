"""README and docs: the files, pictures and commands they name exist, and no line is too wide."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
         *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    if page.name != "CHANGELOG.md":                     # which names what is gone
        for file in re.findall(r"`([a-z_/]+\.py)`", text):
            assert (ROOT / file).is_file(), file
        for module in re.findall(r"python -m ((?:robots|reasoning|studies)\.\w+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_wider_than_120(page):
    wide = [f"{page.name}:{n} {len(line)}" for n, line in enumerate(
        page.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide
