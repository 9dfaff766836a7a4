"""The structure of trl_opd: allowed imports, the cost of an import, private names, and the types of trainer parameters.

The table below is the diagram of docs/design.md, with one row for each part. The tests compare it with the sources.
"""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
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
    "studies": {"opd_trainer", "training", "models", "rollouts", "loss", "rocks", "artefacts", "opd_config"},
    "demo": {"studies", "opd_trainer", "training", "saving", "report", "rocks", "artefacts", "opd_config"},
}
MAY_IMPORT["studies"].add("statistics")
MAY_IMPORT["demo"].add("statistics")
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
# Public names of the standard library that begin with an underscore.
PUBLIC_WITH_UNDERSCORE = {"_asdict", "_exit", "_fields", "_make", "_replace"}


# Imports


class Import(NamedTuple):
    """An import in a source.

    Args:
        importer (`str`): The module of ours that contains it ("rocks.rock_set").
        target (`str`): The absolute name of the import ("trl_opd.artefacts.hub.hub_errors").
        line (`int`): Its line.
        moment (`str`): When it runs: with the module ("load"), in a function ("call") or for type checkers ("typing").
    """

    importer: str
    target: str
    line: int
    moment: str


def imports_in(source: str, module: str) -> list[Import]:
    """Return every import, at any depth, of the source of a module ("trl_opd.cli.demo" or "trl_opd.cli.__init__")."""
    found = []
    for node, moment in _nodes(ast.parse(source), "load"):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            if node.module:
                base.append(node.module)
            targets = [".".join([*base, alias.name]) for alias in node.names]
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
            return ".".join(names).removesuffix(".__init__")
        names.pop()
    return "__init__"


def part_of(module: str) -> str:
    return module.split(".")[0]


def lies_in(module: str, places) -> bool:
    """Return whether a module is one of these places, or is inside one that is a folder."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


def name_of(path: Path) -> str:
    """Return the absolute name of a module by its path ("trl_opd.cli.demo" or "trl_opd.cli.__init__")."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@cache
def source_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def all_imports() -> list[Import]:
    found = []
    for path in FILES:
        found += imports_in(source_of(path), name_of(path))
    return found


def wrong_imports(is_wrong: Callable[[Import], bool]) -> list[str]:
    return [f"{one.importer} imports {one.target} (line {one.line})" for one in all_imports() if is_wrong(one)]


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
        ("try:\n    f()\nfinally:\n    from . import finite", ("trl_opd.training.finite", "training.finite", "load")),
        ("if TYPE_CHECKING:\n    from .finite import A", ("trl_opd.training.finite.A", "training.finite", "typing")),
        ("if not TYPE:\n    from .finite import A", ("trl_opd.training.finite.A", "training.finite", "load")),
        ("if TYPE_CHECKING: f()\nelse: from . import finite", ("trl_opd.training.finite", "training.finite", "load")),
        ("from trl.trainer.utils import RepeatSampler", ("trl.trainer.utils.RepeatSampler", None, "load")),
    ],
)
def test_import_reader_finds_every_form_of_import(source, expected):
    (found,) = imports_in(source, "trl_opd.training.metrics")
    assert (found.target, module_of(found.target), found.moment) == expected
    assert found.importer == "training.metrics"


def test_import_reader_resolves_relative_imports():
    assert imports_in("from ..loss import fused", "trl_opd.cli.demo")[0].target == "trl_opd.loss.fused"
    assert imports_in("from .demo import main", "trl_opd.cli.__init__")[0].target == "trl_opd.cli.demo.main"
    assert imports_in("from .loss import fused", "trl_opd.__init__")[0].target == "trl_opd.loss.fused"
    assert module_of("trl_opd.cli.__init__") == "cli"
    assert module_of("trl_opd.__init__") == "__init__"


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
    def is_wrong(found: Import) -> bool:
        ours = module_of(found.target)
        importer = part_of(found.importer)
        return ours is not None and part_of(ours) != importer and not lies_in(ours, MAY_IMPORT[importer])

    assert not wrong_imports(is_wrong), "see MAY_IMPORT for what each part may import"


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
    def is_wrong(found: Import) -> bool:
        library = found.target.split(".")[0]
        return lies_in(found.importer, PURE) and library in NOT_PURE and found.moment != "typing"

    assert not wrong_imports(is_wrong)


def test_only_trl_py_imports_private_names_of_trl():
    def is_wrong(found: Import) -> bool:
        package, *names = found.target.split(".")
        if package != "trl" or found.importer == "_trl":
            return False
        # After `import trl` the reader would not see a use of `trl.trainer.utils`, so only names of `trl` are allowed.
        return len(names) != 1 or isinstance(getattr(trl, names[0]), ModuleType)

    assert not wrong_imports(is_wrong), "import these through _trl"


def test_no_inner_module_imports_by_a_computed_name():
    # The reader of imports does not see `import_module("trl_opd.cli")`.
    for path in FILES:
        if not lies_in(module_of(name_of(path)), EDGE):
            assert "import_module" not in source_of(path), path
            assert "__import__" not in source_of(path), path


def test_every_module_has_a_docstring():
    for path in FILES:
        assert ast.get_docstring(ast.parse(source_of(path))), f"{path} needs a docstring that defines the module"


# The tests


def test_no_test_module_is_imported_by_another_or_by_a_benchmark():
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for found in imports_in(source_of(path), module):
            package, *names = found.target.split(".")
            if package == "tests" and any(name.startswith("test_") for name in names):
                wrong.append(f"{module} imports {found.target} (line {found.line}): put shared code into tests/helpers")
    assert not wrong, "\n".join(wrong)


# Private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_WITH_UNDERSCORE


def is_own(value: ast.expr) -> bool:
    """Return whether an expression is the object itself, its class or its base class."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        of_self = [ast.unparse(argument) for argument in value.args] == ["self"]
        return value.func.id == "super" or (value.func.id == "type" and of_self)
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def foreign_private_names(source: str, module: str) -> list[tuple[int, str]]:
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


def private_imports(source: str, module: str) -> list[tuple[int, str]]:
    """Return line and name of every private name that a source imports from a module of ours."""
    found = []
    for one in imports_in(source, module):
        name = one.target.split(".")[-1]
        if is_private(name) and module_of(one.target) not in (None, "_trl"):
            found.append((one.line, one.target))
    return found


def untyped_trainers(source: str, module: str) -> list[tuple[int, str]]:
    """Return line and name of every function with a parameter named `trainer` that has no annotation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if any(parameter.arg == "trainer" and parameter.annotation is None for parameter in parameters):
            found.append((node.lineno, node.name))
    return sorted(found)


@pytest.mark.parametrize(
    ("reader", "source", "expected"),
    [
        (foreign_private_names, "x = trainer._step", [(1, "trainer._step")]),
        (foreign_private_names, "x = self.trainer._step", [(1, "self.trainer._step")]),
        (foreign_private_names, "trainer._step()\nother._y = 1", [(1, "trainer._step"), (2, "other._y")]),
        (foreign_private_names, "x = module._function", [(1, "module._function")]),
        (foreign_private_names, "x = f()._y", [(1, "f()._y")]),
        (foreign_private_names, "x = type(other)._y", [(1, "type(other)._y")]),
        (foreign_private_names, "x = self._a._b", [(1, "self._a._b")]),
        (foreign_private_names, "x = getattr(one, '_step', None)", [(1, "getattr(one, '_step', None)")]),
        (foreign_private_names, "setattr(trainer, '_step', 1)", [(1, "setattr(trainer, '_step', 1)")]),
        (foreign_private_names, "x = self._step + cls._step + super()._step + type(self)._step", []),
        (foreign_private_names, "x = getattr(self, '_step')", []),
        (foreign_private_names, "x = getattr(trainer, name)", []),
        (foreign_private_names, "x = trainer.step", []),
        (foreign_private_names, "x = trainer.__class__", []),
        (foreign_private_names, "x = record._replace(a=1)", []),
        (private_imports, "from .metrics import _sum", [(1, "trl_opd.training.metrics._sum")]),
        (private_imports, "from ..loss.fused import a, _b as b", [(1, "trl_opd.loss.fused._b")]),
        (private_imports, "def f():\n    from .metrics import _sum", [(2, "trl_opd.training.metrics._sum")]),
        (private_imports, "from trl_opd import _HOME", [(1, "trl_opd._HOME")]),
        (private_imports, "from .. import _trl", []),
        (private_imports, "from .._trl import RepeatSampler", []),
        (private_imports, "from .. import __version__", []),
        (private_imports, "from torch._dynamo import _x", []),
        (untyped_trainers, "def f(trainer): pass", [(1, "f")]),
        (untyped_trainers, "class A:\n    async def f(self, *, trainer=None): pass", [(2, "f")]),
        (untyped_trainers, "def f(trainer, /): pass", [(1, "f")]),
        (untyped_trainers, "def f(trainer: OPDTrainer): pass", []),
        (untyped_trainers, "def f(model): trainer = model", []),
    ],
)
def test_readers_find_what_is_forbidden_and_nothing_else(reader, source, expected):
    assert reader(source, "trl_opd.training.finite") == expected


@pytest.mark.parametrize("reader", [foreign_private_names, private_imports, untyped_trainers])
def test_no_module_has_what_a_reader_finds(reader):
    wrong = []
    for path in FILES:
        module = name_of(path)
        if reader is not foreign_private_names or module_of(module) not in SEAMS:
            wrong += [f"{module}:{line}: {text}" for line, text in reader(source_of(path), module)]
    assert not wrong, "\n".join(wrong)


# The public names


def test_public_names_are_listed_once_for_every_reader():
    assert set(trl_opd.__all__) == set(trl_opd._HOME)
    assert len(trl_opd.__all__) == len(set(trl_opd.__all__))
    # The block for type checkers repeats the names.
    found = imports_in(source_of(PACKAGE / "__init__.py"), "trl_opd.__init__")
    typed = [one.target for one in found if one.moment == "typing"]
    assert {target.split(".")[-1]: module_of(target) for target in typed} == trl_opd._HOME


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
