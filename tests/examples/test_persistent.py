import itertools

import torch
from common.batches import Batch
from common.persistent import PersistentDescents

from setpred import SetPrediction


def numbered_batches():
    return (Batch(torch.tensor([k]), torch.tensor([True])) for k in itertools.count())


def run(descents, steps, batches, start=0):
    """Let each training step add one to its set; returns the batch's number and the age of each step's descent."""
    seen = []
    for step in range(start, steps):
        batch, options = descents.take(step, batches)
        age, mask = options.get("init", (torch.zeros(1), torch.ones(1)))
        seen.append((batch.elements.item(), int(age)))
        descents.leave(step, batch, SetPrediction(age + 1, mask, None))
    return seen


def test_one_is_the_usual_training():
    descents = PersistentDescents(1)
    assert run(descents, 5, numbered_batches()) == [(k, 0) for k in range(5)]
    assert descents.batches_before(5) == 5
    assert descents.state_dict() == {}


def test_each_descent_goes_on_as_often_as_there_are_descents():
    count = 4
    seen = run(PersistentDescents(count), 50 * count, numbered_batches())
    ages = {}
    for number, age in seen:
        assert age == ages.get(number, -1) + 1  # in order, none left out
        ages[number] = age
    begun = sorted(ages)
    assert begun == list(range(len(begun)))
    # The first ones are replaced early, so that their ages differ from then on.
    assert [ages[k] + 1 for k in range(count)] == [4, 3, 2, 1]
    assert {ages[k] + 1 for k in begun[count:-count]} == {count}
    later = seen[-10 * count :]
    assert [sum(age == a for _, age in later) for a in range(count)] == [10] * count


def test_goes_on_from_a_checkpoint():
    expected = run(PersistentDescents(3), 20, numbered_batches())
    before, after = PersistentDescents(3), PersistentDescents(3)
    found = run(before, 8, numbered_batches())
    after.load_state_dict(before.state_dict(), torch.device("cpu"))
    rest = itertools.islice(numbered_batches(), after.batches_before(8), None)
    assert found + run(after, 20, rest, start=8) == expected
