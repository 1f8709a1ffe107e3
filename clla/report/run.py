"""From a checkpoint to its page: read its files, run source and converted model for what they lack, write HTML."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from clla import console
from clla._version import __version__
from clla.checkpoint.load import Checkpoint, checkpoint_folder, checkpoint_reach, load_checkpoint, teacher_of
from clla.errors import CllaError, UsageError
from clla.evaluate.layer_errors import layer_errors
from clla.evaluate.report import UNSEEN, before_and_after
from clla.evaluate.seen import fitted_of, unseen
from clla.recipe import Recipe
from clla.report.data import Missing, PageData, read_checkpoint, what_is_missing
from clla.report.render import GENERATOR, render, write_page
from clla.report.samples import PROMPTS, built_in, make_samples
from clla.source.device import pick_device
from clla.source.lengths import Reach
from clla.storage.places import check_file, holding
from clla.text.reading import check_text
from clla.text.sequences import evaluation_windows
from clla.text.vocabulary import check_tokens

LONGEST = 2048  # tokens of a window, where the model takes as many


@dataclass(frozen=True)
class Options:
    """What is on a page, and how it is measured.

    Attributes:
        html: file to write.
        samples: built-in prompts to continue.
        prompts: others.
        new_tokens: to write after each.
        text: to measure on.
        windows: of it; 0 measures nothing.
        window_length: tokens per window; default 2048, or what the model takes.
        teacher: source model, where the weights were trained; default: from the recipe.
        device: `auto`, `cpu`, …
        dtype: `auto`, `float32`, …
    """

    html: Path
    samples: int = 3
    prompts: tuple[str, ...] = ()
    new_tokens: int = 160
    text: str = "bundled"
    windows: int = 2
    window_length: int | None = None
    teacher: str | None = None
    device: str = "auto"
    dtype: str = "auto"


def make_page(name: str, options: Options) -> PageData:
    """Write the page of a checkpoint.

    Weights are only loaded where something is to be measured or written.

    Args:
        name: directory or Hub id.
        options: what is on the page.

    Raises:
        CllaError: it is no converted checkpoint, or damaged, or the file is not ours to replace.
    """
    _check_page(options.html)
    if not 0 <= options.samples <= len(PROMPTS):
        raise UsageError(
            f"--samples {options.samples}", expected=f"0 to {len(PROMPTS)} built-in prompts", remedy="add --prompt"
        )
    if any(not prompt.strip() for prompt in options.prompts):
        raise UsageError("the prompt is empty", expected="some text", remedy='pass --prompt "…"')
    if options.windows or options.samples or options.prompts:
        check_text(options.text)
    folder = checkpoint_folder(name)
    reach = checkpoint_reach(folder)
    reach.check_option("--sequence-length", options.window_length)
    today = datetime.now(UTC).date().isoformat()
    data = read_checkpoint(folder, made=today, version=__version__)
    data = replace(data, missing=what_is_missing(data), reach=reach)
    if options.windows or options.samples or options.prompts:
        data = _measured(data, folder, reach, options)
    data = replace(data, missing=data.missing + _not_wanted(data, options))
    with holding(options.html):
        write_page(options.html, render(data))
    return data


def _measured(data: PageData, folder: Path, reach: Reach, options: Options) -> PageData:
    """What takes the model: quality, where the conversion did not measure it, errors of layers, samples."""
    loaded = load_checkpoint(str(folder), device=pick_device(options.device), dtype=options.dtype)
    source, missing = _source(loaded, data, options)
    data = replace(data, missing=data.missing + missing)
    length = options.window_length or reach.fit(LONGEST)
    windows = evaluation_windows(options.text, loaded.tokenizer, count=max(1, options.windows), length=length)
    check_tokens(windows, loaded.model.config.text_config.vocab_size, loaded.tokenizer)
    if options.windows:
        known = unseen(options.text, fitted_of(folder), left_out=options.text == "bundled")
        data = _with_errors(data, loaded, source, windows, options.text, known)
    if source is not None and (options.samples or options.prompts):
        prompts = [*options.prompts, *built_in(loaded.tokenizer, windows.flatten(), options.samples, reach)]
        with console.progress("Writing samples (prompts)", len(prompts)) as advance:
            samples = make_samples(
                source,
                loaded.model,
                loaded.tokenizer,
                data.plan,
                prompts,
                new_tokens=options.new_tokens,
                reach=reach,
                on_sample=advance,
            )
        data = replace(data, samples=samples)
        if not samples:
            why = f"No built-in prompt fits into the {reach.tokens:,} tokens that the model takes."
            data = replace(data, missing=(*data.missing, Missing("Samples of text", why, "clla report --prompt …")))
    return data


def _with_errors(
    data: PageData,
    loaded: Checkpoint,
    source: PreTrainedModel | None,
    windows: Tensor,
    text: str,
    known: bool | None,
) -> PageData:
    """Errors of layers over windows [N, T], and quality on them, where it is not known.

    `known` says whether the model was fitted to them, as of `unseen`.
    """
    plan, chunk = data.plan, data.plan.window or loaded.model.prefill_chunk
    with console.progress("Measuring layers (windows)", len(windows)) as advance:
        errors = layer_errors(loaded.model, windows, chunk=chunk, on_window=advance)
    data = replace(data, errors=errors, error_text=_described(windows, text, known))
    if not errors:
        why = f"No token of {windows.shape[1]} leaves the exact window of {plan.window} and becomes a latent."
        data = replace(data, missing=(*data.missing, Missing("Errors of layers", why, "A longer --sequence-length.")))
    if data.report is not None or source is None:
        return data
    with console.progress("Measuring quality (windows)", len(windows)) as advance:
        report = before_and_after(
            loaded.model, loaded.tokenizer, plan, windows, unseen=known, source_model=source, on_step=advance
        )
    return replace(data, report=report)


def _source(loaded: Checkpoint, data: PageData, options: Options) -> tuple[PreTrainedModel | None, tuple[Missing, ...]]:
    """The source to compare with; without one the page says so, unless the user named it."""
    try:
        return teacher_of(loaded, data.recipe or Recipe(), options.teacher, loaded.model.device), ()
    except CllaError as error:
        if options.teacher is not None:
            raise
        how = f"{error.remedy}: --source-model names it."
        return None, (Missing("Text of the source beside the converted model's", error.got + ".", how),)


def _described(windows: Tensor, text: str, known: bool | None) -> str:
    own = f"{'the bundled text' if text == 'bundled' else Path(text).name}, {UNSEEN[known]}"
    many = "one window" if len(windows) == 1 else f"{len(windows)} windows"
    return f"{many} of {windows.shape[1]:,} tokens of {own}"


def _not_wanted(data: PageData, options: Options) -> tuple[Missing, ...]:
    """What is not there because it was not asked for."""
    lacking = []
    if data.report is None and not options.windows:
        how = "clla report without --num-samples 0 measures it."
        lacking.append(Missing("Perplexity and KL", "The conversion did not measure them (--no-eval).", how))
    if not options.windows:
        lacking.append(Missing("Errors of layers", "Nothing was measured.", "clla report without --num-samples 0."))
    if not options.samples and not options.prompts:
        lacking.append(Missing("Samples of text", "None were asked for.", "clla report with --samples 3."))
    return tuple(lacking)


def _check_page(path: Path) -> None:
    """Refuse what cannot be written, and to replace what is no page of ours.

    Raises:
        UsageError: it is a directory, or another file, or its place cannot be written to.
    """
    check_file(path, "--output")
    if path.is_file():
        with path.open("rb") as stream:
            if GENERATOR.encode() not in stream.read(2048):
                raise UsageError(
                    f"{path} is no page that clla wrote",
                    expected="a new file, or an earlier page to replace",
                    remedy="choose another --output",
                )
