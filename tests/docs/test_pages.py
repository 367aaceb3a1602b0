"""README and docs/: links hold, commands exist, results are what their data say."""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from nas.cli.app import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CODE_PAGES = [ROOT / "docs/reference" / name for name in ("arch.md",)]
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "runs/README.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SRUN = r"srun (?:--\S+ )*"
COMMANDS = typer.main.get_command(app).commands


def shell_lines(text: str) -> list[str]:
    """Commands of vitnas in blocks of shell code."""
    blocks = [code for language, code in FENCE.findall(text) if language == "sh"]
    parts = [part.strip() for block in blocks for part in re.split(r"\n|&&", block.replace("\\\n", " "))]
    return [part for part in parts if re.match(rf"({SRUN})?(\.venv/bin/)?vitnas ", part)]


def inline(text: str) -> list[str]:
    """Commands of vitnas within a sentence or a table, which may leave out what they need."""
    return re.findall(r"`(vitnas [^`\n]+)`", FENCE.sub("", text))


def cases(find) -> Iterator[object]:
    for page in PAGES:
        for line in dict.fromkeys(find(page.read_text())):
            yield pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}")


@pytest.mark.parametrize("line", cases(shell_lines))
def test_a_command_is_one_that_vitnas_takes(line):
    name, *words = shlex.split(re.sub(SRUN, "", line))[1:]
    if name == "--version":
        return
    with contextlib.suppress(typer.Exit):
        COMMANDS[name].make_context(name, words)


@pytest.mark.parametrize("line", cases(inline))
def test_a_command_in_a_sentence_has_options_that_exist(line):
    name, *words = shlex.split(line)[1:]
    if name == "VERB":
        return
    known = {option for param in COMMANDS[name].params for option in (*param.opts, *param.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known | {"--help", "-h"}


@pytest.mark.parametrize("line", cases(lambda text: re.findall(r"^python (tests/benchmarks/.*)$", text, re.M)))
def test_a_benchmark_has_the_options_it_was_run_with(line):
    script, *words = shlex.split(line)
    code = (ROOT / script).read_text()
    shared = (ROOT / "tests/benchmarks/pruning_bench.py").read_text() if "pruning_bench" in code else ""
    assert not [word for word in words if word.startswith("-") and f'"{word}"' not in code + shared]


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.encode()) <= 9 * 1024


def test_readme_s_figures_are_on_a_results_page():
    """Figures with decimals or units, outside of code; 95% is the level of every interval."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", README.read_text()).replace("Python 3.11", ""))
    figures = set(re.findall(r"\d+\.\d+|\d+(?= ?(?:ms|min|%|points|x)\b)", prose)) - {"95"}
    results = "".join(page.read_text() for page in (ROOT / "docs/results").glob("*.md"))
    assert not [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", results)]


@pytest.mark.parametrize("page", PAGES[:3], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_pages_outside_docs_hold(page):
    """mkdocs checks the others."""
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_paths_that_pages_name_exist():
    pattern = re.compile(r"`((?:nas|search_spaces|pruning|tests|docs)/[\w/.*-]*)`")
    named = {path for page in PAGES for path in pattern.findall(page.read_text())}
    assert len(named) > 20
    assert not [path for path in named if not any(ROOT.glob(path.rstrip("/")))]


def test_written_pages_are_what_the_script_writes():
    pages = runpy.run_path(str(ROOT / "tests/benchmarks/write_pages.py"))["pages"]()
    for path, content in pages.items():
        assert path.read_text() == content, f"{path.name}: run tests/benchmarks/write_pages.py"
    written = {path for path in pages if path.parent.name == "results"}
    assert {path for path in (ROOT / "docs/results").glob("*.md") if path.name != "index.md"} == written


def test_the_documentation_builds(tmp_path):
    """Strictly: a broken link, or a page outside the navigation, is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert "--latency-budget" in (tmp_path / "reference/cli.html").read_text()


@pytest.mark.parametrize("page", CODE_PAGES, ids=lambda page: page.name)
def test_code_of_the_reference_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after another, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, code in FENCE.findall(page.read_text()):
        if language == "python":
            exec(code, names)
    assert names
