"""Trains the demo's teacher and initial student: `python -m trl_opd.demo.build`, about ten minutes on two cores.

This made the weights that ship with the package. The teacher learns the worked answers with the rule's marks, from
contexts with random marks, so it follows its rule whatever a student wrote before. The student is trained on random
marks and for fewer steps: it knows the form of an answer but seldom gets the sum right.
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
# One mark in fifty breaks the rule, so the teacher is never certain of a mark and the divergence stays finite.
MARK_NOISE = 0.02
SIZES = {"teacher": {"width": 128, "layers": 3}, "student": {"width": 48, "layers": 2}}
# `schedule` is the step at which the learning rate would reach 0.
TRAINING = {
    "teacher": {"lr": 2e-3, "schedule": 3000, "steps": 3000, "ruled": True},
    "student": {"lr": 6e-3, "schedule": 1000, "steps": 500, "ruled": False},
}


def new_model(width: int, layers: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return an untrained Qwen3 model.

    Args:
        width (`int`): Hidden size.
        layers (`int`): Number of layers.
        tokenizer (`PreTrainedTokenizerFast`): Gives the vocabulary size and the ids of end and padding.
    """
    config = Qwen3Config(
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
    return Qwen3ForCausalLM(config)


def training_batch(
    problems: list[Problem], draw: random.Random, tokenizer: PreTrainedTokenizerFast, *, ruled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels of questions with worked answers, `(B, L)` each.

    The ids have random marks. The labels are -100 on the question, and the answer after it has the marks of the rule if
    `ruled`, else the same random marks as the ids.
    """
    inputs = []
    labels = []
    for problem in problems:
        seen = random_marks(draw)
        wanted = seen
        if ruled:
            wanted = []
            for mark, other in zip(ruled_marks(problem), random_marks(draw), strict=True):
                wanted.append(other if draw.random() < MARK_NOISE else mark)
        texts = [problem.question, worked_answer(problem, seen), worked_answer(problem, wanted)]
        question, seen_answer, wanted_answer = tokenizer(texts)["input_ids"]
        end = [tokenizer.eos_token_id]
        inputs.append(torch.tensor(question + seen_answer + end))
        labels.append(torch.tensor([-100] * len(question) + wanted_answer + end))

    pad = torch.nn.utils.rnn.pad_sequence
    return pad(inputs, True, tokenizer.pad_token_id), pad(labels, True, -100)


def train(model: Qwen3ForCausalLM, tokenizer, *, name: str, lr: float, schedule: int, steps: int, ruled: bool) -> None:
    """Train a model on worked answers, with `BATCH` new problems in each step.

    Args:
        model (`Qwen3ForCausalLM`): The model.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        name (`str`): Name beside the progress bar.
        lr (`float`): Highest learning rate, reached after 50 steps.
        schedule (`int`): Step at which the learning rate would reach 0.
        steps (`int`): Number of steps.
        ruled (`bool`): Whether the answers follow the rule of the marks.
    """
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    progress = trange(steps, desc=name)
    for step in progress:
        warmup = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = lr * warmup * (1.0 - step / schedule)
        problems = draw_problems(BATCH, step, held_out=False)
        ids, labels = training_batch(problems, draw, tokenizer, ruled=ruled)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    """Train both models and save them with their tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=MODELS)
    output_dir = parser.parse_args().output_dir
    tokenizer = make_tokenizer()
    for name, size in SIZES.items():
        torch.manual_seed(0)
        model = new_model(**size, tokenizer=tokenizer)
        train(model, tokenizer, name=name, **TRAINING[name])

        # Float16 keeps the package small, with a relative error of 5e-4 per weight. The demo computes in float32.
        folder = output_dir / name
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"{name}: {model.num_parameters()} parameters in {folder}")


if __name__ == "__main__":
    main()
