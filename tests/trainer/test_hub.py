"""Laws of the trainer on the Hub: it makes no request until it is asked to publish, and then publishes the finished
model in the same way as the other commands; Trainer's own behaviour, the negative control, breaks each law."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.finished_folders import IDS, finished, push
from helpers.hub_client import LOAD, TOKEN, Client, Failed
from helpers.hub_server import Fault, Hub, loopback_hub
from helpers.paths import ROOT
from helpers.tiny import requires_asset, tiny_gpt2
from hf_unlearn.errors import SettingsError
from hf_unlearn.trainer.config import UnlearningConfig

START = """
from pathlib import Path
from hf_unlearn import UnlearningConfig, UnlearningTrainer
from helpers.tiny import text_rows, tiny_gpt2
settings = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 2, "seed": 0,
            "hub_token": token, **settings}
args = UnlearningConfig(folder, **settings)
model = tiny_gpt2()
trainer = UnlearningTrainer(model, args, text_rows(4, seed=2), text_rows(2, seed=1, lengths=(4, 3), prompt=1))
"""
LOGITS = """
import torch
with torch.no_grad():
    result = model.eval()(torch.tensor(ids)).logits.tolist()
"""


def start(client: Client, folder: Path, then: str = "", **settings: Any) -> Any:
    return client.run(START + then, folder=str(folder), settings=settings, token=TOKEN, ids=IDS)


def test_no_request_is_made_before_the_first_push(hub: Hub, client: Client, tmp_path: Path) -> None:
    saving = {"push_to_hub": True, "hub_model_id": "me/model", "save_strategy": "steps", "save_steps": 1}
    start(client, tmp_path / "run", "trainer.train()", **saving)
    assert not hub.requests and len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    # negative control: Trainer's own constructor creates the repository, and its checkpoints are published
    stock = """
from transformers import Trainer
Trainer.init_hf_repo(trainer)
args.hub_strategy = "every_save"
Trainer._push_from_checkpoint(trainer, str(Path(folder) / "checkpoint-1"))
trainer._finish_current_push()
"""
    start(client, tmp_path / "run", stock, **saving)
    assert "training_args.bin" in hub.files("me/model") and TOKEN.encode() in hub.everything_published()


def test_pushing_publishes_the_finished_model_with_its_card(hub: Hub, client: Client, tmp_path: Path) -> None:
    push = "trainer.train(); trainer.push_to_hub('forget'); trainer.push_to_hub('again')"
    got = start(client, tmp_path / "run", push + LOGITS, hub_model_id="me/model", hub_private_repo=True)
    assert hub.repositories["me/model"].private
    files = hub.files("me/model")
    assert set(files) >= {"model.safetensors", "config.json", "README.md", "unlearning_report.json"}
    assert not {name for name in files if "training_args" in name}
    assert (tmp_path / "run/hub/_private/training_args.json").is_file()
    assert client.run(LOAD, repo="me/model", ids=IDS) == got
    card = hub.content(files["README.md"]).decode()
    assert "No retrained model was available" in card and "Metrics: not measured" in card and "ce_u" in card
    report = json.loads(hub.content(files["unlearning_report.json"]))
    assert report["request"]["rows"] == 4 and report["method"]["steps"] == 2 and report["method"]["retained"]
    assert TOKEN.encode() not in hub.everything_published() + hub.everything_received()


def test_a_report_with_metrics_is_completed_from_the_run(hub: Hub, client: Client, tmp_path: Path) -> None:
    measured = """
from hf_unlearn import evaluate_unlearning
trainer.train()
report = evaluate_unlearning(model, {"forget": text_rows(4, seed=2)}, original=trainer.original_model)
trainer.push_to_hub(report=report)
"""
    start(client, tmp_path / "run", measured)
    card = hub.content(hub.files("me/run")["README.md"]).decode()
    assert "| answer\\_probability" in card or "answer_probability" in card
    assert "plots/metrics.png" in card and "plots/metrics.png" in hub.files("me/run")
    assert "| steps | 2 |" in card


def test_the_report_names_the_base_model_and_the_commit_that_were_loaded(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    commit = push(client, finished(tmp_path / "base"), "me/pinned")
    loaded = (
        "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained('me/pinned')\n"
    )
    code = START.replace("model = tiny_gpt2()\n", loaded) + "result = trainer.report().method"
    method = client.run(code, folder=str(tmp_path / "run"), settings={}, token=TOKEN)
    assert (method["base_model"], method["base_model_revision"]) == ("me/pinned", commit)
    assert not method["base_model_is_local"] and method["task"] == "text-generation"
    method = client.run(
        code.replace("'me/pinned'", repr(str(tmp_path / "base"))),
        folder=str(tmp_path / "run"),
        settings={},
        token=TOKEN,
    )
    assert method["base_model_is_local"] and str(tmp_path) not in json.dumps(method)
    push(client, finished(tmp_path / "newer", tiny_gpt2(seed=1)), "me/pinned", update=True)
    method = client.run(code, folder=str(tmp_path / "run"), settings={}, token=TOKEN)
    assert method["base_model_revision"] is None, "with two commits in the cache it is unknown which one was loaded"
    named = {"base_model": "me/named@" + "ab" * 20}
    method = client.run(code, folder=str(tmp_path / "run"), settings=named, token=TOKEN)
    assert (method["base_model"], method["base_model_revision"]) == ("me/named", "ab" * 20)


def test_a_failed_push_names_the_folder_that_resumes(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/", 500))
    with pytest.raises(Failed, match=r"PushError.*hf-unlearn push \S*/run/hub me/model") as caught:
        start(client, tmp_path / "run", "trainer.train(); trainer.push_to_hub()", hub_model_id="me/model")
    assert TOKEN not in caught.value.traceback
    hub.faults.clear()
    command = "from hf_unlearn.cli import main\nresult = main(['push', folder, 'me/model'])"
    assert client.run(command, folder=str(tmp_path / "run/hub")) == 0
    assert "model.safetensors" in hub.files("me/model")


def test_unfinished_weights_are_published_only_with_two_settings(hub: Hub, client: Client, tmp_path: Path) -> None:
    saving = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save"}
    with pytest.raises(SettingsError, match="push_unfinished"):
        UnlearningConfig(str(tmp_path), use_cpu=True, **saving)
    with pytest.raises(SettingsError, match="optimizer states"):
        UnlearningConfig(str(tmp_path), use_cpu=True, hub_strategy="checkpoint", push_unfinished=True)
    assert UnlearningConfig(str(tmp_path), use_cpu=True).hub_strategy == "end"
    start(client, tmp_path / "run", "trainer.train(); trainer.push_to_hub()", push_unfinished=True, **saving)
    commits = list(hub.repositories["me/run"].commits.values())
    weights = {tree["model.safetensors"].sha256 for tree in commits if "model.safetensors" in tree}
    assert len(weights) == 2, "one commit per step; the last one has the finished weights"
    for tree in commits:
        assert not {name for name in tree if "optimizer" in name or "training_args" in name}
    assert TOKEN.encode() not in hub.everything_published()


def test_an_existing_card_is_not_overwritten(hub: Hub, client: Client, tmp_path: Path) -> None:
    start(client, tmp_path / "new", "trainer.create_model_card(tags=['x'])")
    assert "machine-unlearning" in (tmp_path / "new/README.md").read_text()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/README.md").write_text("Mine.")
    start(client, tmp_path / "old", "trainer.create_model_card()")
    assert (tmp_path / "old/README.md").read_text() == "Mine."


def test_an_error_in_a_template_is_reported_before_the_run(tmp_path: Path) -> None:
    own = tmp_path / "own.md"
    own.write_text("---\n{{ card_data }}\n---\n{{ who_knows }}")
    with pytest.raises(SettingsError, match="who_knows"):
        UnlearningConfig(str(tmp_path), use_cpu=True, card_template=str(own))


def test_a_run_publishes_an_adapter_with_the_name_of_its_base_model(hub: Hub, client: Client, tmp_path: Path) -> None:
    """`hf-unlearn run --push_to_hub True` with a LoRA adapter of a model in a local folder."""
    model, data = requires_asset("stories260K"), tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"Item {i} is", "completion": f" number {i * i}."} for i in range(10)]
    (data / "full.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    argv = [
        "run",
        "--model_name_or_path",
        str(model),
        "--dataset_name",
        str(data),
        "--train",
        "full",
        "--forget",
        "full[0:3]",
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
        "--cache_dir",
        str(tmp_path / "c"),
        "--use_cpu",
        "True",
        "--disable_tqdm",
        "True",
        "--use_peft",
        "True",
        "--base_model",
        "me/base@" + "ab" * 20,
        "--push_to_hub",
        "True",
        "--hub_model_id",
        "me/adapter",
    ]
    client.run("from hf_unlearn.cli import main\nassert main(argv) == 0", argv=argv)
    files = hub.files("me/adapter")
    config = json.loads(hub.content(files["adapter_config.json"]))
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "ab" * 20)
    card = hub.content(files["README.md"]).decode()
    assert "base_model_relation: adapter" in card and "base_model: me/base" in card
    for seen in (hub.everything_published(), hub.everything_received()):
        for secret in ("number 4.", "Item 1 is", str(tmp_path), str(model), TOKEN):
            assert secret.encode() not in seen, secret


@pytest.mark.slow
def test_one_of_two_processes_publishes(tmp_path: Path) -> None:
    script = START.replace("(folder", "(sys.argv[1]").replace('"hub_token": token, **settings}', "}")
    script = f"import sys\n{script}\ntrainer.train()\ncommit = trainer.push_to_hub()\n"
    script += "assert (commit is None) == (args.process_index != 0) and args.world_size == 2\n"
    (tmp_path / "push.py").write_text(script)
    with loopback_hub() as running:
        root = ROOT
        env = {
            **os.environ,
            "HF_ENDPOINT": running.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{root}:{root / 'tests'}",
        }
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*line, str(tmp_path / "push.py"), str(tmp_path / "run")],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(running.repositories["me/run"].commits) == 2, "the first commit of the Hub, and ours"
        assert {"model.safetensors", "README.md"} < set(running.files("me/run"))
