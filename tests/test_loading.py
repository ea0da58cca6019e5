"""Batches depend on the seed and the position: on nothing that came before, and on no process."""

import threading
import warnings
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Batch, RunError, SandboxError, ahead, stream, sweep, to_device
from sandbox.loading import NUM_AHEAD

seeds = st.integers(0, 2**31 - 1)


class Numbered:
    """Image `i` is `i` plus noise from the generator it is handed; its label is `i`."""

    def __init__(self, size, noise=0.25):
        self.num, self.noise = size, noise
        self.num_classes, self.class_names, self.image_size = size, (), (1, 1)

    def size(self, split):
        return self.num if split == "train" else self.num // 2

    def batch(self, split, indices, rng):
        noise = torch.rand(len(indices), 3, 1, 1, generator=rng) * self.noise
        return Batch(indices[:, None, None, None] + noise, indices)


def take(batches, count):
    return list(islice(batches, count))


def equal(one, other):
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs
    )


@given(seeds, st.integers(1, 12), st.integers(1, 5), st.integers(0, 6))
def test_a_stream_from_the_middle_is_the_stream_from_the_start(seed, size, batch_size, skipped):
    dataset = Numbered(size)
    whole = take(stream(dataset, "train", batch_size, seed=seed), skipped + 3)
    rest = stream(dataset, "train", batch_size, seed=seed, start=skipped * batch_size)
    assert equal(whole[skipped:], take(rest, 3))


@given(seeds, st.integers(1, 20), st.integers(1, 7))
def test_every_image_comes_once_an_epoch(seed, size, batch_size):
    batches = take(
        stream(Numbered(size), "train", batch_size, seed=seed), -(-3 * size // batch_size)
    )
    labels = torch.cat([batch.labels for batch in batches])
    for epoch in range(3):
        assert sorted(labels[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed):
        return torch.cat([b.labels for b in take(stream(Numbered(50), "train", 50, seed=seed), 2)])

    first, second = order(1).chunk(2)
    assert not torch.equal(first, second) and not torch.equal(first, order(2)[:50])


def test_augmentation_is_drawn_anew_every_epoch():
    first, second = take(stream(Numbered(1), "train", 1, seed=0), 2)
    assert not torch.equal(first.images, second.images)


@given(seeds, st.integers(0, 20), st.integers(1, 7), st.none() | st.integers(1, 30))
def test_a_sweep_covers_each_image_once_in_order(seed, size, batch_size, limit):
    batches = list(sweep(Numbered(size), "train", batch_size, limit=limit, seed=seed))
    labels = [label for batch in batches for label in batch.labels.tolist()]
    assert labels == list(range(size if limit is None else min(size, limit)))
    assert all(1 <= len(batch.labels) <= batch_size for batch in batches)
    assert equal(batches, sweep(Numbered(size), "train", batch_size, limit=limit, seed=seed))


def test_splits_are_not_mixed():
    (batch,) = sweep(Numbered(8), "validation", 8)
    assert batch.labels.tolist() == [0, 1, 2, 3]


def test_worker_processes_change_nothing_at_all():
    """Not the batches, and not the global random stream that dropout draws from."""
    dataset = Numbered(10)
    alone = take(stream(dataset, "train", 4, seed=3, start=4), 4)
    before = torch.get_rng_state()
    helped = stream(dataset, "train", 4, seed=3, start=4, num_workers=1)
    assert equal(alone, take(helped, 4))
    swept = list(sweep(dataset, "train", 4, limit=9, seed=3, num_workers=2))
    assert [len(batch.labels) for batch in swept] == [4, 4, 1]
    assert equal(swept, sweep(dataset, "train", 4, limit=9, seed=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_wrong_with_a_batch_is_told_as_it_was_said(num_workers):
    class Damaged(Numbered):
        def batch(self, split, indices, rng):
            raise RunError(f"image {int(indices[0])} cannot be read")

    with pytest.raises(RunError) as caught:
        next(sweep(Damaged(4), "train", 2, num_workers=num_workers))
    assert str(caught.value) == "image 0 cannot be read"


class UnreadableError(RunError):
    def __init__(self, path, why):
        super().__init__(f"{path}: {why}")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("4 channels"), ValueError, "4 channels"),
        (FileNotFoundError(2, "No such file", "a.png"), OSError, "[Errno 2] No such file: 'a.png'"),
        (UnreadableError("a.png", "cut short"), RunError, "a.png: cut short"),
    ],
)
def test_mistakes_of_every_kind_come_from_a_process_in_one_line(num_workers, error, kind, text):
    class Damaged(Numbered):
        def batch(self, split, indices, rng):
            raise error

    with pytest.raises(kind) as caught:
        next(sweep(Damaged(4), "train", 2, num_workers=num_workers))
    assert str(caught.value) == text
    where = "".join(getattr(caught.value, "__notes__", ())) if num_workers else "in batch"
    assert "in batch" in where  # the traceback of the process


def test_a_warning_that_no_other_process_knows_is_told_as_a_plain_one():
    class OwnWarning(UserWarning):
        pass

    class Worn(Numbered):
        def batch(self, split, indices, rng):
            warnings.warn("worn", OwnWarning, stacklevel=1)
            return super().batch(split, indices, rng)

    with pytest.warns(UserWarning, match="worn") as told:
        list(sweep(Worn(2), "train", 2, num_workers=1))
    assert [each.category for each in told] == [UserWarning]


def test_what_processes_warn_of_is_told_by_the_one_that_asked_and_once():
    class Worn(Numbered):
        def batch(self, split, indices, rng):
            warnings.warn("image 1 was skipped", UserWarning, stacklevel=1)
            return super().batch(split, indices, rng)

    with pytest.warns(UserWarning) as told:
        assert len(list(sweep(Worn(8), "train", 2, num_workers=2))) == 4
    assert [str(each.message) for each in told] == ["image 1 was skipped"]


def test_an_empty_split_is_refused_at_once():
    with pytest.raises(SandboxError, match="no train images"):
        stream(Numbered(0), "train", 4, seed=0)


@given(seeds, st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))
def test_shares_lie_side_by_side_in_the_batch(seed, size, num, each):
    dataset = Numbered(size, noise=0)
    whole = take(stream(dataset, "train", num * each, seed=seed), 3)
    shares = [
        take(stream(dataset, "train", num * each, seed=seed, share=(i, num)), 3) for i in range(num)
    ]
    for number, batch in enumerate(whole):
        joined = torch.cat([share[number].labels for share in shares])
        assert torch.equal(joined, batch.labels)


def test_shares_are_augmented_each_in_its_own_way():
    first, second = (
        next(stream(Numbered(1), "train", 4, seed=0, share=(i, 2))).images for i in range(2)
    )
    assert not torch.equal(first, second)


def test_a_batch_without_equal_shares_is_refused():
    with pytest.raises(SandboxError, match="a batch of 5 has no 2 equal shares"):
        stream(Numbered(8), "train", 5, seed=0, share=(0, 2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_ahead_changes_nothing(num_workers):
    dataset, cpu = Numbered(10), torch.device("cpu")
    plain = take(stream(dataset, "train", 4, seed=3), 5)
    coming = ahead(stream(dataset, "train", 4, seed=3, num_workers=num_workers), cpu)
    assert equal(plain, take(coming, 5))
    coming.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


@given(seeds, st.integers(1, 20), st.integers(1, 7))
def test_loading_ahead_ends_where_the_batches_end(seed, size, batch_size):
    plain = list(sweep(Numbered(size), "train", batch_size, seed=seed))
    coming = ahead(sweep(Numbered(size), "train", batch_size, seed=seed), torch.device("cpu"))
    assert equal(plain, coming)


def test_a_few_batches_are_loaded_before_they_are_asked_for():
    class Counting(Numbered):
        begun = threading.Semaphore(0)

        def batch(self, split, indices, rng):
            self.begun.release()
            return super().batch(split, indices, rng)

    dataset = Counting(10)
    coming = ahead(stream(dataset, "train", 1, seed=0), torch.device("cpu"))
    next(coming)
    assert all(dataset.begun.acquire(timeout=30) for _ in range(1 + NUM_AHEAD))
    assert not dataset.begun.acquire(timeout=0.05)
    coming.close()


def test_a_failure_while_loading_ahead_is_raised_at_its_batch():
    class Broken(Numbered):
        def batch(self, split, indices, rng):
            if 7 in indices:
                raise SandboxError("image 7 is broken")
            return super().batch(split, indices, rng)

    coming, seen = ahead(stream(Broken(10), "train", 1, seed=0), torch.device("cpu")), []
    with pytest.raises(SandboxError, match="image 7 is broken"):
        seen.extend(coming)
    assert equal(seen, take(stream(Numbered(10), "train", 1, seed=0), len(seen)))
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


@pytest.mark.gpu
def test_a_batch_is_not_read_before_it_has_arrived_nor_kept_from_those_who_use_it():
    """Large batches, whose copies take longer than what is computed of them."""

    class Large(Numbered):
        def batch(self, split, indices, rng):
            return Batch(indices[0].float().expand(2**24).contiguous(), indices)

    coming = ahead(stream(Large(64), "train", 1, seed=0), torch.device("cuda"))
    for _ in range(32):
        batch = next(coming)
        torch.cuda._sleep(10**6)
        low, high, label = *batch.images.aminmax(), batch.labels[0]
        del batch  # its memory may be another one's while all this is still to be done
        assert low == high == label
    coming.close()


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_on_a_gpu_are_those_on_the_cpu(num_workers):
    class Held(Numbered):
        def to(self, device):
            there = Held(self.num, self.noise)
            there.batch = lambda *given: on(device, Numbered.batch(self, *given))
            return there

    def on(device, batch):
        return Batch(to_device(batch.images, device), to_device(batch.labels, device))

    device = torch.device("cuda")
    for dataset in (Numbered(10), Held(10)):
        plain = take(stream(dataset, "train", 4, seed=3), 5)
        there = take(stream(dataset, "train", 4, seed=3, device=device, num_workers=num_workers), 5)
        assert {batch.images.device.type for batch in there} == {"cuda"}
        assert equal(plain, [on(torch.device("cpu"), batch) for batch in there])
