"""Run one deletion request from a launcher that takes a script.

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/unlearn.py recipes/tofu.yaml
    torchrun --nproc_per_node 2 recipes/unlearn.py recipes/tofu.yaml

The flags are those of `hf-unlearn run`, which can also start the processes: `hf-unlearn run recipes/tofu.yaml
--accelerate_config ddp`. `--fine_tune_batch_size` is the batch size of all processes together; pass a multiple of their
number.
"""

import sys

from hf_unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
