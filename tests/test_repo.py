"""The repository keeps its own rules: what imports what, which files the pages list, what a wheel
holds."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT

LIBRARY = sorted(p for p in (ROOT / "drgrpo").rglob("*.py") if "kernels" not in p.parts)
TEMPLATES = sorted((ROOT / "drgrpo").rglob("*.jinja"))  # without them a run writes no page
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
ALGORITHM = [path for path in LIBRARY if path.parent.name == "drgrpo" and path.stem != "config"]
PLAIN = {"types", "templates", "data", "answers", "advantage", "pack"}
PLAIN |= {"grade", "reward", "workers"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node under `node` that can run: what only a type checker reads is left out."""
    yield node
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from walk(child)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, at its top or inside functions."""
    names = set()
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


# ---- who may import what


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_know_tensors_only(path):
    found = imports(path)
    if path.name == "trl.py":  # takes the kernel to TRL
        found = {n for n in found if not n.startswith(("trl", "drgrpo.kernels.linear_drgrpo"))}
    assert top(found) - set(sys.stdlib_module_names) <= {"torch", "triton"}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_imports_neither_scripts_nor_tests_nor_benchmarks(path):
    assert not top(imports(path)) & {"train", "eval", "tests", "bench", "kernels"}


@pytest.mark.parametrize("path", ALGORITHM, ids=name)
def test_the_algorithm_takes_plain_arguments(path):
    """Neither the config nor the machinery of a run or an evaluation: a signature is the list of
    what a function depends on."""
    machinery = ("drgrpo.config", "drgrpo.run", "drgrpo.evaluation")
    assert not [module for module in imports(path) if module.startswith(machinery)]


@pytest.mark.parametrize("path", [p for p in ALGORITHM if p.stem in PLAIN], ids=name)
def test_plain_modules_need_no_model(path):
    allowed = {"drgrpo", "drgrpo.types", "drgrpo.answers", "drgrpo.tiny"}
    allowed |= {"drgrpo.reward", "drgrpo.workers"}
    ours = {".".join(n.split(".")[:2]) for n in imports(path) if n.split(".")[0] == "drgrpo"}
    assert ours <= allowed


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Module of drgrpo -> the modules of drgrpo that it imports, inside functions too."""
    modules = {module_of(path): path for path in LIBRARY}
    return {module: imports(path) & modules.keys() - {module} for module, path in modules.items()}


def test_the_library_has_no_import_circle():
    """A circle that is hidden inside functions is one too."""
    graph = import_graph()
    assert graph["drgrpo.run.metrics"] >= {"drgrpo.types"}  # the graph has edges at all
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " -> ".join(reversed(error.args[1])))


# ---- what the pages list


def test_the_librarys_page_lists_exactly_the_files_that_exist():
    folder, listed = "", set()
    for line in (ROOT / "drgrpo" / "README.md").read_text().split("```")[1].splitlines():
        if match := re.match(r"([\w/]+)/\s", line):
            folder = match[1]
        elif match := re.match(r"  ([\w.]+\.(?:py|jinja))\b", line):
            listed.add(f"{folder}/{match[1]}")
    assert listed == {name(path) for path in [*LIBRARY, *TEMPLATES, *KERNELS]}


def test_the_benchmarks_page_names_exactly_the_files_that_exist():
    """As `python -m bench.module`, with torchrun or as `make target` if it is a command, otherwise
    as `module.py`."""
    text = (ROOT / "bench" / "README.md").read_text()
    recipes = re.findall(
        r"^([\w-]+):.*\n\t.*-m (bench[\w.]+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE
    )
    files = [p for p in (ROOT / "bench").rglob("*.py") if p.name != "__init__.py"]
    modules = {module_of(path): path for path in files}
    commands = set(re.findall(r"`(?:python|torchrun [^`]*) -m (bench[\w.]+)", text))
    commands |= {module for target, module in recipes if f"`make {target}`" in text}
    mentioned = commands | {m for m, p in modules.items() if m in text or f"{p.name}`" in text}
    assert mentioned == modules.keys()
    runnable = {m for m, path in modules.items() if '__name__ == "__main__"' in path.read_text()}
    assert commands == runnable


def test_the_two_deletions_are_one_grep_away():
    text = "".join(path.read_text() for path in (ROOT / "train.py", *LIBRARY))
    assert len(re.findall(r"# Dr\. GRPO \(1/2\): no division by the group's std", text)) == 1
    second = r"# Dr\. GRPO \(2/2\): constant normalizer, not response length"
    assert len(re.findall(second, text)) >= 1


def test_the_commit_hooks_run_the_pinned_ruff():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [pin for pin in project["optional-dependencies"]["dev"] if pin.startswith("ruff")]
    hooks = re.findall(r'"(ruff==[\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 2 and set(hooks) == set(pins)


# ---- the name `kernels`, and what is installed


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_hugging_faces_kernels_package_is_not_shadowed():
    """Our folder kernels/ has no __init__.py: with one, `import transformers` from the repository
    root breaks."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels package is not installed")
    code = (
        "import kernels, transformers\n"
        "from transformers import Qwen2ForCausalLM\n"
        "print(kernels.get_kernel.__module__)"
    )
    process = python(code)
    assert process.returncode == 0 and process.stdout.startswith("kernels"), process.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_without_that_package_everything_imports_too():
    code = (
        "import sys; sys.modules['kernels'] = None\n"  # import kernels now raises ImportError
        "import train; from drgrpo.kernels import linear_drgrpo; print(linear_drgrpo.__name__)"
    )
    process = python(code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "drgrpo.kernels.linear_drgrpo"


def test_a_wheel_holds_the_kernels_under_our_own_name(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, ROOT], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "drgrpo/kernels/linear_drgrpo.py" in names and "drgrpo/advantage.py" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"drgrpo"}
    library = {n for n in names if n.startswith("drgrpo/") and "kernels" not in n}
    assert library == {name(path) for path in [*LIBRARY, *TEMPLATES]}


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Assert, ast.Raise)
READ_FIRST = [ROOT / "train.py", ROOT / "eval.py", *sorted((ROOT / "drgrpo").rglob("*.py"))]


def size(node) -> int:
    return node.end_lineno - node.lineno + 1


def test_the_trainer_fits_on_a_few_screens():
    source = (ROOT / "train.py").read_text()
    assert len(source.splitlines()) <= 300
    (main,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "main")
    loops = [size(node) for node in ast.walk(main) if isinstance(node, ast.For)]
    assert size(main) <= 125 and max(loops) <= 60
    assert re.findall(r"^ +# (\d)\. ", source, re.MULTILINE) == list("1234567")


@pytest.mark.parametrize("path", READ_FIRST, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_a_statement_has_one_comprehension(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in ("main", "_drgrpo_row_kernel"):
            assert size(node) <= 70, node.name
        if isinstance(node, SIMPLE):
            inner = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS)]
            assert len(inner) <= 1, f"line {node.lineno}"
