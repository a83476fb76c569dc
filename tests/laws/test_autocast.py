"""Losses that read the original model inside autocast: its low-precision weight copies must not leak."""

import torch

from helpers.tiny import text_rows, tiny_llama
from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.losses import build_loss


def _loss_and_gradient(autocast: bool, clear: bool = True) -> tuple[float, float]:
    """`next_best` after a move away from the original weights, and the norm of its gradient."""
    model = tiny_llama().eval()
    constrainer = StepConstrainer(model, None, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    batch = {"forget": {k: v for k, v in PaddingCollator()(text_rows(4)).items()}}
    batch["forget"]["labels"] = batch["forget"]["input_ids"].clone()
    clear_cache = torch.clear_autocast_cache
    if not clear:
        torch.clear_autocast_cache = lambda: None
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = build_loss("next_best")(model, batch, constrainer.original)
        if loss.requires_grad:
            loss.backward()
    finally:
        torch.clear_autocast_cache = clear_cache
    gradients = [p.grad for n, p in model.named_parameters() if p.grad is not None and "proj" in n]
    return loss.item(), float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def test_original_model_under_autocast_gives_the_same_loss_and_gradient() -> None:
    exact, half = _loss_and_gradient(False), _loss_and_gradient(True)
    assert abs(half[0] - exact[0]) < 0.05 * abs(exact[0])
    assert abs(half[1] - exact[1]) < 0.2 * exact[1]


def test_without_clearing_the_cache_it_does_not() -> None:
    exact, stale = _loss_and_gradient(False), _loss_and_gradient(True, clear=False)
    assert abs(stale[1] - exact[1]) > 0.2 * exact[1]
