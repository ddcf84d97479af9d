"""The images and random numbers of a step are pure functions of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

from ccssl_hf.sampling import LABELED, UNLABELED, PairedBatchSampler, counter_bits, uniform


def sampler(batch_size: int = 8, num_batches: int = 40, seed: int = 1, num_unlabeled: int = 200) -> PairedBatchSampler:
    return PairedBatchSampler(
        num_labeled=30, num_unlabeled=num_unlabeled, batch_size=batch_size, mu=3, num_batches=num_batches, seed=seed
    )


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    numbers = uniform(0, 3, torch.arange(100_000), 4).double()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    expected = numbers.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.015  # columns
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))[0, 1])) < 0.015  # consecutive draws


def test_numbers_depend_on_seed_stream_draw_and_column_alone() -> None:
    draws = torch.tensor([5, 2**40, 7])
    all_at_once = counter_bits(1, LABELED, draws, 6)
    assert torch.equal(all_at_once[1:2, :3], counter_bits(1, LABELED, draws[1:2], 3))
    for seed, stream in ((2, LABELED), (1, UNLABELED)):
        assert not (counter_bits(seed, stream, draws, 6) == all_at_once).any()
    assert counter_bits(1, LABELED, draws, 6).unique().numel() == 18


def test_numbers_stay_what_they_are() -> None:
    """These numbers must never change, or published runs cannot be repeated."""
    assert counter_bits(42, 1, torch.tensor([0, 1]), 2).tolist() == [
        [-5906812181275049325, -1464585531585702699],
        [-1153731052136819964, 1179906986465186789],
    ]


def test_an_epoch_is_a_permutation_and_the_next_one_another() -> None:
    drawn = np.concatenate([batch.unlabeled_index for batch in sampler(num_batches=25)])  # 3 epochs of 200
    epochs = drawn.reshape(3, 200)
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs.tolist())
    assert (epochs[0] != epochs[1]).any()
    draws = np.concatenate([batch.unlabeled_draw for batch in sampler(num_batches=25)])
    assert draws.tolist() == list(range(600))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_processes(processes: int) -> None:
    alone = list(sampler(batch_size=8, num_batches=10))
    shards = [
        list(BatchSamplerShard(sampler(batch_size=8 // processes, num_batches=10 * processes), processes, rank))
        for rank in range(processes)
    ]
    for step, whole in enumerate(alone):
        parts = [shard[step] for shard in shards]
        for field in ("labeled_index", "labeled_draw", "unlabeled_index", "unlabeled_draw"):
            assert np.array_equal(np.concatenate([getattr(p, field) for p in parts]), getattr(whole, field))


def test_skipping_batches_leads_to_the_same_ones() -> None:
    whole = list(sampler())
    resumed = list(SkipBatchSampler(sampler(), skip_batches=17))
    assert len(resumed) == 23
    assert all(np.array_equal(a.unlabeled_index, b.unlabeled_index) for a, b in zip(resumed, whole[17:], strict=True))


def test_another_seed_takes_other_images_and_no_unlabeled_split_takes_none() -> None:
    first, other = next(iter(sampler(seed=1))), next(iter(sampler(seed=2)))
    assert (first.unlabeled_index != other.unlabeled_index).any()
    labels_only = next(iter(sampler(num_unlabeled=0)))
    assert len(labels_only.unlabeled_index) == 0 and len(labels_only) == 8


def test_a_split_smaller_than_a_batch_repeats_in_it() -> None:
    tiny = PairedBatchSampler(num_labeled=3, num_unlabeled=0, batch_size=8, mu=1, num_batches=2, seed=0)
    batch = next(iter(tiny))
    assert np.bincount(batch.labeled_index, minlength=3).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert batch.labeled_draw.tolist() == list(range(8))


def test_the_order_of_a_large_split_stays_what_it_is() -> None:
    """Shuffling in chunks must not change the order. These are rows of the second epoch."""
    drawn, _ = sampler(seed=5, num_unlabeled=200_000).unlabeled.take(200_000, 200_000)
    assert drawn[:5].tolist() == [68407, 44254, 796, 121594, 130553]
    assert np.array_equal(np.sort(drawn), np.arange(200_000))
