"""Which causal families of transformers train on right numbers, which are refused, and which cannot be built tiny.

    python -m tests.benchmarks.families [FAMILY ...]

Each family is built twice with random weights, as a student and as a teacher, and trained for one step by `OPDTrainer`
on rollouts of unequal length. Right: `kl/mean` of the step is the mean KL of the two whole models by their own
forwards, each rollout alone and unpadded, in float64 (within 1e-4 relative). Refused: the trainer's message, with the
difference that justifies it. Wrong: accepted, with another number; then the exit code is 1.
"""

import argparse
import contextlib
import io
import signal
import sys
import tempfile
import time
import warnings

import torch
import transformers

from trl_opd.models.model_check import check_student

from tests.helpers.families import families, make_family, make_trainer, mean_kl

SECONDS = 120  # of one family
TOLERANCE = 1e-4  # relative; nats per token below a KL of 0.01


def judge(family: str) -> tuple[str, str]:
    """Return "right", "refused", "wrong" or "unbuildable" for a family, and why."""
    try:
        student, teacher = make_family(family, seed=0), make_family(family, seed=1)
    except Exception as error:
        return "unbuildable", f"{type(error).__name__}: {error}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = make_trainer(folder, student, teacher)
        except ValueError as error:
            return "refused", str(error)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    expected = mean_kl(trainer.first_student, trainer.teacher_model, trainer.batch)
    found = trainer.state.log_history[0]["kl/mean"]
    traits = trainer.student_traits
    apart = ""
    if not traits.generates_padded:
        apart = "; prompts of one length are sampled together"
    if not traits.generates_together:
        apart = "; each prompt is sampled apart"
    verdict = "right" if abs(found - expected) <= TOLERANCE * max(abs(expected), 0.01) else "wrong"
    return verdict, f"kl/mean {found:.4f}, by whole models {expected:.4f}{apart}"


def seconds_of_check(model: torch.nn.Module) -> float:
    """Return the seconds of the check of a student."""

    def last_hidden_state(model, ids, mask, kept):
        return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]

    began = time.perf_counter()
    check_student(model, last_hidden_state=last_hidden_state)
    return time.perf_counter() - began


def _too_long(*_) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    """Print a line for each family and the number of each verdict; return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="only these")
    chosen = parser.parse_args().families or families()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _too_long)

    verdicts = []
    for family in chosen:
        signal.alarm(SECONDS)
        try:
            verdict, why = judge(family)
        except Exception as error:
            verdict, why = "wrong", f"{type(error).__name__}: {error}"
        signal.alarm(0)
        verdicts.append(verdict)
        print(f"{family:32} {verdict:12} {' '.join(why.split())[:300]}", flush=True)

    counts = {verdict: verdicts.count(verdict) for verdict in ("right", "refused", "wrong", "unbuildable")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if not parser.parse_args().families:
        tiny = make_family("llama")
        large = make_family_of_135m()
        print(f"The check of a student takes {seconds_of_check(tiny):.2f} s for {tiny.num_parameters() / 1e6:.1f} and")
        print(f"{seconds_of_check(large):.2f} s for {large.num_parameters() / 1e6:.0f} million parameters.")
    return 1 if "wrong" in verdicts else 0


def make_family_of_135m() -> torch.nn.Module:
    """Return a random model of the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
