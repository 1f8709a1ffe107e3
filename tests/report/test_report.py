"""The page of `clla report`: complete, self-contained, well-formed, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import byte_tokenizer, pico
from helpers import clla

from clla.artifacts.plan import KVShape, LayerGroup, Plan
from clla.errors import CorruptArtifactError
from clla.evaluate.plan_tables import groups_table
from clla.evaluate.report import Report
from clla.evaluate.report_file import ReportFile
from clla.report import words
from clla.report.data import PageData, read_checkpoint, what_is_missing
from clla.report.plan_charts import draw_plan
from clla.report.render import CONTROL, render, write_page
from clla.report.samples import Sample, _sample, same_start
from clla.report.svg import Drawing, Scale
from clla.storage.filenames import CHECKSUMS
from clla.storage.files import read_json

VOID = {"meta", "link", "br", "img", "hr", "input"}
ATTACK = "<script>alert(1)</script>&\"'"
PAPER = "https://arxiv.org/abs/2410.15252"
FAST = ["--num-samples", 1, "--sequence-length", 128, "--num-prompts", 2, "--max-new-tokens", 24]


class Page(HTMLParser):
    """A page taken apart; tags that are not closed in order are an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html, self.open, self.text, self.tags = html, list[str](), "", list[tuple[str, dict[str, str | None]]]()
        self.script = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def pictures(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.html, re.DOTALL)]

    @property
    def sections(self) -> set[str | None]:
        return {attributes.get("id") for tag, attributes in self.tags if tag == "section"}


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    """A page of the pico with everything on it, and the figures that the command printed."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    done = clla("report", checkpoint, "--output", path, *FAST, "--prompt", f"Say {ATTACK} twice", "--json")
    assert done.exit_code == 0, done.output + done.stderr
    return Page(path.read_text(encoding="utf-8")), json.loads(done.stdout)


@pytest.fixture(scope="module")
def data(checkpoint: Path) -> PageData:
    """What the files alone say."""
    return read_checkpoint(checkpoint, made="2026-01-02", version="0")


def healed(data: PageData, report: Report | None = None) -> PageData:
    """The same with a healing run in its report, and what was measured after it."""
    history = [{"tokens": 0, "kl": None, "held_out": 0.5}, {"tokens": 4096, "kl": 0.4, "held_out": 0.3125}]
    before = {"converted": {"perplexity": 17.125, "kl": 0.4375, "bytes_per_token": 99.0}}
    earlier = Report(quality=before, context=128, windows=1, chunk=32).to_json()
    healing = {"config": {"train": "all"}, "history": history, "verdict": "Healing took KL down", "before": earlier}
    return replace(data, healed="all", file=replace(data.file, healing=healing, report=report or data.file.report))


def without_outlook(data: PageData, plan: Plan) -> PageData:
    """The same with another plan, of which nothing else is known."""
    return replace(data, plan=plan, file=replace(data.file, outlook={}))


def test_every_figure_is_on_the_page(made: tuple[Page, dict[str, Any]], data: PageData) -> None:
    page, found = made
    for name, row in found["measured"].items():
        if name in ("source", "int4", "converted"):
            for figure in (f"{row['perplexity']:.3f}", f"{row['bytes_per_token']:,.0f}"):
                assert figure in page.text, (name, figure)
    for name in ("int4", "converted"):
        assert f"{found['measured'][name]['kl']:.4f}" in page.text
    assert len(found["layers"]) == 4
    for row in found["layers"]:
        for kind in ("key", "value", "output"):
            assert words.percent(row[kind]) in page.text, (row, kind)
    plan = data.plan
    assert f"{plan.row_bytes:,} bytes each" in page.text
    for group in plan.groups:
        assert f"{len(group.tier_bits) * plan.tier_size:,}" in page.text
        assert words.percent(group.predicted_loss / plan.predicted_loss) in page.text
    assert data.file.predicted_kl is not None and f"{data.file.predicted_kl:.4f}" in page.text
    assert data.recipe_text.strip() in page.text and "seed: 0" in page.text
    for sample in found["samples"]:
        assert sample["shared"].translate(CONTROL).strip() in page.text
    assert page.sections == {"quality", "memory", "plan", "spectra", "layers", "samples", "recipe"}
    assert found["missing"] == []


def test_the_page_loads_nothing(made: tuple[Page, dict[str, Any]]) -> None:
    page, _ = made
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img", "audio", "video"), tag
        for name in ("src", "srcset", "action", "poster", "xlink:href"):
            assert name not in attributes, (tag, name)
        address = attributes.get("href")
        if address is not None:
            assert address.startswith("#") or (tag, address) in (("a", PAPER), ("link", "data:,")), (tag, address)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert "@import" not in page.html and "url(" not in page.html
    assert set(re.findall(r"https?://[^\"'\s<]+", page.html)) == {PAPER, "http://www.w3.org/2000/svg"}
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_pictures_are_valid_and_described(made: tuple[Page, dict[str, Any]], data: PageData) -> None:
    page, _ = made
    assert len(page.pictures) == 2 * 5 + len(data.plan.groups)  # spectra have one size, the others two
    for picture in page.pictures:
        assert picture.get("role") == "img" and len(picture.get("aria-label", "")) > 10
        width, height = (float(v) for v in picture.get("viewBox", "").split()[2:])
        for element in picture.iter():
            for name, most in (("x", width), ("y", height), ("cx", width), ("cy", height)):
                if name in element.attrib:
                    assert -1 <= float(element.attrib[name]) <= most + 1, ElementTree.tostring(element)
            assert "nan" not in "".join(element.attrib.values()).lower()


def test_what_users_supply_is_escaped(made: tuple[Page, dict[str, Any]], data: PageData) -> None:
    page, _ = made
    assert f"Say {ATTACK} twice" in page.text and page.html.count("<script") == 1
    sample = Sample(ATTACK, ATTACK, 9, ATTACK, 1, None, None, 0)
    bad = replace(data, name=ATTACK, shape=ATTACK, recipe_text=ATTACK, error_text=ATTACK, samples=(sample,))
    worse = replace(healed(bad), plan=replace(bad.plan, source=ATTACK))
    assert worse.file.healing is not None
    worse.file.healing.update(verdict=ATTACK)
    html = render(worse)
    assert html.count("<script") == 1 and html.count("</script") == 1 and "alert(1)</title>" not in html
    assert Page(html).text.count(ATTACK) >= 9


def test_characters_that_are_no_text(data: PageData, tmp_path: Path) -> None:
    sample = Sample("a\x00b\x1b[31m", "a\x00b", 2, "\udcff bell\x07\tok\n", 3, None, None, None)
    path = tmp_path / "new" / "page.html"
    write_page(path, render(replace(data, samples=(sample,))))
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", html)
    assert "a␀b" in html and "? bell␇\tok" in html


def test_healing_is_shown_where_there_was_some(data: PageData, made: tuple[Page, dict[str, Any]]) -> None:
    assert "healing" not in made[0].sections and "no training" not in made[0].text.lower()
    report = replace(read_report(made[1]), context=128)
    page = Page(render(healed(data, report)))
    assert "healing" in page.sections
    for figure in ("17.125", "0.4375", "Healing took KL down", "Trained: all", "held-out KL 0.3125"):
        assert figure in page.text, figure
    assert "before healing: 99 bytes" in page.text and len(page.pictures) == 2 * 5 + len(data.plan.groups)
    assert "Quality before and after was not measured" in Page(render(healed(data))).text


def read_report(found: dict[str, Any]) -> Any:
    report = Report.from_json(found["measured"])
    assert report.to_json() == found["measured"]
    return report


def test_a_checkpoint_without_report_says_what_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    """Neither report, recipe nor weights: a page of the plan, made without loading anything."""
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint, folder)
    for name in ("clla_report.json", "clla_recipe.yaml", "model.safetensors"):
        (folder / name).unlink()
    done = clla("report", folder, "--num-samples", 0, "--num-prompts", 0)
    assert done.exit_code == 0, done.output + done.stderr
    page = Page((tmp_path / "bare-report.html").read_text(encoding="utf-8"))
    assert page.sections == {"quality", "memory", "plan", "missing", "recipe"}
    for what in ("Perplexity and KL", "Spectra", "The recipe", "Errors of layers", "Samples of text", "--work-dir"):
        assert what in page.text, what
    assert "what that costs was not measured" in page.text and "Perplexity and KL: not on the page" in flat(done.stderr)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_an_older_checkpoint_has_no_spectra(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(checkpoint, folder)
    report = read_json(folder / "clla_report.json")
    del report["outlook"], report["reduction"]
    (folder / "clla_report.json").write_text(json.dumps(report))
    (folder / CHECKSUMS).unlink()
    old = read_checkpoint(folder, made="2026-01-02", version="0")
    (missing,) = what_is_missing(old)
    page = Page(render(replace(old, missing=(missing,))))
    assert "spectra" not in page.sections and missing.how in page.text


def test_layers_that_are_kept(data: PageData) -> None:
    """A hybrid: groups whose layers others part, layers with a window, layers with a state."""
    bits = data.plan.groups[0].tier_bits
    groups = (LayerGroup((1, 3), bits, 1.0), LayerGroup((5, 7), bits, 2.0))
    plan = replace(data.plan, groups=groups, kept_layers=(0, 2, 4, 6, 8, 9), kept_window=32, at_context=2048)
    page = Page(render(without_outlook(data, plan)))
    assert "6 layers (0, 2, 4, 6, 8–9) keep" in page.text and "a window of 32 tokens" in page.text
    assert "cache of the 4 converted layers" in page.text and "6 layers kept as they are" in page.text
    assert page.text.count("layers 8–9: not converted") == 2
    stateful = Page(render(without_outlook(data, replace(plan, kept_window=0))))
    assert "a state of fixed size, which is not counted" in stateful.text and "6 layers kept as" not in stateful.text
    plan = replace(plan, kept_window=0, kept_state_bytes=12_345)
    stateful = Page(render(without_outlook(data, plan)))
    assert "bounded by a state of 12,345 bytes" in stateful.text and "6 layers kept as they are" in stateful.text


@pytest.mark.parametrize("layers", [1, 30, 126])
@pytest.mark.parametrize("width", [350, 1000])
def test_labels_of_layers_do_not_touch(data: PageData, layers: int, width: int) -> None:
    bits = data.plan.groups[0].tier_bits
    plan = replace(data.plan, groups=tuple(LayerGroup((i,), bits, 1.0) for i in range(layers)))
    root = draw_plan(plan, width).root
    numbers = [e for e in root.iter("text") if e.get("text-anchor") == "end" and e.get("class") == "num"]
    for x in {e.get("x") for e in numbers}:
        places = sorted(float(e.get("y", "")) for e in numbers if e.get("x") == x)
        assert len(places) == layers and all(b - a >= 12 for a, b in pairwise(places))


def test_plans_without_exact_tokens(data: PageData) -> None:
    whole = replace(data.plan, groups=(LayerGroup((0, 1, 2, 3), (16,) * 32, 0.0),), window=0, sinks=0)
    assert whole.row_bytes > 0 and Page(render(without_outlook(data, whole))).text


def test_files_that_are_not_ours_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    quick = ["--num-samples", 0, "--num-prompts", 0]
    refused = clla("report", checkpoint, "--output", mine, *quick)
    assert refused.exit_code == 2 and "no page that clla wrote" in flat(refused.stderr)
    assert mine.read_text() == "<p>mine</p>"
    assert clla("report", checkpoint, "--output", tmp_path, *quick).exit_code == 2
    ours = tmp_path / "ours.html"
    for _ in range(2):
        assert clla("report", checkpoint, "--output", ours, *quick).exit_code == 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--num-prompts", 9], 2, "built-in prompts"),
        (["--prompt", " "], 2, "the prompt is empty"),
        (["--text", "nowhere.txt", "--num-samples", 1], 1, "does not exist"),
        (["--source-model", "nowhere", "--num-prompts", 1], 1, "nowhere"),
    ],
)
def test_mistakes(checkpoint: Path, tmp_path: Path, options: list[Any], code: int, says: str) -> None:
    path = tmp_path / "page.html"
    done = clla("report", checkpoint, "--output", path, *options)
    assert done.exit_code == code and says in flat(done.stderr), done.stderr
    assert not path.exists()


def test_what_is_no_checkpoint_or_damaged(checkpoint: Path, pico_dir: Path, tmp_path: Path) -> None:
    assert "not converted" in flat(clla("report", pico_dir, "--output", tmp_path / "p.html").stderr)
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    (folder / "clla_report.json").write_text('{"measured": {"source": 3}}')
    done = clla("report", folder, "--num-samples", 0, "--num-prompts", 0)
    assert done.exit_code == 1 and "no valid report" in flat(done.stderr)


def test_null_fields_of_older_versions_are_read(checkpoint: Path, tmp_path: Path) -> None:
    data = read_json(checkpoint / "clla_report.json")
    data["recipe"]["budget"]["eviction_ratio"] = None
    (tmp_path / "clla_report.json").write_text(json.dumps(data))
    assert ReportFile.load(tmp_path) == ReportFile.load(checkpoint)
    data["recipe"]["budget"]["eviction_ratio"] = 0.5
    (tmp_path / "clla_report.json").write_text(json.dumps(data))
    with pytest.raises(CorruptArtifactError, match="eviction_ratio"):
        ReportFile.load(tmp_path)


def test_an_untold_source_costs_only_the_samples(checkpoint: Path, tmp_path: Path) -> None:
    """Trained weights whose source is gone: errors of layers, but nothing beside the source."""
    folder = tmp_path / "trained"
    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    config["clla"]["healed"] = "all"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "clla_recipe.yaml").unlink()
    (folder / CHECKSUMS).unlink()
    done = clla("report", folder, "--output", tmp_path / "p.html", *FAST, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == [] and len(found["layers"]) == 4
    assert any("--source-model" in item["how"] for item in found["missing"])


def test_where_two_texts_part() -> None:
    tokenizer = byte_tokenizer()

    def parted(one: str, other: str, more: int = 0) -> Sample:
        ids = [tokenizer(text)["input_ids"] for text in (one, other)]
        return _sample("a\nb?", 7, [ids[0], ids[1] + [tokenizer.eos_token_id] * more], tokenizer, 3)

    alike = parted("the same", "the same")
    assert alike.source is None and alike.shared == "the same" and alike.same == 8 and alike.title == "b?"
    found = parted("the lake", "the mill")
    assert found.shared == "the " and found.same == 4 and found.source and found.converted
    assert (found.source.first, found.source.rest) == ("l", "ake") and found.converted.first == "m"
    part = parted("né", "nè")  # they share the first of two bytes
    assert part.shared == "n" and part.same == 2 and part.source and part.source.first == "é"
    ended = parted("the lake", "the lake", more=1)
    assert ended.shared == "the lake" and ended.converted and ended.converted.first == ended.converted.rest == ""
    assert same_start("", "a") == 0 and same_start([1, 2], [1, 2, 3]) == 2


def test_scales() -> None:
    linear = Scale(0, 30, 100, 400, most=7)
    assert linear(15) == 250 and linear.ticks == [0, 5, 10, 15, 20, 25, 30]
    log = Scale(50, 50_000, 0, 300, log=True, most=3)
    assert log(50) == 0 and log(50_000) == pytest.approx(300) and log.ticks == [100, 1000, 10_000]
    for low, high in ((0, 1e-9), (-0.6, 0.4), (3, 1e12)):
        scale = Scale(low, high, 0, 100)
        found = scale.ticks
        assert 2 <= len(found) <= 7 and all(scale.holds(tick) for tick in found), found
    drawing = Drawing(10, 10, ATTACK)
    drawing.text("num", 1, 1, ATTACK, tip=ATTACK)
    root = ElementTree.fromstring(str(drawing.markup()))
    assert root.get("aria-label") == ATTACK and "".join(root.itertext()) == 2 * ATTACK


def test_bytes_of_groups_hold_their_rotary_keys() -> None:
    groups = (LayerGroup((0, 1), (8, 4), 1.0, (0, 1, 2, 3)), LayerGroup((2,), (4,), 0.5, (0, 2, 4, 6)))
    plan = Plan(
        groups=groups, kv=KVShape(2, 16), kv_itemsize=2, window=0, sinks=0, tier_size=8, source="first",
        flush_block=16, budget_bytes=1, at_context=512, made_from="test", rope_bits=6,
    )  # fmt: skip
    told = [int(row[3]) for row in groups_table(plan).rows]
    assert told == [plan.row_bytes_of(group) for group in groups] and sum(told) == plan.row_bytes
    bare = replace(plan, groups=tuple(replace(group, rope_pairs=()) for group in groups))
    assert all(a - plan.row_bytes_of(b) == 7 for a, b in zip(told, bare.groups, strict=True))  # 8 of 6 bits, a scale


def test_words() -> None:
    assert [words.size(n) for n in (7, 1440, 999_900, 24e9)] == ["7 B", "1.44 kB", "1,000 kB", "24 GB"]
    assert [words.percent(x) for x in (0.0625, 0.00012, 12.5)] == ["6.25 %", "0.012 %", "1,250 %"]
    assert words.span((4,)) == "4" and words.span((1, 2, 3, 7, 9, 10)) == "1–3, 7, 9–10"
    assert [words.tokens(n) for n in (512, 8192, 131_072)] == ["512", "8k", "128k"]


def test_letters_stand_out_in_light_and_dark() -> None:
    """WCAG's 4.5 : 1, for text on the page and for numbers on the colours of the bits."""
    style = (resources.files("clla.report") / "page.css").read_text(encoding="utf-8")
    for colours in themes(style):
        pairs = [(text, ground) for text in ("--text", "--quiet") for ground in ("--page", "--soft")]
        pairs += [(name, "--page") for name in ("--own", "--source", "--other", "--key", "--value")]
        pairs += [(name, name.removesuffix("-on")) for name in colours if name.endswith("-on")]
        pairs += [("--text", "--mark"), ("--page", "--own")]
        assert len(pairs) > 15
        for text, ground in pairs:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, colours["--page"])


def themes(style: str) -> Iterator[dict[str, str]]:
    """Colours of light, dark and print, each over the light ones."""
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 3
    base: dict[str, str] = {}
    for block in blocks:
        own = base | dict(re.findall(r"(--[\w-]+): ([^;]+);", block))
        base = base or own
        yield {k: own.get(v.removeprefix("var(").rstrip(")"), v) for k, v in own.items()}


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = digits if len(digits) == 6 else "".join(2 * c for c in digits)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_token_ids_that_are_none_are_told(text_file: Path, tmp_path: Path) -> None:
    """Of the source's generation config: by every command that generates, and not as a fault of the package."""
    source = tmp_path / "source"
    pico().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1, "x"]}))
    small = ["--calibration-tokens", 1024, "--sequence-length", 128, "--budget-context", 0, "--kv-budget", "20%"]
    small += ["--exact-window", 8, "--no-eval"]
    assert clla("convert", source, "-o", tmp_path / "out", "--dataset", text_file, *small).exit_code == 0
    for command in (
        ["generate", tmp_path / "out", "--prompt", "hello", "--max-new-tokens", 4],
        ["report", tmp_path / "out", "--num-prompts", 1, "--max-new-tokens", 4, "--num-samples", 0],
        ["convert", source, "-o", tmp_path / "own", "--dataset", "self", *small],
    ):
        done = clla(*command)
        assert done.exit_code == 1 and "generation_config.json" in done.stderr and "internal" not in done.stderr
