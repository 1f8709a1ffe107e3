"""Checkpoints to the Hub and back, against a stand-in on the loopback that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer, pico
from helpers import clla
from hub_server import Fault, Hub, serving

from clla.checkpoint.checksums import check_files, write_checksums
from clla.checkpoint.load import load_checkpoint
from clla.errors import CllaError, UsageError
from clla.hub.revision import beside, plain_name, split_revision
from clla.publish.base_model import HubModel
from clla.publish.contents import TEXT, gather
from clla.source.model import open_source
from clla.storage.files import read_json

TINY = (
    "--calibration-tokens",
    512,
    "--sequence-length",
    64,
    "--exact-window",
    8,
    "--kv-budget",
    "3%",
    "--budget-context",
    0,
)
# Without the package: what a checkpoint brings along must do.
LOAD = """
import sys
sys.modules["clla"] = None
import torch
from transformers import AutoModelForCausalLM
found = {}
for name in sys.argv[2:]:
    repo, _, revision = name.partition("@")
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision or None, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        found[name] = model(torch.arange(100)[None]).logits
torch.save(found, sys.argv[1])
"""


@dataclass
class Run:
    """Attributes: exit_code; stdout; stderr."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return " ".join(self.stderr.split())


class Client:
    """Commands in a process that knows the stand-in only."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self.env |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # the stand-in keeps big files as LFS does
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        worker = [sys.executable, str(Path(__file__).parents[1] / "hub_worker.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(worker, env=self.env, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, *arguments: Any, token: str | None = "hf_write") -> Run:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"arguments": [str(a) for a in arguments], "token": token}) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        assert found.pop("raised") == "None", found
        return Run(**found)

    def forget(self) -> None:
        """Empty the cache of downloads."""
        shutil.rmtree(self.home / "hub", ignore_errors=True)


def ok(run: Run) -> Run:
    assert run.exit_code == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    found = Client(hub, tmp_path_factory.mktemp("home"))
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait(timeout=30)


@pytest.fixture(autouse=True)
def clean(hub: Hub) -> Iterator[None]:
    """No faults are left over, and requests are counted from here."""
    hub.requests.clear()
    hub.uploaded.clear()
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def source(hub: Hub, pico_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`maker/pico` on the Hub: commit of the tag v1, which is the local pico, and a later main, which is not."""
    old = hub.add("maker/pico", {path.name: path.read_bytes() for path in pico_dir.iterdir()})
    hub.repos["maker/pico"].tags["v1"] = old
    later = tmp_path_factory.mktemp("later")
    pico(seed=1).save_pretrained(later)
    byte_tokenizer().save_pretrained(later)
    new = hub.add("maker/pico", {path.name: path.read_bytes() for path in later.iterdir()})
    return {"v1": old, "main": new}


@pytest.fixture(scope="module")
def from_hub(client: Client, source: dict[str, str], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`maker/pico@v1`, converted with its weights."""
    folder = tmp_path_factory.mktemp("converted") / "from-hub"
    ok(client("convert", "maker/pico@v1", "-o", folder, "--dataset", text_file, "--no-eval", *TINY))
    return folder


@pytest.fixture(scope="module")
def codec_alone(pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local pico, converted to a codec that stands on a local directory."""
    folder = tmp_path_factory.mktemp("converted") / "alone"
    done = clla("convert", pico_dir, "-o", folder, "--codec-only", "--dataset", text_file, "--no-eval", *TINY)
    assert done.exit_code == 0, done.output + done.stderr
    return folder


def logits(name: str | Path) -> torch.Tensor:
    loaded = load_checkpoint(str(name), device=torch.device("cpu"))
    with torch.no_grad():
        return loaded.model(torch.arange(100)[None]).logits


def loaded_elsewhere(client: Client, folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """Logits of checkpoints on the Hub in a process that has never seen them, nor the package."""
    client.forget()
    env = {**client.env, "HF_MODULES_CACHE": str(folder / "modules")}
    out = folder / "logits.pt"
    done = subprocess.run([sys.executable, "-c", LOAD, out, *names], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(torch.load(out))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_no_place(files: dict[str, bytes], *places: Path) -> None:
    looked_at = [name for name in files if Path(name).suffix in TEXT]
    assert {"config.json", "clla_recipe.yaml", "clla_report.json", "README.md", "tokenizer.json"} <= set(looked_at)
    for name in looked_at:
        for place in places:
            assert str(place).encode() not in files[name], name


@pytest.mark.slow
def test_models_come_back_as_they_went(
    client: Client, hub: Hub, checkpoint: Path, codec_alone: Path, from_hub: Path, source: dict[str, str],
    pico_dir: Path, text_file: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Whole; a codec whose source was local; a codec taken out of a whole checkpoint: all load elsewhere, the same."""
    before = contents(checkpoint)
    done = json.loads(ok(client("push", checkpoint, "ada/whole", "--json")).stdout)
    assert done["url"].endswith("/ada/whole") and done["commit"] == hub.repos["ada/whole"].branches["main"]
    assert contents(checkpoint) == before
    given = ("--base-model", "maker/pico@v1")
    ok(client("push", codec_alone, "ada/alone", *given))
    ok(client("push", from_hub, "ada/taken", "--codec-only"))
    pushed = {name: hub.files(f"ada/{name}") for name in ("whole", "alone", "taken")}
    for files in pushed.values():
        names_no_place(files, pico_dir, text_file, text_file.parent, checkpoint.parent, codec_alone.parent)
    for name in ("alone", "taken"):
        assert not any(file.startswith("model") and file.endswith(".safetensors") for file in pushed[name])
        base = json.loads(pushed[name]["config.json"])["base_model"]
        assert (base["path"], base["hub_revision"]) == ("maker/pico", source["v1"])
        assert base["sha256"].keys() == {"config.json", "model.safetensors"}
    origin = yaml.safe_load(pushed["alone"]["clla_recipe.yaml"])["provenance"]
    assert (origin["model"], origin["revision"]) == ("maker/pico", source["v1"])
    assert yaml.safe_load(pushed["whole"]["clla_recipe.yaml"])["provenance"]["model"] == "pico-llama (local)"
    assert 'from_pretrained("ada/whole"' in pushed["whole"]["README.md"].decode()
    commit = hub.repos["ada/whole"].branches["main"]
    found = loaded_elsewhere(client, tmp_path, "ada/whole", f"ada/whole@{commit}", "ada/alone", "ada/taken")
    assert torch.equal(found["ada/whole"], logits(checkpoint))
    assert torch.equal(found[f"ada/whole@{commit}"], found["ada/whole"])
    assert torch.equal(found["ada/alone"], logits(codec_alone))
    assert torch.equal(found["ada/taken"], logits(from_hub))
    for name in ("whole", "alone", "taken"):  # what was rewritten has its new checksum
        ok(client("generate", f"ada/{name}", "--prompt", "the cold lake", "--max-new-tokens", 4))


@pytest.mark.slow
def test_dry_run_shows_all_and_asks_nobody(client: Client, hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("mine")
    run = ok(client("push", folder, "ada/x", "--dry-run", "--private", token=None))
    assert all(word in run.stdout for word in ("ada/x", "private", "model.safetensors", "notes.txt", "runs/"))
    found = json.loads(ok(client("push", folder, "ada/x", "--dry-run", "--json", token=None)).stdout)
    assert found["total_bytes"] == sum(found["files"].values())
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert set(found["left_out"]) == {"notes.txt", "runs/"} and not found["private"]
    assert hub.requests == [] and "ada/x" not in hub.repos


def test_no_place_of_this_machine_leaves(checkpoint: Path, text_file: Path, pico_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "clla_checksums.json").unlink()  # as in those of an earlier version

    def change(name: str, **values: Any) -> None:
        (folder / name).write_text(json.dumps(read_json(folder / name) | values))

    home = "/home/ada/models/secret"
    change("config.json", _name_or_path=str(pico_dir), note=f"{home}/a.json", windows="C:\\Users\\ada\\x")
    change("generation_config.json", origin=home)
    change("tokenizer_config.json", name_or_path=home, mask_token="/think/x")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{card}\nFrom {home} and {home}/a.json, tuned on {text_file}; see {folder}/x.\n")
    found = gather(folder, "ada/x", None, alone=False)
    sent = {n: held if isinstance(held, bytes) else held.read_bytes() for n, held in found.files.items()}
    names_no_place(sent, pico_dir, text_file, folder, Path("/home/ada"), Path("C:"))
    assert json.loads(sent["tokenizer_config.json"])["mask_token"] == "/think/x"
    assert yaml.safe_load(sent["clla_recipe.yaml"])["calibration"]["dataset"] == text_file.name
    assert json.loads(sent["clla_report.json"])["recipe"]["calibration"]["dataset"] == text_file.name
    (tmp_path / "there").mkdir()
    for name, data in sent.items():
        (tmp_path / "there" / name).write_bytes(data)
    assert check_files(tmp_path / "there")
    with_base = gather(folder, "ada/x", HubModel("maker/pico", "0" * 40), alone=False).files["config.json"]
    assert isinstance(with_base, bytes) and json.loads(with_base)["text_config"]["_name_or_path"] == "maker/pico"
    (folder / "LICENSE").write_text(f"as in {pico_dir}/LICENSE")
    with pytest.raises(CllaError, match="LICENSE names"):
        gather(folder, "ada/x", None, alone=False)


@pytest.mark.slow
def test_second_push_sends_no_big_file_and_branches_are_read(
    client: Client, hub: Hub, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    ok(client("push", checkpoint, "ada/again"))
    assert "ada/again" in hub.repos
    commit = hub.repos["ada/again"].branches["main"]
    hub.uploaded.clear()
    ok(client("push", checkpoint, "ada/again"))
    assert hub.uploaded == [] and hub.repos["ada/again"].branches["main"] == commit
    ok(client("push", checkpoint, "ada/again", "--revision", "half"))
    assert hub.uploaded == [] and hub.files("ada/again", "half") == hub.files("ada/again")
    again, short = "ada/again@half", ("--contexts", 32)
    ok(client("eval", again, "--num-samples", 1, "--sequence-length", 64, "--no-retrieval", *short))
    ok(client("bench", again, "--new-tokens", 2, "--repeats", 1, *short))
    training = ("--tokens", 256, "--batch-tokens", 128, "--sequence-length", 64, "--evaluations", 1, "--train", "codec")
    ok(client("heal", again, "-o", tmp_path / "healed", "--dataset", text_file, "--no-eval", *training))
    ok(client("push", tmp_path / "healed", "ada/healed"))
    files = hub.files("ada/healed")
    names_no_place(files, text_file.parent, tmp_path, client.home, checkpoint.parent)


@pytest.mark.slow
def test_broken_upload_goes_on_where_it_was(
    client: Client, hub: Hub, checkpoint: Path, codec_alone: Path, source: dict[str, str]
) -> None:
    hub.objects = {k: v for k, v in hub.objects.items() if len(v) != (checkpoint / "model.safetensors").stat().st_size}
    before = contents(checkpoint)
    hub.faults = [Fault(r"PUT /lfs/\w+/2", 400)]
    run = client("push", checkpoint, "ada/broken")
    assert run.exit_code == 1 and f"clla push {checkpoint} ada/broken" in run.said
    assert set(hub.files("ada/broken")) == {".gitattributes"} and hub.uploaded == []
    hub.faults = [Fault(r"PUT /lfs/\w+/3", 0), Fault(r"POST /api/models/ada/broken/commit", 0)]
    run = client("push", checkpoint, "ada/broken")  # a part that breaks is sent again at once, the commit is not
    assert run.exit_code == 1 and "connection broke" in run.said and f"clla push {checkpoint}" in run.said
    assert len(hub.uploaded) == 1 and set(hub.files("ada/broken")) == {".gitattributes"}
    ok(client("push", checkpoint, "ada/broken"))
    assert len(hub.uploaded) == 1 and "model.safetensors" in hub.files("ada/broken")
    assert contents(checkpoint) == before
    # Then the codec alone: weights that the config no longer speaks of would only be in the way.
    given = ("--base-model", "maker/pico@v1")
    done = json.loads(ok(client("push", codec_alone, "ada/broken", *given, "--json")).stdout)
    assert done["removed"] == ["model.safetensors"] and "model.safetensors" not in hub.files("ada/broken")


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("ada/x", None, "no Hub token"),
        ("ada/x", "hf_wrong", "does not know the token (401)"),
        ("ada/x", "hf_read", "the token may only read"),
        ("ada/x", "hf_narrow", "not allowed to (403"),
        ("ada/a--b", "hf_write", "Cannot have -- or .."),
        ("a/b/c", "hf_write", "namespace/repo_name"),
        ("bob/x", "hf_write", "namespace bob is not yours. expected: one of ada, mill, guests"),
        ("guests/x", "hf_write", "only read in the organization guests"),
    ],
)
def test_access_is_explained(
    client: Client, hub: Hub, checkpoint: Path, repo: str, token: str | None, said: str
) -> None:
    run = client("push", checkpoint, repo, token=token)
    assert run.exit_code == (2 if "--" in repo or repo.count("/") > 1 else 1)
    assert said.replace(". expected", " expected") in run.said and "remedy:" in run.said
    assert repo not in hub.repos


def test_what_is_there_is_not_overwritten(
    client: Client, hub: Hub, checkpoint: Path, pico_dir: Path, source: dict[str, str]
) -> None:
    model = {path.name: path.read_bytes() for path in pico_dir.iterdir()}
    hub.add("ada/precious", model)
    run = client("push", checkpoint, "ada/precious")
    assert run.exit_code == 1 and "'llama' model that is not converted" in run.said
    assert set(hub.files("ada/precious")) == {".gitattributes", *model}
    run = client("push", checkpoint, "ada/precious", "--private")
    assert run.exit_code == 1 and "is public" in run.said
    ok(client("push", checkpoint, "precious-too", "--private"))
    assert hub.repos["ada/precious-too"].private


def test_troubles_of_the_hub_are_explained(client: Client, hub: Hub, checkpoint: Path) -> None:
    for fault, said in (
        (Fault("whoami", 500), "the Hub is in trouble (500"),
        (Fault("whoami", 0), "the connection broke"),
        (Fault("whoami", 429), "too many requests"),
        (Fault("repos/create", 403), "not allowed to (403"),
    ):
        hub.faults = [fault]
        run = client("push", checkpoint, "ada/trouble")
        assert run.exit_code == 1 and said in run.said and "remedy:" in run.said
    assert "ada/trouble" not in hub.repos
    offline = clla("push", checkpoint, "ada/trouble")  # this process runs with HF_HUB_OFFLINE=1
    assert offline.exit_code == 1 and "HF_HUB_OFFLINE=1 forbids the network" in offline.stderr


def test_damaged_checkpoint_is_not_sent(client: Client, hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    run = client("push", folder, "ada/damaged")
    assert run.exit_code == 1 and "model.safetensors" in run.said and "checksum" in run.said
    assert "ada/damaged" not in hub.repos


def test_codec_alone_needs_its_source_on_the_hub(
    client: Client, hub: Hub, checkpoint: Path, codec_alone: Path, from_hub: Path, source: dict[str, str],
    tmp_path: Path, pico_dir: Path,
) -> None:  # fmt: skip
    run = client("push", codec_alone, "ada/no")
    assert run.exit_code == 1 and "--base-model user/repo" in run.said
    run = client("push", codec_alone, "ada/no", "--base-model", "maker/pico")  # main is another model
    assert run.exit_code == 1 and "not the model that was converted: model.safetensors differs" in run.said
    run = client("push", codec_alone, "ada/no", "--base-model", "maker/pico@v9")
    assert run.exit_code == 1 and "no revision 'v9'" in run.said and "main, v1" in run.said
    hub.add("ada/hidden", {path.name: path.read_bytes() for path in pico_dir.iterdir()}, private=True)
    run = client("push", codec_alone, "ada/no", "--base-model", "ada/hidden")
    assert run.exit_code == 1 and "not public" in run.said
    ok(client("push", codec_alone, "ada/both-hidden", "--base-model", "ada/hidden", "--private"))
    trained = tmp_path / "trained"
    shutil.copytree(from_hub, trained)
    config = read_json(trained / "config.json")
    config["clla"]["healed"] = "all"
    (trained / "config.json").write_text(json.dumps(config))
    (trained / "clla_checksums.json").unlink()
    write_checksums(trained)
    run = client("push", trained, "ada/no", "--codec-only")
    assert run.exit_code == 1 and "were trained (all)" in run.said
    ok(client("push", checkpoint, "ada/still-here", "--codec-only", "--base-model", "maker/pico@v1"))
    assert "ada/no" not in hub.repos


def test_source_that_says_what_it_is(
    client: Client, hub: Hub, source: dict[str, str], pico_dir: Path, codec_alone: Path, tmp_path: Path
) -> None:
    """A local source whose config names a Hub id: taken only if the files there are the same."""
    local, folder = tmp_path / "local", tmp_path / "alone"
    shutil.copytree(pico_dir, local)
    config = read_json(local / "config.json") | {"_name_or_path": "maker/named"}
    (local / "config.json").write_text(json.dumps(config))
    shutil.copytree(codec_alone, folder)
    converted = read_json(folder / "config.json")
    converted["base_model"]["path"] = str(local)
    converted["base_model"]["sha256"] = {
        "config.json": json_digest_of(local / "config.json"),
        "model.safetensors": converted["base_model"]["sha256"]["model.safetensors"],
    }
    (folder / "config.json").write_text(json.dumps(converted))
    (folder / "clla_checksums.json").unlink()
    write_checksums(folder)
    commit = hub.add("maker/named", {path.name: path.read_bytes() for path in local.iterdir()})
    ok(client("push", folder, "ada/named"))
    base = json.loads(hub.files("ada/named")["config.json"])["base_model"]
    assert (base["path"], base["hub_revision"]) == ("maker/named", commit)
    names_no_place(hub.files("ada/named"), local)
    hub.add("maker/named", {**hub.files("maker/named"), "model.safetensors": b"another"})
    assert "model.safetensors differs" in client("push", folder, "ada/named").said


def json_digest_of(path: Path) -> str:
    from clla.checkpoint.checksums import file_digest

    return file_digest(path)


def test_conversion_asks_for_access_first(client: Client, hub: Hub, pico_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    hub.add("ada/hidden", {path.name: path.read_bytes() for path in pico_dir.iterdir()}, private=True)
    for token, extra, said in (
        ("hf_wrong", (), "401"),
        ("hf_read", (), "may only read"),
        ("hf_write", ("--codec-only",), "--base-model"),
    ):
        run = client("convert", pico_dir, "-o", folder, *TINY, "--push-to-hub", "ada/early", *extra, token=token)
        assert run.exit_code in (1, 2) and said in run.said and "Loading" not in run.stderr
    run = client("convert", "ada/hidden", "-o", folder, *TINY, "--push-to-hub", "ada/early", "--codec-only")
    assert run.exit_code == 1 and "ada/hidden is not public" in run.said
    assert not folder.exists() and "ada/early" not in hub.repos


def test_conversion_survives_a_failing_upload(
    client: Client, hub: Hub, source: dict[str, str], text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "late"
    hub.faults = [Fault(r"ada/late/commit", 500)]
    options = ("--dataset", text_file, "--no-eval", "--codec-only", *TINY, "--push-to-hub", "ada/late", "--json")
    run = client("convert", "maker/pico", "-o", folder, *options)
    assert run.exit_code == 1 and f"clla push {folder} ada/late" in run.said and "500" in run.said
    found = json.loads(run.stdout)
    assert found["pushed_to"] is None and found["plan"]["groups"] and "500" in found["push_failed"]["error"]
    assert check_files(folder)
    ok(client("push", folder, "ada/late"))
    base = json.loads(hub.files("ada/late")["config.json"])["base_model"]
    assert base["hub_revision"] == source["main"]


def test_revisions(client: Client, from_hub: Path, source: dict[str, str], tmp_path: Path) -> None:
    provenance = yaml.safe_load((from_hub / "clla_recipe.yaml").read_text())["provenance"]
    assert (provenance["model"], provenance["revision"]) == ("maker/pico", source["v1"])
    run = client("convert", "maker/pico@v9", "-o", tmp_path / "none")
    assert run.exit_code == 1 and "maker/pico has no revision 'v9'" in run.said and "main, v1" in run.said
    run = client("convert", "maker/pico@", "-o", tmp_path / "none")
    assert run.exit_code == 2 and "names no revision" in run.said
    run = client("generate", "maker/pico@v1", "--prompt", "a")
    assert run.exit_code == 1 and "not converted" in run.said
    run = client("eval", "maker/nothing")
    assert run.exit_code == 1 and "no such repository" in run.said


def test_names_with_an_at(tmp_path: Path, pico_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_revision("user/repo@refs/pr/1") == ("user/repo", "refs/pr/1")
    assert split_revision("user/repo") == ("user/repo", None)
    with pytest.raises(UsageError, match="names no model"):
        split_revision("@main")
    shutil.copytree(pico_dir, tmp_path / "user" / "repo@main")
    monkeypatch.chdir(tmp_path)
    assert split_revision("user/repo@main") == ("user/repo@main", None)
    assert plain_name("user/repo@main") == "repo@main" and plain_name("other/repo@main") == "repo"
    assert beside("other/repo@main", "-healed") == Path("repo-healed").resolve()
    assert beside("user", "-report.html") == Path("user-report.html").resolve()
    assert open_source("user/repo@main").commit is None
