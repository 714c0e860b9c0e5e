import random

import pytest

from lit_prune.surgery.cache import cache_slots


@pytest.mark.parametrize("seed", range(30))
def test_every_attention_has_its_own_slot_of_its_own_type_and_slot_0_is_filled(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 9)
    types = [rng.choice(["full", "slide"]) for _ in range(count)]
    attends = [rng.random() < 0.6 for _ in range(count)]
    if not any(attends):
        attends[rng.randrange(count)] = True
    labels, slots = cache_slots(types, attends)
    assert len(labels) == count
    assert sorted(slots) == [i for i, here in enumerate(attends) if here]
    assert len(set(slots.values())) == len(slots)
    for position, slot in slots.items():
        assert labels[position] == types[position]  # its own mask stays
        assert labels[slot] == types[position]  # and the slot has the cache of that mask
    # the cache reads its length from slot 0, and a type's mask from that type's first slot
    assert 0 in slots.values()
    for kind in set(labels):
        first = labels.index(kind)
        assert first in slots.values()


def test_an_untouched_stack_keeps_its_slots():
    types = ["full", "slide", "full"]
    assert cache_slots(types, [True] * 3) == (tuple(types), {0: 0, 1: 1, 2: 2})
