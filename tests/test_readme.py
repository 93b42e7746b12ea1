"""The README's claims that can go stale: the equation map and the files it names."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_equation_map_points_at_the_lines_it_quotes():
    rows = re.findall(r"^\|[^|]+\| `(\w+\.py):(\d+)` \| `(.+)` \|$", README, re.MULTILINE)
    assert len(rows) > 10
    for file, line, quote in rows:
        assert quote in (ROOT / file).read_text().splitlines()[int(line) - 1], f"{file}:{line} does not hold {quote}"


def test_the_files_and_pictures_it_names_exist():
    for path in set(re.findall(r"\]\((results/[^)]+)\)|`([\w/]+\.py)`", README)):
        assert (ROOT / (path[0] or path[1])).is_file(), path
