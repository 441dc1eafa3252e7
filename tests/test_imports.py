"""Imports point one way.

cli -> training, evaluation, export, inference -> models, objectives, data -> config -> errors
"""

import ast
from pathlib import Path

import pytest
from conftest import REPO

# What a unit may import of ours besides itself. A unit is a package, or a module where the module is stricter.
ALLOWED = {
    "medvlm": set(),
    "medvlm.errors": set(),
    "medvlm.objectives": set(),
    "medvlm.measures": {"medvlm.errors"},
    "medvlm.data.order": set(),
    "medvlm.data.packing": set(),
    "medvlm.recipes": set(),
    "medvlm.config": {"medvlm.errors"},
    "medvlm.data": {"medvlm.errors"},
    "medvlm.models": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.objectives"},
    "medvlm.training": {
        *("medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models", "medvlm.measures", "medvlm.objectives"),
    },
    "medvlm.inference": {
        *("medvlm.errors", "medvlm.data.dicom", "medvlm.data.pixels", "medvlm.data.nifti", "medvlm.data.series"),
        *("medvlm.data.volume_slices", "medvlm.models.poolings"),
    },
    "medvlm.evaluation": {"medvlm.errors", "medvlm.data", "medvlm.inference", "medvlm.measures"},
    "medvlm.export.verify": set(),  # runs in a fresh process, through unmodified transformers
    "medvlm.export": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models", "medvlm.training.checkpoint"},
    # rehearses the very code of a training; training asks it through a process of its own
    "medvlm.planning": {
        *("medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models", "medvlm.objectives", "medvlm.training"),
    },
    "medvlm.studies": set(),
    # trains and exports through commands; of evaluation it takes the tasks' tables
    "medvlm.study": {"medvlm", "medvlm.errors", "medvlm.config", "medvlm.evaluation", "medvlm.data.page"},
    "medvlm.cli_study": {"medvlm.errors", "medvlm.study"},
    "medvlm.cli_plan": {"medvlm.errors", "medvlm.config", "medvlm.planning"},
    "medvlm.cli": {
        *("medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.training", "medvlm.export"),
        *("medvlm.inference", "medvlm.evaluation", "medvlm.planning", "data_prep"),
        *("medvlm.cli_checkpoint", "medvlm.cli_plan", "medvlm.cli_runs", "medvlm.cli_shards"),
        "medvlm.cli_study",
    },
    "medvlm.cli_checkpoint": {"medvlm.errors", "medvlm.training"},
    "medvlm.cli_runs": {"medvlm.errors", "medvlm.training"},
    "medvlm.cli_shards": {"medvlm.errors", "medvlm.config", "medvlm.data", "medvlm.models", "medvlm.training"},
    "data_prep": {
        *("medvlm.errors", "medvlm.data.schema", "medvlm.data.shards", "medvlm.data.dicom", "medvlm.data.nifti"),
        "medvlm.data.dicom_codes",
        *("medvlm.data.series", "medvlm.data.volumes", "medvlm.data.pixels", "medvlm.data.phi"),
        "medvlm.data.labeler",
    },
    "ds_configs": set(),
}
OURS = ("medvlm", "data_prep", "ds_configs")


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for folder in OURS for p in (REPO / folder).rglob("*.py")}


def within(name: str, unit: str) -> bool:
    return name == unit or name.startswith(unit + ".")


def unit_of(module: str) -> str:
    """The longest unit that holds a module; ``medvlm`` itself is only the top file."""
    holding = [u for u in ALLOWED if within(module, u) and (u != "medvlm" or module == "medvlm")]
    assert holding, f"{module} belongs to no unit: say in ALLOWED what it may import"
    return max(holding, key=len)


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Our modules that a source imports, anywhere in it; ``from package import module`` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return {name for name in found if name.split(".")[0] in OURS}


def forbidden(source: str, module: str, is_package: bool = False) -> list[str]:
    unit = unit_of(module)
    # a stricter module of a package may not even import its package
    allowed = ALLOWED[unit] | {unit}
    return sorted(n for n in imported(source, module, is_package) if not any(within(n, a) for a in allowed))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_what_its_package_may(module):
    path = MODULES[module]
    assert forbidden(path.read_text(), module, path.name == "__init__.py") == []


def test_table_names_only_units_that_exist():
    units = set(ALLOWED).union(*ALLOWED.values())
    assert sorted(u for u in units if not any(within(m, u) for m in MODULES)) == []


def test_table_has_no_cycle():
    open_units, done = [], set()

    def visit(unit: str) -> None:
        assert unit not in open_units, " -> ".join([*open_units, unit])
        if unit in done:
            return
        open_units.append(unit)
        for name in ALLOWED[unit]:
            visit(unit_of(name))
        open_units.pop()
        done.add(unit)

    for unit in ALLOWED:
        visit(unit)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("medvlm.models.build", "from medvlm.training import loop"),
        ("medvlm.data.loader", "def f():\n    import medvlm.models.build"),
        ("medvlm.data.shards", "from ..training.loop import train"),
        ("medvlm.data.order", "from medvlm.errors import UserError"),
        ("medvlm.objectives.language_modeling", "from medvlm.data.conversation import IGNORE"),
        ("medvlm.export.llava", "from medvlm.training import loop"),
        ("medvlm.export.verify", "from medvlm.export.llava import verify"),
        ("medvlm.evaluation.vqa", "from medvlm.models import build"),
        ("data_prep.vqa_rad", "from medvlm.data import loader"),
        ("data_prep.vqa_rad", "import medvlm.config.load"),
    ],
)
def test_a_wrong_arrow_is_found(module, source):
    assert forbidden(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("medvlm.export.llava", "from medvlm.training import checkpoint"),
        ("data_prep.vqa_rad", "from medvlm.data import schema, shards"),
        ("medvlm.data.loader", "from .order import Order\nimport numpy"),
    ],
)
def test_a_right_arrow_is_let_pass(module, source):
    assert not forbidden(source, module)
