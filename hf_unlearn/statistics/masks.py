"""Which positions of a batch count, for the inputs and outputs of its layers.

Shapes: B rows, T positions (of the decoder if there are two stacks), S positions of the encoder, N unmasked positions,
F features, G blocks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.forward import decoder_mask
from hf_unlearn.models.layers import BlockRows


class PositionMasks:
    """The masks of the current batch; of an encoder-decoder one for each stack.

    Attributes:
        current_BT: The mask of the stack that runs now: the encoder's while the encoder runs, else the decoder's (or
            that of the only stack). None if all positions count.
        encoder_BS: The mask of the encoder's positions, of an encoder-decoder only.
    """

    def __init__(self, model: nn.Module):
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.current_BT: Tensor | None = None
        self.encoder_BS: Tensor | None = None
        self._model = model
        self._decoder_BT: Tensor | None = None
        self._encoded: Tensor | None = None  # what the encoder returned

    def start_batch(self, inputs: Mapping[str, Tensor]) -> None:
        """Read the masks of a batch."""
        mask = inputs.get("attention_mask")
        self.current_BT = mask.bool() if mask is not None and mask.ndim == 2 else None
        self._encoded = None
        if self.encoder_decoder:
            self.encoder_BS, self.current_BT = self.current_BT, decoder_mask(inputs)

    def of_input(self, tensor: Tensor) -> Tensor | None:
        """Return the mask of a layer's input: cross-attention reads the encoder's output within the decoder."""
        return self.encoder_BS if tensor is self._encoded else self.current_BT

    @contextmanager
    def following_encoder(self) -> Iterator[None]:
        """Switch `current_BT` to the encoder's mask while the encoder runs, within a `with` block."""
        if not self.encoder_decoder:
            yield
            return

        def enter(*hook_arguments: object) -> None:
            self._decoder_BT, self.current_BT = self.current_BT, self.encoder_BS

        def leave(module: nn.Module, args: object, output: Any) -> None:
            self._encoded, self.current_BT = output[0], self._decoder_BT

        model: Any = without_wrapper(self._model)
        handles = [model.get_encoder().register_forward_pre_hook(enter)]
        handles.append(model.get_encoder().register_forward_hook(leave))
        try:
            yield
        finally:
            self._encoded = None
            for handle in handles:
                handle.remove()


def unmasked_rows(tensor: Tensor, mask: Tensor | None, blocks: int = 1) -> Tensor:
    """Return the rows of a layer's input or output that count: `[B, T, F]`, `[B * T, F]` or `[B, F] -> [N, F]`.

    Of several blocks: `[..., G, F] -> [G, N, F]`.
    """
    row_shape = tensor.shape[-1:] if blocks == 1 else tensor.shape[-2:]
    leading = tensor.shape[: tensor.ndim - len(row_shape)]
    if mask is not None and leading == mask.shape:
        rows = tensor[mask]
    elif mask is not None and len(leading) == 1 and leading[0] == mask.numel() and mask.shape[1] > 1:
        rows = tensor[mask.flatten()]
    else:
        rows = tensor.reshape(-1, *row_shape)
    return rows if blocks == 1 else rows.transpose(0, 1)


def unmasked_block_rows(blocks: BlockRows, mask: Tensor | None) -> list[Tensor]:
    """Return the rows of each block that count, for blocks that each read positions of their own (experts)."""
    if mask is None or mask.shape[1] == 1:
        return [rows_NI for rows_NI, _ in blocks]
    mask_N = mask.flatten()
    return [rows_NI[mask_N[positions_N]] for rows_NI, positions_N in blocks]


def expanded_indices(indices: Tensor, batch_size: int) -> Tensor:
    """Repeat indices that stand for all rows of the batch (`[1, T, 1]` or `[T, 1]`, of positions) for each row."""
    if indices.ndim == 2 or len(indices) == 1:
        return indices.expand(batch_size, *indices.shape[-2:])
    return indices
