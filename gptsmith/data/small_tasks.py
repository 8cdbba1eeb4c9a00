"""The built-in examples `small-tasks`: questions that a small model learns to answer in minutes.

Each answer can be checked exactly. Knows nothing of tokens or files.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

SEED = 17
HELD_OUT = 200  # inputs of a task in each of validation and test
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
OPPOSITES = """
    hot cold, big small, tall short, fast slow, up down, left right, in out, on off, day night,
    black white, good bad, old young, rich poor, happy sad, wet dry, full empty, hard soft,
    high low, open closed, early late, near far, first last, clean dirty, strong weak,
    sweet bitter, north south, buy sell, win lose, push pull, love hate
"""
PAIRS = [pair.split() for pair in OPPOSITES.split(",")]
# A wording of a question about opposites is one of the first and one of the second.
ASKING = ["What is", "Tell me", "Give", "Name", "Write", "Say", "Find", "Show me", "Type", "Print"]
ASKED = [
    "the opposite of {}",
    "the antonym of {}",
    "the contrary of {}",
    "the word opposite to {}",
    "the antonym for {}",
    "an antonym of {}",
    "a word that is the opposite of {}",
    "a word that means the opposite of {}",
]
HELD_OUT_WORDINGS = {(0, 1): "validation", (4, 2): "validation", (1, 1): "test", (3, 0): "test"}


class Task(NamedTuple):
    """A task whose inputs are drawn at random: its wordings, an input, the answer to it."""

    wordings: tuple[str, ...]
    learned: int  # inputs in train: more where the task is harder
    draw: Callable[[Random], str]
    answer: Callable[[str], str]


def word(choose: Random, least: int, most: int) -> str:
    """Make up a word of `least` to `most` letters, in which vowels mostly follow consonants."""
    letters, likely = "", 0.4
    for _ in range(choose.randint(least, most)):
        vowel = choose.random() < likely
        letters += choose.choice(VOWELS if vowel else CONSONANTS)
        likely = 0.2 if vowel else 0.6
    return letters


def noun(choose: Random) -> str:
    """Make up a word, with one of the endings that the rule of the plural tells apart."""
    return word(choose, 2, 4) + choose.choice(["s", "x", "z", "ch", "sh", "ay", "oy", *"ytnrke"])


def plural(noun: str) -> str:
    """Return the plural by rule: -es after a hiss, -ies for y after a consonant, else -s."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + "s"


def numbers(choose: Random) -> str:
    """Draw two numbers of at most two digits."""
    return f"{choose.randrange(100)} + {choose.randrange(100)}"


def total(numbers: str) -> str:
    """Return the value of "12 + 34"."""
    return str(sum(map(int, numbers.split(" + "))))


TASKS = {
    "upper-case": Task(
        ("Write {} in capital letters.", "Make {} upper-case."),
        3000,
        lambda choose: word(choose, 3, 8),
        str.upper,
    ),
    "reverse": Task(
        ("Write {} backwards.", "Reverse {}."),
        5000,
        lambda choose: word(choose, 3, 6),
        lambda w: w[::-1],
    ),
    "plural": Task(("What is the plural of {}?", "More than one {}?"), 4500, noun, plural),
    "sum": Task(("What is {}?", "Add {}."), 9600, numbers, total),
}


def small_tasks() -> Iterator[dict[str, str]]:
    """Yield rows of task, prompt, completion and split: always the same, in a random order.

    Held out are inputs: of opposites, which are a list, wordings of the question.
    """
    rows = [*opposites()]
    for number, (name, task) in enumerate(TASKS.items()):
        choose = Random(SEED + number)
        inputs = dict[str, None]()  # in the order in which they were drawn
        while len(inputs) < task.learned + 2 * HELD_OUT:
            inputs[task.draw(choose)] = None
        for place, text in enumerate(inputs):
            split = ("validation", "test", "train")[min(2, place // HELD_OUT)]
            prompt = choose.choice(task.wordings).format(text)
            rows.append(row(name, prompt, task.answer(text), split))
    Random(SEED).shuffle(rows)
    yield from rows


def opposites() -> Iterator[dict[str, str]]:
    """Yield a row for each word in each wording."""
    answers = [*PAIRS, *([b, a] for a, b in PAIRS)]
    for first, asking in enumerate(ASKING):
        for second, asked in enumerate(ASKED):
            split = HELD_OUT_WORDINGS.get((first, second), "train")
            mark = "?" if asking.startswith("What") else "."
            for word, answer in answers:
                prompt = f"{asking} {asked.format(word)}{mark}"
                yield row("opposite", prompt, answer, split)


def row(task: str, prompt: str, completion: str, split: str) -> dict[str, str]:
    """Return one example."""
    return {"task": task, "prompt": prompt, "completion": completion, "split": split}
