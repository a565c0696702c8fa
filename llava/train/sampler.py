"""Batches of samples of similar length: less padding, and work shared evenly between processes.

A megabatch holds world_size * batch_size samples. It is sorted by length and dealt to the processes
so that their totals are about equal. With modalities, a megabatch holds only samples with an image
or only samples without, except the last one, which mixes the leftovers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)


def split_to_even_chunks(
    indices: Sequence[int], lengths: Sequence[int], num_chunks: int
) -> list[list[int]]:
    """Deals `indices` into `num_chunks` lists of equal size and about equal total length.

    Each index in turn goes to the list with the smallest total that is not full, the first on ties.
    If the sizes cannot be equal, the indices are dealt round robin.
    """
    if len(indices) % num_chunks != 0:
        return [list(indices[i::num_chunks]) for i in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in indices:
        shortest = min(range(num_chunks), key=totals.__getitem__)
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == size:
            totals[shortest] = float("inf")
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator=None
) -> list[int]:
    """A random order of all samples in which every megabatch is sorted and dealt evenly."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = world_size * batch_size
    indices = []
    for i in range(0, len(order), size):
        megabatch = sorted(order[i : i + size], key=lambda k: lengths[k], reverse=True)
        for chunk in split_to_even_chunks(megabatch, lengths, world_size):
            indices += chunk
    return indices


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator=None
) -> list[int]:
    """As `get_length_grouped_indices`, with one modality per megabatch.

    lengths: positive for samples with an image, negative for samples without.
    The order inside a modality is drawn from the global random state, that of the megabatches from
    `generator` (recorded behaviour).
    """
    if any(length == 0 for length in lengths):
        raise ValueError("a sample of length 0 has no modality: lengths must not be 0")
    if len({length > 0 for length in lengths}) <= 1:
        return get_length_grouped_indices(lengths, batch_size, world_size, generator)
    size = world_size * batch_size
    megabatches, leftover = [], []
    for sign in (1, -1):
        samples = [i for i, length in enumerate(lengths) if length * sign > 0]
        sizes = [abs(lengths[i]) for i in samples]
        order = get_length_grouped_indices(sizes, batch_size, world_size, generator=None)
        grouped = [samples[i] for i in order]
        batches = [grouped[i : i + size] for i in range(0, len(grouped), size)]
        megabatches += batches[:-1]
        leftover += batches[-1]
    order = torch.randperm(len(megabatches), generator=generator).tolist()
    return [i for k in order for i in megabatches[k]] + sorted(leftover)


class LengthGroupedSampler(Sampler):
    """Iterates over sample indices in a length-grouped random order.

    seed: None draws from the global random state; a number makes the order depend on the seed and
    the epoch only, which is what an exact resume and several processes need.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
        seed: int | None = None,
    ):
        if lengths is None:
            raise ValueError("lengths must be given: one number per sample")
        self.batch_size, self.world_size, self.lengths = batch_size, world_size, lengths
        self.generator, self.seed, self.epoch = generator, seed, 0
        self.group = (
            get_modality_length_grouped_indices if group_by_modality else get_length_grouped_indices
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def start_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; only matters with a seed."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.manual_seed(self.seed + self.epoch)
            return iter(self.group(self.lengths, self.batch_size, self.world_size, self.generator))


class EpochRandomSampler(Sampler):
    """A random order of `num_samples` indices that depends on the seed and the epoch only."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0

    def __len__(self) -> int:
        return self.num_samples

    def start_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.num_samples, generator=generator).tolist())


class ChunkSampler(EpochRandomSampler):
    """The same random order in whole chunks, of which every index comes `repeats` times in a row.

    chunk:   indices, repeats counted, that belong together: those of one step of the optimizer; a
             last chunk that is not full is left out
    repeats: the answers that a reinforcement samples for a question, else 1
    Raises ValueError when the samples do not fill one chunk, or the repeats do not divide it.
    """

    def __init__(self, num_samples: int, seed: int, chunk: int, repeats: int = 1):
        super().__init__(num_samples, seed)
        if chunk % repeats:
            raise ValueError(
                f"num_generations {repeats} must divide the {chunk} answers of a step (samples of "
                "a device x processes x accumulation)"
            )
        self.questions, self.repeats = chunk // repeats, repeats
        if num_samples < self.questions:
            raise ValueError(
                f"{num_samples} samples do not fill one step, which takes {self.questions}: use a "
                "smaller batch, less accumulation, or more data"
            )
        if rest := num_samples % self.questions:
            logger.warning(
                "%d of %d samples, others in every epoch, are left out: they fill no step of %d",
                rest,
                num_samples,
                self.questions,
            )

    def __len__(self) -> int:
        return self.num_samples // self.questions * self.questions * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())[: len(self) // self.repeats]
        return (index for index in order for _ in range(self.repeats))
