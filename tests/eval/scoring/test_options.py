"""Which option an answer names: by letter, by its words, or not at all."""

import pytest

from llava.eval.scoring.options import option_letter

DOG_OR_CAT = ["dog", "A cat"]


@pytest.mark.parametrize(
    "text, letter",
    [("A cat", "B"), ("A", "A"), ("A.", "A"), ("A dog is shown", "A")],
)
def test_b3_an_article_is_not_an_option(text, letter):
    assert option_letter(text, DOG_OR_CAT) == letter


@pytest.mark.parametrize("text", ["A bird", "A very small cow", "A-frame", "A's", "a horse"])
def test_an_article_before_other_words_names_nothing(text):
    assert option_letter(text, DOG_OR_CAT) is None


@pytest.mark.parametrize(
    "text",
    ["B", "b", "B.", "(B)", "[B]", "B)", "B:", "B,", "(B).", '"B"', "**B**", "\tB\r\n", "B"],
)
def test_a_letter_alone_counts_whatever_surrounds_it(text):
    assert option_letter(text, DOG_OR_CAT) == "B"


@pytest.mark.parametrize(
    "text",
    ["B. dog", "(B) dog", "B: dog", "B) dog", "b) dog", "**B.** dog", "B\n\nBecause of the dog."],
)
def test_a_letter_before_punctuation_counts_more_than_the_words_behind_it(text):
    assert option_letter(text, DOG_OR_CAT) == "B"


def test_an_option_that_ends_with_another_one_is_itself():
    assert option_letter("This is a big dog", ["dog", "big dog", "cat"]) == "B"


@pytest.mark.parametrize("text", ["A. red B. blue", "(A) red (B) blue (C) green"])
def test_options_that_are_only_listed_name_nothing(text):
    assert option_letter(text, ["red", "blue", "green"]) is None


@pytest.mark.parametrize("text", ["The answer is C++", "the answer is C#."])
def test_the_name_of_a_language_is_no_letter(text):
    assert option_letter(text, ["C++", "C#", "Java"]) == ("A" if "+" in text else "B")


def test_a_letter_before_other_words_does_not_count():
    assert option_letter("B dog", DOG_OR_CAT) == "A"  # by its text
    assert option_letter("B something", DOG_OR_CAT) is None


@pytest.mark.parametrize(
    "text",
    [
        "Answer: B",
        "answer: b.",
        "The answer is B.",
        "The answer is (B)",
        "The correct answer is: B",
        "The answer is B because of the dog",
        "Option B is correct",
        "I think it is B.",
        "答案:B",
        "答案是B。",
    ],
)
def test_a_letter_may_be_announced(text):
    assert option_letter(text, DOG_OR_CAT) == "B"


def test_an_article_behind_an_announcement_is_one_too():
    assert option_letter("The answer is A.", ["dog", "A cat"]) == "A"
    assert option_letter("The answer is A cat", ["dog", "A cat"]) == "B"
    assert option_letter("The answer is a cat.", ["dog", "cat"]) == "B"


@pytest.mark.parametrize(
    "text",
    ["A, B", "A or B", "A and B.", "It is A or B", "A dog and a cat", "A;B", "A. B."]
    + ["A. dog\nB. A cat", "(A) dog (B) A cat", "A, B or C"],
)
def test_two_options_are_no_choice(text):
    assert option_letter(text, DOG_OR_CAT) is None


@pytest.mark.parametrize("text", ["Not B", "It is not A.", "It is not a cat", "It can't be B."])
def test_what_an_answer_denies_is_not_its_choice(text):
    assert option_letter(text, DOG_OR_CAT) is None


@pytest.mark.parametrize(
    "text, letter",
    [
        ("It isn't red, it's blue.", "B"),
        ("The car is red, not blue.", "A"),
        ("C is correct", "C"),
        ("A is the right answer.", "A"),
        ("It must be C, because the sky is grey", "C"),
        ("I'd choose (B) here.", "B"),
        ("A. red\nB. blue\nThe answer is B.", "B"),
        ("“A”", "A"),
        ("【B】", "B"),
    ],
)
def test_an_answer_is_read_as_a_careful_person_would(text, letter):
    assert option_letter(text, ["red", "blue", "green"]) == letter


def test_options_that_are_about_other_options_or_deny_something_can_be_chosen():
    assert option_letter("C. A and B", ["x", "y", "A and B"]) == "C"
    assert option_letter("There is no dog", ["no dog", "a dog"]) == "A"
    assert option_letter("It is not sure", ["sure", "not sure"]) == "B"


@pytest.mark.parametrize(
    "text, options, letter",
    [
        ("cat", ["dog", "A cat"], "B"),
        ("The Cat.", ["dog", "A cat"], "B"),
        ("a black  cat\n", ["cat", "black cat"], "B"),
        ("There is a black cat", ["cat", "black cat"], "B"),
        ("There is a cat", ["cat", "black cat"], "A"),
        ("It is a catalogue", ["cat", "dog"], None),
        ("2.5 m", ["2", "2.5"], "B"),
        ("5", [".5", "5"], "B"),
        ("solution b", ["Solution A", "Solution B"], "B"),
        ("No, there is none", ["Yes", "No"], "B"),
        ("A", ["B", "A"], "A"),  # a letter that was asked for, not a text
        ("猫", ["狗", "猫"], "B"),
        ("不是", ["是", "否"], None),
        ("E", ["dog", "cat"], None),
        ("", ["dog", "cat"], None),
    ],
)
def test_an_option_is_named_by_its_words(text, options, letter):
    assert option_letter(text, options) == letter
