"""Time and peak memory of the divergence, forward and backward: ours, TRL's, and Liger's if it is installed.

    python -m tests.benchmarks.divergence_op [--vocab 32768 151936] [--rows 160 640] [--rounds 5]

The ops take turns in this process, and a ratio is the median over the rounds. Memory is what an op uses beyond its
inputs, measured in a separate process. On a GPU the inputs are bfloat16, and the table also has the bare products of
rows and heads, forward and backward.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from trl_opd import LMHead, weighted_divergence
from trl_opd.loss.divergence import divergence_by_trl, divergence_fused

from tests.benchmarks.measuring import in_a_process, machine, peak_bytes

WIDTHS = (256, 384)
CHUNK_BYTES = 512 * 2**20
GPU = torch.cuda.is_available()


def make_inputs(vocab: int, rows: int, widths=WIDTHS):
    """Return hidden states and heads of both models, and weights."""
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"
    dtype = torch.bfloat16 if GPU else torch.float32
    hidden = [torch.randn(rows, width, device=device).to(dtype) for width in widths]
    heads = [(torch.randn(vocab, width, device=device) / width**0.5).to(dtype) for width in widths]
    weights = torch.ones(rows, device=device) / rows
    return hidden, heads, weights


def leaves(hidden, heads, trainable: bool):
    """Return the student's hidden states and head as leaves that get gradients, the head only if it is trainable."""
    return hidden[0].detach().requires_grad_(), heads[0].detach().requires_grad_(trainable)


def in_one_pass(hidden, heads, weights, beta, trainable):
    student, head = leaves(hidden, heads, trainable)
    loss, *_ = divergence_fused(student, hidden[1], (LMHead(head), LMHead(heads[1])), weights, beta, 1.0, CHUNK_BYTES)
    loss.backward()


def by_trl(hidden, heads, weights, beta, trainable):
    student, head = leaves(hidden, heads, trainable)
    loss, *_ = divergence_by_trl(student, hidden[1], (LMHead(head), LMHead(heads[1])), weights, beta, 1.0, CHUNK_BYTES)
    loss.backward()


def bare_products(hidden, heads, weights, beta, trainable):
    student, head = leaves(hidden, heads, trainable)
    logits = student @ head.t()
    hidden[1] @ heads[1].t()
    logits.backward(logits.detach())


def measured(hidden, heads, weights, beta, trainable):
    """Measure without gradients, as a step that logs does for frozen rows."""
    with torch.no_grad():
        student, teacher = hidden
        student_head, teacher_head = map(LMHead, heads)
        weighted_divergence(student, teacher, student_head, teacher_head, weights, 1.0, beta=beta, temperature=1.0)


def by_liger(hidden, heads, weights, beta, trainable):
    student, head = leaves(hidden, heads, trainable)
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=GPU)
    loss(student, head, hidden[1], heads[1], labels).backward()


OPS = {"TRL": by_trl, "ours": in_one_pass, "ours, without gradient": measured}
try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    OPS["Liger"] = by_liger
except ImportError:
    pass
if GPU:
    OPS["bare head products"] = bare_products


def seconds(op: Callable, *inputs) -> float:
    synchronize = torch.cuda.synchronize if GPU else lambda: None
    synchronize()
    start = time.perf_counter()
    op(*inputs)
    synchronize()
    return time.perf_counter() - start


def peak_of(name: str, vocab: int, rows: int, beta: float, trainable: bool) -> int:
    """Return the most memory that an op used beyond its inputs."""
    OPS[name](*make_inputs(64, 2), beta, trainable)  # so that what a first call loads is not measured
    return peak_bytes(OPS[name], *make_inputs(vocab, rows), beta, trainable)


def rows_of_table(vocab: int, rows: int, rounds: int) -> None:
    for beta in (1.0, 0.0, 0.5):
        for trainable in (False, True):
            inputs = (*make_inputs(vocab, rows), beta, trainable)
            times = []
            for _ in range(rounds + 1):
                times.append({name: seconds(op, *inputs) for name, op in OPS.items()})
            del times[0]  # the first round warms up
            head = "trainable" if trainable else "frozen"
            for name in OPS:
                median = statistics.median(turn[name] for turn in times)
                ratio = statistics.median(turn[name] / turn["TRL"] for turn in times)
                memory = in_a_process(peak_of, name, vocab, rows, beta, trainable) / 2**20
                print(f"| {vocab} | {rows} | {beta} | {head} | {name} | {median:.3f} | {ratio:.2f} | {memory:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 151936])
    parser.add_argument("--rows", type=int, nargs="+", default=[160, 640])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{machine()}; load average {os.getloadavg()[0]:.2f}")
    print("| vocabulary | rows | beta | head | op | seconds | ratio to TRL | peak, MiB |\n|" + "---|" * 8)
    for vocab in options.vocab:
        for rows in options.rows:
            rows_of_table(vocab, rows, options.rounds)


if __name__ == "__main__":
    main()
