"""The README's claims that can go stale: the equation map and the files it names."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_equation_map_points_at_the_lines_it_quotes():
    rows = re.findall(r"^\|[^|]+\| `(\w+\.py):(\d+)` \| `(.+)` \|$", README, re.MULTILINE)
    assert len(rows) > 10
    for file, line, quote in rows:
        assert quote in (ROOT / file).read_text().splitlines()[int(line) - 1], f"{file}:{line} does not hold {quote}"


def test_the_files_and_pictures_it_names_exist():
    for path in set(re.findall(r"\]\((runs/[^)]+)\)|`(\w+\.py|tests/\w+\.py)`", README)):
        assert (ROOT / (path[0] or path[1])).is_file(), path


def test_the_table_of_files_is_complete():
    assert sorted(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE)) == sorted(file.name for file in ROOT.glob("*.py"))


def test_what_it_says_can_be_copied_alone_imports_no_sibling():
    [sentence] = re.findall(r"^(.+) import none of the others", README, re.MULTILINE)
    names = re.findall(r"`(\w+\.py)`", sentence)
    assert len(names) > 5
    for name in names:
        for node in ast.parse((ROOT / name).read_text()).body:
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [module for module in imported if (ROOT / f"{module}.py").exists()], f"{name}:{node.lineno}"
