"""The examples in docstrings, of every file that has some."""
import doctest
import importlib
from pathlib import Path

import pytest

FILES = sorted(file.stem for file in Path(__file__).parent.parent.glob("*.py") if ">>> " in file.read_text())


@pytest.mark.parametrize("name", FILES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted >= 1 and result.failed == 0
