"""Who may import whom, where import-linter does not reach: clocks, sockets and chance stay in the shells."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sottovoce", "edge_agent", "coordinator", "models", "simulation")

OUTSIDE_WORLD = {"paho", "asyncio", "socket", "threading", "time", "random"}
"""What a functional core never imports: it is handed bytes, times and entropy."""
SHELLS = (
    "sottovoce/transport/",
    "sottovoce/runtime.py",
    "sottovoce/fleet_ca.py",
    "sottovoce/__main__.py",
    "edge_agent/__main__.py",
    "edge_agent/agent.py",
    "edge_agent/local_broker.py",
    "coordinator/__main__.py",
    "coordinator/service.py",
    "coordinator/clock.py",
)
CORES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("sottovoce", "edge_agent", "coordinator")
    for path in (ROOT / package).glob("**/*.py")
    if not path.relative_to(ROOT).as_posix().startswith(SHELLS)
)


def imported_roots(source: str) -> set[str]:
    """Return the top-level name of every absolute import in `source`, in functions too."""
    roots = set()
    for statement in ast.walk(ast.parse(source)):
        if isinstance(statement, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module:
            roots.add(statement.module.split(".")[0])
    return roots


def python(program: str) -> str:
    """Return what `program` prints in a fresh interpreter; fail with its error if it fails."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of(*packages: str) -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for name in packages for path in (ROOT / name).glob("**/*.py")]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


@pytest.mark.parametrize("path", CORES)
def test_a_core_imports_nothing_of_the_outside_world(path: str) -> None:
    assert imported_roots((ROOT / path).read_text()) & OUTSIDE_WORLD == set()


def test_the_shells_that_are_excepted_exist() -> None:
    assert [shell for shell in SHELLS if not (ROOT / shell).exists()] == []


def test_imports_are_found_wherever_they_hide() -> None:
    hidden = "def f():\n    if True:\n        from socket import socket\n    import os.path, paho.mqtt.client as c\n"
    assert imported_roots(hidden) == {"socket", "os", "paho"}
    assert imported_roots("from . import time\nfrom .random import x\n") == set()


def test_the_agent_and_the_coordinator_work_without_tensorflow() -> None:
    modules = modules_of("sottovoce", "edge_agent", "coordinator")
    loaded = python(
        "import importlib, sys\n"
        "sys.modules['tensorflow'] = sys.modules['keras'] = sys.modules['models'] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*sys.modules)\n"
    ).split()
    assert set(modules) <= set(loaded)


def test_a_device_loads_no_tflite_runtime_before_it_runs_a_program() -> None:
    modules = modules_of("sottovoce", "edge_agent")
    loaded = python(
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*{name.split('.')[0] for name in sys.modules})\n"
    ).split()
    assert set(loaded) & {"ai_edge_litert", "tflite_runtime", "rich", "scipy", "matplotlib", "sklearn"} == set()


def test_importing_the_package_imports_no_room_and_no_dependency() -> None:
    loaded = python("import sys\nimport sottovoce\nprint(*sys.modules)\n").split()
    assert [name for name in loaded if name.startswith("sottovoce")] == ["sottovoce"]
    assert set(loaded) & {"numpy", "msgspec", "cryptography", "paho"} == set()


VIOLATIONS = {
    "edge_agent/planted.py": "import coordinator\nimport tensorflow\nimport paho.mqtt.client\nimport ai_edge_litert\n",
    "edge_agent/planted_language.py": "import sottovoce.language.operators\n",
    "sottovoce/language/planted.py": "import sottovoce.secagg\n",
    "coordinator/planted.py": "import sottovoce.authority\n",
    "sottovoce/planted.py": "import simulation\n",
    "sottovoce/errors.py": "import sottovoce.wire\n",
    "sottovoce/tensors.py": "import sottovoce.identity\n",
}
"""Together they break every contract of pyproject.toml."""


def test_every_contract_of_import_linter_catches_its_violation(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.svp"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, violation in VIOLATIONS.items():
        (tmp_path / path).write_text(violation)
    report = lint_imports(tmp_path)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert contracts
    assert [contract["name"] for contract in contracts if f"{contract['name']} BROKEN" not in report] == []


def test_the_contracts_are_kept_and_scripts_check_asks_for_them() -> None:
    assert "0 broken" in lint_imports(ROOT)
    assert '"$tools/lint-imports"' in (ROOT / "scripts" / "check").read_text()


def lint_imports(folder: Path) -> str:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(program), "--no-cache"],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr
