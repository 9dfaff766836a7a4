"""Logits that are not finite stop a run, with the step and the model that they came from."""

from contextlib import contextmanager

import torch
from accelerate import Accelerator

# A scaler that starts at 2^16 and halves needs about this many steps to find a scale that fits.
SKIPPED_LIMIT = 10
_ADVICE = {
    "student": "lower learning_rate or max_grad_norm, use bf16 instead of fp16, and check the checkpoint",
    "teacher": "load it in bfloat16 or float32 instead of float16, and check its weights and its quantisation",
}


class FiniteGuard:
    """Two flags on the device, raised by values that are not finite and read once per optimizer step.

    Args:
        accelerator (`accelerate.Accelerator`): Holds the device, and sums the flags over processes so that all stop.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._flags = torch.zeros(len(_ADVICE), device=accelerator.device)
        self._skipped = 0

    def note(self, entropy: torch.Tensor, divergence: torch.Tensor, projected: torch.Tensor | bool = True) -> None:
        """Look at the values of projected positions, of any shape, without a synchronisation."""
        if isinstance(projected, torch.Tensor):
            projected = projected.to(entropy.device, non_blocking=True)
        # The entropy is the student's alone: where it is finite and the divergence is not, the teacher is at fault.
        student = (~torch.isfinite(entropy) & projected).any()
        teacher = (~torch.isfinite(divergence) & projected).any() & ~student
        self._flags += torch.stack([student, teacher]).to(self._flags)

    def stop_if_raised(self, step: int) -> None:
        """Raise `ValueError` on every process when one has seen a value that is not finite in optimizer step `step`."""
        flags = self._accelerator.reduce(self._flags, reduction="sum").tolist()
        self._flags.zero_()
        for model, flag in zip(_ADVICE, flags, strict=True):
            if flag:
                raise not_finite_error(model, step)

    def end_step(self, step: int) -> None:
        """Raise `ValueError` when something was not finite in optimizer step `step`, or fp16 has skipped ten in a row.

        A single gradient that overflows in float16 is left to the scaler, which skips the step and lowers its scale.
        Called once in every optimizer step, before the gradients are clipped.
        """
        self.stop_if_raised(step)
        self._skipped = self._skipped + 1 if self._accelerator.optimizer_step_was_skipped else 0
        if self._skipped >= SKIPPED_LIMIT:
            raise ValueError(
                f"Step {step}: the gradients of the last {self._skipped} steps overflowed in float16 and nothing was "
                "trained: use bf16 instead of fp16, or lower learning_rate."
            )


def not_finite_error(model: str, step: int) -> ValueError:
    """Return the error that says which model's logits are not finite, in which optimizer step, and what to check."""
    return ValueError(f"Step {step}: the {model}'s logits are not finite (NaN or infinite): {_ADVICE[model]}.")


@contextmanager
def name_student_in_sampling_error(step: int):
    """Raise `ValueError` where sampling fails because the student's logits are not finite."""
    try:
        yield
    except RuntimeError as error:
        # How torch.multinomial says NaN, on the CPU and on CUDA.
        if any(sign in str(error) for sign in ("probability tensor contains", "device-side assert")):
            raise not_finite_error("student", step) from error
        raise
