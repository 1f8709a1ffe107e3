"""Build wheel and sdist, look at what is in them, and use the wheel in an environment of its own: `make test-wheel`.

The environment sees neither this clone nor the environment that builds. The installer's cache alone is shared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent
PICO = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "</s>"])}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(sys.argv[1])
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=257, max_position_embeddings=1024, eos_token_id=256)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""
CONVERT = (
    "clla convert pico --calibration-tokens 2048 --sequence-length 256 --budget-context 512 --exact-window 16 "
    "--kv-budget 25%"
)
USE = (
    ("clla --version", 0),
    ("clla recipes ls", 0),
    ("clla convert", 2),
    ("clla convert nowhere", 1),
    (f"{CONVERT} --dry-run", 0),
    (f"{CONVERT} --no-eval", 0),
    ("clla generate pico-clla --max-new-tokens 24 --prompt 'The cache is what grows.'", 0),
)


@dataclass(frozen=True)
class Environment:
    """A virtual environment and a directory to work in, which serves as home, too."""

    folder: Path
    home: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """Of a user who has this environment alone; the rest, such as pip's settings, is kept."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "TERM", "COLUMNS"))}
        path = f"{self.folder / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
        return {**kept, "PATH": path, "HOME": str(self.home), "HF_HUB_OFFLINE": "1", "COLUMNS": "110", "TERM": "dumb"}

    def run(self, command: str | list[str]) -> subprocess.CompletedProcess[str]:
        """A command line, or a program with its arguments, in the home directory."""
        program = ["bash", "-c", command] if isinstance(command, str) else command
        return subprocess.run(
            program, cwd=self.home, env=self.variables, capture_output=True, text=True, errors="replace", check=False
        )


def build(folder: Path) -> Path:
    """Write wheel and sdist into `folder`, check them, return the wheel.

    Raises:
        SystemExit: something is missing in them, or does not belong there.
    """
    source = folder / "source"  # a clean copy: no leftovers of earlier builds get in
    tracked = _git("ls-files", "--cached", "--others", "--exclude-standard")
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, source], check=True, capture_output=True)
    wheel, sdist = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    package = {name for name in tracked if name.startswith("clla/") and (ROOT / name).is_file()}
    check_contents(wheel, sdist, package)
    return wheel


def check_contents(wheel: Path, sdist: Path, package: set[str]) -> None:
    """The wheel holds the package's files, the licence and valid metadata, and nothing else; the sdist holds as much.

    Args:
        wheel: of this version.
        sdist: of this version.
        package: files below clla/.

    Raises:
        SystemExit: it does not.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(info), validate=True)  # raises on what an index would refuse
    own = {name for name in names if ".dist-info/" not in name}
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    problems = {
        "not in the wheel": package - own,
        "only in the wheel": own - package,
        "not in the sdist": (package | {"LICENSE", "README.md", "pyproject.toml"}) - packed,
        "no licence": set() if any(name.endswith("licenses/LICENSE") for name in names) else {wheel.name},
        "another version": set() if f"-{metadata.version}-" in wheel.name else {str(metadata.version)},
    }
    found = [f"{what}: {', '.join(sorted(files))}" for what, files in problems.items() if files]
    if found:
        raise SystemExit("\n".join(found))


def install(wheel: Path, folder: Path, *, torch: str, extras: str = "", uv: str = "") -> Environment:
    """The wheel in a new virtual environment in `folder`, with torch first.

    Args:
        wheel: to install.
        folder: for the environment and the home.
        torch: what to ask the installer for.
        extras: comma-separated.
        uv: path of uv, to install in a third of the time; pip does where it is empty.
    """
    environment = Environment(folder / "venv", folder / "home")
    environment.home.mkdir()
    venv.create(environment.folder, with_pip=not uv, upgrade_deps=not uv)
    installer = [str(Path(uv).resolve())] if uv else [sys.executable, "-m", "pip"]
    asked = subprocess.run([*installer, "cache", "dir"], capture_output=True, text=True, check=True)
    python, options = str(environment.python), ["install", "-q", "--cache-dir", asked.stdout.strip()]
    program = [*installer, "pip", *options, "--python", python] if uv else [python, "-m", "pip", *options]
    for what in (torch, f"{wheel}[{extras}]" if extras else str(wheel)):
        done = environment.run([*program, what])
        if done.returncode:
            raise SystemExit(f"{what} could not be installed:\n{done.stderr}")
    return environment


def use(environment: Environment) -> None:
    """What a new user tries first, on a model made on the spot.

    Raises:
        SystemExit: an exit code is not the expected one, or the package came from somewhere else.
    """
    where = environment.run([str(environment.python), "-c", "import clla; print(clla.__file__)"])
    if not where.stdout.startswith(str(environment.folder)):
        raise SystemExit(f"the package came from {where.stdout or where.stderr}")
    made = environment.run([str(environment.python), "-c", PICO, "pico"])
    if made.returncode:
        raise SystemExit(made.stderr)
    for command, expected in USE:
        began = time.monotonic()
        done = environment.run(command)
        print(f"{time.monotonic() - began:5.1f} s  {command}", flush=True)
        if done.returncode != expected or (expected and "Traceback" in done.stderr):
            raise SystemExit(f"exit code {done.returncode} instead of {expected}\n{done.stdout}\n{done.stderr}")


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def main() -> None:
    """Build, install, use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="what to ask pip for, e.g. torch==2.13.0 for a CPU build")
    parser.add_argument("--uv", default="", help="path of uv, to install with it instead of pip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        wheel = build(Path(name))
        print(f"{time.monotonic() - began:5.1f} s  {wheel.name}: contents as they should be", flush=True)
        began = time.monotonic()
        environment = install(wheel, Path(name), torch=options.torch, uv=options.uv)
        print(f"{time.monotonic() - began:5.1f} s  installed", flush=True)
        use(environment)


if __name__ == "__main__":
    main()
