"""From a checkpoint to its page: read its files, run source and converted model for what they lack, write HTML."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from clla import console
from clla._version import __version__
from clla.checkpoint.load import Checkpoint, checkpoint_folder, checkpoint_reach, load_checkpoint, source_of
from clla.errors import CllaError, UsageError
from clla.evaluate.layer_errors import layer_errors
from clla.evaluate.report import UNSEEN, before_and_after
from clla.evaluate.seen import unseen
from clla.recipe import Recipe
from clla.report.data import Missing, PageData, read_checkpoint, what_is_missing
from clla.report.options import Options
from clla.report.render import GENERATOR, render, write_page
from clla.report.samples import PROMPTS, built_in, make_samples
from clla.source.device import pick_device
from clla.storage.places import check_file, holding
from clla.text.reading import check_text
from clla.text.sequences import evaluation_samples
from clla.text.vocabulary import check_tokens

LONGEST = 2048  # tokens of a sample, where the model takes as many


def make_page(name: str, html: Path, options: Options, *, prompts: tuple[str, ...] = ()) -> PageData:
    """Write the page of a checkpoint.

    Weights are only loaded where something is to be measured or written.

    Args:
        name: directory or Hub id.
        html: file to write.
        options: what is on the page.
        prompts: to continue beside the built-in ones.

    Raises:
        CllaError: it is no converted checkpoint, or damaged, or the file is not ours to replace.
    """
    _check_page(html)
    built = options.num_prompts if options.num_prompts is not None else 0 if prompts else 3
    if built > len(PROMPTS):
        raise UsageError(
            f"--num-prompts {built}", expected=f"0 to {len(PROMPTS)} built-in prompts", remedy="add --prompt"
        )
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("the prompt is empty", expected="some text", remedy='pass --prompt "…"')
    if options.num_samples or built or prompts:
        check_text(options.text)
    folder = checkpoint_folder(name)
    reach = checkpoint_reach(folder)
    reach.check_option("--sequence-length", options.sequence_length)
    today = datetime.now(UTC).date().isoformat()
    data = read_checkpoint(folder, made=today, version=__version__)
    data = replace(data, missing=what_is_missing(data), reach=reach)
    if options.num_samples or built or prompts:
        data = _measured(data, folder, options, prompts, built)
    lacking = _not_wanted(data, quality=options.num_samples > 0, samples=bool(built or prompts))
    data = replace(data, missing=data.missing + lacking)
    with holding(html):
        write_page(html, render(data))
    return data


def _measured(data: PageData, folder: Path, options: Options, prompts: tuple[str, ...], built: int) -> PageData:
    """What takes the model: quality, where the conversion did not measure it, errors of layers, samples."""
    loaded = load_checkpoint(str(folder), device=pick_device(options.device), dtype=options.dtype)
    source, missing = _source(loaded, data, options)
    data = replace(data, missing=data.missing + missing)
    reach = data.reach
    length = options.sequence_length or reach.fit(LONGEST)
    ids = evaluation_samples(options.text, loaded.tokenizer, count=max(1, options.num_samples), length=length)
    check_tokens(ids, loaded.model.config.text_config.vocab_size, loaded.tokenizer)
    if options.num_samples:
        known = unseen(options.text, data.file.fitted, left_out=options.text == "bundled")
        data = _with_errors(data, loaded, source, ids, options.text, known)
    if source is not None and (built or prompts):
        chosen = [*prompts, *built_in(loaded.tokenizer, ids.flatten(), built, reach)]
        with console.progress("Writing samples (prompts)", len(chosen)) as advance:
            samples = make_samples(
                source,
                loaded.model,
                loaded.tokenizer,
                data.plan,
                chosen,
                new_tokens=options.max_new_tokens,
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
    ids: Tensor,
    text: str,
    known: bool | None,
) -> PageData:
    """Errors of layers over samples [N, T], and quality on them, where it is not known.

    `known` says whether the model was fitted to them, as of `unseen`.
    """
    plan, chunk = data.plan, data.plan.window or loaded.model.prefill_chunk
    with console.progress("Measuring layers (samples)", len(ids)) as advance:
        errors = layer_errors(loaded.model, ids, chunk=chunk, on_sample=advance)
    data = replace(data, errors=errors, error_text=_described(ids, text, known))
    if not errors:
        why = f"No token of {ids.shape[1]} leaves the exact window of {plan.window} and becomes a latent."
        data = replace(data, missing=(*data.missing, Missing("Errors of layers", why, "A longer --sequence-length.")))
    if data.file.report is not None or source is None:
        return data
    with console.progress("Measuring quality (samples)", len(ids)) as advance:
        report = before_and_after(
            loaded.model, loaded.tokenizer, plan, ids, unseen=known, source_model=source, on_step=advance
        )
    return replace(data, file=replace(data.file, report=report))


def _source(loaded: Checkpoint, data: PageData, options: Options) -> tuple[PreTrainedModel | None, tuple[Missing, ...]]:
    """The source to compare with; without one the page says so, unless the user named it."""
    try:
        return source_of(loaded, data.recipe or Recipe(), options.source_model, loaded.model.device), ()
    except CllaError as error:
        if options.source_model is not None:
            raise
        how = f"{error.remedy}: --source-model names it."
        return None, (Missing("Text of the source beside the converted model's", error.got + ".", how),)


def _described(ids: Tensor, text: str, known: bool | None) -> str:
    own = f"{'the bundled text' if text == 'bundled' else Path(text).name}, {UNSEEN[known]}"
    many = "one sample" if len(ids) == 1 else f"{len(ids)} samples"
    return f"{many} of {ids.shape[1]:,} tokens of {own}"


def _not_wanted(data: PageData, *, quality: bool, samples: bool) -> tuple[Missing, ...]:
    """What is not there because it was not asked for."""
    lacking = []
    if data.file.report is None and not quality:
        how = "clla report without --num-samples 0 measures it."
        lacking.append(Missing("Perplexity and KL", "The conversion did not measure them (--no-eval).", how))
    if not quality:
        lacking.append(Missing("Errors of layers", "Nothing was measured.", "clla report without --num-samples 0."))
    if not samples:
        lacking.append(Missing("Samples of text", "None were asked for.", "clla report with --num-prompts 3."))
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
