"""Tests of the structure of trl_opd: allowed imports, the cost of an import, and private names.

The table below is the diagram of docs/design.md, with one row for each part. The tests compare it with the sources.
"""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import trl

import trl_opd

from tests.helpers.paths import ROOT

PACKAGE = Path(trl_opd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Part (a folder, or a module next to the folders) -> parts or modules of ours that it may import.
MAY_IMPORT = {
    "_trl": set(),
    "statistics": set(),
    "opd_config": {"_trl"},
    "loss": {"_trl"},
    "artefacts": set(),
    "rocks": {"artefacts", "statistics"},
    "report": {"rocks", "artefacts", "statistics", "_trl"},  # a model card cites the paper that TRL cites
    "rollouts": {"loss", "_trl"},
    "models": {"loss", "artefacts", "opd_config", "_trl"},
    "training": {"models", "rollouts", "loss", "rocks", "artefacts", "opd_config"},
    "saving": {"models", "report", "rocks", "artefacts", "opd_config"},  # the record of a run holds its settings
    "opd_trainer": {"training", "saving", "models", "rollouts", "loss", "rocks", "artefacts", "opd_config", "_trl"},
    "studies": {
        "opd_trainer",
        "training",
        "models",
        "rollouts",
        "loss",
        "rocks",
        "artefacts",
        "opd_config",
        "statistics",
    },
}
MAY_IMPORT["demo"] = {"studies", "opd_trainer", "training", "saving", "report", "rocks", "artefacts"}
MAY_IMPORT["demo"] |= {"opd_config", "statistics"}
# Commands parse, load models, call functions and print; they compute nothing with tensors.
MAY_IMPORT["cli"] = MAY_IMPORT["demo"] | {"demo", "models", "rollouts"}
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT["__init__"] = set(trl_opd._HOME.values())

# Pure parts take tensors and plain values, and know no configuration, trainer or device policy.
PURE = ("loss", "rocks", "rollouts.batches", "statistics")
NOT_PURE = {"accelerate", "datasets", "peft", "transformers", "trl"}
# Users type or import these names, and only these modules may import by a computed name.
EDGE = ("__init__", "__main__", "cli")
# Seams to TRL and transformers, whose private names are overridden, called or copied there.
SEAMS = {"opd_trainer", "_trl", "rollouts.sampling"}
# Names that the standard library has made public with an underscore in front.
PUBLIC_IN_SPITE_OF_IT = {"_asdict", "_exit", "_fields", "_make", "_replace"}


# Imports


class Import(NamedTuple):
    """An import in a source.

    Args:
        importer (`str`): The module of ours that contains it ("rocks.rock_set").
        target (`str`): The absolute name of the import ("trl_opd.artefacts.hub.hub_errors").
        line (`int`): Where.
        moment (`str`): When it runs: with the module ("load"), in a function ("call") or for type checkers ("typing").
    """

    importer: str
    target: str
    line: int
    moment: str


def imports_in(source: str, module: str, *, package: bool = False) -> list[Import]:
    """Return every import of a source, at any depth.

    Args:
        source (`str`): The text of the module.
        module (`str`): Its absolute name.
        package (`bool`, *optional*, defaults to `False`): Whether it is an `__init__`, from which one dot is itself.
    """
    found = []
    for node, moment in _nodes(ast.parse(source), "load"):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        for target in targets:
            found.append(Import(module_of(module), target, node.lineno, moment))
    return found


def _nodes(node: ast.AST, moment: str) -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body
        if typing_only:
            inside = "typing"
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and moment == "load":
            inside = "call"
        else:
            inside = moment
        yield child, inside
        yield from _nodes(child, inside)


def module_of(target: str) -> str | None:
    """Return the module of ours that a target is or belongs to ("rocks.rock_set"), or `None` for other packages."""
    package, *names = target.split(".")
    if package != "trl_opd":
        return None
    if len(names) == 1 and names[0] in trl_opd._HOME:  # `from trl_opd import RockSet` loads the public name's home
        return trl_opd._HOME[names[0]]
    while names:
        path = PACKAGE.joinpath(*names)
        if path.is_dir() or path.with_suffix(".py").is_file():
            return ".".join(names)
        names.pop()
    return "__init__"


def part_of(module: str) -> str:
    return module.split(".")[0]


def lies_in(module: str, places) -> bool:
    """Return whether a module is one of these places, or is inside one that is a folder."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


def name_of(path: Path) -> str:
    """Return the absolute name of a module by its path."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def all_imports() -> list[Import]:
    found = []
    for path in FILES:
        found += imports_in(path.read_text(encoding="utf-8"), name_of(path), package=path.stem == "__init__")
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..rocks.rock_set import RockSet", ("trl_opd.rocks.rock_set.RockSet", "rocks.rock_set", "load")),
        ("from ..artefacts import hub as h", ("trl_opd.artefacts.hub", "artefacts.hub", "load")),
        ("from .. import artefacts", ("trl_opd.artefacts", "artefacts", "load")),
        ("from .. import RockSet", ("trl_opd.RockSet", "rocks.rock_set", "load")),
        ("import trl_opd.statistics", ("trl_opd.statistics", "statistics", "load")),
        ("import trl_opd", ("trl_opd", "__init__", "load")),
        ("from trl_opd import OPDConfig", ("trl_opd.OPDConfig", "opd_config", "load")),
        ("from trl_opd import __version__", ("trl_opd.__version__", "__init__", "load")),
        ("from trl_opd.cli.demo import main", ("trl_opd.cli.demo.main", "cli.demo", "load")),
        ("def f():\n    from .finite import A", ("trl_opd.training.finite.A", "training.finite", "call")),
        ("class A:\n    async def f(self):\n        import trl_opd.cli", ("trl_opd.cli", "cli", "call")),
        ("class A:\n    from .finite import A", ("trl_opd.training.finite.A", "training.finite", "load")),
        (
            "try:\n    pass\nfinally:\n    from .finite import A",
            ("trl_opd.training.finite.A", "training.finite", "load"),
        ),
        ("if TYPE_CHECKING:\n    from .finite import A", ("trl_opd.training.finite.A", "training.finite", "typing")),
        ("if not TYPE:\n    from .finite import A", ("trl_opd.training.finite.A", "training.finite", "load")),
        (
            "if TYPE_CHECKING:\n    pass\nelse:\n    from .finite import A",
            ("trl_opd.training.finite.A", "training.finite", "load"),
        ),
        ("from trl.trainer.utils import RepeatSampler", ("trl.trainer.utils.RepeatSampler", None, "load")),
    ],
)
def test_import_reader_finds_every_form_of_import(source, expected):
    (found,) = imports_in(source, "trl_opd.training.metrics")
    assert (found.target, module_of(found.target), found.moment) == expected
    assert found.importer == "training.metrics"


def test_import_reader_resolves_relative_imports():
    assert imports_in("from ..loss import fused", "trl_opd.cli.demo")[0].target == "trl_opd.loss.fused"
    assert imports_in("from .demo import main", "trl_opd.cli", package=True)[0].target == "trl_opd.cli.demo.main"
    assert imports_in("from .loss import fused", "trl_opd", package=True)[0].target == "trl_opd.loss.fused"


def test_folder_contains_its_modules_and_no_others():
    assert lies_in("loss.signals", ["loss"])
    assert lies_in("loss.signals", ["loss.signals"])
    assert not lies_in("loss", ["loss.signals"])
    assert not lies_in("lossless", ["loss"])


def test_import_table_has_a_row_for_each_part():
    parts = {part_of(module_of(name_of(path))) for path in FILES}
    assert parts <= MAY_IMPORT.keys(), "a new part needs a row: here and in docs/design.md"
    assert MAY_IMPORT.keys() <= parts, "the table has rows of parts that do not exist"


def test_every_import_is_allowed_by_the_table():
    wrong = []
    for found in all_imports():
        ours = module_of(found.target)
        if ours is None or part_of(ours) == part_of(found.importer):
            continue
        allowed = MAY_IMPORT.get(part_of(found.importer), set())
        if not lies_in(ours, allowed):
            may = ", ".join(sorted(allowed)) or "none of ours"
            wrong.append(f"{found.importer} imports {found.target} (line {found.line}); it may import {may}")
    assert not wrong, "\n".join(wrong)


def test_import_table_has_no_cycle():
    graph = {part: {part_of(place) for place in allowed} for part, allowed in MAY_IMPORT.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_imports_between_modules_have_no_cycle():
    graph = {}
    for found in all_imports():
        ours = module_of(found.target)
        if found.moment == "load" and ours not in (None, found.importer):
            graph.setdefault(found.importer, set()).add(ours)
    graphlib.TopologicalSorter(graph).prepare()


def test_pure_modules_import_no_trainer_library():
    wrong = []
    for found in all_imports():
        library = found.target.split(".")[0]
        if lies_in(found.importer, PURE) and library in NOT_PURE and found.moment != "typing":
            wrong.append(f"{found.importer} imports {found.target} (line {found.line})")
    assert not wrong, "\n".join(wrong)


def test_only_trl_py_imports_private_names_of_trl():
    wrong = []
    for found in all_imports():
        package, *names = found.target.split(".")
        if package != "trl" or found.importer == "_trl":
            continue
        # `import trl` would let `trl.trainer.utils` in unseen: take names, one dot below.
        if len(names) != 1 or isinstance(getattr(trl, names[0]), ModuleType):
            wrong.append(f"{found.importer} imports {found.target} (line {found.line}): take it through _trl")
    assert not wrong, "\n".join(wrong)


def test_no_inner_module_imports_by_a_computed_name():
    # `import_module("trl_opd.cli")` is invisible to the reader of imports.
    for path in FILES:
        if not lies_in(module_of(name_of(path)), EDGE):
            text = path.read_text(encoding="utf-8")
            assert "import_module" not in text, path
            assert "__import__" not in text, path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "write a docstring that defines the module"


# The tests


def test_no_test_module_is_imported_by_another_or_by_a_benchmark():
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for found in imports_in(path.read_text(encoding="utf-8"), module, package=path.stem == "__init__"):
            package, *names = found.target.split(".")
            if package == "tests" and any(name.startswith("test_") for name in names):
                wrong.append(f"{module} imports {found.target} (line {found.line}): put shared code into tests/helpers")
    assert not wrong, "\n".join(wrong)


# Private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_IN_SPITE_OF_IT


def is_own(value: ast.expr) -> bool:
    """Return whether an expression is the object itself, its class or its base class."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        of_self = [ast.unparse(argument) for argument in value.args] == ["self"]
        return value.func.id == "super" or (value.func.id == "type" and of_self)
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def foreign_private_names(source: str) -> list[tuple[int, str]]:
    """Return line and text of every private name that a source takes from another object, by a dot or by its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            found.append((node.lineno, ast.unparse(node)))
        by_name = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1
        if by_name and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
            holder, name = node.args[:2]
            is_text = isinstance(name, ast.Constant) and isinstance(name.value, str)
            if is_text and is_private(name.value) and not is_own(holder):
                found.append((node.lineno, ast.unparse(node)))
    return sorted(found)


def private_imports(source: str, module: str, *, package: bool = False) -> list[tuple[int, str]]:
    """Return line and name of every private name that a source imports from a module of ours."""
    found = []
    for one in imports_in(source, module, package=package):
        name = one.target.split(".")[-1]
        if is_private(name) and module_of(one.target) not in (None, "_trl"):
            found.append((one.line, one.target))
    return found


def untyped_trainers(source: str) -> list[tuple[int, str]]:
    """Return line and name of every function with a parameter named `trainer` that has no annotation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if any(parameter.arg == "trainer" and parameter.annotation is None for parameter in parameters):
            found.append((node.lineno, node.name))
    return sorted(found)


def listed(found: list[tuple[Path, int, str]]) -> str:
    return "\n".join(f"{path.relative_to(PACKAGE)}:{line}: {text}" for path, line, text in found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = trainer._step", [(1, "trainer._step")]),
        ("x = self.trainer._step", [(1, "self.trainer._step")]),
        ("trainer._step()\nother._y = 1", [(1, "trainer._step"), (2, "other._y")]),
        ("x = module._function", [(1, "module._function")]),
        ("x = f()._y", [(1, "f()._y")]),
        ("x = type(other)._y", [(1, "type(other)._y")]),
        ("x = self._a._b", [(1, "self._a._b")]),
        ("x = getattr(trainer, '_step', None)", [(1, "getattr(trainer, '_step', None)")]),
        ("setattr(trainer, '_step', 1)", [(1, "setattr(trainer, '_step', 1)")]),
        ("x = self._step + cls._step + super()._step + type(self)._step", []),
        ("x = getattr(self, '_step')", []),
        ("x = getattr(trainer, name)", []),
        ("x = trainer.step", []),
        ("x = trainer.__class__", []),
        ("x = record._replace(a=1)", []),
    ],
)
def test_reader_finds_private_names_of_other_objects(source, expected):
    assert foreign_private_names(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .metrics import _sum", [(1, "trl_opd.training.metrics._sum")]),
        ("from ..loss.fused import a, _b as b", [(1, "trl_opd.loss.fused._b")]),
        ("def f():\n    from .metrics import _sum", [(2, "trl_opd.training.metrics._sum")]),
        ("from trl_opd import _HOME", [(1, "trl_opd._HOME")]),
        ("from .. import _trl", []),
        ("from .._trl import RepeatSampler", []),
        ("from .. import __version__", []),
        ("from torch._dynamo import _x", []),
    ],
)
def test_reader_finds_imported_private_names(source, expected):
    assert private_imports(source, "trl_opd.training.finite") == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(trainer): pass", [(1, "f")]),
        ("class A:\n    async def f(self, *, trainer=None): pass", [(2, "f")]),
        ("def f(trainer, /): pass", [(1, "f")]),
        ("def f(trainer: OPDTrainer): pass", []),
        ("def f(model): trainer = model", []),
    ],
)
def test_reader_finds_untyped_trainer_parameters(source, expected):
    assert untyped_trainers(source) == expected


def test_no_private_name_is_read_from_another_object():
    wrong = []
    for path in FILES:
        if module_of(name_of(path)) not in SEAMS:
            wrong += [(path, *found) for found in foreign_private_names(path.read_text(encoding="utf-8"))]
    assert not wrong, listed(wrong)


def test_no_private_name_is_imported_from_another_module():
    wrong = []
    for path in FILES:
        source, package = path.read_text(encoding="utf-8"), path.stem == "__init__"
        wrong += [(path, *found) for found in private_imports(source, name_of(path), package=package)]
    assert not wrong, listed(wrong)


def test_every_trainer_parameter_has_a_type():
    wrong = []
    for path in FILES:
        wrong += [(path, *found) for found in untyped_trainers(path.read_text(encoding="utf-8"))]
    assert not wrong, listed(wrong)


# The public names


def test_public_names_are_listed_once_for_every_reader():
    assert set(trl_opd.__all__) == set(trl_opd._HOME)
    assert len(trl_opd.__all__) == len(set(trl_opd.__all__))
    # The block for type checkers repeats the names.
    typed = {}
    for found in imports_in(Path(trl_opd.__file__).read_text(encoding="utf-8"), "trl_opd", package=True):
        if found.moment == "typing":
            typed[found.target.split(".")[-1]] = module_of(found.target)
    assert typed == trl_opd._HOME


def test_every_public_name_loads_from_its_home():
    for name, home in trl_opd._HOME.items():
        assert getattr(trl_opd, name).__module__ == f"trl_opd.{home}"
    with pytest.raises(AttributeError, match="no attribute 'OPDTrianer'"):
        _ = trl_opd.OPDTrianer


LOADED_BY = """
import json, sys
def loaded():
    return sorted(name for name in sys.modules if "." not in name)
import trl_opd
after_import = loaded()
names = dir(trl_opd)
after_dir = loaded()
from trl_opd import RockSet
print(json.dumps({"import": after_import, "dir": after_dir, "RockSet": loaded(), "names": names}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, list[str]]:
    """Top-level modules that a fresh interpreter has loaded after each step, and the names of `dir`."""
    done = subprocess.run([sys.executable, "-c", LOADED_BY], check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", ["import", "dir", "RockSet"])
def test_import_of_the_package_loads_no_heavy_library(fresh, step):
    assert "trl_opd" in fresh[step]
    assert not {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy"} & set(fresh[step])


def test_dir_shows_every_public_name(fresh):
    assert set(trl_opd.__all__) <= set(fresh["names"])
