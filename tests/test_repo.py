"""The repository keeps its own rules: what imports what, what the README lists, what a wheel
holds."""

import ast
import re
import subprocess
import sys
import zipfile

import pytest

from conftest import ROOT

FOLDERS = (".", "kernels", "drgrpo", "tests", "bench")
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))


def imports(path) -> set[str]:
    """Modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_tensors_only(path):
    assert top(imports(path)) - set(sys.stdlib_module_names) <= {"torch", "triton"}


@pytest.mark.parametrize("path", sorted((ROOT / "drgrpo").glob("*.py")), ids=lambda p: p.name)
def test_the_library_imports_neither_scripts_nor_tests_nor_benchmarks(path):
    assert not top(imports(path)) & {"train", "eval", "tests", "bench", "kernels"}


@pytest.mark.parametrize(
    "name", ["types", "arithmetic", "tokenizer", "templates", "data", "grade", "advantage", "pack"]
)
def test_plain_modules_need_no_model_engine_or_config(name):
    allowed = {"drgrpo", "drgrpo.types", "drgrpo.tiny.arithmetic"}
    ours = {i for i in imports(ROOT / "drgrpo" / f"{name}.py") if i.split(".")[0] == "drgrpo"}
    assert {".".join(i.split(".")[:2]) for i in ours} <= allowed


def test_only_the_trainer_and_the_run_folder_read_the_config():
    readers = {p.stem for p in (ROOT / "drgrpo").glob("*.py") if "drgrpo.config" in imports(p)}
    assert readers <= {"checkpoint"}, (
        "everything else takes plain arguments: a signature is the list of what it depends on"
    )


def test_the_readme_tree_lists_exactly_the_files_that_exist():
    folder, names = None, set()
    for line in (
        (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1].splitlines()
    ):
        if match := re.match(r"(\w+)/\s", line):
            folder = match[1]
        elif match := re.match(r"(\s*)([\w.]+\.py)\b", line):
            names.add(f"{folder}/{match[2]}" if match[1] else match[2])
    assert names == {str(p.relative_to(ROOT)) for p in SOURCES}


def test_the_two_deletions_are_one_grep_away():
    text = "".join(p.read_text() for p in (ROOT / "train.py", *(ROOT / "drgrpo").glob("*.py")))
    assert len(re.findall(r"# Dr\. GRPO \(1/2\): no division by the group's std", text)) == 1
    assert (
        len(re.findall(r"# Dr\. GRPO \(2/2\): constant normalizer, not response length", text)) >= 1
    )


def test_hugging_faces_kernels_package_is_not_shadowed():
    """Our folder kernels/ has no __init__.py: with one, `import transformers` from the repository
    root breaks."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels package is not installed")
    code = "import kernels, transformers; from transformers import Qwen2ForCausalLM; print(kernels.get_kernel.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("kernels"), done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_without_that_package_everything_imports_too():
    code = (
        "import sys; sys.modules['kernels'] = None\n"  # import kernels now raises ImportError
        "import train; from drgrpo.kernels import linear_drgrpo; print(linear_drgrpo.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "drgrpo.kernels.linear_drgrpo", (
        done.stderr
    )


def test_a_wheel_holds_the_kernels_under_our_own_name(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "drgrpo/kernels/linear_drgrpo.py" in names and "drgrpo/advantage.py" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"drgrpo"}
