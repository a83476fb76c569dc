"""Tiny models and rows that the tests share: seeded, quick, and far enough from initialisation to be interesting.

A freshly initialised transformer predicts almost uniformly: nothing that it could lose is there to be seen; `sharpen`
scales its matrices up until the logits differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.paths import ASSETS

VOCABULARY = 29
CLASSES = 5
Row = dict[str, Any]


def requires_asset(name: str) -> Path:
    """Path of a real model or data set (`stories260K`, `tofu`, `tofu/full.json`); skips the test without it."""
    path = ASSETS / name
    if not path.exists():
        pytest.skip(f"asset {name!r} is missing in {ASSETS}; set HF_UNLEARN_ASSETS to the folder that has it")
    return path


def sharpen(model: nn.Module, scale: float = 4.0) -> nn.Module:
    """Multiply every matrix by `scale`, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.eval()


def tiny_gpt2(seed: int = 0, *, layers: int = 2, width: int = 32, dropout: float = 0.0) -> Any:
    """GPT-2: Conv1D layers, tied embeddings, learnt positions; 4 linear layers per block, each with its own Gram."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        **rates,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return sharpen(GPT2LMHeadModel(config))


def tiny_llama(seed: int = 0, *, layers: int = 2, width: int = 32, dropout: float = 0.0, tied: bool = False) -> Any:
    """Llama with grouped-query attention: 7 linear layers and 4 Grams per block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return sharpen(LlamaForCausalLM(config))


def tiny_bert(seed: int = 0, *, width: int = 16) -> Any:
    """BERT sequence classifier: pads and masks, pooler and classifier see one row for each text."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return sharpen(BertForSequenceClassification(config))


def tiny_vit(seed: int = 0, *, width: int = 16) -> Any:
    """ViT image classifier: 8 x 8 images of one channel in patches of 4 x 4; its patch embedding is a Conv2d."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return sharpen(ViTForImageClassification(config))


class MLP(nn.Module):
    """Plain torch classifier without a config: `pixel_values [B, inputs] -> logits [B, CLASSES]`."""

    def __init__(self, inputs: int = 6, width: int = 8, bias: bool = True):
        super().__init__()
        self.first = nn.Linear(inputs, width, bias=bias)
        self.second = nn.Linear(width, CLASSES, bias=bias)

    def forward(self, pixel_values: torch.Tensor, **ignored: Any) -> torch.Tensor:
        return self.second(torch.tanh(self.first(pixel_values)))


def tiny_mlp(seed: int = 0, *, inputs: int = 6, width: int = 8, bias: bool = True) -> MLP:
    torch.manual_seed(seed)
    return MLP(inputs, width, bias).eval()


def text_rows(
    n: int, seed: int = 0, *, lengths: Sequence[int] = (7, 4, 9, 6), prompt: int = 2, labels: bool = True
) -> list[Row]:
    """`n` tokenised rows of varying length; the first `prompt` labels are -100. Tokens are never 0, the padding."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = []
    for index in range(n):
        tokens = torch.randint(1, VOCABULARY, (lengths[index % len(lengths)],), generator=generator).tolist()
        row: Row = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
        rows.append(row | ({"labels": [-100] * prompt + tokens[prompt:]} if labels else {}))
    return rows


def text_class_rows(n: int, seed: int = 0) -> list[Row]:
    """`n` tokenised rows with one class label each, for `tiny_bert`."""
    rows = text_rows(n, seed, labels=False)
    return [row | {"labels": sum(row["input_ids"]) % CLASSES} for row in rows]


def image_rows(n: int, seed: int = 0) -> list[Row]:
    """`n` images `[1, 8, 8]` with a class label each, for `tiny_vit`."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return [{"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": i % CLASSES} for i in range(n)]


def vector_rows(n: int, seed: int = 0, *, inputs: int = 6) -> list[Row]:
    """`n` feature vectors with a class label each, for `tiny_mlp`."""
    generator = torch.Generator().manual_seed(3000 + seed)
    return [{"pixel_values": torch.randn(inputs, generator=generator), "labels": i % CLASSES} for i in range(n)]


def collate(rows: Sequence[Row], side: str = "right") -> dict[str, torch.Tensor]:
    """All rows as one batch, padded on `side`."""
    from hf_unlearn.data.batches import PaddingCollator

    return PaddingCollator(side=side)(rows)


# name -> (model maker, row maker): what tests are parametrised over.
CASES = {
    "gpt2": (tiny_gpt2, text_rows),
    "llama": (tiny_llama, text_rows),
    "bert": (tiny_bert, text_class_rows),
    "vit": (tiny_vit, image_rows),
    "mlp": (tiny_mlp, vector_rows),
}
