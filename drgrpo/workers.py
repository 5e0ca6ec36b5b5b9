"""Processes for what may hang, crash or eat memory: the kernel kills them at a limit of time or
memory, and the caller goes on.

    Pool.submit -> Worker.ask -> one line of JSON each way -> serve, in a process of its own

Nothing here imports torch, so that a worker starts quickly.
"""

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drgrpo.types import UserError

TASKS_PER_WORKER = 5000  # then a new worker, since ANTLR's tables grow with every new input


class Pool:
    """Workers that share the tasks. Each starts when a task needs it.

    command: what starts a worker. The process must call `serve`."""

    def __init__(self, command: Sequence[str], workers: int) -> None:
        self.workers = [Worker(command) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)
        # Each thread waits for one worker.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="worker")

    def submit(self, task: Mapping[str, Any]) -> Future[Any]:
        """Start a task. The future holds the reply, or an error of `Worker.ask`."""
        return self._threads.submit(self._ask, task)

    def _ask(self, task: Mapping[str, Any]) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask(task)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill the workers. Tasks that wait are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._stop()  # nobody waits for the tasks that still run
        self._threads.shutdown()
        self._stop()  # a thread may have started another worker in between

    def _stop(self) -> None:
        for worker in self.workers:
            worker.stop()


class Worker:
    """A child process that answers what it is sent.

    This is a plain subprocess and not `multiprocessing`, for three reasons. `multiprocessing`
    imports the caller's `__main__` in every worker, which is train.py and with it torch. Its forks
    are unsafe beside torch's threads. It unpickles what the worker returns.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None
        self.tasks = 0

    def ask(self, task: Mapping[str, Any]) -> Any:
        """The reply to a task. TimeoutError or ChildProcessError if the worker did not survive the
        task; the next task gets a new worker. What JSON lacks, such as a date, is sent as `str`.
        """
        if self.process is None or self.tasks >= TASKS_PER_WORKER:
            self.stop()
            self.process = self.start()
        self.tasks += 1
        reply = exchange(self.process, json.dumps(task, default=str) + "\n")
        if reply:
            return json.loads(reply)
        status = self._reap()
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            raise TimeoutError(f"a worker was ended at its limit of time ({ending(status)})")
        raise ChildProcessError(f"a worker ended with {ending(status)}")

    def start(self) -> "subprocess.Popen[str]":
        """The process, once it is ready. RuntimeError with what it says if it does not start."""
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # `stop` must see the process before it is ready.
        self.process = process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,  # what the worker starts dies with it
        )
        self.tasks = 0
        greeting = exchange(process, "").strip()
        if greeting != "ready":
            status = ending(self._reap())
            raise RuntimeError(
                greeting or f"a worker did not start: {status}: {' '.join(self.command)}"
            )
        return process

    def stop(self) -> None:
        """Kill the process and all that it has started."""
        if self.process is not None:
            self.process.kill()
            self._reap()

    def _reap(self) -> int:
        """The exit status of a process that is dead or dying."""
        assert self.process is not None
        status = self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None
        return status


def exchange(process: "subprocess.Popen[str]", line: str) -> str:
    """The process's reply to a line; empty if the process is dead."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def ending(status: int) -> str:
    """An exit status in words."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"


# ---- the worker process


def serve(
    prepare: Callable[[], Callable[..., Any]], timeout_s: float, memory: int, start_s: float = 0
) -> None:
    """Answer what stdin asks for until stdin closes, so that no worker outlives the trainer.

    prepare: makes the function that is called with each task's fields. A UserError in it is the
    reason why the worker does not start. timeout_s: CPU time of a task in seconds; a busy machine
    therefore changes no reply. The limit by the clock is 10 times as long. memory: bytes of address
    space. start_s: seconds that `prepare` may take, 0 for any."""
    # These signals are sent to the whole job, and the trainer handles them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no reply
    limit(start_s, start_s)
    try:
        answer = prepare()
    except UserError as error:
        return send(replies, " ".join(str(error).split()))
    limit(0, 0)
    send(replies, "ready")
    for line in sys.stdin:
        limit(timeout_s, 10 * timeout_s)
        # An exception ends the process too: a new process is the best cleanup.
        reply = answer(**json.loads(line))
        limit(0, 0)
        send(replies, json.dumps(reply))


def limit(cpu_s: float, clock_s: float) -> None:
    """Let the kernel end this process after so many seconds; 0: never. Nobody handles the signals
    of these timers, so that they act even inside a long multiplication."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, clock_s)


def send(replies: int, line: str) -> None:
    """Write a line to a file descriptor. The process ends if nobody reads it."""
    data = f"{line}\n".encode()
    try:
        while data:
            data = data[os.write(replies, data) :]
    except BrokenPipeError:
        os._exit(0)
