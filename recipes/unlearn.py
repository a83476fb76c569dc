"""Run one deletion request from a launcher that takes a script.

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/unlearn.py recipes/tofu.yaml
    torchrun --nproc_per_node 2 recipes/unlearn.py recipes/tofu.yaml

The flags are those of `hf-unlearn run`, which can also start the processes: `hf-unlearn run recipes/tofu.yaml
--accelerate_config ddp`. `--fine_tune_batch_size` is the batch size of all processes together; pass a multiple of their
number.
"""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["run"]
    runpy.run_module("hf_unlearn", run_name="__main__")  # python -m hf_unlearn run ...
