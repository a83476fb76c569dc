"""Make the untrained tiny GPT-2 of recipes/tofu_tiny_gpt2.yaml: a transformers folder with its own tokenizer.

The tokenizer is a byte-level BPE trained on the questions and answers of TOFU. The weights are random. The same rows
and seed give the same files, so fine-tuned models are reused from the cache.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_unlearn import OutputError, SettingsError, UnlearningError, load_rows

END = "<|endoftext|>"
VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS = 2048, 256, 4, 192, 6


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with one special token, used for end of text and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def make_model(end: int, seed: int) -> GPT2LMHeadModel:
    """Return a random GPT-2 without dropout, so that it memorises and fixed-size steps use the exact gradient."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return GPT2LMHeadModel(config)


def make(dataset: str, output_dir: str, rows: str, seed: int, overwrite: bool) -> str:
    """Write tokenizer and model to `output_dir`; return a one-line summary."""
    folder = Path(output_dir)
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty; choose another folder, or pass --overwrite_output_dir")
    if not re.fullmatch(r"\d*:\d*", rows):
        raise SettingsError(f"--rows {rows!r} is malformed; write start:stop, such as 0:800")
    data = load_rows(dataset, f"full[{rows}]", "tokenizer")
    tokenizer = train_tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in data)
    if len(tokenizer) != VOCABULARY:
        raise SettingsError(
            f"{len(data)} rows give only {len(tokenizer)} of {VOCABULARY} tokens; take more with --rows"
        )
    model = make_model(tokenizer.eos_token_id, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{model.num_parameters():,} random parameters, {len(tokenizer)} tokens from {len(data)} rows: {output_dir}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", help="folder that holds full.json of TOFU, or the Hub id of the data set")
    parser.add_argument("output_dir", help="folder to write model and tokenizer to")
    parser.add_argument("--rows", default="0:800", help="rows of full that the tokenizer learns from (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (%(default)s)")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace what is in the output folder")
    args = parser.parse_args()
    try:
        print(make(args.dataset, args.output_dir, args.rows, args.seed, args.overwrite_output_dir))
    except UnlearningError as error:
        print(f"make_tiny_gpt2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
