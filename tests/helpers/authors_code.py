"""Runs the PGU authors' `unlearn.py` as it is, on given rows and weights; a program of its own, for it shadows modules.

    python tests/authors.py FOLDER_OF_THEIR_CODE WORK

`WORK` holds `unlearn.yaml`, `learned.yaml`, `full.safetensors`, `forget.safetensors` (`images [N, 3, 32, 32]` and
`labels`) and `weights.safetensors`, and gets `svd.safetensors` (`full|retain.LAYER.U|S`, `projection.LAYER`) and the
weights after each epoch, `epoch_N.safetensors`. Their data sets, torchvision and easydict are replaced by stand-ins,
and `.cuda()` does nothing; no line of their code is touched.
"""

import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Attributes(dict):
    """A dict whose items are attributes, like easydict's."""

    def __init__(self, content: Any = (), **more: Any) -> None:
        super().__init__()
        for key, value in dict(content, **more).items():
            self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, with_attributes(value))

    def __getattr__(self, key: str) -> Any:
        if key not in self:
            raise AttributeError(key)
        return self[key]

    __setattr__ = __setitem__


def with_attributes(value: Any) -> Any:
    if isinstance(value, list):
        return [with_attributes(item) for item in value]
    return Attributes(value) if isinstance(value, dict) else value


class Rows(torch.utils.data.Dataset):
    """Their data set classes' part of the rows in a file: `full`, `forget` or `retain`; held-out labels are wrong."""

    def __init__(self, root: str, data_section: str = "full", data_set: str = "train", **ignored: Any) -> None:
        sections = {name: load_file(Path(root) / f"{name}.safetensors") for name in ("full", "forget")}
        content = sections["forget" if data_section == "forget" else "full"]
        self.images, self.labels = content["images"], content["labels"].tolist()
        if data_set == "val":  # never above the forget rows' accuracy, or they would stop
            self.images, self.labels = self.images[:20], [(label + 5) % 10 for label in self.labels[:20]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def create_feature_extractor(model: nn.Module, nodes: dict[str, str]) -> Any:
    """`images -> {name: output of that module}`, by hooks; torchvision traces the model instead."""

    def extract(images: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(node).register_forward_hook(
                lambda module, args, output, name=name: found.__setitem__(name, output.clone())
            )
            for node, name in nodes.items()
        ]
        model(images)
        for handle in handles:
            handle.remove()
        return found

    return extract


def stand_in(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def install(code: Path) -> None:
    """Make their modules importable in this process, in which `datasets` is then not Hugging Face's."""
    names = ("Compose", "Resize", "RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize")
    stand_in("easydict", EasyDict=Attributes)
    stand_in("datasets", Rows=Rows)
    stand_in("torchvision")
    stand_in("torchvision.transforms", **{name: lambda *args, **kwargs: None for name in names})
    stand_in("torchvision.models", resnet18=None, resnet50=None)
    stand_in("torchvision.models.resnet", BasicBlock=nn.Module, ResNet=nn.Module)
    stand_in("torchvision.models.feature_extraction", create_feature_extractor=create_feature_extractor)
    sys.path.insert(0, str(code))
    nn.Module.cuda = lambda self, *args: self  # type: ignore[method-assign, assignment]
    plain = torch.utils.data.DataLoader.__init__
    torch.utils.data.DataLoader.__init__ = (  # type: ignore[method-assign]
        lambda self, *args, num_workers=0, **kwargs: plain(self, *args, **kwargs)
    )


def main(code: Path, work: Path) -> None:
    install(code)
    os.chdir(work)
    for folder in ("learned", "forget"):  # the original; and the retrained model, which is looked at and not used
        Path(folder, "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save({"model": load_file("weights.safetensors")}, f"{folder}/checkpoints/ckp.pth")
    retrained = Path("exp/learned/allcnn_cifar10/forget_0-1_1classes/checkpoints")
    retrained.mkdir(parents=True, exist_ok=True)
    os.replace("forget/checkpoints/ckp.pth", retrained / "ckp.pth")
    Path("learned.yaml").rename("learned/config.yaml")
    sys.argv = [str(code / "unlearn.py"), str(work / "unlearn.yaml")]
    end = runpy.run_path(sys.argv[0])
    svd = {
        f"{kind}.{layer}.{part}": value.contiguous()
        for kind in ("full", "retain")
        for layer, parts in end[f"{kind}_svd"].items()
        for part, value in parts.items()
    }
    save_file(svd | {f"projection.{layer}": matrix for layer, matrix in end["P"].items()}, "svd.safetensors")
    for path in sorted(Path("results/0-1_1classes/ckp").glob("ckp_*.pt")):
        state = torch.load(path, weights_only=False).get("model")
        if state is not None:
            save_file({k: v.contiguous() for k, v in state.items()}, f"epoch_{int(path.stem[4:])}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
