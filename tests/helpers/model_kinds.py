"""One tiny random model for each kind of architecture, with rows that it takes; see `test_kinds`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from helpers import tiny as cases
from helpers.tiny import CLASSES, VOCABULARY, Row, sharpen

LENGTHS = (5, 6)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **TOKENS, intermediate_size=48, max_position_embeddings=64))


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**SIZES, **TOKENS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0)
    return OPTForCausalLM(config)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, **TOKENS, **EXPERTS, intermediate_size=48, num_local_experts=4))


def qwen_moe() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **SIZES,
        **TOKENS,
        **EXPERTS,
        intermediate_size=48,
        moe_intermediate_size=40,
        num_experts=4,
        shared_expert_intermediate_size=48,
    )
    return Qwen2MoeForCausalLM(config)


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        **SIZES, **NO_DROPOUT, intermediate_size=48, max_position_embeddings=34, num_labels=CLASSES, pad_token_id=0
    )
    return RobertaForSequenceClassification(config)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config)


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


def convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_channels=1,
        patch_size=2,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_stages=2,
        num_labels=CLASSES,
        layer_scale_init_value=0.5,
        image_size=8,
    )
    return ConvNextForImageClassification(config)


def pair_rows(n: int, seed: int = 0) -> list[Row]:
    """Inputs and answers of different lengths, for encoder-decoders."""
    inputs = cases.text_rows(n, seed, lengths=(5, 6), labels=False)
    answers = cases.text_rows(n, seed + 50, lengths=(4, 3, 5), labels=False)
    return [row | {"labels": answer["input_ids"]} for row, answer in zip(inputs, answers, strict=True)]


def text_rows(n: int, seed: int = 0) -> list[Row]:
    return cases.text_rows(n, seed, lengths=LENGTHS)


def class_rows(n: int, seed: int = 0) -> list[Row]:
    rows = cases.text_rows(n, seed, lengths=LENGTHS, labels=False)
    return [row | {"labels": sum(row["input_ids"]) % CLASSES} for row in rows]


def drawn(make: Callable[[], nn.Module], scale: float = 4.0) -> Callable[[], Any]:
    """The same weights at each call; sharpened, so that there is something to see."""

    def seeded() -> Any:
        torch.manual_seed(0)
        return sharpen(make(), scale)

    return seeded


# name -> (model maker, row maker)
KINDS: dict[str, tuple[Callable[[], Any], Callable[..., list[Row]]]] = {
    "Llama": (cases.tiny_llama, text_rows),
    "GPT-2": (cases.tiny_gpt2, text_rows),
    "GPT-NeoX": (drawn(gpt_neox), text_rows),
    "OPT": (drawn(opt), text_rows),
    "Mixtral": (drawn(mixtral), text_rows),
    "Qwen-MoE": (drawn(qwen_moe), text_rows),
    "BERT": (lambda: cases.tiny_bert(width=32), class_rows),
    "RoBERTa": (drawn(roberta), class_rows),
    "T5": (drawn(t5, 2.0), pair_rows),
    "ViT": (lambda: cases.tiny_vit(width=32), cases.image_rows),
    "ResNet": (drawn(resnet, 1.5), cases.image_rows),
    "ConvNeXt": (drawn(convnext), cases.image_rows),
}
