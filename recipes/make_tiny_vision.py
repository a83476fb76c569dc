"""Make a small untrained vision model with its image processor: a transformers folder.

    python recipes/make_tiny_vision.py vit outputs/tiny_vit_mnist --channels 1 --image_size 28
    python recipes/make_tiny_vision.py vit outputs/tiny_vit_digits --channels 1 --image_size 8
    python recipes/make_tiny_vision.py resnet outputs/tiny_resnet --channels 3 --image_size 32

The same arguments give the same files, so fine-tuned models are reused from the cache.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)


def make_vit(size: int, channels: int, classes: int) -> PreTrainedModel:
    """Return a ViT with four blocks of width 96 on 4 x 4 patches (width 64 on 2 x 2 patches for 8-pixel images).

    It has no dropout, so that fixed-size steps use the exact gradient.
    """
    patch, width = (4, 96) if size > 8 else (2, 64)
    return ViTForImageClassification(
        ViTConfig(
            image_size=size,
            patch_size=patch,
            num_channels=channels,
            hidden_size=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=2 * width,
            num_labels=classes,
            hidden_dropout_prob=0.0,
        )
    )


def make_resnet(size: int, channels: int, classes: int) -> PreTrainedModel:
    """Return a ResNet with three stages of two basic blocks, 32 to 128 channels; the stem halves the image twice."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=channels,
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[2, 2, 2],
            layer_type="basic",
            num_labels=classes,
        )
    )


MODELS = {"vit": make_vit, "resnet": make_resnet}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image_size", type=int, default=32, help="pixels on a side")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        print(f"make_tiny_vision.py: {args.folder} is not empty; choose another folder", file=sys.stderr)
        return 2
    torch.manual_seed(args.seed)
    model = MODELS[args.kind](args.image_size, args.channels, args.classes)
    half = [0.5] * args.channels
    processor = ViTImageProcessorPil(
        size={"height": args.image_size, "width": args.image_size}, do_normalize=True, image_mean=half, image_std=half
    )
    model.save_pretrained(args.folder)
    processor.save_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
