"""The folder of `python -m drgrpo.kernels.hub` is one that the package `kernels` loads."""

import json
import re
import sys

import pytest
import torch

from drgrpo.kernels import hub
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss, linear_logprob_ref
from head_cases import DEVICE, assert_same_bits, both, ignore_numpy_warnings, make, run

kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata  # noqa: E402

pytestmark = ignore_numpy_warnings  # numpy computes in Triton's interpreter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "repository"
    hub.main([str(out)])
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    return kernels.get_local_kernel(folder)


def test_the_package_is_the_installed_one():
    """The folder `kernels` of this repository has no __init__.py and must not hide it."""
    assert "site-packages" in kernels.__file__


@both
def test_the_loaded_kernel_computes_what_ours_does(loaded, backend):
    case = make(50, 32, 300)
    assert loaded.linear_drgrpo_loss.__module__.startswith("_linear_drgrpo_")
    expected = run(linear_drgrpo_loss, case, backend=backend)
    assert_same_bits(run(loaded.linear_drgrpo_loss, case, backend=backend), expected)
    logprob, entropy = loaded.linear_logprob(case.hidden, case.weight, case.target)
    exact = linear_logprob_ref(case.hidden.double(), case.weight.double(), case.target)
    assert torch.allclose(torch.stack([logprob, entropy]).double(), torch.stack(exact), atol=1e-4)
    exact = run(loaded.linear_drgrpo_loss_ref, case.double())
    assert torch.allclose(expected[2].double(), exact[2], atol=1e-5)


def test_its_operators_are_its_own(loaded):
    """Both copies keep their operators."""
    name = loaded.linear_drgrpo_loss.__module__.partition(".")[0]
    for namespace in (name, "drgrpo"):
        operators = getattr(torch.ops, namespace)
        assert operators.linear_logprob.default and operators.linear_drgrpo.default
    assert re.fullmatch(rf"_linear_drgrpo_{DEVICE}_[0-9a-f]{{7}}", name)


def test_another_source_has_other_operators():
    source = hub.SOURCE.read_text()
    ids = [
        json.loads(hub.files(text)["build/torch-cpu/metadata.json"])["id"]
        for text in (source, source + "\n")
    ]
    assert ids[0] != ids[1]


def test_the_build_file_and_the_metadata_pass_the_packages_own_validation(folder):
    build = Build.open(folder)
    assert [str(backend).lower() for backend in build.general.backends] == list(hub.BACKENDS)
    for backend in hub.BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.name.python_name == hub.MODULE and metadata.license == "MIT"
        assert metadata.id.isidentifier() and metadata.python_depends == []
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    names = {path.name for path in (folder / "build").iterdir()}
    assert names == {f"torch-{backend}" for backend in hub.BACKENDS}


def test_kernel_builder_gets_the_same_module(folder):
    """It adds `_ops.py` and the metadata by itself."""
    source, built = folder / "torch-ext" / hub.MODULE, folder / "build" / "torch-cpu"
    for path in source.iterdir():
        assert path.read_text() == (built / path.name).read_text()
    extra = {path.name for path in built.iterdir()} - {path.name for path in source.iterdir()}
    assert extra - {"__pycache__"} == {"_ops.py", "metadata.json"}


def test_it_imports_torch_triton_itself_and_the_standard_library(folder):
    """The hub allows no more."""
    text = (folder / "torch-ext" / hub.MODULE / f"{hub.MODULE}.py").read_text()
    modules = re.findall(r"^\s*(?:from|import) (\.?\w+)", text, flags=re.MULTILINE)
    others = set(modules) - {"torch", "triton", "._ops"}
    assert others <= set(sys.stdlib_module_names) and "._ops" in modules


def test_a_source_with_other_operators_is_not_written():
    with pytest.raises(ValueError, match="has 1 operators named drgrpo::"):
        hub.portable('custom_op("drgrpo::one")')


def test_files_of_the_user_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").write_text("text")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(SystemExit) as stop:
            hub.main([str(out)])
        assert stop.value.code == 2
        assert f"OUT ({out}) is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
