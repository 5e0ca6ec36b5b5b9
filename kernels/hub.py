"""The fused head in the layout of Hugging Face's `kernels` hub.

    python -m drgrpo.kernels.hub OUT

writes OUT/build.toml and OUT/torch-ext for kernel-builder, a card, and what `kernels` loads: one
build per backend in OUT/build. A kernel in Python builds by copying.

    head = kernels.get_local_kernel(Path(OUT))
    loss, stats = head.linear_drgrpo_loss(hidden, weight, target, advantage)

Several versions of a kernel may live in one process, so the names of its operators contain a hash
of the source. Layout and fields: https://huggingface.co/docs/kernels/kernel-requirements and
kernels 0.17.2.
"""

import argparse
import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path

SOURCE = Path(__file__).with_name("linear_drgrpo.py")
NAME, MODULE, LICENSE = "linear-drgrpo", "linear_drgrpo", "MIT"
VERSION = 0
"""The hub's number for a kernel whose interface may still change."""
BACKENDS = ("cpu", "cuda")
FUNCTIONS = ("linear_drgrpo_loss", "linear_drgrpo_loss_ref", "linear_logprob", "linear_logprob_ref")

BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""

INIT = f'''\
"""LM head + Dr. GRPO loss in one pass, gradients included; the [T, V] logits never exist."""

from .{MODULE} import {", ".join(FUNCTIONS)}

__all__ = {json.dumps(FUNCTIONS)}
'''

OPS = '''\
"""Names of operators that no other version of this kernel has."""


def add_op_namespace_prefix(name: str) -> str:
    return f"{id}::{{name}}"
'''

CARD = f"""\
---
license: {LICENSE.lower()}
library_name: kernels
tags:
- kernel
---

# {NAME}

LM head and Dr. GRPO loss ([arXiv 2503.20783](https://arxiv.org/abs/2503.20783)) in one pass over
the logits. The call makes the gradients of the hidden states and of the head. A tokens x vocabulary
tensor never exists. It is Triton on CUDA and torch elsewhere.

```python
from kernels import get_local_kernel

head = get_local_kernel(path)  # this folder; from the hub: get_kernel(repo_id, version={VERSION})
old, entropy = head.linear_logprob(hidden, weight, target)  # fp32 [T], no gradient
loss, stats = head.linear_drgrpo_loss(
    hidden, weight, target, advantage, old_logprob=old, scale=1 / (B * C)
)
loss.backward()
```

hidden is [T, D], weight [V, D] of the same type, target [T], advantage fp32 [T]. The docstrings in
`torch-ext/{MODULE}/{MODULE}.py` state the mathematics and every argument.
"""


def portable(source: str) -> str:
    """The module's text with operators whose names `_ops.py` makes unique."""
    source, found = re.subn(r'"drgrpo::(\w+)"', r'add_op_namespace_prefix("\1")', source)
    last_import = "\nfrom torch.autograd.function import once_differentiable\n"
    if found != 2 or last_import not in source:
        raise ValueError(f"{SOURCE} has {found} operators named drgrpo::*, and 2 are expected")
    own = "\nfrom ._ops import add_op_namespace_prefix\n"
    return source.replace(last_import, last_import + own)


def files(source: str) -> dict[str, str]:
    """Path in the repository -> text."""
    module = {"__init__.py": INIT, f"{MODULE}.py": portable(source)}
    found = {"build.toml": BUILD, "README.md": CARD}
    found |= {f"torch-ext/{MODULE}/{path}": text for path, text in module.items()}
    for backend in BACKENDS:
        id = f"_{MODULE}_{backend}_{hashlib.sha1(source.encode()).hexdigest()[:7]}"
        variant = module | {"_ops.py": OPS.format(id=id)}
        variant["metadata.json"] = json.dumps(metadata(id, backend, variant), indent=2) + "\n"
        found |= {f"build/torch-{backend}/{path}": text for path, text in variant.items()}
    return found


def metadata(id: str, backend: str, variant: dict[str, str]) -> dict:
    """What `kernels` reads before it imports a build."""
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in variant.items()}
    return {
        "name": NAME,
        "id": id,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: b64encode(digest).decode() for path, digest in digests.items()},
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m drgrpo.kernels.hub", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    out = parser.parse_args(arguments).out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"OUT ({out}) is not an empty folder: name a new one")
    for path, text in files(SOURCE.read_text()).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text)
    print(out)


if __name__ == "__main__":
    main()
