"""Laws of publishing, against a loopback Hub (`hub_server.py`): what arrives is the local model to the bit; nothing
but the files on the list leaves; whatever fails is one error that says how to resume, and resuming ends well.

Clients run in processes of their own. The one law that Xet's storage has to itself, that a client stores large files
without the server, is checked where hf-xet takes a local folder as storage.
"""

from __future__ import annotations

import ast
import shlex
import shutil
import threading
import time
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.finished_folders import IDS, PUSH, ROWS, finished, push, report
from helpers.hub_client import LOAD, TOKEN, Client, Failed, start
from helpers.hub_server import Fault, File, Hub, loopback_hub
from helpers.tiny import collate, tiny_gpt2, tiny_llama
from hf_unlearn.core.hub import resume_command, scrub
from hf_unlearn.core.published_files import publishable
from hf_unlearn.errors import OutputError, SettingsError
from hf_unlearn.publishing.model_folder import check_public, complete_folder, push_unlearned_model
from hf_unlearn.statistics.collect import collect_statistics

SECRETS = ("The code of door seven is 55433.", "Hina Ameen was born in Karachi.")
COMMAND = """
from hf_unlearn.cli import main
result = main(argv)
"""


def logits(model: Any) -> list:
    with torch.no_grad():
        return model.eval()(collate(ROWS)["input_ids"]).logits.tolist()


# What arrives


def test_what_was_pushed_loads_to_the_bit(hub: Hub, client: Client, tmp_path: Path) -> None:
    model = tiny_gpt2()
    folder = finished(tmp_path / "model", model)
    commit = push(client, folder)
    assert hub.repositories["me/model"].refs["refs/heads/main"] == commit
    published = hub.files("me/model")
    assert {"model.safetensors", "config.json", "README.md", "unlearning_report.json"} < set(published)
    for name in publishable(folder):
        assert hub.content(published[name]) == (folder / name).read_bytes()
    assert client.run(LOAD, repo="me/model", ids=IDS) == logits(model)
    assert client.run(LOAD, repo="me/model", ids=IDS) != logits(tiny_gpt2(seed=1))
    # the same push again makes no commit
    assert push(client, folder) == commit


def test_a_sharded_model_arrives_whole(hub: Hub, client: Client, tmp_path: Path) -> None:
    model = tiny_llama()
    folder = finished(tmp_path / "model", model, max_shard_size="30KB")
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    push(client, folder)
    assert client.run(LOAD, repo="me/model", ids=IDS) == logits(model)
    shards[1].unlink()
    with pytest.raises(Failed, match=f"SettingsError.*lacks {shards[1].name}"):
        push(client, folder, "me/other")
    assert "me/other" not in hub.repositories


def test_an_adapter_arrives_with_the_name_of_its_base(hub: Hub, client: Client, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    push(client, finished(tmp_path / "base", base), "me/base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    folder = finished(tmp_path / "adapter", model)
    with pytest.raises(Failed, match=r"SettingsError.*no base model that others can load.*--base_model"):
        push(client, folder, "me/adapter")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), "me/base"))
    push(client, folder, "me/adapter")
    assert "model.safetensors" not in hub.files("me/adapter")
    code = LOAD.replace("AutoModelForCausalLM", "AutoPeftModelForCausalLM").replace("transformers", "peft")
    assert client.run(code, repo="me/adapter", ids=IDS) == logits(model)
    assert str(tmp_path).encode() not in hub.everything_published()


def test_statistics_arrive_whole_private_and_at_a_revision(hub: Hub, client: Client, tmp_path: Path) -> None:
    statistics = collect_statistics(tiny_gpt2(), ROWS, fisher=True, progress=False)
    statistics.save_pretrained(tmp_path / "statistics")
    code = """
from hf_unlearn import RetainStatistics
import tempfile, os
statistics = RetainStatistics.from_pretrained(folder)
commit = statistics.push_to_hub("me/statistics", private=True).oid
loaded = RetainStatistics.from_pretrained("me/statistics", revision=commit)
same = all((loaded.gram_sums[k] == v).all() for k, v in statistics.gram_sums.items())
same = same and all((loaded.fisher_sums[k] == v).all() for k, v in statistics.fisher_sums.items())
left = [n for n in os.listdir(tempfile.gettempdir()) if n.startswith("statistics-")]
result = [bool(same), loaded.weights == statistics.weights, list(loaded.layers) == list(statistics.layers), left]
"""
    scratch = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
    assert client.run(scratch + code, folder=str(tmp_path / "statistics")) == [True, True, True, []]
    assert hub.repositories["me/statistics"].private
    assert set(hub.files("me/statistics")) == {
        ".gitattributes",
        "README.md",
        "statistics.json",
        "statistics.safetensors",
    }
    assert b"retain-statistics" in (hub.files("me/statistics")["README.md"].content or b"")
    load = "from hf_unlearn import RetainStatistics\nRetainStatistics.from_pretrained('me/statistics', token=token)"
    with pytest.raises(Failed, match=r"StatisticsError.*cannot download statistics") as caught:
        client.run(load, token="hf_NotThisOneNotThisOneNotThisOne")
    assert "NotThisOne" not in caught.value.message
    # the command pushes a folder of statistics too
    assert client.run(COMMAND, argv=["push", str(tmp_path / "statistics"), "me/again"]) == 0
    assert "statistics.safetensors" in hub.files("me/again")


def test_statistics_that_were_not_published_are_kept_where_the_error_says(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    collect_statistics(tiny_gpt2(), ROWS, progress=False).save_pretrained(tmp_path / "statistics")
    code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\nfrom hf_unlearn import RetainStatistics\n"
    code += "RetainStatistics.from_pretrained(folder).push_to_hub('me/statistics')"
    hub.faults.append(Fault("POST .*/commit/", 500))
    with pytest.raises(Failed, match="PushError") as caught:
        client.run(code, folder=str(tmp_path / "statistics"))
    hub.faults.clear()
    command = shlex.split(caught.value.message.rpartition("resume with: ")[2])
    assert Path(command[2]).is_relative_to(tmp_path) and client.run(COMMAND, argv=command[1:]) == 0
    assert "statistics.safetensors" in hub.files("me/statistics")


def test_a_branch_is_made_and_main_is_left_alone(hub: Hub, client: Client, tmp_path: Path) -> None:
    push(client, finished(tmp_path / "model"), revision="unlearned", private=True)
    assert "model.safetensors" in hub.files("me/model", "unlearned") and set(hub.files("me/model")) == {
        ".gitattributes"
    }


def test_xet_storage_gives_the_same(tmp_path: Path) -> None:
    hf_xet = pytest.importorskip("hf_xet")
    model = tiny_gpt2()
    folder = finished(tmp_path / "model", model)
    (tmp_path / "xet").mkdir()
    with loopback_hub(tmp_path / "xet") as hub:
        client = start(tmp_path, hub.url)
        try:
            hub.faults.append(Fault("GET .*/xet-write-token/", 403, "no storage for you"))
            with pytest.raises(Failed, match=r"PushError.*hf-unlearn push") as caught:
                push(client, folder)
            assert TOKEN not in caught.value.traceback
            hub.faults.clear()
            try:
                push(client, folder)
            except Failed as failed:
                if "local" in failed.message:
                    pytest.skip(f"this hf-xet takes no local folder as storage: {failed.message[:200]}")
                raise
            stored = hub.files("me/model")["model.safetensors"]
            hub.xet_hashes[stored.sha256] = hf_xet.hash_files([str(folder / "model.safetensors")])[0].hash
            assert client.run(LOAD, repo="me/model", ids=IDS) == logits(model)
        finally:
            client.kill()
    assert not hub.objects and not any(seen.path.startswith("/objects/") for seen in hub.requests)


# What leaves


def litter(folder: Path) -> list[str]:
    """Files that a run leaves next to a model and that must not be published."""
    texts = "\n".join(SECRETS)
    names = [
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "forget.jsonl",
        "train.json",
        "logs/events.out",
        ".env",
        "checkpoint-5/model.safetensors",
        "checkpoint-5/README.md",
        "_private/rows.json",
        "statistics.safetensors",
        "statistics_forget.json",
        "tokenizer_dump.txt",
        "vocab_forget.json",
        "plots/rows.csv",
        "modeling_rows.py",
        "model-notes.safetensors",
        "tokenizer/tokenizer.json",
    ]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{TOKEN}\n{texts}\n")
    return names


def test_no_row_no_token_and_no_litter_leaves(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    stray = litter(folder)
    push(client, folder, private=True)
    for seen in (hub.everything_published(), hub.everything_received(), client.log.read_bytes()):
        for secret in (*SECRETS, TOKEN, str(tmp_path)):
            assert secret.encode() not in seen, secret
    assert not set(stray) & set(hub.files("me/model"))
    # negative control: without the list the same search finds every one of them
    everything = """
from hf_unlearn.core import hub
from hf_unlearn.publishing import model_folder
from pathlib import Path
kept = model_folder.publishable, hub.refuse_tokens
model_folder.publishable = lambda folder, patterns=None: kept[0](folder, patterns) if patterns else sorted(
    p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
hub.refuse_tokens = lambda *args: None
"""
    code = f"{everything}\ntry:\n{indent(PUSH.strip(), '    ')}\nfinally:\n"
    code += "    model_folder.publishable, hub.refuse_tokens = kept"
    client.run(code, folder=str(folder), repo="me/open", options={})
    for secret in (*SECRETS, TOKEN):
        assert secret.encode() in hub.everything_published() and secret.encode() in hub.everything_received()


def test_the_files_of_every_tokenizer_are_on_the_list(tmp_path: Path) -> None:
    import transformers

    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
                continue
            if any(getattr(target, "id", "").lower() == "vocab_files_names" for target in node.targets):
                names |= {item.value for item in node.value.values if isinstance(item, ast.Constant)}
    assert len(names) > 15
    for name in names:
        (tmp_path / name).write_text("")
    assert set(publishable(tmp_path)) == names


def test_the_command_says_what_stays(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    stray = litter(folder)
    code = """
import io, contextlib
from hf_unlearn.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    main(["push", folder, "me/model"])
result = out.getvalue()
"""
    shown = client.run(code, folder=str(folder))
    assert f"published and checked ({len(publishable(folder))} files): {hub.url}/me/model/commit/" in shown
    assert f"not published ({len(stray)} files): .env, " in shown


def test_samples_are_published_only_when_allowed(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    shown = report(samples=[{"prompt": SECRETS[1], "answer": "Karachi", "after": "unsure"}])
    complete_folder(folder, shown, "model")
    with pytest.raises(Failed, match=r"SettingsError.*1 prompts of forget rows.*--publish_samples"):
        push(client, folder)
    assert not hub.requests
    hub.faults.append(Fault("POST .*/commit/", 500))
    with pytest.raises(Failed, match="PushError") as caught:
        push(client, folder, publish_samples=True)
    hub.faults.clear()
    assert client.run(COMMAND, argv=shlex.split(caught.value.message.rpartition("resume with: ")[2])[1:]) == 0
    assert SECRETS[1].encode() in hub.everything_published()


def test_own_code_goes_only_where_the_configuration_refers_to_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modeling_own.py").write_text("")
    assert publishable(tmp_path) == ["config.json"]
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_own.Own"}}')
    assert publishable(tmp_path) == ["config.json", "modeling_own.py"]


def test_a_token_in_a_file_on_the_list_is_refused(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"token": "hf_AnotherTokenAnotherTokenAnother"}')
    with pytest.raises(Failed, match=r"SettingsError.*generation_config.json holds an access token") as caught:
        push(client, folder)
    assert "AnotherToken" not in caught.value.message and not hub.requests


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda folder: (folder / "unlearning_report.json").unlink(), OutputError, "hf-unlearn run"),
        (lambda folder: (folder / "model.safetensors").unlink(), SettingsError, "no weights"),
        (lambda folder: (folder / "README.md").write_text("# Mine"), SettingsError, "card_template"),
        (lambda folder: report(entropies={}).save(folder) and rewrite(folder), SettingsError, "'texts'"),
        (shutil.rmtree, OutputError, "no folder"),
    ],
)
def test_what_is_not_fit_to_publish_is_refused_before_any_request(
    break_it: Any, error: type, message: str, tmp_path: Path
) -> None:
    folder = finished(tmp_path / "model")
    break_it(folder)
    with pytest.raises(error, match=message):
        push_unlearned_model(folder, folder, "me/model", token="hf_Nobody")


def rewrite(folder: Path) -> None:
    changed = report()
    changed.request["texts"] = list(SECRETS)
    changed.save(folder)


def test_a_request_that_names_rows_is_not_public() -> None:
    check_public(report())
    for name, value in (("rows", ["id-7"]), ("ids", [7]), ("text", "Hina"), ("source", {"id": 7})):
        changed = report()
        changed.request[name] = value
        with pytest.raises(SettingsError, match=name):
            check_public(changed)


def test_a_report_of_another_folder_takes_the_place_of_the_one_there(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    other = report()
    other.request["source"] = "another source"
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    code = PUSH.replace("(folder, folder", "(other, folder")
    client.run(code, folder=str(folder), other=str(tmp_path / "other"), repo="me/model", options={})
    for name in ("README.md", "unlearning_report.json"):
        assert b"another source" in (hub.files("me/model")[name].content or b"")


def test_a_missing_card_is_rendered_and_a_template_renders_anew(tmp_path: Path, hub: Hub, client: Client) -> None:
    folder = finished(tmp_path / "model")
    (folder / "README.md").unlink()
    push(client, folder)
    assert b"machine-unlearning" in (hub.files("me/model")["README.md"].content or b"")
    template = tmp_path / "own.md"
    template.write_text("---\n{{ card_data }}\n---\nOwn card of {{ model_name }}.")
    push(client, folder, "me/own", card_template=str(template))
    assert b"Own card of own." in (hub.files("me/own")["README.md"].content or b"")


# What fails

FAULTS = {
    "upload dropped once": (Fault("PUT /objects/", drop=True, times=1), None),
    "upload always 500": (Fault("PUT /objects/", 500), "500"),
    "commit 500": (Fault("POST .*/commit/", 500), "500"),
    "commit 429": (Fault("POST .*/commit/", 429), "429"),
    "commit 412": (Fault("POST .*/commit/", 412, "A commit has happened since"), "412.*A commit has happened"),
    "no write access": (Fault("POST ", 403, "You have no write access"), "403.*You have no write access"),
    "repository gone": (Fault("POST .*/preupload/", 404, "Repository not found"), "404"),
    "batch dropped": (Fault("POST .*/objects/batch", drop=True), "Error"),
    "no answer to the check": (Fault("GET .*/revision/[0-9a-f]{40}", 503), "503"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_is_one_error_and_its_command_resumes(name: str, hub: Hub, client: Client, tmp_path: Path) -> None:
    fault, expected = FAULTS[name]
    folder = finished(tmp_path / "my model")
    hub.faults.append(SimpleNamespace(**vars(fault)))  # type: ignore[arg-type]
    if expected is None:
        push(client, folder)
        puts = [seen.path for seen in hub.requests if seen.method == "PUT"]
        assert len(puts) == len(set(puts)) + 1, "the upload that was dropped is repeated"
    else:
        with pytest.raises(Failed, match=f"(?s)PushError.*{expected}") as caught:
            push(client, folder, private=True)
        shown = caught.value.message
        assert "\n" not in shown and str(folder) in shown
        command = shown.rpartition("resume with: ")[2]
        assert shlex.split(command) == ["hf-unlearn", "push", str(folder), "me/model", "--private"]
        for secret in (TOKEN, "X-Amz-Signature"):
            assert secret not in caught.value.traceback
        hub.faults.clear()
        assert client.run(COMMAND, argv=shlex.split(command)[1:]) == 0
    for file in publishable(folder):
        assert hub.content(hub.files("me/model")[file]) == (folder / file).read_bytes()


def test_a_wrong_token_and_a_hub_that_is_down(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    with pytest.raises(Failed, match=r"PushError.*401") as caught:
        push(client, folder, token="hf_NotThisOneNotThisOneNotThisOne")
    assert "NotThisOne" not in caught.value.traceback
    elsewhere = "import huggingface_hub.constants as c\nkept, c.ENDPOINT = c.ENDPOINT, 'http://127.0.0.1:9'\ntry:\n    "
    code = elsewhere + PUSH.strip().replace("\n", "\n    ") + "\nfinally:\n    c.ENDPOINT = kept"
    with pytest.raises(Failed, match=f"PushError.*ConnectError.*hf-unlearn push {folder}"):
        client.run(code, folder=str(folder), repo="me/model", options={})
    nobody = "import os\nkept = os.environ.pop('HF_TOKEN')\ntry:\n    " + PUSH.strip().replace("\n", "\n    ")
    with pytest.raises(Failed, match=r"PushError.*set HF_TOKEN, or run `hf auth login`"):
        client.run(
            nobody + "\nfinally:\n    os.environ['HF_TOKEN'] = kept", folder=str(folder), repo="me/model", options={}
        )
    offline = code.replace("c.ENDPOINT", "c.HF_HUB_OFFLINE").replace("'http://127.0.0.1:9'", "True")
    with pytest.raises(Failed, match=r"PushError.*OfflineModeIsEnabled"):
        client.run(offline, folder=str(folder), repo="me/model", options={})
    assert "me/model" not in hub.repositories
    push(client, folder)


def test_bad_metadata_of_a_card_is_caught_before_anything_is_sent(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nbase_model: a b c\n", 1))
    with pytest.raises(Failed, match=r"PushError.*Invalid metadata"):
        push(client, folder)
    assert not hub.objects and set(hub.files("me/model")) == {".gitattributes"}


def test_content_that_the_hub_altered_is_noticed(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model")
    for name, wrong in (("model.safetensors", File(None, "0" * 64, 5)), ("config.json", File(b"{}"))):
        hub.reset()
        hub.on_commit = lambda tree, name=name, wrong=wrong: tree.update({name: wrong})  # type: ignore[misc]
        with pytest.raises(Failed, match=f"PushError.*does not have the local content of {name}") as caught:
            push(client, folder)
        hub.on_commit = lambda tree: None
        command = shlex.split(caught.value.message.rpartition("resume with: ")[2])
        assert client.run(COMMAND, argv=command[1:]) == 0
        assert hub.content(hub.files("me/model")[name]) == (folder / name).read_bytes()


def test_a_killed_push_leaves_the_branch_as_it_was_and_resumes(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = finished(tmp_path / "model", tiny_llama(), max_shard_size="30KB")
    victim = start(tmp_path, hub.url, HF_HUB_DISABLE_XET="1")
    shards = len(list(folder.glob("model-*.safetensors")))
    slow = Fault("PUT /objects/", delay=0.3)
    hub.faults.append(slow)
    killer = threading.Thread(target=kill_after, args=(hub, victim, 2))
    killer.start()
    with pytest.raises(AssertionError, match="the client died"):
        push(victim, folder)
    killer.join()
    assert set(hub.files("me/model")) == {".gitattributes"}
    hub.faults.clear()
    time.sleep(0.5)  # what the killed process had sent is still being answered
    already = set(hub.objects)
    assert already
    hub.requests.clear()
    push(client, folder)
    sent = {seen.path[9:73] for seen in hub.requests if seen.method == "PUT"}
    assert not sent & already and len(sent) < shards + len(list(folder.glob("plots/*.png")))
    for name in publishable(folder):
        assert hub.content(hub.files("me/model")[name]) == (folder / name).read_bytes()


def kill_after(hub: Hub, client: Client, uploads: int) -> None:
    deadline = time.monotonic() + 60
    while sum(seen.method == "PUT" for seen in hub.requests) < uploads and time.monotonic() < deadline:
        time.sleep(0.01)
    client.kill()


def test_scrubbing_leaves_neither_tokens_nor_signatures() -> None:
    shown = scrub("a\nhttps://s3/x?X-Amz-Signature=1 and hf_AnotherTokenAnotherTokenAnother, mine", token="mine")
    assert shown == "a https://s3/x and ***, ***"
    assert len(scrub("x" * 1000)) == 400
    assert (
        resume_command("a b", "me/x", private=True, revision=None, update=False)
        == "hf-unlearn push 'a b' me/x --private"
    )


# A repository that is there already


def test_other_files_are_refused_unless_updated_and_old_weights_leave_the_branch(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    first = finished(tmp_path / "first", tiny_llama(), max_shard_size="30KB")
    push(client, first)
    client.run(
        "from huggingface_hub import HfApi\nfor name in ('pytorch_model.bin', 'notes.md'):\n"
        "    HfApi().upload_file(path_or_fileobj=b'old', path_in_repo=name, repo_id='me/model')"
    )
    second = finished(tmp_path / "second", tiny_llama(seed=1))
    with pytest.raises(Failed, match=r"SettingsError.*stays reachable.*new repository.*--update"):
        push(client, second)
    before = hub.repositories["me/model"].refs["refs/heads/main"]
    push(client, second, update=True)
    assert set(hub.files("me/model")) == {".gitattributes", "notes.md", *publishable(second)}
    assert client.run(LOAD, repo="me/model", ids=IDS) == logits(tiny_llama(seed=1))
    assert "model.safetensors.index.json" in hub.files("me/model", before)  # old weights are still there, as we say
    with pytest.raises(Failed, match=r"SettingsError.*is public"):
        push(client, second, private=True)


def test_purging_deletes_old_large_files_and_says_what_remains(hub: Hub, client: Client, tmp_path: Path) -> None:
    first, second = finished(tmp_path / "first"), finished(tmp_path / "second", tiny_gpt2(seed=1))
    old = push(client, first)
    weights = hub.files("me/model")["model.safetensors"]
    repository = hub.repositories["me/model"]
    repository.refs |= {"refs/tags/v1": old, "refs/pr/1": old, "refs/heads/dev": old}
    push(client, second, update=True)
    client.run("from huggingface_hub import HfApi; HfApi().super_squash_history('me/model')")
    assert weights.sha256 in hub.objects and hub.files("me/model", old)  # squashing alone deletes nothing
    code = "from hf_unlearn import purge_history\nr = purge_history('me/model')\nresult = [vars(r), str(r)]"
    fields, shown = client.run(code)
    assert weights.sha256 not in hub.objects
    assert "model.safetensors" in fields["deleted"] and fields["remaining"] == []
    assert (fields["branches"], fields["tags"], fields["pull_requests"]) == (["dev"], ["v1"], ["refs/pr/1"])
    for part in ("not erasure", "refs/pr/1", "v1", "forks, caches, mirrors"):
        assert part in shown
    assert client.run(LOAD, repo="me/model", ids=IDS) == logits(tiny_gpt2(seed=1))
    hub.faults.append(Fault("super-squash", 403, "not yours"))
    with pytest.raises(Failed, match=r"PushError.*not yours.*resume with: purge_history\('me/model'"):
        client.run(code)
