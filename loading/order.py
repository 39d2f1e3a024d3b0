"""Order and randomness: when each sample comes, and how its random numbers are seeded."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from loading.processes import Loading


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Restore the states of `random`, numpy and torch's CPU generator after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_all(*key: int) -> None:
    """Seed `random`, numpy and torch's CPU generator from non-negative integers of any size."""
    words = np.random.SeedSequence(key).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:2].view(np.uint32))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed the GPUs as well


class EpochSampler:
    """One rank's batches of an epoch: its parts of a permutation of all samples, as pairs (epoch, index).

    The order is a function of (seed, epoch) and the same on all ranks. A global batch is the next `batch_size *
    world_size` samples of this order, and rank r takes the r-th part of it. The samples up to a position are thus the
    same set for any number of ranks. The last global batch is filled from the start of the order, repeated if needed.
    """

    def __init__(self, length: int, loading: Loading):
        if length < 1:
            raise ValueError("there must be 1 or more samples to train on, not 0")
        self.length, self.loading = length, loading
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose the epoch, and how many samples at the beginning of its order, over all ranks, to skip."""
        self.epoch = epoch
        self.start_sample = start_sample

    @property
    def num_batches(self) -> int:
        """Number of batches in a whole epoch."""
        return -(-self.length // (self.loading.batch_size * self.loading.world_size))

    @property
    def remaining_batches(self) -> int:
        """Number of batches from `start_sample` to the end of the epoch."""
        return -(-max(0, self.length - self.start_sample) // (self.loading.batch_size * self.loading.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # numpy guarantees that RandomState's stream never changes, unlike those of its newer and torch's generators.
        bits = np.random.MT19937(np.random.SeedSequence((self.loading.seed, self.epoch)))
        epoch, order = self.epoch, np.random.RandomState(bits).permutation(self.length)
        batch_size, rank, world_size = self.loading.batch_size, self.loading.rank, self.loading.world_size
        for batch in range(self.remaining_batches):
            start = self.start_sample + (batch * world_size + rank) * batch_size
            indices = order[np.arange(start, start + batch_size) % self.length]
            yield [(epoch, index) for index in indices.tolist()]
