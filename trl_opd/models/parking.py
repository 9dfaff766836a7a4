"""Offloads the weights of a frozen model to the host while the model is not in use."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


class Parking:
    """Offloads the parameters of a frozen model to copies on the host and puts them back on the device.

    The copies are made once, because frozen weights never change. While the model is offloaded its parameters are
    empty and a forward raises `RuntimeError`, even on a CPU. Buffers stay on the device, and so do the constants of
    4-bit weights (0.13 bits per weight, 0.5 if they are not quantised themselves).

    Args:
        model (`transformers.PreTrainedModel`): A frozen model, unquantised or in 4 bits.
        stays (`Iterable[torch.Tensor]`): Parameters that are never offloaded.

    Raises:
        `ValueError`: if the model is in 8 bits, whose state cannot be moved, or was offloaded by a `device_map`.
    """

    def __init__(self, model: PreTrainedModel, stays: Iterable[torch.Tensor]):
        kept = {id(tensor) for tensor in stays}
        offloaded = any(parameter.device.type == "meta" for parameter in model.parameters())
        if offloaded or getattr(model, "is_loaded_in_8bit", False):
            kind = "that a `device_map` has offloaded" if offloaded else "in 8 bits"
            raise ValueError(
                f"A teacher {kind} cannot be parked, because its weights cannot be moved: set "
                "teacher_placement='resident', or load it in 4 bits or unquantised, on one device."
            )
        self._weights = [
            (parameter, _on_host(parameter.data), parameter.device)
            for parameter in model.parameters()
            if id(parameter) not in kept
        ]
        self._away = False
        self._held = False
        # Every forward starts at the embeddings. Without this check quantised kernels would read past the empty
        # weights, because they take the number of bytes from the layer's shape.
        model.get_input_embeddings().register_forward_pre_hook(self._require_here)

    @contextmanager
    def on_device(self):
        """Keep the weights on their device inside this block; the outermost block offloads them at its end."""
        held = self._held
        self._held = True
        try:
            if self._away:
                # An out-of-memory error may leave some weights on the device, so they count as there from now on.
                self._away = False
                for parameter, host, device in self._weights:
                    parameter.data = host.to(device, non_blocking=True)
            yield
        finally:
            self._held = held
            if not held:
                self.offload()

    def offload(self) -> None:
        """Free the device memory of the weights."""
        for parameter, host, device in self._weights:
            parameter.data = torch.empty(0, dtype=host.dtype, device=device)
        self._away = True

    def _require_here(self, *_) -> None:
        if self._away:
            raise RuntimeError(
                "The teacher is parked: its weights are not on its device, so it cannot run a forward. Run it inside "
                "`with parking.on_device():`, or set teacher_placement='resident'."
            )


def _on_host(weight: torch.Tensor) -> torch.Tensor:
    if weight.device.type == "cpu":
        return weight
    return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)
