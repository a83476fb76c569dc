"""QLoRA: a LoRA adapter on 4-bit base weights, where bitsandbytes is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from helpers.training import FORGET, RETAIN, logits, settings
from hf_unlearn.errors import ModelError
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.trainer import UnlearningTrainer

pytest.importorskip("bitsandbytes")


def four_bit(folder: Path) -> torch.nn.Module:
    """Widths are multiples of the quantisation's blocks of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, dtype=torch.float32)


@pytest.mark.parametrize("constraint", ["energy", "none"])
def test_an_adapter_on_four_bit_weights_keeps_retain_logits(constraint: str, tmp_path: Path) -> None:
    """Up to the rounding of the 4-bit kernels, hence against the original under the same kernels."""
    model = four_bit(tmp_path / "base")
    statistics = collect_statistics(model, RETAIN, progress=False)
    args = settings(tmp_path / "out", constraint=constraint, learning_rate=2e-2, optim="adamw_torch", max_steps=20)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trainer = UnlearningTrainer(model, args, FORGET, statistics=statistics, peft_config=lora)
    trainer.train()
    with trainer.original_model():
        before = logits(trainer.model, RETAIN), logits(trainer.model, FORGET)
    retain = (logits(trainer.model, RETAIN) - before[0]).abs().max().item()
    forget = (logits(trainer.model, FORGET) - before[1]).abs().max().item()
    drift = trainer.constrainer.drift().relative
    if constraint == "energy":
        assert drift < 1e-6 and retain < 5e-3 and forget > 10 * retain
    else:
        assert drift > 1e-2 and retain > 5e-2


def test_a_fisher_of_four_bit_weights_on_the_cpu_is_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the accelerator's kernels have gradients")
    model = four_bit(tmp_path)
    logits(model, RETAIN)  # packs the weights for inference, for good
    with pytest.raises(ModelError, match="no gradient flows back"):
        collect_statistics(model, RETAIN, fisher=True, progress=False)
