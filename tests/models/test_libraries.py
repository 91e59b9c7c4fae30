"""Importing the libraries quickly: what is hidden meanwhile, and that it is there afterwards."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys

import pytest

from lorakit.models.libraries import hidden

PROBE = """
import gc, sys
import lorakit.models.libraries
import peft.import_utils, transformers.utils.import_utils as utils
assert gc.isenabled() and gc.get_freeze_count() > 100_000
for name in ("bitsandbytes", "scipy"):
    assert name not in sys.modules, name
assert utils.is_scipy_available()
print(peft.import_utils.is_bnb_available())
"""


def test_what_was_hidden_is_there_once_the_libraries_are() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    installed = importlib.util.find_spec("bitsandbytes") is not None
    assert done.stdout.split() == [str(installed)]


def test_a_hidden_package_is_missing_inside_the_block_alone() -> None:
    name = "wave"  # of the standard library; nothing here imports it
    with hidden(name):
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ImportError, match=name):
            importlib.import_module(name)
    assert name not in sys.modules
    assert importlib.util.find_spec(name) is not None


def test_a_package_that_was_imported_before_cannot_be_hidden() -> None:
    with hidden("gc"):
        assert importlib.import_module("gc") is gc
    assert sys.modules["gc"] is gc
