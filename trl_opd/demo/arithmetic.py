"""The demo's task: addition as word problems, answered in worked steps whose wording follows a rule of the operands.

A small student can learn the content: digits, carries and the answer. It cannot learn the wording. Which discourse
marker opens a step, which mark precedes its result and which separator ends it are looked up in random tables by three
digits, and only the teacher knows the tables. These tokens are therefore rocks by construction, and we know which.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import chain

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kira", "Leo", "Mia", "Nils", "Olga",
    "Paul", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Vera", "Wim", "Xenia", "Yann", "Zoe", "Abel", "Bea",
)  # fmt: skip
THINGS = (
    "apples", "beads", "books", "cards", "coins", "cups", "eggs", "figs", "keys", "lamps", "maps", "nuts", "pears",
    "pens", "pins", "plums", "seeds", "shells", "stamps", "tiles", "bolts", "bricks", "caps", "forks", "kites",
    "rings",
)  # fmt: skip
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
# The planted rocks by family; the rule chooses one mark of the family for each place.
FAMILIES = {
    "discourse": ("So", "Now", "Then", "Next", "Well", "Okay"),
    "emphasis": ("**", "__", "==", "~~"),
    "separator": (";", "--", "|", "/"),
}
PLANTED_ROCKS = tuple(chain.from_iterable(FAMILIES.values()))
CARRY = "carry"  # without this token the next column would be wrong
ANSWER = "####"  # without this token there would be no answer
PLANTED_PILLARS = (CARRY, ANSWER)
PAD = "<pad>"
EOS = "<eos>"
UNKNOWN = "<unk>"
COLUMNS = 3
_WORD = r"[A-Za-z]+|\d|[^\sA-Za-z\d]+"
_RULE_SEED = 2605
# Ten of the hundred pairs of last digits are never trained on, and every held-out problem has one of them. Its units
# column is new; its other columns have pairs that occur in training.
_HELD_OUT = 10


@dataclass(frozen=True)
class Problem:
    """A word problem: the question, its two three-digit numbers and the noun that they count."""

    question: str
    a: int
    b: int
    what: str

    @property
    def answer(self) -> int:
        """The sum."""
        return self.a + self.b


def draw_problems(count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """Return random problems, all with operands that are held out of training or all with operands that are not.

    Args:
        count (`int`): Number of problems.
        seed (`int`): Equal seeds give equal problems.
        held_out (`bool`): Whether the operands are held out.
    """
    draw = random.Random(seed)
    problems = []
    while len(problems) < count:
        a = draw.randint(100, 999)
        b = draw.randint(100, 999)
        who = draw.choice(NAMES)
        what = draw.choice(THINGS)
        question = draw.choice(TEMPLATES).format(who=who, what=what, a=a, b=b)
        is_held_out = (7 * a + b) % _HELD_OUT == 0
        if is_held_out == held_out:
            problems.append(Problem(question, a, b, what))
    return problems


def _draw_rule() -> list[list[str]]:
    """Return a table of marks for each family, indexed by the number that three digits form."""
    draw = random.Random(_RULE_SEED)
    tables = []
    for family in FAMILIES.values():
        tables.append([draw.choice(family) for _ in range(10**COLUMNS)])
    return tables


_RULE = _draw_rule()


def ruled_marks(problem: Problem) -> list[str]:
    """Return the nine marks that the teacher's rule puts into an answer: three for each column, units first."""
    a = str(problem.a)[::-1]
    b = str(problem.b)[::-1]
    marks = []
    for column in range(COLUMNS):
        for place, table in enumerate(_RULE):
            first = (column + place) % COLUMNS
            second = (first + 1) % COLUMNS
            third = (first + 2) % COLUMNS
            digits = a[first] + b[second] + a[third]
            marks.append(table[int(digits)])
    return marks


def random_marks(draw: random.Random) -> list[str]:
    """Return nine marks in the order of `ruled_marks`, every mark of a family equally likely."""
    families = list(FAMILIES.values()) * COLUMNS
    return list(map(draw.choice, families))


def worked_answer(problem: Problem, marks: list[str]) -> str:
    """Return the answer in worked steps, with the nine marks in their places.

    347 + 285 gives "347 apples + 285 : So 7 + 5 = ** 2 carry ; Now 4 + 8 = ~~ 3 carry | Next 3 + 2 = == 6 / #### 632".

    Args:
        problem (`Problem`): The problem.
        marks (`list[str]`): Three marks for each column: opening, emphasis and separator, units first.
    """
    parts = [f"{problem.a} {problem.what} + {problem.b} :"]
    remaining = iter(marks)
    a = problem.a
    b = problem.b
    carry = 0
    for opening, emphasis, separator in zip(remaining, remaining, remaining, strict=True):
        a, x = divmod(a, 10)
        b, y = divmod(b, 10)
        carry, digit = divmod(x + y + carry, 10)
        ending = f"{CARRY} {separator}" if carry else separator
        parts.append(f"{opening} {x} + {y} = {emphasis} {digit} {ending}")
    parts.append(f"{ANSWER} {problem.answer}")
    return " ".join(parts)


def is_right(problem: Problem, completion: str) -> bool:
    """Return whether the number after the first answer mark of a completion is the sum."""
    return solved([completion], [str(problem.answer)]) == [1.0]


def solved(completions: list[str], answer: list[str], **_) -> list[float]:
    """Return 1 for each completion whose number after the first answer mark is the answer, else 0: a TRL reward.

    Args:
        completions (`list[str]`): Texts of the completions.
        answer (`list[str]`): Right answer for each.
    """
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        after_mark = completion.partition(ANSWER)[2]
        digits = re.match(r"[\s\d]*", after_mark)[0]
        rewards.append(float("".join(digits.split()) == right))
    return rewards


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of this task: one token for each word, mark and digit."""
    questions = [template.format(who=NAMES[0], what=THINGS[0], a=0, b=0) for template in TEMPLATES]
    texts = chain(questions, [ANSWER, "+ : =", CARRY], PLANTED_ROCKS, NAMES, THINGS)
    words = re.findall(_WORD, " ".join(texts))
    unique = dict.fromkeys(chain([PAD, EOS, UNKNOWN], "0123456789", words))
    vocabulary = {word: id for id, word in enumerate(unique)}

    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=256,
    )
