"""Packing loses, doubles and mixes nothing, whatever the lengths, the processes and the budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drgrpo.pack import Sequence, balance, fill, microbatches, minibatches, pack, shard, sizes


def test_minibatches_partition_the_step_and_follow_the_seed():
    parts = minibatches(256, 4, seed=1, step=7)
    assert [len(p) for p in parts] == [64] * 4
    assert sorted(i for part in parts for i in part) == list(range(256))
    assert parts == minibatches(256, 4, seed=1, step=7)
    assert parts != minibatches(256, 4, seed=1, step=8)
    assert parts != minibatches(256, 4, seed=2, step=7)


@pytest.mark.parametrize(
    ("n", "expected"), [(6, [3, 3]), (7, [4, 3]), (2, [1, 1]), (1, [1]), (0, [])]
)
def test_a_step_of_any_size_is_dealt_evenly_and_no_optimizer_step_is_empty(n, expected):
    parts = minibatches(n, 2, seed=0, step=1)
    assert [len(part) for part in parts] == sizes(n, 2) == expected
    assert sorted(i for part in parts for i in part) == list(range(n))


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 3000), max_size=60),
    world=st.integers(1, 9),
    budget=st.integers(1, 5000),
)
def test_every_rollout_is_in_exactly_one_micro_batch(lengths, world, budget):
    lengths = dict(enumerate(lengths))
    plan = microbatches(lengths, world, budget)
    assert len(plan) == world
    assert len({len(bins) for bins in plan}) == 1, (
        "FSDP2 would hang: the processes run different numbers of passes"
    )
    assert len(plan[0]) >= 1
    assert sorted(i for bins in plan for part in bins for i in part) == sorted(lengths)
    for bins in plan:
        for part in bins:
            assert len(part) == 1 or sum(lengths[i] for i in part) <= budget


def test_balance_is_within_five_percent_on_lognormal_lengths():
    import numpy as np

    lengths = np.random.default_rng(0).lognormal(6.5, 0.75, 1024).clip(50, 3000).astype(int)
    tokens = [
        sum(int(lengths[i]) for i in share)
        for share in balance(dict(enumerate(lengths.tolist())), 8)
    ]
    assert max(tokens) / (sum(tokens) / 8) <= 1.05


def test_the_next_rollout_goes_to_the_process_with_the_fewest_tokens():
    assert balance({0: 10, 1: 3, 2: 3, 3: 3}, world=2) == [[0], [1, 2, 3]]


def test_a_sequence_over_the_budget_goes_alone():
    assert fill([0, 1, 2], {0: 100, 1: 5, 2: 5}, budget=10) == [[0], [1, 2]]


def test_the_budget_is_a_limit_to_the_token():
    assert fill([0, 1], {0: 6, 1: 4}, budget=10) == [[0, 1]]
    assert fill([0, 1], {0: 6, 1: 5}, budget=10) == [[0], [1]]


def test_rows_and_targets_of_a_packed_batch():
    first = Sequence([1, 2, 3], [4, 5], [-0.1, -0.2], 0.5)
    second = Sequence([6], [7, 8, 9], [-0.3, -0.4, -0.5], -1.0, stale=2)
    batch = pack([first, second])
    assert batch.token_T.tolist() == [1, 2, 3, 4, 6, 7, 8], "the last token predicts nothing"
    assert batch.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.max_seqlen == 4
    assert batch.row_N.tolist() == [2, 3, 4, 5, 6]
    assert batch.target_N.tolist() == [4, 5, 7, 8, 9]
    assert batch.advantage_N.tolist() == [0.5, 0.5, -1, -1, -1]
    assert batch.fresh_N.tolist() == [True, True, False, False, True]
    assert batch.sampler_logprob_N.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5])


def test_an_empty_batch_has_one_token_and_no_row():
    batch = pack([])
    assert batch.token_T.tolist() == [0]
    assert batch.row_N.numel() == batch.target_N.numel() == 0


def test_the_shards_of_all_processes_hold_every_sequence_once():
    sequences = {3 * i: Sequence([1] * i, [2, 3 + i], [-1.0] * 2, float(i)) for i in range(1, 8)}
    shards = [shard(sequences, rank, 2, budget=9, device="cpu") for rank in (0, 1)]
    assert len(shards[0]) == len(shards[1])
    ends = [n for batches in shards for batch in batches for n in batch.target_N.tolist()[1::2]]
    assert sorted(ends) == [3 + i for i in range(1, 8)]
