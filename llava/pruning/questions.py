"""What a prompt asks, without the words that every prompt of a benchmark has."""

#: last lines that say how to answer, not what is asked
ANSWER_FORMATS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
    "\n请直接回答选项字母。",
)


def bare_question(text: str) -> str:
    """The question without image marks and without the line that says how to answer."""
    text = text.replace("<image>\n", "").replace("<image>", "")
    for ending in ANSWER_FORMATS:
        text = text.removesuffix(ending)
    return text
