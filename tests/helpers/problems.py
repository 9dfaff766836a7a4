"""Problems with answers, and a reward that keeps what it was given."""

from datasets import Dataset

from tests.helpers.tiny import make_dataset


def problems(rows: int = 6, *, chat: bool = False) -> Dataset:
    dataset = make_dataset(rows, chat=chat)
    return dataset.add_column("answer", [f"answer {row}" for row in range(rows)])


class Seen:
    """A reward that keeps what it was given, and counts an even length as right."""

    def __init__(self, values=None):
        self.calls, self._values = [], values

    def __call__(self, prompts, completions, answer, **columns):
        self.calls.append((prompts, completions, answer))
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        return self._values or [float(len(text) % 2 == 0) for text in texts]
