"""A run is uploaded at its end, and what would stop the upload is said before training."""

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import ROOT
from drgrpo.config import MAY_CHANGE_ON_RESUME, RECIPES
from drgrpo.run import hub

CALL = """
import sys
from dataclasses import replace
from drgrpo.config import RECIPES
from drgrpo.run import hub
from drgrpo.run.cli import user_errors
step, name, out = sys.argv[1:]
with user_errors():
    getattr(hub, step)(replace(RECIPES["tiny"](), push_to_hub=name, out=out))
"""
REFUSED = {"unknown token": 401, "no right to write": 403}


class Hub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as an upload needs. `answers` maps the end of a path to
    the status that it gets instead of 200."""

    def __init__(self, **answers: int) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers = answers
        self.requests: list[tuple[str, dict]] = []
        self.uploaded: dict[str, bytes] = {}
        self.message = ""


class Request(BaseHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        url = f"http://127.0.0.1:{self.server.server_port}/ann/toy"
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.reply({"files": [how | {"path": path} for path in paths]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "header":
                    self.server.message = line["value"]["summary"]
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.uploaded[line["value"]["path"]] = content
            return self.reply({"commitUrl": f"{url}/commit/{'a' * 40}", "commitOid": "a" * 40})
        return self.reply({"url": url}, json.loads(body or b"{}"))

    def reply(self, value: dict, body: dict | None = None) -> None:
        self.server.requests.append((f"{self.command} {self.path}", body or {}))
        answers = self.server.answers.items()
        (status, *_) = [s for end, s in answers if self.path.endswith(end)] + [200]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())


@contextmanager
def serve(**answers: int):
    with Hub(**answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def environment(home, port: int, token: str = "hf_secret") -> dict[str, str]:
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_TOKEN": token, "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_XET": "1"}
    return env | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def call(step: str, name: str, out, port: int = 9, token: str = "hf_secret", **more: str):
    """A step of hub.py in its own process, because the client reads the environment once. Nobody
    answers at port 9."""
    env = environment(out, port, token) | more
    command = [sys.executable, "-c", CALL, step, name, str(out)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def refusal(process) -> str:
    """Its one line."""
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert "hf_secret" not in line
    return line


@pytest.fixture
def complete(tmp_path):
    """The folder of a run of 100 steps."""
    folder = tmp_path / "checkpoints" / "latest"
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "README.md").write_text("---\ntags: [x]\n---\n# a card")
    (folder / "hf" / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "trainer.json").write_text(json.dumps({"step": 100}))
    (tmp_path / "hf").symlink_to("checkpoints/latest/hf")
    return tmp_path


# ---- before training


@pytest.mark.parametrize("status", [200, 409], ids=["new", "there already"])
def test_the_repository_is_there_before_training_and_a_new_one_is_private(tmp_path, status):
    with serve(**{"/create": status}) as server:
        process = call("check", "ann/toy", tmp_path, server.server_port)
    assert process.returncode == 0, process.stderr
    asked = dict(server.requests)  # the client may ask for other things too
    body = asked["POST /api/repos/create"]
    assert (body["organization"], body["name"], body["visibility"]) == ("ann", "toy", "private")
    assert "GET /api/models/ann/toy/auth-check/write" in asked


@pytest.mark.parametrize("status", REFUSED.values(), ids=REFUSED)
def test_who_may_not_write_hears_it_before_training(tmp_path, status):
    with serve(**{"/write": status}) as server:
        line = refusal(call("check", "ann/toy", tmp_path, server.server_port))
    assert "--push-to-hub ann/toy would fail at the end of the run" in line and str(status) in line
    assert "Check the network, HF_HUB_OFFLINE, the name and what the token may write" in line


@pytest.mark.parametrize("more", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_without_the_hub_the_run_does_not_start(tmp_path, more):
    line = refusal(call("check", "ann/toy", tmp_path, **more))
    assert "would fail at the end of the run (" in line and "HF_HUB_OFFLINE" in line


def test_without_a_token_the_way_to_one_is_named(tmp_path):
    line = refusal(call("check", "ann/toy", tmp_path, token=""))
    assert "--push-to-hub ann/toy needs a token" in line
    assert "hf auth login" in line and "HF_TOKEN" in line


def test_train_py_refuses_a_wrong_name_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "train.py", "--recipe", "tiny", "--out", out]
    command += ["--push-to-hub", "ann//toy"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "--push-to-hub ann//toy is no name of the hub" in refusal(process)
    assert not out.exists() and not process.stdout


# ---- at the end


def test_the_hf_folder_is_uploaded_to_the_repository_that_is_there(complete):
    with serve(**{"/create": 409}) as server:
        process = call("push", "ann/toy", complete, server.server_port)
    assert process.returncode == 0, process.stderr
    assert "uploaded" in process.stdout and "ann/toy" in process.stdout
    assert server.message == "Dr. GRPO, step 100"
    assert server.uploaded == {file.name: file.read_bytes() for file in (complete / "hf").iterdir()}


def test_an_upload_that_fails_says_where_the_model_lies_and_how_to_upload_it(complete):
    with serve(**{"/commit/main": 500}) as server:
        line = refusal(call("push", "ann/toy", complete, server.server_port))
    assert f"the run is complete and {complete}/hf holds the model" in line
    assert line.endswith(f"Upload it by hand: hf upload ann/toy {complete}/hf")


def test_a_run_that_was_stopped_is_not_uploaded(complete):
    (complete / "checkpoints" / "latest" / "trainer.json").write_text(json.dumps({"step": 99}))
    process = call("push", "ann/toy", complete)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "nothing is uploaded to ann/toy before step 100; this is step 99\n"


@pytest.mark.slow
def test_train_py_checks_trains_and_uploads(tmp_path, random_model):
    out = tmp_path / "run"
    flags = {"recipe": "tiny", "model": random_model, "out": out, "push-to-hub": "ann/toy"}
    flags |= {"steps": 1, "prompts-per-step": 2, "group-size": 2, "minibatches": 1}
    flags |= {"max-new-tokens": 4, "eval-data": ""}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    with serve() as server:
        env = environment(tmp_path, server.server_port)
        command = [sys.executable, "train.py", *arguments]
        process = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert server.uploaded == {file.name: file.read_bytes() for file in (out / "hf").iterdir()}
    assert {"README.md", "model.safetensors", "config.json"} <= server.uploaded.keys()
    created, _ = [i for i, (path, _) in enumerate(server.requests) if path.endswith("/create")]
    committed = [i for i, (path, _) in enumerate(server.requests) if "/commit/" in path]
    assert created < min(committed)


# ---- whose job it is


def test_without_the_flag_in_a_dry_run_and_on_other_ranks_nothing_happens(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    named = replace(RECIPES["tiny"](), out=str(tmp_path), push_to_hub="ann/toy")
    idle = [replace(named, push_to_hub=""), replace(named, dry_run=True)]
    for config in idle:
        hub.check(config)
        hub.push(config)
    monkeypatch.setenv("RANK", "1")
    hub.check(named)
    hub.push(named)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ImportError):
        hub.check(named)


def test_a_resumed_run_may_ask_for_the_upload():
    assert "push_to_hub" in MAY_CHANGE_ON_RESUME
