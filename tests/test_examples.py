"""The examples run: three rewards, a trainer of TRL, and two scripts whose training command is
understood."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from drgrpo.grade import Grader
from drgrpo.reward import check
from drgrpo.types import Completion, Problem, Rollout
from test_docs import links

EXAMPLES = ROOT / "examples"


def rewards(where: str, *responses: str, answer="1", finished: bool = True) -> list[float]:
    """What a function says, through the workers that training uses."""
    problem = Problem(0, "q", answer)
    with Grader("hash", workers=1, reward=f"{EXAMPLES}/{where}") as grader:
        made = [Rollout(problem, Completion([1], [0.0], finished), text) for text in responses]
        grades = [grader.grade(rollout) for rollout in made]
        return [next(iter(grade.result().components.values())) for grade in grades]


def test_a_reward_for_the_format():
    responses = ("so \\boxed{1}", "\\boxed{1} or \\boxed{2}", "1")
    assert rewards("format_reward.py:one_box", *responses) == [1, 0, 0]
    assert rewards("format_reward.py:one_box", responses[0], finished=False) == [0]


def test_a_reward_that_knows_the_length():
    found = rewards("length_reward.py:brevity", "", "x" * 6000, "x" * 7500, "x" * 9000, "x" * 10000)
    assert found == [0, 0, -0.5, -1, -1]


TESTS = ["assert double(1) == 2", "assert double('a') == 'aa'", "assert double(3) == 6"]
WRITE = "try: os.write(fd, b'0 3')\n except OSError: pass"


def code(text: str) -> str:
    return f"First\n```python\nnonsense(\n```\nthen\n```python\n{text}\n```\nDone."


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("def double(x): return x + x", 1),
        ("def double(x): return 2 * int(x)", 2 / 3),
        ("def double(x): return 0", 0),
        ("def double(x):", 0),
        ("import sys; sys.exit(0)", 0),
        ("import os; os._exit(0)", 0),
        ("print('0 3')\ndef double(x): return x + x", 1),
        (f"import os\nfor fd in range(9):\n {WRITE}\nos._exit(0)", 0),
        ("import os; os.fork()\ndef double(x): return x + x", 0),
        ("import mmap; mmap.mmap(-1, 2 << 30)\ndef double(x): return x + x", 0),
        ("open('big', 'w').write('x' * (2 << 20))\ndef double(x): return x + x", 0),
        ("import os\nassert 'PATH' not in os.environ\ndef double(x): return x + x", 1),
        ("import os\nassert os.listdir() == []\ndef double(x): return x + x", 1),
    ],
    ids=range(13),
)
def test_unit_tests_of_generated_code(text, share):
    assert rewards("code_reward.py:passes_tests", code(text), answer=TESTS) == [share]


@pytest.mark.slow
def test_code_that_never_ends_is_killed_and_the_next_one_runs():
    endless = ("import time; time.sleep(1000)", "while True: pass")
    good = "def double(x): return x + x"
    found = rewards("code_reward.py:passes_tests", *map(code, (*endless, good)), answer=TESTS)
    assert found == [0, 0, 1]


def test_a_response_without_code_passes_nothing():
    assert rewards("code_reward.py:passes_tests", "I cannot.", answer=TESTS) == [0]


def test_generated_code_has_no_network_where_namespaces_are_allowed():
    sys.path.insert(0, str(EXAMPLES))
    import code_reward

    if not code_reward.sandbox():
        pytest.skip("unshare is not allowed here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address).close()  # this process reaches it
        text = f"import socket; socket.create_connection({address})\ndef double(x): return x + x"
        assert rewards("code_reward.py:passes_tests", code(text), answer=TESTS) == [0]
    text = "import os\ndef double(x): return x + x if os.getpid() == 1 else 0"
    assert rewards("code_reward.py:passes_tests", code(text), answer=TESTS) == [1]


def test_every_example_passes_the_check_of_the_command_line():
    functions = ("format_reward.py:one_box", "length_reward.py:brevity")
    functions += ("code_reward.py:passes_tests",)
    check(" + ".join(f"{EXAMPLES}/{function}" for function in functions))
    files = {path.name for path in EXAMPLES.glob("*_reward.py")}
    assert {name.split(":")[0] for name in functions} == files


@pytest.mark.slow
def test_trl_learns_with_the_fused_head(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: make env-test")
    command = [sys.executable, EXAMPLES / "trl_grpo.py", "--out", str(tmp_path), "--steps", "15"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = re.findall(r"\d\.\d\d", done.stdout.splitlines()[-1])
    assert float(last) > float(first) + 0.1


# ---- the scripts

STUBS = {
    "scontrol": "#!/bin/sh\necho node1\necho node2\n",
    "srun": '#!/bin/sh\nexec "$@"\n',
    "torchrun": f"""#!{sys.executable}
import os, sys
at = sys.argv.index("train.py")
flags = dict(flag.split("=") for flag in sys.argv[1:at] if "=" in flag)
world = int(flags.get("--nnodes", 1)) * int(flags["--nproc-per-node"])
print(flags, flush=True)
os.environ["WORLD_SIZE"] = str(world)
os.execv(sys.executable, [sys.executable, *sys.argv[at:], "--print-config"])
""",
}


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_starts_a_run_that_train_py_understands(script, tmp_path):
    """The script runs with stand-ins for SLURM's commands and torchrun."""
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    command = ["bash", script, "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"seed": 3' in done.stdout, "what the caller adds reaches the command"
    if script.name == "slurm.sh":
        assert "'--rdzv-endpoint': 'node1:29500'" in done.stdout
        assert '"dp_replicate": 2' in done.stdout and '"recipe": "oat_zero_7b"' in done.stdout


def test_the_page_names_every_example():
    page = EXAMPLES / "README.md"
    named = {link for link in links(page) if not link.startswith("..")}
    assert named == {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert all((EXAMPLES / Path(link.partition("#")[0])).exists() for link in links(page))
