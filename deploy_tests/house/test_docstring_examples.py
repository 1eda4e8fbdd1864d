"""The examples in docstrings run, and give what they say."""

import doctest
import importlib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITH_EXAMPLES = [
    f"chip_deploy.{path.parent.name}.{path.stem}"
    for wing in ("chip", "export", "pipeline")
    for path in sorted((ROOT / wing).glob("*.py"))
    if ">>>" in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_give_what_they_say(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name), verbose=False)
    assert (failed, tried > 0) == (0, True)


def test_there_are_examples_to_try() -> None:
    assert "chip_deploy.pipeline.recipe" in WITH_EXAMPLES


def test_an_example_that_lies_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("lying", ">>> 1 + 1\n3\n")
    assert doctest.testmod(module).failed == 1
    assert "Got:" in capsys.readouterr().out
