"""The examples in docstrings, of every file that has some."""
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [file.relative_to(ROOT) for pattern in ("*.py", "[!t.]*/*.py")
         for file in sorted(ROOT.glob(pattern)) if ">>> " in file.read_text()]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples(file):
    result = doctest.testmod(importlib.import_module(".".join(file.with_suffix("").parts)))
    assert result.attempted >= 1 and result.failed == 0
