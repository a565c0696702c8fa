"""Which questions are answered together: one image's side by side, prompts of like length."""

from collections.abc import Iterator

from llava.eval.answering.questions import Question

Batch = list[int]  # numbers of questions
Share = list[Batch]  # what one process takes at a time


def plan_shares(questions: list[Question], batch_size: int, by_image: bool = True) -> list[Share]:
    """Returns every question's number once, in batches of at most `batch_size`.

    by_image: batches about one image make one share, so that what belongs to the image is computed
              once; images with few questions are put together, each in one batch
    The longest prompts come first: what does not fit into memory fails at once. The plan follows
    from the questions alone, so a run that is continued answers in the same batches.
    """
    if batch_size == 1 and not by_image:
        return [[[number]] for number in range(len(questions))]
    length = [(len(question.images), len(question.text)) for question in questions]
    groups: dict[object, Batch] = {}
    for number, question in enumerate(questions):
        key = tuple(question.images) if by_image and question.images else number
        groups.setdefault(key, []).append(number)
    ordered = [sorted(group, key=length.__getitem__, reverse=True) for group in groups.values()]
    ordered.sort(key=lambda group: length[group[0]], reverse=True)
    large = [split(group, batch_size) for group in ordered if len(group) >= batch_size]
    small = packed((group for group in ordered if len(group) < batch_size), batch_size)
    shares = [*large, *([batch] for batch in small)]
    return sorted(shares, key=lambda share: length[share[0][0]], reverse=True)


def split(group: Batch, batch_size: int) -> list[Batch]:
    """Returns a group in as few batches as it takes, of sizes that differ by one at most."""
    count = -(-len(group) // batch_size)
    ends = [len(group) * part // count for part in range(count + 1)]
    return [group[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def packed(groups: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """Yields batches of whole groups."""
    batch: Batch = []
    for group in groups:
        if len(batch) + len(group) > batch_size:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch
