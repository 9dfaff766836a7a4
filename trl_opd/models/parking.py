"""Weights of a frozen model that leave its device while nobody needs them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


class Parking:
    """Swaps a frozen model's parameters with copies on the host, which are made once: frozen weights never change.

    While the model is away its parameters are empty and a forward is an error, on a CPU too. Buffers stay, and so do
    the constants of 4-bit weights (0.13 bits for each, 0.5 when they are not quantised themselves).

    Args:
        model (`transformers.PreTrainedModel`): A frozen model, unquantised or in 4 bits.
        stays (`Iterable[torch.Tensor]`): Parameters that stay where they are.

    Raises:
        `ValueError`: if the model is in 8 bits, whose state does not move, or offloaded.
    """

    def __init__(self, model: PreTrainedModel, stays: Iterable[torch.Tensor]):
        kept = {id(tensor) for tensor in stays}
        offloaded = any(parameter.device.type == "meta" for parameter in model.parameters())
        if offloaded or getattr(model, "is_loaded_in_8bit", False):
            kind = "that a `device_map` has offloaded" if offloaded else "in 8 bits"
            raise ValueError(
                f"A teacher {kind} cannot be parked: leave teacher_placement='resident', or load it in 4 bits or "
                "unquantised, on one device."
            )
        self._weights = [
            (parameter, _on_host(parameter.data), parameter.device)
            for parameter in model.parameters()
            if id(parameter) not in kept
        ]
        self._away, self._held = False, False
        # Every forward begins there. Quantised kernels read as many bytes as a layer's shape says, whatever is there.
        model.get_input_embeddings().register_forward_pre_hook(self._require_here)

    @contextmanager
    def on_device(self):
        """Hold the weights on their device; when this ends they leave, unless it was inside of another hold."""
        held, self._held = self._held, True
        if self._away:
            for parameter, host, device in self._weights:
                parameter.data = host.to(device, non_blocking=True)
            self._away = False
        try:
            yield
        finally:
            self._held = held
            if not held:
                self.offload()

    def offload(self) -> None:
        """Free the device."""
        for parameter, host, device in self._weights:
            parameter.data = torch.empty(0, dtype=host.dtype, device=device)
        self._away = True

    def _require_here(self, *_) -> None:
        if self._away:
            raise RuntimeError("The teacher is parked: its weights are not on its device, so it cannot run a forward.")


def _on_host(weight: torch.Tensor) -> torch.Tensor:
    if weight.device.type == "cpu":
        return weight
    return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)
