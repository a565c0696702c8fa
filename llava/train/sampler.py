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


def whole_steps(
    num_samples: int, batch: int, accumulation: int, drop_last: bool = False
) -> tuple[int, int]:
    """(steps of the optimizer, samples) of an epoch, which ends with a step.

    batch: samples that all processes take at once; accumulation: batches of a step; drop_last:
    whether a last batch that is not full is left out

    Where the batches do not fill the last step, those behind the last whole one are left out: the
    steps are as many as transformers counts. Samples that do not fill a single step come again
    until they do.
    """
    batches = num_samples // batch if drop_last else -(-num_samples // batch)
    steps = batches // accumulation
    if steps == 0:
        return 1, batch * accumulation
    return steps, min(num_samples, steps * accumulation * batch)


def tell_difference(num_samples: int, taken: int, step: int) -> None:
    """Warns when an epoch takes more or fewer than all samples; step: samples of one."""
    if taken < num_samples:
        logger.warning(
            "%d of %d samples, others in every epoch, are left out: they fill no step of %d",
            num_samples - taken,
            num_samples,
            step,
        )
    elif taken > num_samples:
        logger.warning(
            "%d samples do not fill a step of %d: they come again until it is full",
            num_samples,
            step,
        )


class LengthGroupedSampler(Sampler):
    """Iterates over sample indices in a length-grouped random order.

    seed: None draws from the global random state; a number makes the order depend on the seed and
    the epoch only, which is what an exact resume and several processes need.
    taken: how many indices an epoch has, see `whole_steps`; default: each once. Which ones are left
    out or come again is drawn with the seed, whatever their length.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
        seed: int | None = None,
        taken: int | None = None,
    ):
        if lengths is None:
            raise ValueError("lengths must be given: one number per sample")
        self.taken = len(lengths) if taken is None else taken
        self.batch_size, self.world_size, self.lengths = batch_size, world_size, lengths
        # Not `generator`: where it is None, accelerate puts one of its own there for several
        # processes, whose state neither seed nor checkpoint knows.
        self._generator, self.seed, self.epoch = generator, seed, 0
        self.group = (
            get_modality_length_grouped_indices if group_by_modality else get_length_grouped_indices
        )

    def __len__(self) -> int:
        return self.taken

    def start_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; only matters with a seed."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.manual_seed(self.seed + self.epoch)
            chosen: Sequence[int] = range(len(self.lengths))
            if self.taken != len(chosen):
                chosen = sorted(first(torch.randperm(len(chosen)).tolist(), self.taken))
            lengths = [self.lengths[i] for i in chosen]
            order = self.group(lengths, self.batch_size, self.world_size, self._generator)
            return iter([chosen[i] for i in order])


def first(order: Sequence[int], count: int) -> list[int]:
    """The first `count` of `order`, which begins again where it ends."""
    return [order[i % len(order)] for i in range(count)]


class EpochRandomSampler(Sampler):
    """A random order of `num_samples` indices that depends on the seed and the epoch only.

    taken: how many indices of it an epoch has, see `whole_steps`; default: all
    """

    def __init__(self, num_samples: int, seed: int, taken: int | None = None):
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0
        self.taken = num_samples if taken is None else taken

    def __len__(self) -> int:
        return self.taken

    def start_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        return iter(first(order, self.taken))


class ChunkSampler(EpochRandomSampler):
    """The same random order in whole chunks, of which every index comes `repeats` times in a row.

    chunk:   indices, repeats counted, that belong together: those of one step of the optimizer; a
             last chunk that is not full is left out
    repeats: the answers that a reinforcement samples for a question, else 1
    Raises ValueError when the samples do not fill one chunk, or the repeats do not divide it.
    """

    def __init__(self, num_samples: int, seed: int, chunk: int, repeats: int = 1):
        if chunk % repeats:
            raise ValueError(
                f"num_generations {repeats} must divide the {chunk} answers of a step (samples of "
                "a device x processes x accumulation)"
            )
        questions, self.repeats = chunk // repeats, repeats
        if num_samples < questions:
            raise ValueError(
                f"{num_samples} samples do not fill one step, which takes {questions}: use a "
                "smaller batch, less accumulation, or more data"
            )
        super().__init__(num_samples, seed, num_samples // questions * questions)
        tell_difference(num_samples, self.taken, questions)

    def __len__(self) -> int:
        return self.taken * self.repeats

    def __iter__(self) -> Iterator[int]:
        return (index for index in super().__iter__() for _ in range(self.repeats))
