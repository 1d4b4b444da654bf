"""The order of training: seeded, by similar length, the same whatever was drawn before."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterolora.data.sampler import Batches, SimilarLength


def lengths_of(count, seed=0):
    source = random.Random(seed)
    return [source.randint(4, 120) for _ in range(count)]


def epoch_order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def batches_of(order, size):
    return [order[at : at + size] for at in range(0, len(order), size)]


def padding(order, lengths, size):
    """Padded places of an epoch."""
    batches = batches_of(order, size)
    return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)


@given(count=st.integers(1, 300), size=st.integers(1, 17), seed=st.integers(0, 10), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_epoch_holds_every_index_once(count, size, seed, epoch):
    sampler = SimilarLength(lengths_of(count), size, seed)
    assert sorted(epoch_order(sampler, epoch)) == list(range(count))
    assert len(sampler) == count


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = lengths_of(500)
    first = SimilarLength(lengths, 8, 3)
    orders = [epoch_order(first, epoch) for epoch in range(3)]
    torch.manual_seed(99)
    torch.rand(7)
    second = SimilarLength(lengths, 8, 3)
    assert [epoch_order(second, epoch) for epoch in (2, 0, 1)] == [orders[2], orders[0], orders[1]]


def test_reading_an_order_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    list(SimilarLength(lengths_of(100), 8, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = lengths_of(500)
    orders = [tuple(epoch_order(SimilarLength(lengths, 8, seed), epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_an_epoch_stays_until_the_next_is_set():
    sampler = SimilarLength(lengths_of(100), 8, 0)
    assert list(sampler) == list(sampler) == epoch_order(sampler, 0)
    assert epoch_order(sampler, 1) != epoch_order(sampler, 0)


@pytest.mark.parametrize("count", [1001, 1027, 1040])
def test_batches_are_the_same_with_the_short_one_last(count):
    # a short batch in the middle would shift all later ones and mix lengths
    lengths, size = lengths_of(count), 16
    batches = batches_of(epoch_order(SimilarLength(lengths, size, 0), 2), size)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert len(batches[-1]) == count % size or count % size == 0
    assert sum(spread[:-1]) / len(spread[:-1]) < 20  # of 116; sorted in pools of 32 batches


def test_much_less_padding_than_a_random_order():
    lengths, size = lengths_of(3000), 16
    shuffled = random.Random(1).sample(range(3000), 3000)
    assert padding(list(SimilarLength(lengths, size, 0)), lengths, size) < 0.25 * padding(shuffled, lengths, size)


def test_batches_do_not_come_by_length():
    # short sentences first would be a curriculum that nobody asked for
    lengths, size = lengths_of(3000), 16
    batches = batches_of(list(SimilarLength(lengths, size, 0)), size)
    means = torch.tensor([sum(lengths[i] for i in batch) / len(batch) for batch in batches])
    places = torch.arange(len(means), dtype=torch.float)
    assert abs(torch.corrcoef(torch.stack([means, places]))[0, 1]) < 0.2


def test_batches_change_their_members_between_epochs():
    sampler = SimilarLength(lengths_of(2000), 16, 0)
    members = [{frozenset(batch) for batch in batches_of(epoch_order(sampler, epoch), 16)} for epoch in (0, 1)]
    assert len(members[0] & members[1]) < 3


def test_a_small_set_also_gets_new_batches_each_epoch():
    # sorted as a whole, it would be the same batches for ever, only in another order
    sampler = SimilarLength(random.Random(0).sample(range(1000), 160), 16, 0)
    members = [{frozenset(batch) for batch in batches_of(epoch_order(sampler, epoch), 16)} for epoch in (0, 1)]
    assert len(members[0] & members[1]) < 5


@given(count=st.integers(1, 60), size=st.integers(1, 9), epoch=st.integers(0, 3), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_batches_go_on_after_any_of_them_once(count, size, epoch, data):
    batches = Batches(SimilarLength(lengths_of(count), size, 0), size)
    batches.sampler.set_epoch(epoch)
    whole = list(batches)
    assert whole == batches_of(epoch_order(SimilarLength(lengths_of(count), size, 0), epoch), size)
    assert len(batches) == len(whole)
    batches.first = first = data.draw(st.integers(0, len(whole) - 1))
    assert list(batches) == whole[first:]
    assert list(batches) == whole  # the next epoch starts at its first
