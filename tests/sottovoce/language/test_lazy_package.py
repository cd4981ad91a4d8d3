"""`import sottovoce as sv` gives every public name and loads none of them before it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sottovoce


def test_the_table_and_what_type_checkers_read_say_the_same() -> None:
    tree = ast.parse(Path(sottovoce.__file__).read_text())
    block = next(statement for statement in tree.body if isinstance(statement, ast.If))
    read = {
        alias.asname: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert read == sottovoce._HOME


@pytest.mark.parametrize("name", sorted(sottovoce._HOME))
def test_every_name_is_there_and_listed(name: str) -> None:
    assert getattr(sottovoce, name) is getattr(importlib.import_module(sottovoce._HOME[name]), name)
    assert name in dir(sottovoce)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="sottovoce has no 'federated_median'"):
        sottovoce.federated_median  # type: ignore[attr-defined]  # noqa: B018


def test_describing_and_running_needs_no_tensorflow() -> None:
    program = (
        "import sys\n"
        "sys.modules['tensorflow'] = None\n"
        "import sottovoce as sv\n"
        "total = sv.federated_computation(lambda x: sv.federated_sum(x), '{int32}@CLIENTS')\n"
        "print(total([1, 2, 3]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "6\n"


def test_without_tensorflow_tf_computation_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['tensorflow'] = None\n"
        "import sottovoce as sv\n"
        "try:\n    sv.tf_computation('float32')(lambda x: x)\n"
        "except sv_error.ConfigError as error:\n    print(error)\n"
    ).replace("import sottovoce as sv\n", "import sottovoce as sv\nimport sottovoce.errors as sv_error\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "@sv.tf_computation needs TensorFlow on the author's machine: pip install 'sottovoce[models]'"
    )
