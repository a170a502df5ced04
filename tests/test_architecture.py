"""The rules of docs/architecture.md: which way imports go, and who may import what."""

import ast
import re
import sys

import pytest

from tests.conftest import ROOT

MAY_IMPORT = {
    "configs": {"configs"},
    "models": {"configs", "models"},
    "data": {"configs", "data"},
    "launch": {"configs", "models", "data", "launch"},
    "pretrain": {"configs", "models", "data", "launch", "pretrain"},
    "finetune": {"configs", "models", "data", "launch", "finetune"},
    "bench": {"configs", "models", "data", "launch", "pretrain", "finetune", "bench"},
}
ONLY_IN = {
    "deepspeed": "launch/training/engine.py",
    "MinkowskiEngine": "models/sparse/minkowski.py",
    "ray": "data/ray_pool.py",
    "huggingface_hub": "models/formats/hub.py",
}


def imports(path) -> set[str]:
    """Top-level names of everything a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        more = {"pretrain"} if path == ROOT / "launch/plan.py" else set()  # a command: it measures objectives
        wrong = imports(path) & MAY_IMPORT.keys() - MAY_IMPORT[folder] - more
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_only_one_file_imports(library):
    users = [
        p.relative_to(ROOT).as_posix() for f in MAY_IMPORT for p in (ROOT / f).rglob("*.py") if library in imports(p)
    ]
    assert set(users) <= {ONLY_IN[library]}


def test_commands_are_not_libraries():
    """No product code imports a command, and only commands change sys.path."""
    files = [path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")]
    texts = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path.read_text() for path in files}
    commands = {name for name, text in texts.items() if '__name__ == "__main__"' in text}
    assert {"pretrain.main", "data.prepare", "finetune.predict"} <= commands
    for name, text in texts.items():
        for command in commands - {name}:
            assert not re.search(rf"^\s*(from|import) {re.escape(command)}\b", text, re.M), f"{name} imports {command}"
        assert name in commands or "sys.path" not in text, name


def test_every_library_is_a_dependency():
    """pyproject.toml names what the code imports; MinkowskiEngine is optional, triton comes with torch."""
    known = set(re.findall(r'"([\w-]+)(?:\[\w+\])?>=', (ROOT / "pyproject.toml").read_text()))
    known |= {
        "PIL",
        "pillow_heif",
        "sklearn",
        "yaml",
        "MinkowskiEngine",
        "triton",
        "tests",
        *MAY_IMPORT,
        *sys.stdlib_module_names,
    }
    used = {
        name for folder in (*MAY_IMPORT, "tests") for path in (ROOT / folder).rglob("*.py") for name in imports(path)
    }
    assert used <= known, used - known


def test_the_rule_sees_a_wrong_import(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    from pretrain.pretraining import pretrain\n")
    assert imports(tmp_path / "x.py") == {"pretrain"}
