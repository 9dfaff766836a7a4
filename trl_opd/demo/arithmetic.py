"""The demo's world: word problems of addition, answered in worked steps whose form follows a rule of the operands.

The content (digits, carries, the answer) can be learned by a small student. The form cannot: which discourse marker
opens a step, which mark stands before its result and which separator ends it is looked up in random tables by three
digits, and the teacher knows the tables. So these tokens are rocks by construction, and we know which.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kira", "Leo", "Mia", "Nils")
NAMES += ("Olga", "Paul", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Vera", "Wim", "Xenia", "Yann", "Zoe", "Abel", "Bea")
THINGS = ("apples", "beads", "books", "cards", "coins", "cups", "eggs", "figs", "keys", "lamps", "maps", "nuts")
THINGS += (
    "pears",
    "pens",
    "pins",
    "plums",
    "seeds",
    "shells",
    "stamps",
    "tiles",
    "bolts",
    "bricks",
    "caps",
    "forks",
    "kites",
    "rings",
)
TEMPLATES = (
    "{who} has {a} {what} and finds {b} more. How many {what} does {who} have?",
    "{who} bought {a} {what} on Monday and {b} on Friday. How many in all?",
    "A shop sold {a} {what} before noon and {b} after. What is the total?",
    "{who} counts {a} {what} in one box and {b} in the other. How many together?",
    "There are {a} {what} here and {b} there. How many {what} are there?",
    "{who} gave away {a} {what} and kept {b}. How many were there first?",
    "One farm sends {a} {what}, a second sends {b}. How many arrive?",
    "After {who} took {a} {what}, {b} were left. How many were there first?",
    "A red crate holds {a} {what} and a blue crate {b}. Add them up.",
    "{who} made {a} {what} last week and {b} this week. Find the sum.",
)
# The planted rocks, by family. Which of a family stands in a place is the rule's choice.
FAMILIES = {
    "discourse": ("So", "Now", "Then", "Next", "Well", "Okay"),
    "emphasis": ("**", "__", "==", "~~"),
    "separator": (";", "--", "|", "/"),
}
PLANTED_ROCKS = tuple(mark for family in FAMILIES.values() for mark in family)
# Without "carry" the next column is wrong; without "####" there is no answer.
CARRY, ANSWER = "carry", "####"
PLANTED_PILLARS = (CARRY, ANSWER)
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
COLUMNS = 3
_WORD = r"[A-Za-z]+|\d|[^\sA-Za-z\d]+"
_RULE_SEED = 2605
# Of the hundred pairs of last digits ten are never trained on, and all held-out problems have these: their units column
# is new, their other columns have pairs that training saw.
_HELD_OUT = 10


@dataclass(frozen=True)
class Problem:
    """Two numbers of three digits in a sentence."""

    question: str
    a: int
    b: int
    what: str

    @property
    def answer(self) -> int:
        """The sum."""
        return self.a + self.b


def draw_problems(count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """Return `count` problems drawn with a seed, with operands that training sees, or with those that it never sees."""
    draw = random.Random(seed)
    problems = []
    while len(problems) < count:
        a, b, who, what = draw.randint(100, 999), draw.randint(100, 999), draw.choice(NAMES), draw.choice(THINGS)
        question = draw.choice(TEMPLATES).format(who=who, what=what, a=a, b=b)
        if ((7 * a + b) % _HELD_OUT == 0) == held_out:
            problems.append(Problem(question, a, b, what))
    return problems


def _rule() -> dict[str, list[str]]:
    draw = random.Random(_RULE_SEED)
    return {name: [draw.choice(family) for _ in range(10**COLUMNS)] for name, family in FAMILIES.items()}


_RULE = _rule()


def ruled_marks(problem: Problem) -> list[str]:
    """Return the nine marks that the teacher's rule puts into an answer: three for each column, units first."""
    a, b = str(problem.a)[::-1], str(problem.b)[::-1]
    marks = []
    for column in range(COLUMNS):
        for place, table in enumerate(_RULE.values()):
            first, second, third = ((column + place + shift) % COLUMNS for shift in range(COLUMNS))
            marks.append(table[int(a[first] + b[second] + a[third])])
    return marks


def random_marks(draw: random.Random) -> list[str]:
    """Return nine marks of the right families, every mark of a family equally likely."""
    return [draw.choice(family) for _ in range(COLUMNS) for family in FAMILIES.values()]


def worked_answer(problem: Problem, marks: list[str]) -> str:
    """Return the answer in worked steps, with the nine marks in their places.

    347 + 285 gives "347 apples + 285 : So 7 + 5 = ** 2 carry ; Now 4 + 8 = ~~ 3 carry | Next 3 + 2 = == 6 / #### 632".
    """
    a, b = str(problem.a), str(problem.b)
    parts, carry = [f"{a} {problem.what} + {b} :"], 0
    for column in range(COLUMNS):
        opening, emphasis, separator = marks[3 * column : 3 * column + 3]
        x, y = int(a[-1 - column]), int(b[-1 - column])
        carry, digit = divmod(x + y + carry, 10)
        parts.append(f"{opening} {x} + {y} = {emphasis} {digit}{f' {CARRY}' * carry} {separator}")
    return " ".join([*parts, f"{ANSWER} {problem.answer}"])


def is_right(problem: Problem, completion: str) -> bool:
    """Return whether the number after the first answer mark of a completion is the sum."""
    return solved([completion], [str(problem.answer)]) == [1.0]


def solved(completions: list[str], answer: list[str], **_) -> list[float]:
    """Return 1 where the number after the first answer mark of a completion is the answer: a reward as TRL has them."""
    found = (re.match(r"[\s\d]*", completion.partition(ANSWER)[2])[0] for completion in completions)
    return [float("".join(digits.split()) == one) for digits, one in zip(found, answer, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of this world: one token for each word, mark and digit."""
    example = (*TEMPLATES, f"{ANSWER} + : = {CARRY}", " ".join(PLANTED_ROCKS), " ".join(NAMES + THINGS))
    texts = [text.format(who=NAMES[0], what=THINGS[0], a=0, b=0) for text in example]
    words = dict.fromkeys(
        [PAD, EOS, UNKNOWN, *"0123456789", *(word for text in texts for word in re.findall(_WORD, text))]
    )
    core = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=256,
    )
