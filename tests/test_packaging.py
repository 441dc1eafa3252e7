"""The wheel carries recipes and DeepSpeed configurations, and imports point one way."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import REPO

ALLOWED = {
    "medvlm.errors": set(),
    "medvlm.config": {"medvlm.errors"},
    "medvlm.objectives": set(),
    "medvlm.data": {"medvlm.errors", "medvlm.config"},
    "medvlm.models": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.objectives"},
    "medvlm.inference": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models"},
    "medvlm.training": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models", "medvlm.objectives"},
    "medvlm.export": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models", "medvlm.training"},
    "medvlm.evaluation": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models", "medvlm.inference"},
    "data_prep": {"medvlm.errors", "medvlm.data.schema", "medvlm.data.shards"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("medvlm", "data_prep")}


def test_imports_point_one_way():
    checked = 0
    for path in [*REPO.glob("medvlm/**/*.py"), *REPO.glob("data_prep/**/*.py")]:
        module = ".".join(path.relative_to(REPO).with_suffix("").parts)
        package = next((p for p in ALLOWED if module == p or module.startswith(f"{p}.")), None)
        if package is None:
            assert module in ("medvlm.cli", "medvlm.__init__", "medvlm.recipes.__init__"), (
                f"{module} belongs to no package"
            )
            continue
        for name in imports(path):
            legal = ALLOWED[package] | {package}
            assert any(name == p or name.startswith(f"{p}.") for p in legal), f"{module} must not import {name}"
        checked += 1
    assert checked > 20
    for name in ("medvlm/data/order.py", *(str(p) for p in REPO.glob("medvlm/objectives/*.py"))):
        assert not imports(REPO / name), f"{name} must import nothing of ours"


def test_the_wheel_carries_recipes_and_deepspeed_configs(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        tmp_path,
        REPO,
    ]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("medvlm-*.whl"))).namelist()
    for folder, pattern in (("medvlm/recipes", "*.yaml"), ("ds_configs", "*.json"), ("data_prep", "*.py")):
        for file in (REPO / folder).glob(pattern):
            assert f"{folder}/{file.name}" in names
