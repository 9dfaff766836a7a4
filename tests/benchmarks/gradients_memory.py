"""Memory and time of the gradient study with a vocabulary of real size, on random logits.

    python -m tests.benchmarks.gradients_memory [--vocab 151936] [--types 400] [--rows 256]

The paper's public scripts keep a dense float64 matrix of types by vocabulary, and more: 3.6 GB.
"""

import argparse
import time

import torch

from trl_opd.loss.logits import CHUNK_ROWS, reverse_kl_gradient
from trl_opd.studies.gradients import GradientSums

from tests.benchmarks.measuring import host_peak_bytes, machine


def study(vocab: int, types: int, rows: int) -> None:
    """Add up the gradients of random rows in chunks, and compute the measures."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2 * types, (rows,), generator=generator)
    counts = torch.bincount(ids, minlength=vocab)
    sums = GradientSums(counts, torch.arange(types))
    for chunk in ids.split(CHUNK_ROWS):
        student = torch.randn(len(chunk), vocab, generator=generator)
        teacher = torch.randn(len(chunk), vocab, generator=generator)
        gradients = reverse_kl_gradient(student, teacher)
        del student, teacher
        sums.add(chunk, gradients, chunk % 2 == 0)
    sums.measures()


def peaks(vocab: int, types: list[int], rows: int) -> list[int]:
    """Return the peak memory of studies of increasing size, in bytes; to be called in a new process."""
    return [host_peak_bytes(study, vocab, one, rows) for one in types]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--types", type=int, default=400)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    print(machine())
    started = time.perf_counter()
    peak = host_peak_bytes(study, options.vocab, options.types, options.rows)
    seconds = time.perf_counter() - started
    print(f"{options.types} types, {options.vocab} entries, {options.rows} rows: {peak / 1e9:.2f} GB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
