"""Every family through the commands, as a user calls them; a column each in docs/models.md."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILY_CONFIGS, OTHER_CONFIGS, byte_tokenizer, pico
from helpers import clla
from model_table import TABLE
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from clla.evaluate import figures

NAMES = [*FAMILY_CONFIGS, *OTHER_CONFIGS]
WINDOW, LENGTH = 16, 64
PROMPT = "The lake lies under a cold light, and the mill runs by it."
# What does not work for a family: words of the message, and what the table says.
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    ("heal", name): ("computes its attention in a way that healing cannot take part in", "no: own attention")
    for name in ("bloom", "falcon", "falcon-alibi", "gemma2", "gpt_oss", "mpt", "xglm")
}


@cache
def text() -> str:
    """Too short to keep anything back, so that reports measure windows as short as the calibration's sequences."""
    return "\n".join(
        f"{PROMPT} It was seen {number} times, and {number * number % 97} boats lay there." for number in range(99)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text.txt").write_text(text(), encoding="utf-8")
    (folder / "brief.txt").write_text(text()[: 3 * LENGTH], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda *_, **__: None)
        yield folder
    gc.unfreeze()


def ran(command: str, name: str, *arguments: object) -> Any:
    """What a command printed as JSON; None where it says that it does not work for this family."""
    done = clla(command, *arguments, *(() if command == "generate" else ("--json",)))
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    if (command, name) in REFUSED:
        words, verdict = REFUSED[command, name]
        assert done.exit_code == 1 and "Error:" in done.stderr and words in done.stderr, done.output + done.stderr
        TABLE.passed(name, f"clla {command}", verdict)
        return None
    assert done.exit_code == 0, done.output + done.stderr
    TABLE.passed(name, f"clla {command}")
    return done if command == "generate" else json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_commands(name: str, folder: Path) -> None:
    kind = {**FAMILY_CONFIGS, **OTHER_CONFIGS}[name][0]
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    source, out, words = folder / name / "source", folder / name / "converted", folder / "text.txt"
    pico(name).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    lengths = ["--dataset", words, "--calibration-tokens", 512, "--sequence-length", LENGTH, "--exact-window", WINDOW]
    made = ran("convert", name, source, "-o", out, *lengths, "--kv-budget", "20%", "--budget-context", 0, "--no-eval")
    ran("generate", name, out, "--prompt", PROMPT, "--max-new-tokens", 2)
    window = ["--text", words, "--num-samples", 1, "--sequence-length", LENGTH]
    codes = ["--retrieval-context", 128, "--retrieval-trials", 1]
    found = ran("eval", name, out, *window, "--chunk", 32, "--contexts", 40, *codes)
    check_bytes(found, made["plan"])
    assert found["cache"]["by_context"].keys() == {"40", "64"} and found["retrieval"].keys() == {
        "source",
        "int4",
        "converted",
    }
    page = ran("report", name, out, *window, "--num-prompts", 1, "--max-new-tokens", 2)
    assert len(page["layers"]) == len([layer for group in made["plan"]["groups"] for layer in group["layers"]])
    assert len(page["samples"]) == 1 and "html" in Path(page["output"]).read_text(encoding="utf-8")
    gc.freeze()  # `clla bench` collects garbage before every pass, which takes long among all that tests import
    ran("bench", name, out, "--contexts", 40, "--new-tokens", 2, "--repeats", 1)
    steps = ["--tokens", 2 * LENGTH, "--batch-tokens", LENGTH, "--sequence-length", LENGTH, "--evaluations", 1]
    steps += ["--dataset", folder / "brief.txt", "--train", "codec", "--no-eval"]
    ran("heal", name, out, "-o", folder / name / "healed", *steps)


def check_bytes(measured: dict[str, Any], plan: dict[str, Any]) -> None:
    """The converted cache takes what is planned; the source's what its layers keep."""
    for context, row in measured["cache"]["by_context"].items():
        assert round((row["bytes_per_token"] - row["planned_bytes_per_token"]) * int(context)) == 0
        slots = min(int(context), max(0, plan["kept_window"] - 1))
        kept = plan["kept_state_bytes"] + slots * (plan["kept_slot_bytes"] or 0)
        layers = sum(len(group["layers"]) for group in plan["groups"])
        values = 2 * plan["kv"]["num_key_value_heads"] * plan["kv"]["head_dim"] * plan["kv_itemsize"]
        source = measured["source_bytes_by_context"][context]
        assert round(source * int(context)) == layers * values * int(context) + kept
