"""Upload the trained model to the Hugging Face hub at the end of a run: `--push-to-hub NAME`.

`check` comes before training. It makes the repository, because that alone shows that the upload
will be allowed. The client of the hub takes a second to import, which only runs with the flag pay.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from drgrpo.config import Config
from drgrpo.types import UserError


def is_rank_0() -> bool:
    """Known before torch is imported, and after the process group is gone."""
    return os.environ.get("RANK", "0") == "0"


def check(config: Config) -> None:
    """UserError if `push` would fail: for the name's form, or without a token, a network or the
    right to write there. The repository is there afterwards, and is private if it is new."""
    name = config.push_to_hub
    if not name or config.dry_run or not is_rank_0():
        return
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name} is no name of the hub: {one_line(error)}") from error
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {name} needs a token that may write: run `hf auth login`, or set "
            "HF_TOKEN"
        )
    with as_user_error(
        f"--push-to-hub {name} would fail at the end of the run",
        "Check the network, HF_HUB_OFFLINE, the name and what the token may write, or train without"
        " the flag and upload OUT/hf later",
    ):
        api = HfApi()
        repo = api.create_repo(name, private=True, exist_ok=True)
        api.auth_check(repo.repo_id, write=True)


def push(config: Config) -> None:
    """Upload OUT/hf of a complete run. A run that was stopped uploads once it is complete.
    UserError if the upload fails, with the command that does it by hand."""
    name, folder = config.push_to_hub, config.folder / "hf"
    if not name or config.dry_run or not is_rank_0():
        return
    step = json.loads((folder.resolve().parent / "trainer.json").read_text())["step"]
    if step < config.steps:
        print(f"nothing is uploaded to {name} before step {config.steps}; this is step {step}")
        return
    from huggingface_hub import HfApi

    with as_user_error(
        f"the run is complete and {folder} holds the model, but the upload to {name} failed",
        f"Upload it by hand: hf upload {name} {folder}",
    ):
        api = HfApi()
        repo = api.create_repo(name, private=True, exist_ok=True)
        message = f"Dr. GRPO, step {step}"
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message)
        print(f"uploaded {folder} to {repo}")


@contextmanager
def as_user_error(what: str, way_out: str) -> Iterator[None]:
    """Errors of the client have no type in common: it may fail on this machine, on the way, or on
    the server."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({one_line(error)}). {way_out}") from error


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
