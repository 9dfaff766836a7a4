"""Wheel and source archive: their files, their metadata, and that an installed wheel works."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trl_opd

from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WHEEL_BYTES = SDIST_BYTES = 2_000_000
FILE_BYTES = 200_000
TEACHER = "trl_opd/demo/models/teacher/model.safetensors"
# Users who want these install them; where one is missing, an error message says so.
OPTIONAL = {"deepspeed", "math_verify"}


class Release(NamedTuple):
    """The two archives: their paths, and the content of every file by its name."""

    wheel: Path
    sdist: Path
    files: dict[str, bytes]
    sources: dict[str, bytes]

    @property
    def info(self) -> str:
        return f"trl_opd-{trl_opd.__version__}.dist-info"

    @property
    def metadata(self) -> Message:
        return Parser().parsestr(self.files[f"{self.info}/METADATA"].decode("utf-8"))


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    return [name for name in listed.decode("utf-8").split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    """Build the source archive from a copy of the tracked files, and the wheel from the source archive."""
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("out")
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        sources = {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}
    return Release(wheel, sdist, files, sources)


@pytest.mark.slow
def test_archives_contain_the_tracked_package_and_what_builds_it(release):
    package = {name for name in tracked() if name.startswith("trl_opd/")}
    contents = {name: (ROOT / name).read_bytes() for name in package | {"pyproject.toml", "README.md", "LICENSE"}}
    inside = {name: content for name, content in release.files.items() if not name.startswith(f"{release.info}/")}
    assert inside == {name: contents[name] for name in package}
    assert contents.items() <= release.sources.items()
    assert release.wheel.name == f"trl_opd-{trl_opd.__version__}-py3-none-any.whl"
    assert {TEACHER, "trl_opd/demo/models/student/model.safetensors"} <= inside.keys()
    assert {"trl_opd/report/templates/page.html.jinja", "trl_opd/report/templates/page.js"} <= inside.keys()


def test_archives_are_small(release):
    large = {name: len(content) for name, content in release.files.items() if len(content) > FILE_BYTES}
    assert large.keys() == {TEACHER}
    assert large[TEACHER] < 1_000_000
    assert release.wheel.stat().st_size < WHEEL_BYTES
    assert release.sdist.stat().st_size < SDIST_BYTES


def test_archives_contain_licence_and_command(release):
    licence = (ROOT / "LICENSE").read_bytes()
    assert release.files[f"{release.info}/licenses/LICENSE"] == licence
    assert release.sources["LICENSE"] == licence
    commands = release.files[f"{release.info}/entry_points.txt"].decode()
    assert commands.split() == ["[console_scripts]", "trl-opd", "=", "trl_opd.cli:main"]


def test_metadata_matches_the_project(release):
    metadata = release.metadata
    assert metadata["Name"] == "trl_opd"
    assert metadata["Version"] == trl_opd.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert set(map(Requirement, always)) == set(map(Requirement, PROJECT["dependencies"]))
    assert Requirement("trl>=1.16,<1.17") in map(Requirement, always)


def test_readme_is_the_description_and_renders(release):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert release.metadata["Description-Content-Type"] == "text/markdown"
    assert release.metadata.get_payload().strip() == readme.strip()
    page = MarkdownIt("gfm-like", {"linkify": False}).render(readme)
    assert page.count("<h2>") == sum(line.startswith("## ") for line in readme.splitlines())
    assert page.count("<pre>") == readme.count("\n```") / 2
    assert "<table>" in page


@pytest.mark.slow
@pytest.mark.processes
def test_installed_wheel_has_a_working_command(release, tmp_path):
    """`python -m build` makes the wheel from the source archive, so this checks both."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path), str(release.wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = str(tmp_path / "bin" / "trl-opd")
    for arguments, expected in (
        ([program, "--version"], f"trl-opd {trl_opd.__version__}"),
        ([program, "env"], "trl_opd: "),
        (["-c", "import trl_opd.demo.arithmetic; print(trl_opd.__file__)"], str(tmp_path)),
    ):
        command = [sys.executable, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(expected)


def imported_modules() -> set[str]:
    """Return the top-level modules that the package imports."""
    modules = set()
    for path in Path(trl_opd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.partition(".")[0])
    return modules


def test_every_import_is_a_requirement_or_a_requirement_of_one():
    """For example tqdm, which datasets requires."""
    direct = {Requirement(line).name for line in PROJECT["dependencies"]}
    known = set(map(canonicalize_name, direct))
    for name in direct:
        for line in importlib.metadata.requires(name) or ():
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                known.add(canonicalize_name(one.name))
    owners = importlib.metadata.packages_distributions()
    foreign = imported_modules() - sys.stdlib_module_names - OPTIONAL
    assert [name for name in foreign if known.isdisjoint(map(canonicalize_name, owners[name]))] == []


def test_constraints_satisfy_the_requirements():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(one.name): next(iter(one.specifier)).version for one in pinned}
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), line
