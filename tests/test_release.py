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
OPTIONAL = {"deepspeed", "math_verify"}  # of who asks for them; a sentence says so where they are missing


class Release(NamedTuple):
    """The two archives: their paths, and the bytes of every file by its name."""

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
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        sources = {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}
    return Release(wheel, sdist, files, sources)


@pytest.mark.slow
def test_wheel_contains_exactly_the_tracked_package(release):
    package = {name for name in tracked() if name.startswith("trl_opd/")}
    inside = {name for name in release.files if not name.startswith(f"{release.info}/")}
    assert inside == package
    for name in package:
        assert release.files[name] == (ROOT / name).read_bytes(), name
    assert release.wheel.name == f"trl_opd-{trl_opd.__version__}-py3-none-any.whl"


def test_wheel_contains_demo_models_and_report_templates(release):
    assert {TEACHER, "trl_opd/demo/models/student/model.safetensors"} <= release.files.keys()
    assert {"trl_opd/report/templates/page.html.jinja", "trl_opd/report/templates/page.js"} <= release.files.keys()


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


def test_source_archive_contains_everything_the_wheel_needs(release):
    needed = {name for name in tracked() if name.startswith("trl_opd/")} | {"pyproject.toml", "README.md", "LICENSE"}
    for name in needed:
        assert release.sources[name] == (ROOT / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_installed_archive_has_a_working_command(release, tmp_path, name):
    archive = getattr(release, name)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(tmp_path), str(archive)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments, expected in (["--version"], f"trl-opd {trl_opd.__version__}"), (["env"], "trl_opd: "):
        command = [sys.executable, str(tmp_path / "bin" / "trl-opd"), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(expected)
    where = [sys.executable, "-c", "import trl_opd, trl_opd.demo.arms; print(trl_opd.__file__)"]
    run = subprocess.run(where, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert run.stdout.strip().startswith(str(tmp_path))


def test_every_import_is_covered_by_the_requirements():
    """A direct requirement, or one that a direct requirement has: tqdm comes with datasets."""
    modules = set()
    for path in Path(trl_opd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.partition(".")[0])
    direct = {Requirement(line).name for line in PROJECT["dependencies"]}
    known = set(map(canonicalize_name, direct))
    for name in direct:
        found = map(Requirement, importlib.metadata.requires(name) or ())
        known |= {
            canonicalize_name(one.name) for one in found if one.marker is None or one.marker.evaluate({"extra": ""})
        }
    owners = importlib.metadata.packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - OPTIONAL
    assert {name for name in foreign if not known & set(map(canonicalize_name, owners[name]))} == set()


def test_constraints_satisfy_the_requirements():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(one.name): next(iter(one.specifier)).version for one in pinned}
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), line
