"""What a user reads when something is wrong: encodings, brackets, interrupts, memory, and values of functions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clla as command
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import clla
from clla import console
from clla.arguments import parse_size
from clla.commands.failures import InternalError, explained
from clla.errors import CllaError, UsageError, reason
from clla.source.model import open_source, settle_generation
from clla.tables import Table

SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes away from what runs behind it
sys.argv[0] = "clla"
from clla import cli, console
from clla.commands import recipes
from clla.tables import Table
SIGNS = "model Gr\\u00fc\\u00dfe \\u2013 \\u2192 \\u00d7 \\u2026 [/red] [bold]x[/bold] :smile: \\udce9"
def ls():
    with recipes.errors(True, interrupted="nothing is lost"):
        do()
"""
MAIN = "cli.app.command(name='do')(ls)\nsys.argv[1:] = ['do']\ncli.main()\n"
SHOW = """
def do():
    console.say(SIGNS)
    console.results.print(SIGNS)
    console.show(Table.of([SIGNS], [[SIGNS]], title=SIGNS))
    with console.progress(SIGNS, 1) as advance:
        advance(1)
        advance.note("[/x]")
    print(SIGNS)
"""


def ran(body: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A command of which `body` defines what it does."""
    environment = {**os.environ, "COLUMNS": "200", **variables}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + body + MAIN], env=environment, capture_output=True, check=False
    )


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252"])
def test_any_encoding_takes_all_signs(encoding: str) -> None:
    done = ran(SHOW, PYTHONIOENCODING=encoding)
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0, err
    for text in (out, err):
        assert "[/red] [bold]x[/bold] :smile:" in text and "\\udce9" in text
        assert ("– → × …" if encoding == "utf-8" else "->") in text
    assert "Grüße" in out or (encoding == "ascii" and "Gr\\xfc\\xdfe" in out)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "20"}, {"LC_ALL": "C"}])
def test_any_terminal_takes_all_signs(variables: dict[str, str]) -> None:
    done = ran(SHOW, **variables)
    assert done.returncode == 0 and b"[/red]" in done.stdout, done.stderr


def test_signs_stay_in_tables_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("heal", "generate", "eval"):
        assert "user/repo[@revision]" in " ".join(command(name, "--help").stdout.replace("│", " ").split()), name
    console.show(Table.of(["a[/b]"], [["[red]"]]))
    shown = capsys.readouterr().out
    assert "a[/b]" in shown and "[red]" in shown


INTERRUPTS = {
    "Ctrl-C": ("raise KeyboardInterrupt", 130),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT)", 130),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", 143),
}


@pytest.mark.parametrize("kind", INTERRUPTS)
def test_interrupts_say_what_they_leave(kind: str) -> None:
    line, code = INTERRUPTS[kind]
    done = ran(f"def do():\n    {line}\n    __import__('time').sleep(5)\n")
    assert done.returncode == code and done.stderr.decode().strip() == "Interrupted; nothing is lost"


def test_interrupted_conversions_say_where_the_work_is(
    pico_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    small = ["--dataset", text_file, "--calibration-tokens", 256, "--sequence-length", 64, "--no-eval"]
    monkeypatch.setattr("clla.convert.stages.make_codec", stop)
    done = command("convert", pico_dir, "-o", tmp_path / "out", *small)
    assert done.exit_code == 130 and f"kept in {tmp_path / 'out.work'}" in done.stderr and "--resume" in done.stderr
    monkeypatch.setattr("clla.convert.stages.collect", stop)
    done = command("convert", pico_dir, "-o", tmp_path / "other", *small)
    assert done.exit_code == 130 and "nothing half-written was left" in done.stderr and "--resume" not in done.stderr
    assert not list(tmp_path.glob("other*"))


def test_what_nobody_foresaw_is_told_and_kept(tmp_path: Path) -> None:
    body = "def do():\n    print('done', flush=True)\n    {}['x']\n"
    done = ran(body, TMPDIR=str(tmp_path))
    (kept,) = tmp_path.glob("clla-traceback-*")
    assert done.returncode == 1 and b"Traceback" not in done.stderr and str(kept).encode() in done.stderr
    assert b"internal error: KeyError" in done.stderr and b"transformers" in done.stderr
    assert "KeyError: 'x'" in kept.read_text()
    assert "internal error" in json.loads(done.stdout.splitlines()[-1])["error"]
    assert b"Traceback" in ran(body, TMPDIR=str(tmp_path), CLLA_TRACEBACK="1").stderr
    missing = ran("import tempfile\ntempfile.tempdir = '/no/such'\n" + body)
    assert missing.returncode == 1 and b"CLLA_TRACEBACK=1 prints the traceback" in missing.stderr


def test_a_closed_pipe_ends_in_silence() -> None:
    line = f'{sys.executable} -c "$BODY" | head -1'
    body = SCRIPT + "def do():\n    for i in range(100000): print(i)\n" + MAIN
    done = subprocess.run(["bash", "-c", line], env={**os.environ, "BODY": body}, capture_output=True, check=False)
    assert done.stdout == b"0\n" and not done.stderr


ERRORS: dict[str, tuple[Exception, str]] = {
    "memory": (MemoryError(), "out of memory"),
    "memory of torch": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory"),
    "disk": (OSError(28, "No space left on device"), "could not be written"),
    "disk by safetensors": (SafetensorError("I/O error: File too large (os error 27)"), "could not be written"),
    "safetensors": (SafetensorError("Error while deserializing header"), "file of weights"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "nested"),
    "unicode": (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "Unicode"),
    "import": (ImportError("cannot import name 'x'", name="pyarrow.lib"), "broken"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_known_errors_have_a_remedy(kind: str) -> None:
    error, word = ERRORS[kind]
    found = explained(error)
    assert word in found.got and found.expected and found.remedy and not isinstance(found, InternalError)
    assert kind != "import" or found.remedy.endswith("pyarrow")


def test_reasons_are_whole_and_one_line() -> None:
    assert reason(ValueError("first:\n  the reason\n")) == "first: the reason"
    assert reason(KeyError("x")) == "KeyError: 'x'" and reason(ValueError()) == "ValueError"


WRONG: dict[str, Callable[[str], Any]] = {
    "a model": lambda c: clla.convert_model(torch.nn.Linear(1, 1)),  # type: ignore[arg-type]
    "an empty name": lambda c: clla.convert_model(""),
    "a zero byte": lambda c: clla.convert_model("a\0b"),
    "no Unicode": lambda c: clla.convert_model("caf\udce9"),
    "a number for a path": lambda c: clla.convert_model("x", output=5),  # type: ignore[arg-type]
    "a word for a number": lambda c: clla.convert_model("x", exact_window="8"),  # type: ignore[arg-type]
    "yes for a number": lambda c: clla.convert_model("x", exact_window=True),
    "a size": lambda c: clla.convert_model("x", max_shard_size="5XB"),
    "a word for a flag": lambda c: clla.convert_model("x", heal="yes"),  # type: ignore[arg-type]
    "the text itself": lambda c: clla.evaluate_model(c, text="the text itself " * 100),
    "no windows": lambda c: clla.evaluate_model(c, num_samples=0),
    "short windows": lambda c: clla.evaluate_model(c, sequence_length=1),
    "no context": lambda c: clla.evaluate_model(c, contexts=[0]),
    "no contexts": lambda c: clla.evaluate_model(c, contexts=[]),
    "one context": lambda c: clla.evaluate_model(c, contexts=64),  # type: ignore[arg-type]
    "chunk 0": lambda c: clla.evaluate_model(c, chunk=0),
    "dtype": lambda c: clla.load_model(c, dtype="float64"),
    "device": lambda c: clla.load_model(c, device="banana"),
    "learning rate": lambda c: clla.heal_model(c, codec_lr=float("nan")),
    "tokens": lambda c: clla.heal_model(c, tokens=-1),
}


@pytest.mark.parametrize("what", WRONG)
def test_functions_refuse_wrong_values(what: str, checkpoint: Path) -> None:
    with pytest.raises(UsageError) as caught:
        WRONG[what](str(checkpoint))
    assert caught.value.got and caught.value.remedy
    assert "--" not in str(caught.value).replace("show --schema", ""), "which are the command line's"


TOLD: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (lambda: clla.convert_model("x", windows=3), "got an unexpected keyword argument 'windows'"),  # type: ignore[call-arg]
    "missing": (lambda: clla.heal_model(), "heal_model() misses the argument 'checkpoint'"),  # type: ignore[call-arg]
    "by number": (lambda: clla.extract_language_model(5, "x"), "model is 5"),  # type: ignore[arg-type]
    "too many": (lambda: clla.load_model("x", "cpu"), "unexpected positional argument after 'checkpoint'"),  # type: ignore[misc]
    "a flag": (lambda: clla.convert_model("x", evaluate="x"), "evaluate is 'x'"),  # type: ignore[arg-type]
    "a remedy": (lambda: clla.convert_model("x", heal_tokens=3), "add heal=True"),
    "a flag that is off": (lambda: clla.convert_model("x", codec_only=True, max_shard_size="5GB"), "codec_only=True"),
    "a budget": (lambda: clla.convert_model("x", kv_budget="200%"), "budget.kv_budget (kv_budget): "),
    "help": (lambda: clla.evaluate_model("x", chunk=0), "help(clla.evaluate_model) says"),
}


@pytest.mark.parametrize("what", TOLD)
def test_functions_name_their_arguments(what: str) -> None:
    call, told = TOLD[what]
    with pytest.raises(UsageError) as caught:
        call()
    assert told in str(caught.value) and "--" not in str(caught.value).replace("show --schema", "")


COMMANDS = {
    "compare x --budgets 300%": "--budgets 300% is out of range",
    "compare x --budgets 0.5B": "--budgets is '0.5B'",
    "compare x --budgets 6.25": "'6.25%' for percent",
    "eval x --chunk 0": "clla eval --help says",
    "bench --shape tiny --repeats 0": "clla bench --help says",
    "bench --shape tiny --kv-budget 300%": "--kv-budget 300% is out of range",
    "convert x --num-sinks -1": "budget.num_sinks (--num-sinks): ",
    "convert x --heal --heal-tokens 0": "heal.tokens (--heal-tokens): ",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_name_their_options(line: str) -> None:
    done = command(*line.split())
    told = " ".join(done.stderr.split())
    assert done.exit_code == 2 and COMMANDS[line] in told and "token (1)" not in told, told


def test_what_healing_cannot_do_names_the_options_of_who_asks(checkpoint: Path, pico_dir: Path, tmp_path: Path) -> None:
    asked = {
        "heal.tokens (--tokens) 40 with": ("heal", checkpoint, "--tokens", 40),
        "heal.tokens (--heal-tokens) 40 with": ("convert", pico_dir, "--heal", "--heal-tokens", 40),
    }
    for told, words in asked.items():
        done = command(*words, "-o", tmp_path / "out", "--no-eval", "--device", "cpu")
        assert done.exit_code == 2 and told in " ".join(done.stderr.split()), done.stderr
    with pytest.raises(UsageError, match=r"heal\.tokens \(tokens\) 40 with"):
        clla.heal_model(checkpoint, output=tmp_path / "out", tokens=40, evaluate=False)


def test_several_wrong_values_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        clla.evaluate_model("x", num_samples=0, chunk=-1, sequence_length=1)
    assert all(option in caught.value.got for option in ("num_samples is 0", "chunk is -1", "sequence_length is 1"))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 1572864), ("300kb", 300_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "500", "5XB", "-5GB", "GB", "0GB", "1B", "nanGB", "9" * 400 + "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--max-shard-size"):
        parse_size(text, "--max-shard-size")


@pytest.mark.parametrize("name", ["./nothere", "/data/models/nothere", "../x", "a/b/c", r"C:\models\x", "my model"])
def test_paths_that_are_not_there(name: str) -> None:
    with pytest.raises(CllaError, match="does not exist"):
        open_source(name)
    with pytest.raises(CllaError, match="does not exist"):
        clla.load_model(name)


def test_directories_that_hold_something_else(pico_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, word in (("adapter", "merge_and_unload"), ("empty", "is empty"), ("", "empty|adapter|no config")):
        with pytest.raises(CllaError, match=word):
            open_source(str(tmp_path / name))
    with pytest.raises(CllaError, match=str(pico_dir)):
        open_source(str(pico_dir.parent))
    with pytest.raises(CllaError, match="is a file"):
        open_source(str(pico_dir / "model.safetensors"))


@pytest.mark.parametrize("data", [b"", b"GGUF", b"no model at all", b"GGUF" + bytes(100)])
def test_files_that_are_no_gguf(data: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CllaError) as caught:
        open_source(str(tmp_path / "x.gguf"))
    assert "download it again" in caught.value.remedy


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles') }}", "{% for m in messages %}{{ m['role'] }", "{{ x.y.z }}"]
)
def test_chat_templates_that_fail(template: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(template)
    done = command("generate", folder, "--prompt", "hello", "--max-new-tokens", 2)
    assert done.exit_code == 1 and "chat template" in done.stderr and "--no-chat" in done.stderr
    assert command("generate", folder, "--prompt", "hello", "--max-new-tokens", 2, "--no-chat").exit_code == 0


def test_generation_configs_that_fail(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "odd")
    (folder / "clla_checksums.json").unlink()
    for settings, code in (('{"stop_strings": ["x"]}', 0), ('{"repetition_penalty": 0}', 1)):
        (folder / "generation_config.json").write_text(settings)
        done = command("generate", folder, "--prompt", "hello", "--max-new-tokens", 2)
        assert done.exit_code == code, done.stderr
    assert "generation_config.json: `penalty`" in " ".join(done.stderr.split())


def test_what_transformers_does_not_save_is_left_out(pico_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A temperature without sampling, as older models name it: found before calibration, not after it."""
    model = AutoModelForCausalLM.from_pretrained(pico_dir)
    config: Any = model.generation_config
    settle_generation(model, "it")
    assert model.generation_config is config and not capsys.readouterr().err
    config.temperature, config.eos_token_id = 0.6, 257
    settle_generation(model, "it")
    assert "generation config of it" in capsys.readouterr().err
    kept: Any = model.generation_config
    assert kept.eos_token_id == 257 and kept.temperature != 0.6
    kept.validate(strict=True)


def test_prompts_that_are_no_text(checkpoint: Path) -> None:
    for prompt in ("caf\udce9", " ", ""):
        assert command("generate", checkpoint, "--prompt", prompt).exit_code == 2


def test_names_that_are_no_text() -> None:
    """JSON and YAML could not hold them."""
    for words in (["convert", "nothing", "-o", "caf\udce9"], ["convert", "nothing", "--dataset", "\udce9.txt"]):
        done = command(*words)
        assert done.exit_code == 2 and "is no UTF-8" in done.stderr
