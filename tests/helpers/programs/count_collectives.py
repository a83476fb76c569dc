"""What each process of `test_communication.py` runs: constrained steps of sharded weights, collectives counted."""

import faulthandler
import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import SGD

from helpers.tiny import collate, tiny_gpt2, tiny_llama
from helpers.training import FORGET, RETAIN
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.processes import leave
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics

CASES = {
    "linear, right": (tiny_llama, EnergyConstraint(0.9)),
    "linear, both": (tiny_llama, KroneckerConstraint()),
    "conv1d, right": (tiny_gpt2, EnergyConstraint(0.9)),
    "conv1d, both": (tiny_gpt2, KroneckerConstraint()),
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for name, (make, constraint) in CASES.items():
        model = make()
        statistics = collect_statistics(model, RETAIN, fisher=True, progress=False)
        freeze_unprotected(model, statistics.layers)
        constrainer = StepConstrainer(model, statistics, constraint)
        fully_shard(model, mesh=mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = SGD(trained, lr=0.1)
        constrainer.attach(optimizer)
        model(**collate(FORGET)).loss.backward()
        with CommDebugMode() as counter:
            optimizer.step()
        counts = {str(kind): count for kind, count in counter.get_comm_counts().items()}
        found[name] = {"weights": len(trained), "total": counter.get_total_counts(), "counts": counts}
    if dist.get_rank() == 0:
        (folder / "counted.json").write_text(json.dumps(found))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)
    main(Path(sys.argv[1]))
    leave()
