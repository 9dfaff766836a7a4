"""Stops a run when logits are not finite, with an error that names the step and the model."""

from contextlib import contextmanager

import torch
from accelerate import Accelerator

# A gradient scaler starts at 2^16 and halves at each overflow, so it may need about this many steps to find its scale.
SKIPPED_LIMIT = 10
_ADVICE = {
    "student": "lower learning_rate or max_grad_norm, use bf16 instead of fp16, and check the checkpoint",
    "teacher": "load it in bfloat16 or float32 instead of float16, and check its weights and its quantisation",
}


class FiniteGuard:
    """Two flags on the device, one per model, set by values that are not finite and read once per optimizer step.

    Args:
        accelerator (`accelerate.Accelerator`): Sums the flags over processes, so that all of them stop.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._flags = torch.zeros(len(_ADVICE), device=accelerator.device)
        self._skipped = 0

    def note(self, entropy: torch.Tensor, divergence: torch.Tensor, projected: torch.Tensor | bool = True) -> None:
        """Set the flags if values at projected positions, of any shape, are not finite; without synchronisation."""
        if isinstance(projected, torch.Tensor):
            projected = projected.to(entropy.device, non_blocking=True)
        # The entropy depends on the student only: if it is finite and the divergence is not, the teacher is at fault.
        student = (~torch.isfinite(entropy) & projected).any()
        teacher = (~torch.isfinite(divergence) & projected).any() & ~student
        self._flags += torch.stack([student, teacher]).to(self._flags)

    def stop_if_raised(self, step: int) -> None:
        """Raise `ValueError` on every process if any process met a value that is not finite in step `step`."""
        flags = self._accelerator.reduce(self._flags, reduction="sum").tolist()
        self._flags.zero_()
        for model, flag in zip(_ADVICE, flags, strict=True):
            if flag:
                raise not_finite_error(model, step)

    def end_step(self, step: int) -> None:
        """Raise `ValueError` if a value was not finite in step `step`, or fp16 has skipped ten steps in a row.

        One gradient that overflows in float16 raises nothing: the scaler skips the step and lowers its scale. Called
        once in every optimizer step, before the gradients are clipped.
        """
        self.stop_if_raised(step)
        self._skipped = self._skipped + 1 if self._accelerator.optimizer_step_was_skipped else 0
        if self._skipped >= SKIPPED_LIMIT:
            raise ValueError(
                f"Step {step}: the gradients of the last {self._skipped} steps overflowed in float16, so nothing was "
                "trained: use bf16 instead of fp16, or lower learning_rate."
            )


def not_finite_error(model: str, step: int) -> ValueError:
    """Return the error for a model (student or teacher) whose logits are not finite in an optimizer step."""
    return ValueError(f"Step {step}: the {model}'s logits are not finite (NaN or infinite): {_ADVICE[model]}.")


@contextmanager
def name_student_in_sampling_error(step: int):
    """Raise an error that says what to do if sampling fails because the student's logits are not finite.

    It is a `ValueError` that names the student, and for an assertion of CUDA, which may have other causes, a
    `RuntimeError`.
    """
    try:
        yield
    except RuntimeError as error:
        # torch.multinomial reports NaN with the first message on the CPU, and as any failed assertion on CUDA.
        message = str(error)
        if "probability tensor contains" in message:
            raise not_finite_error("student", step) from error
        if "device-side assert" in message:
            raise RuntimeError(
                f"Step {step}: a CUDA assertion failed while rollouts were sampled. The line that CUDA printed before "
                "says which one: `input[0] != 0` or `probability` means logits that are not finite (lower "
                "learning_rate, use bf16), an index out of bounds means a token id that the student cannot embed."
            ) from error
        raise
