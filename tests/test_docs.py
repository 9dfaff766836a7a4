"""The docs match the repository: commands, trees, tables, links and names of tests."""

import re

import pytest

from trl_opd.cli.options import options_of_config, show_default

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def package_parts() -> set[str]:
    """Return the names of the package's modules and folders."""
    modules = {path.stem for path in (ROOT / "trl_opd").glob("*.py")} - {"__init__", "__main__"}
    return modules | {path.parent.name for path in (ROOT / "trl_opd").glob("*/__init__.py")}


def test_readme_is_short_and_ci_runs_its_commands():
    assert len(README.splitlines()) <= 150
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile\n' in README
    assert 'pip install -q -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile\n' in ci
    assert "pip install -c constraints.txt . && trl-opd demo\n" in README
    assert "trl-opd demo" in ci
    training = (ROOT / "docs" / "training.md").read_text()
    for part in ("examples/tiny_models.py", "examples/recipes/two_minutes.yaml"):
        assert part in training
        assert part in ci


def test_readme_shows_the_real_tree():
    tree = README[README.index("## The tree") :]
    rows = re.findall(r"^[├└]── ([^\s,]+(?:, [^\s,]+)*)", tree, re.MULTILINE)
    shown = re.findall(r"(\w+)(?:\.py|/)", "\n".join(rows))
    assert set(shown) == package_parts()


def test_design_diagram_names_every_module():
    design = (ROOT / "docs" / "design.md").read_text()
    diagram = design[design.index("## The parts") : design.index("Imports go down")]
    assert package_parts() <= set(re.findall(r"\w+", diagram))


def test_option_table_matches_the_config():
    page = (ROOT / "docs" / "training.md").read_text()
    section = page[page.index("## New options") :]
    table = section[section.index("| option |") : section.index("\n\nA rollout")]
    without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", table)
    rows = [f"| `{option.name}` | `{show_default(option)}` | {option.help} |" for option in options_of_config()]
    expected = "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])
    assert without_links == expected, f"The table must be, except for links:\n{expected}"


def test_tests_named_in_the_docs_exist():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) >= 18
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
