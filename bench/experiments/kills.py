"""Is a run lost if it is killed? SIGKILLs at random moments, each followed by the same command.

    python -m bench.experiments.kills                 # 1000 kills, an hour or more on two cores
    python -m bench.experiments.kills --kills 40 --cases torch "torch, carry-over"

Result at commits 64bf296 to 0bd9ae9 on two cores of an AMD EPYC: 1,023 kills, 135 of them with
vLLM, and none of the 381 runs that got to the end differed. Only 11 of these were with vLLM, whose
start takes most of the time of a run.

A case is a short run of the `tiny` recipe with an engine, a number of processes, and carry-over or
not. It is run once without interruption. Then it is started again and again, and each start is
killed after a random share of the CPU time that the whole run takes, until one start gets to the
end. Its weights, metrics, samples and evaluations must equal those of the uninterrupted run to the
last bit. Then the next such run begins. A kill hits all processes of the run at once.

A start is a fork of this process, so that no start pays for the import of torch. Each start reads
its command, its folder and its checkpoint as a new process would.

    kills.json     kills, runs and differing runs of each case, and the steps that had been saved.
                   A case that is not run keeps its earlier row
"""

import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import train
from bench import harness
from bench.harness import RESULTS, markdown
from drgrpo import distributed
from drgrpo.config import RECIPES, Config
from drgrpo.run.cli import hard_exit
from drgrpo.run.files import read_jsonl
from drgrpo.run.folder import list_checkpoints
from drgrpo.run.metrics import TIMES
from drgrpo.tiny.warmup import Warmup, cached_tiny_model

CARRY = {"carry_over": 0.25, "carry_steps": 2}
VLLM = {"engine": "vllm", "kv_cache_gb": 0.1}
CASES = {  # name: (what it changes, processes, share of the kills)
    "torch": ({}, 1, 0.24),
    "torch, carry-over": (CARRY, 1, 0.24),
    "torch, two processes": ({}, 2, 0.22),
    "torch, two processes, carry-over": (CARRY, 2, 0.22),
    "vLLM": (VLLM, 1, 0.02),
    "vLLM, carry-over": (VLLM | CARRY, 1, 0.02),
    "vLLM, two processes": (VLLM, 2, 0.02),
    "vLLM, two processes, carry-over": (VLLM | CARRY, 2, 0.02),
}
"""A start of vLLM takes ten seconds or more, so that it gets fewer kills."""
TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = harness.command_line(__doc__)
    add, every = parser.add_argument, list(CASES)
    add("--kills", type=int, default=1000, help="over all cases, by their shares")
    add("--cases", nargs="+", choices=every, default=every, metavar="NAME", help="which of them")
    add("--seed", type=int, default=0, help="of the moments")
    add("--out", type=Path, default=RESULTS, help="where kills.json goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / "kills.json"
    whole = sum(CASES[name][2] for name in args.cases)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        model = str(cached_tiny_model(Warmup(seed=0), Path(folder) / "warmup"))
        for name in args.cases:
            count = max(1, round(args.kills * CASES[name][2] / whole))
            row = kill_case(name, model, Path(folder), count, random.Random(args.seed))
            row |= {"seed": args.seed, "where": harness.provenance()}
            rows = (harness.read_json(path) or {}) | {name: row}
            print(f"{name}: {harness.write_json(path, rows)}", flush=True)
    print(table(rows))
    if any(row["differing"] for row in rows.values()):
        raise SystemExit(1)


def config_of(name: str, model: str, out: Path) -> Config:
    """Three steps of 32 responses, each followed by a checkpoint and the second by an
    evaluation."""
    size = {"prompts_per_step": 8, "group_size": 4, "minibatches": 2, "steps": 3}
    size |= {"eval_every": 2, "eval_samples": 0, "save_every": 1, "model": model, "out": str(out)}
    return replace(RECIPES["tiny"](), **size, **CASES[name][0])


# ---- one case


def kill_case(name: str, model: str, folder: Path, count: int, rng: random.Random) -> dict:
    """Runs of a case, with `count` kills over all of them."""
    processes = CASES[name][1]
    straight = config_of(name, model, folder / "straight")
    whole = attempt(straight, processes)
    if whole.status != 0:
        raise RuntimeError(f"{name} fails without a kill: see {keep(straight)}")
    if straight.carry_over:
        carried = [row["carried"] for row in read_jsonl(straight.folder / "metrics.jsonl")]
        assert all(carried[:-1]), f"{name} carries nothing over: {carried}"
    kills, runs, differing, saved = 0, 0, [], Counter()
    while kills < count:
        config = config_of(name, model, folder / "killed")
        while (end := attempt(config, processes, rng.uniform(0, whole.cpu))).killed:
            kills += 1
            saved[len(list_checkpoints(config.folder))] += 1
        if end.status != 0:
            raise RuntimeError(f"{name}: a start ended with {end.status}: see {keep(config)}")
        runs += 1
        if found := differences(straight.folder, config.folder):
            differing.append({"files": found, "kept": str(keep(config))})
        shutil.rmtree(config.folder)
    shutil.rmtree(straight.folder)
    row = {"kills": kills, "runs": runs, "differing": len(differing), "kept": differing}
    return row | {"after_saving": {str(n): saved[n] for n in sorted(saved)}}


def keep(config: Config) -> Path:
    """A copy of a run folder and its output, for whoever wants to know what went wrong."""
    kept = Path(tempfile.mkdtemp(prefix="kept-"))
    shutil.copytree(config.folder, kept / "run", symlinks=True, dirs_exist_ok=True)
    shutil.copy(log_of(config), kept / "output.txt")
    return kept


def differences(one: Path, other: Path) -> list[str]:
    """The files in which two finished runs differ. Times do not count."""
    found = [
        name
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl")
        if records(one / name) != records(other / name)
    ]
    weights = sorted(path.name for path in (one / "hf").glob("*.safetensors"))
    assert weights, f"{one} has no weights"
    for name in weights:
        if (one / "hf" / name).read_bytes() != (other / "hf" / name).read_bytes():
            found.append(name)
    return found


def records(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_jsonl(path)]


# ---- one start


class End(NamedTuple):
    """How a start ended. `cpu`: seconds that its first process used."""

    status: int
    killed: bool
    cpu: float


def attempt(config: Config, processes: int, moment: float = float("inf")) -> End:
    """Start the run and kill it when its first process has used `moment` CPU seconds."""
    port = free_port()
    pids: list[int] = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pids.append(fork(partial(one_process, config, environment), pids[0] if pids else 0))
    cpu, killed = 0.0, False
    while os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        cpu = cpu_seconds(pids[0])
        if cpu >= moment:
            os.killpg(pids[0], signal.SIGKILL)
            killed = True
            break
        time.sleep(0.002)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    killed = killed and -signal.SIGKILL in statuses
    return End(max(map(abs, statuses)), killed, cpu)


def fork(run: Callable[[], None], group: int) -> int:
    """A process that does `run`, which does not return, in a process group that is killed as one.
    Group 0 is a new one."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, group)
        run()
    os.setpgid(pid, group or pid)
    return pid


def one_process(config: Config, environment: dict[str, str]) -> None:
    """What `train.py` does when it is the main program. Ends the process."""
    os.environ.update(environment)
    status = 0
    with open(log_of(config), "a") as log:
        for descriptor in (1, 2):  # for the processes that this one starts
            os.dup2(log.fileno(), descriptor)
        sys.stdout = sys.stderr = log
        try:
            with hard_exit():
                train.main(config)
                distributed.stop()
        except BaseException:
            traceback.print_exc()
            status = 1
    os._exit(status)


def log_of(config: Config) -> Path:
    return config.folder.with_suffix(".txt")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def table(rows: dict[str, dict]) -> str:
    """Markdown: a line per case and their sum."""
    cells = []
    columns = ("kills", "runs", "differing")
    for name, row in rows.items():
        cells.append([name, *(str(row[column]) for column in columns)])
    cells.append(["all", *(str(sum(row[column] for row in rows.values())) for column in columns)])
    return markdown(["case", "kills", "runs that got to the end", "of these differ"], cells)


if __name__ == "__main__":
    main()
