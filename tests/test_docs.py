"""The pages keep their promises: they are short and plain, their links lead somewhere, and every
command that they show is one that this repository understands."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from drgrpo import config, data
from drgrpo.evaluation import config as evaluation
from drgrpo.types import UserError

DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = sorted((ROOT / "bench" / "results").glob("*.md"))
PROSE = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "drgrpo" / "README.md",
    *DOCS,
]
PAGES = [*PROSE, *RESULTS, ROOT / "bench" / "README.md", ROOT / "kernels" / "README.md"]

NEEDS_A_NETWORK = {
    "git clone <this repository> drgrpo && cd drgrpo",
    "pip install -e '.[cpu,dev]'",
    "pip install -e '.[cuda]'",
    "pip install --group peers",
}
"""Commands that are shown and not checked. Everything else is parsed."""

ABBREVIATIONS = re.compile(r"\b(Dr|et al|Sec|App|Fig|e\.g|i\.e)\.")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- length and style


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items as running text: no code, tables, headings, pictures or link
    targets."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(\||#| {4}|!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = ABBREVIATIONS.sub(r"\1", text)
    parts = re.split(r"\n\s*\n|^(?:[-*]|\d+\.) ", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in parts if part.strip()]


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?])[*)\"]* ", paragraph)


def per_100_sentences(text: str, mark: str) -> float:
    parts = paragraphs(text)
    count = sum(len(re.findall(mark, part)) for part in parts)
    return 100 * count / sum(len(sentences(part)) for part in parts)


def test_the_counter_of_sentences_and_marks():
    text = """# Heading: none; of this counts

One; two: three. Dr. GRPO (Liu et al. 2025) is `a: b; c` one [link: more](x; y). **Bold end.** Last

- an item without a stop
- another: with a colon

| table: | x; y |

```sh
code: x; y
```
"""
    assert [len(sentences(part)) for part in paragraphs(text)] == [4, 1, 1]
    assert per_100_sentences(text, ";") == pytest.approx(100 * 1 / 6)
    assert per_100_sentences(text, r":(?=\s|$)") == pytest.approx(100 * 3 / 6)


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_one_fact_a_sentence(page):
    text = page.read_text()
    assert per_100_sentences(text, ";") < 8
    assert per_100_sentences(text, r":(?=\s|$)") < 25
    assert [part for part in paragraphs(text) if part.count(";") > 1] == []


# ---- links


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_and_picture_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{name(page)}: no heading for {link}"


# ---- commands


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """Every command of a page's `sh` blocks, continued lines joined, comments cut."""
    for language, content in blocks(page):
        if language == "sh":
            for line in content.replace("\\\n", " ").splitlines():
                if command := re.sub(r"(^|\s)#.*$", "", line).strip():
                    yield command


def parse(parser: Callable[[list[str]], object], argv: list[str]) -> None:
    """UserError if the parser does not take the arguments. `--print-config` and `--help` exit."""
    try:
        parser(argv)
    except SystemExit as end:
        assert end.code == 0, f"not understood: {argv}"


def module_file(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check(command: str) -> None:
    """AssertionError or UserError if this repository does not know the command."""
    words = shlex.split(command)
    if "train.py" in words:
        parse(config.parse_args, words[words.index("train.py") + 1 :])
    elif "eval.py" in words:
        parse(evaluation.parse_args, words[words.index("eval.py") + 1 :])
    elif words[0] == "make":
        variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= make_targets(), f"the Makefile lacks a target of: {command}"
        if targets == ["train"]:
            flags = shlex.split(variables.get("ARGS", ""))
            parse(config.parse_args, ["--recipe", "tiny", *flags])
    elif words[0] in ("python", "torchrun") and "-m" in words:
        module = words[words.index("-m") + 1]
        assert module_file(module).exists(), f"no such module: {command}"
    else:
        assert command in NEEDS_A_NETWORK, f"nothing checks this command: {command}"


@pytest.fixture
def parsers_only(monkeypatch):
    """Nobody looks for the runs and the benchmarks that a page makes up."""
    for name in ("find", "read"):
        monkeypatch.setattr(evaluation.responses, name, lambda path: path)
    monkeypatch.setenv("WORLD_SIZE", "16")  # two nodes, as docs/install.md has them
    monkeypatch.setattr(data, "benchmark_source", lambda name, folder: name)
    monkeypatch.setattr(data, "load_problems", lambda *args, **kwargs: [])
    monkeypatch.setattr("drgrpo.run.rehearse.rehearse", lambda config, machine: 0)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_understood(page, parsers_only):
    for command in commands(page):
        check(command)


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_commands_in_running_text_are_understood_too(page, parsers_only):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`((?:make|python -m) [^`]+)`", text):
        check(command)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_of_commands_is_marked_as_one(page):
    """Otherwise nothing would check it."""
    for language, content in blocks(page):
        if language != "sh":
            assert not re.search(r"^(make|python|torchrun|pip|git) ", content, re.MULTILINE)


def test_every_command_that_goes_unchecked_is_shown_somewhere():
    shown = {command for page in PAGES for command in commands(page)}
    assert shown >= NEEDS_A_NETWORK


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --recipe tinny",
        "torchrun --nproc-per-node=8 train.py --recipe tiny --no-such-flag 1",
        "python eval.py --model M --grader none",
        "make trane",
        'make train ARGS="--algo grpoo"',
        "python -m bench.no_such_module",
        "curl example.org",
    ],
)
def test_a_wrong_command_is_noticed(command, parsers_only):
    with pytest.raises((AssertionError, UserError)):
        check(command)


def test_the_workflow_runs_targets_that_exist():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    targets = set(re.findall(r"- run: make ([\w-]+)", workflow))
    assert targets == {"check", "test"} and targets <= make_targets()
