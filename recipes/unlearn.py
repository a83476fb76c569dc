"""One deletion request, for launchers that take a script: `accelerate launch recipes/unlearn.py recipes/tofu.yaml`.

`torchrun --nproc_per_node 2 recipes/unlearn.py recipes/tofu.yaml` does the same; all flags are those of
`hf-unlearn run`, which can also launch by itself: `hf-unlearn run recipes/tofu.yaml --accelerate_config ddp`. The batch
size of a fine-tune is that of all processes together: pass `--fine_tune_batch_size`, a multiple of their number.
"""

import sys

from hf_unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
