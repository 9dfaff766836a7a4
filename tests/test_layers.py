"""Tests of the shape of trl_opd: who may import whom, what an import costs, and how long a thing may be.

A diagram that is not tested is a wish: the table below is the one of docs/design.md, read against the sources.
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

PACKAGE = Path(trl_opd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULE_LINES, FUNCTION_LINES = 300, 50

GROUND = {
    "_trl",
    "checkpoints",
    "files",
    "hub",
    "occurrences",
    "parquet",
    "records",
    "rock_set",
    "rollout_file",
    "schema",
}
GROUND |= {"token_stats", "vocabulary"}
PURE = {
    "batching",
    "context",
    "corpus",
    "counters",
    "cutoff",
    "detection",
    "divergence",
    "evidence",
    "families",
    "figures",
    "fused_divergence",
    "selection",
    "statistics",
    "weighting",
}
PLUMBING = {
    "accuracy",
    "arm",
    "collect",
    "continuous_batching",
    "finite",
    "gradient_study",
    "gradients",
    "knockout",
    "memory",
    "merging",
    "model_shape",
    "option_checks",
    "opd_config",
    "opd_trainer",
    "parking",
    "phases",
    "preflight",
    "probe",
    "prompts",
    "publishing",
    "report",
    "rewards",
    "rollout_samples",
    "rollouts",
    "run_occurrences",
    "run_record",
    "run_stats",
    "scoring",
    "student",
    "teacher",
    "teacher_phase",
}
EDGE = {"__init__", "__main__", "cli"}

# layer: its modules, and the modules of ours that each of them may import
DIAGRAM = {
    "ground": (GROUND, GROUND),
    "pure": (PURE - {"divergence", "corpus", "context", "cutoff", "selection", "weighting"}, GROUND),
    "hashes": ({"weighting"}, GROUND | {"counters"}),
    "corpus": ({"corpus"}, GROUND | {"statistics"}),
    "of a corpus": ({"context", "cutoff"}, {"corpus"}),
    "selection": ({"selection"}, GROUND | {"context", "corpus", "cutoff", "detection", "families"}),
    "the op": ({"divergence"}, GROUND | {"fused_divergence"}),
    "knockout": ({"knockout"}, {"counters"}),
    "scoring": ({"scoring"}, GROUND | {"batching", "divergence"}),
    "gradient sums": ({"gradients"}, GROUND | {"batching", "scoring"}),
    "gradient study": ({"gradient_study"}, GROUND | {"gradients"}),
    "probe": ({"probe"}, GROUND | {"evidence", "knockout", "rewards", "statistics"}),
    "alone": ({"finite", "merging", "model_shape", "option_checks", "parking", "phases", "prompts", "rewards"}, set()),
    "configuration": ({"opd_config"}, {"option_checks"}),
    "planner": ({"memory"}, {"model_shape"}),
    "report": ({"report"}, GROUND | {"cutoff", "families", "gradient_study"}),
    "for others to see": ({"publishing"}, GROUND | {"merging", "report"}),
    "record": ({"run_record"}, GROUND | {"report"}),
    "callbacks": (
        {"accuracy", "rollout_samples"},
        GROUND | PURE | {"arm", "gradients", "knockout", "option_checks", "prompts", "rewards", "rollouts", "scoring"},
    ),
    "rollouts": ({"rollouts", "continuous_batching"}, GROUND | PURE),
    "teacher phase": ({"teacher_phase"}, GROUND | PURE | {"parking"}),
    "student": ({"student"}, GROUND | {"teacher"}),
    "collector": ({"collect"}, GROUND | PURE | {"opd_trainer", "rollouts", "run_stats", "scoring"}),
    "teacher": ({"teacher"}, GROUND | {"opd_config"}),
    "one arm": ({"arm", "preflight", "run_occurrences", "run_stats"}, GROUND | PURE | {"opd_config"}),
    "trainer": ({"opd_trainer"}, GROUND | PURE | PLUMBING),
    "demo": ({"demo"}, GROUND | PURE | PLUMBING),
    "edge": (EDGE, GROUND | PURE | PLUMBING | EDGE | {"demo"}),
}
MAY_IMPORT = {module: allowed for modules, allowed in DIAGRAM.values() for module in modules}
# Pure modules take tensors and plain values, and know no configuration, trainer or device policy.
NOT_PURE = {"accelerate", "datasets", "peft", "transformers", "trl"}


class Import(NamedTuple):
    """An import in a source: what is imported, by whom, and whether it runs when the importing module loads."""

    importer: str
    target: str
    line: int
    at_load: bool


def imports_in(source: str, module: str, *, package: bool = False) -> list[Import]:
    """Return every import of a source with absolute targets ("trl_opd.rock_set.RockSet"), wherever it stands.

    Args:
        source (`str`): The text of the module.
        module (`str`): Its absolute name.
        package (`bool`, *optional*, defaults to `False`): Whether it is an `__init__`, from which one dot is itself.
    """
    found = []
    for node, at_load in _nodes(ast.parse(source), True):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        found += [Import(_ours(module), target, node.lineno, at_load) for target in targets]
    return found


def _nodes(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body
        runs = at_load and not typing_only and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield child, runs
        yield from _nodes(child, runs)


def _ours(target: str) -> str | None:
    """Return the module of the diagram that a target lies in, or `None` for another package's."""
    package, *rest = target.split(".")
    if package != "trl_opd":
        return None
    first = rest[0] if rest else "__init__"
    # `from trl_opd import RockSet` loads the public name's home.
    return first if first in MAY_IMPORT or (PACKAGE / f"{first}.py").exists() else trl_opd._HOME.get(first, "__init__")


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _all_imports() -> list[Import]:
    return [
        found
        for path in FILES
        for found in imports_in(path.read_text(encoding="utf-8"), _name(path), package=path.stem == "__init__")
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .rock_set import RockSet", ("trl_opd.rock_set.RockSet", "rock_set", True)),
        ("from . import schema as s", ("trl_opd.schema", "schema", True)),
        ("from . import RockSet", ("trl_opd.RockSet", "rock_set", True)),
        ("import trl_opd.figures", ("trl_opd.figures", "figures", True)),
        ("import trl_opd", ("trl_opd", "__init__", True)),
        ("from trl_opd import OPDConfig", ("trl_opd.OPDConfig", "opd_config", True)),
        ("from trl_opd import __version__", ("trl_opd.__version__", "__init__", True)),
        ("from trl_opd.cli.demo import main", ("trl_opd.cli.demo.main", "cli", True)),
        ("def f():\n    from .arm import Arm", ("trl_opd.arm.Arm", "arm", False)),
        ("class A:\n    async def f(self):\n        import trl_opd.arm", ("trl_opd.arm", "arm", False)),
        ("class A:\n    from .arm import Arm", ("trl_opd.arm.Arm", "arm", True)),
        ("try:\n    pass\nfinally:\n    from .arm import Arm", ("trl_opd.arm.Arm", "arm", True)),
        ("if TYPE_CHECKING:\n    from .arm import Arm", ("trl_opd.arm.Arm", "arm", False)),
        ("if not TYPE:\n    from .arm import Arm", ("trl_opd.arm.Arm", "arm", True)),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from .arm import Arm", ("trl_opd.arm.Arm", "arm", True)),
        ("from trl.trainer.utils import RepeatSampler", ("trl.trainer.utils.RepeatSampler", None, True)),
    ],
)
def test_the_reader_sees_an_import_in_every_form(source, expected):
    (found,) = imports_in(source, "trl_opd.teacher")
    assert (found.target, _ours(found.target), found.at_load) == expected
    assert found.importer == "teacher"


def test_the_reader_counts_dots_from_the_place_of_the_module():
    assert imports_in("from ..arm import Arm", "trl_opd.cli.demo")[0].target == "trl_opd.arm.Arm"
    assert imports_in("from .demo import main", "trl_opd.cli", package=True)[0].target == "trl_opd.cli.demo.main"
    assert imports_in("from .arm import Arm", "trl_opd", package=True)[0].target == "trl_opd.arm.Arm"


def test_every_module_has_a_place_in_the_diagram():
    modules = {_ours(_name(path)) for path in FILES}
    assert modules <= MAY_IMPORT.keys(), "a new module needs a layer: here and in docs/design.md"
    assert MAY_IMPORT.keys() <= modules, "the diagram names modules that do not exist"


def test_no_module_imports_against_the_diagram():
    wrong = [
        f"{found.importer} imports {found.target} (line {found.line}); it may import {allowed or 'none of ours'}"
        for found in _all_imports()
        if (ours := _ours(found.target)) is not None
        and ours != found.importer
        and ours not in (allowed := MAY_IMPORT.get(found.importer, set()))
    ]
    assert not wrong, "\n".join(wrong)


def test_pure_modules_know_no_trainer_library():
    wrong = [found for found in _all_imports() if found.importer in PURE and found.target.split(".")[0] in NOT_PURE]
    assert not wrong


def test_modules_load_without_a_cycle():
    edges = {}
    for found in _all_imports():
        if found.at_load and (ours := _ours(found.target)) not in (None, found.importer):
            edges.setdefault(found.importer, set()).add(ours)
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the cycle


def test_only_trl_py_reaches_behind_the_public_names_of_trl():
    wrong = []
    for found in _all_imports():
        package, *names = found.target.split(".")
        if package != "trl" or found.importer == "_trl":
            continue
        # `import trl` would let `trl.trainer.utils` in unseen: take names, one dot below.
        if len(names) != 1 or isinstance(getattr(trl, names[0]), ModuleType):
            wrong.append(f"{found.importer} imports {found.target} (line {found.line}): take it through _trl")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_imported_by_a_computed_name_below_the_edge():
    # What no reader of imports can see: `import_module("trl_opd.cli")`.
    for path in FILES:
        if _ours(_name(path)) not in EDGE:
            text = path.read_text(encoding="utf-8")
            assert "import_module" not in text, path
            assert "__import__" not in text, path


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_module_says_what_it_is_and_is_short(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "its first line says what it is for"
    assert len(text.splitlines()) <= MODULE_LINES, "a module that outgrows its one-line purpose is two modules"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert not long, f"a function has at most {FUNCTION_LINES} lines"


# The public names


def test_public_names_are_listed_once_for_every_reader():
    assert set(trl_opd.__all__) == set(trl_opd._HOME)
    assert len(trl_opd.__all__) == len(set(trl_opd.__all__))
    # The block for type checkers says the same a third time.
    typed = {
        found.target.split(".")[2]: found.target.split(".")[1]
        for found in imports_in(Path(trl_opd.__file__).read_text(encoding="utf-8"), "trl_opd", package=True)
        if _ours(found.target) is not None
    }
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
    """What one fresh interpreter has loaded after each step: top-level modules by step, and the names of `dir`."""
    done = subprocess.run([sys.executable, "-c", LOADED_BY], check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", ["import", "dir", "RockSet"])
def test_a_look_at_the_package_loads_no_heavy_library(fresh, step):
    assert "trl_opd" in fresh[step]
    assert not {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy"} & set(fresh[step])


def test_dir_shows_every_public_name(fresh):
    assert set(trl_opd.__all__) <= set(fresh["names"])
