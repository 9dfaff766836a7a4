"""Train the demo's teacher and start student: `python -m trl_opd.demo.build`, about ten minutes on two cores.

The shipped weights are what this makes. The teacher learns the worked answers with the rule's marks, from contexts
whose marks are random, so that it keeps to its rule whatever a student wrote before. The student sees random marks and
stops early: it knows the form and seldom the sum.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .arithmetic import Problem, draw_problems, make_tokenizer, random_marks, ruled_marks, worked_answer

MODELS = Path(__file__).parent / "models"
BATCH = 64
# A teacher that is never sure of a mark has a finite divergence: one mark in fifty is not the rule's.
MARK_NOISE = 0.02
# Width, layers, learning rate, steps of its schedule, steps trained.
TEACHER = {"width": 128, "layers": 3, "lr": 2e-3, "schedule": 3000, "steps": 3000}
STUDENT = {"width": 48, "layers": 2, "lr": 6e-3, "schedule": 1000, "steps": 500}


def new_model(width: int, layers: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return an untrained model of the Qwen3 architecture."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width if layers > 2 else 3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=max(16, width // 4),
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def training_batch(
    problems: list[Problem], draw: random.Random, tokenizer: PreTrainedTokenizerFast, *, ruled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids with random marks, and labels with the rule's or the same, `(B, L)` each, -100 on the questions."""
    inputs, labels = [], []
    for problem in problems:
        seen = random_marks(draw)
        wanted = seen
        if ruled:
            pairs = zip(ruled_marks(problem), random_marks(draw), strict=True)
            wanted = [other if draw.random() < MARK_NOISE else mark for mark, other in pairs]
        question, *answers = tokenizer(
            [problem.question, worked_answer(problem, seen), worked_answer(problem, wanted)]
        )["input_ids"]
        inputs.append(torch.tensor([*question, *answers[0], tokenizer.eos_token_id]))
        labels.append(torch.tensor([-100] * len(question) + [*answers[1], tokenizer.eos_token_id]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(inputs, True, tokenizer.pad_token_id), pad(labels, True, -100)


def train(model: Qwen3ForCausalLM, tokenizer, *, name: str, lr: float, schedule: int, steps: int, ruled: bool) -> None:
    """Train a model on worked answers, `BATCH` fresh problems a step."""
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    progress = trange(steps, desc=name)
    for step in progress:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50) * (1.0 - step / schedule)
        ids, labels = training_batch(draw_problems(BATCH, step, held_out=False), draw, tokenizer, ruled=ruled)
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=MODELS)
    output_dir = parser.parse_args().output_dir
    tokenizer = make_tokenizer()
    for name, size in (("teacher", TEACHER), ("student", STUDENT)):
        torch.manual_seed(0)
        size = dict(size)
        model = new_model(size.pop("width"), size.pop("layers"), tokenizer)
        train(model, tokenizer, name=name, ruled=name == "teacher", **size)
        # Half precision keeps the package small: a relative error of 5e-4 in a weight. The demo computes in float32.
        model.half().save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)
        print(f"{name}: {model.num_parameters()} parameters in {output_dir / name}")


if __name__ == "__main__":
    main()
