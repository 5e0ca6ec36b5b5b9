"""--vllm: what reaches vLLM, and what is refused before anything is loaded."""

import json
from dataclasses import replace

import pytest
import torch

from drgrpo.config import RECIPES
from drgrpo.engine_vllm import llm_arguments
from drgrpo.types import UserError
from drgrpo.vllm_options import REFUSED, SET_BY_A_FLAG, check_rounding, parse_vllm_options


def test_options_are_a_json_object():
    assert parse_vllm_options("") == {}
    assert parse_vllm_options('{"enforce_eager": true}') == {"enforce_eager": True}
    for text in ("enforce_eager", '["enforce_eager"]', "3", "{'a': 1}"):
        with pytest.raises(UserError, match=r"--vllm .*enforce_eager.: true"):
            parse_vllm_options(text)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_what_the_trainer_sets_itself_is_refused(on_gpu):
    """Every argument of `llm_arguments` but those that change neither samples nor memory."""
    free = {"enforce_eager", "block_size", "use_tqdm_on_load"}
    given = llm_arguments(
        *("model",),
        **dict(dtype=torch.bfloat16, on_gpu=on_gpu, world=8, batch=256, max_tokens=4024),
        **dict(kv_cache_gb=30.0, tp=1, sleep=False),
    )
    assert given.keys() - free <= SET_BY_A_FLAG.keys() | REFUSED.keys()
    for name in free:
        assert parse_vllm_options(json.dumps({name: 1})) == {name: 1}


@pytest.mark.parametrize("name", [*SET_BY_A_FLAG, *REFUSED])
def test_a_refusal_names_the_argument_and_the_flag_or_the_reason(name):
    reason = SET_BY_A_FLAG.get(name) or REFUSED[name]
    with pytest.raises(UserError) as error:
        parse_vllm_options(json.dumps({"enforce_eager": True, name: 1}))
    assert name in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("options", [{"kv_cache_dtype": "fp8"}, {"quantization": "fp8"}])
def test_a_sampler_of_fewer_bits_needs_a_correction(options):
    text = json.dumps(options)
    with pytest.raises(UserError, match=r"fp8 makes .* add --tis-cap 2"):
        replace(RECIPES["oat_zero_7b"](), vllm=text)
    replace(RECIPES["oat_zero_7b"](), vllm=text, tis_cap=2.0)
    check_rounding('{"kv_cache_dtype": "auto", "quantization": null}', tis_cap=0.0)
