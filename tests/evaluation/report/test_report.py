"""A report's sentences, pages, pictures and folder."""

import base64
import io
import json
import math
import os
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retnet.checkpoints import load_checkpoint
from retnet.data.listing import files_below
from retnet.errors import UserError
from retnet.evaluation import EvaluationText, compare_checkpoints
from retnet.evaluation.bootstrap import Difference
from retnet.evaluation.costs import Costs
from retnet.evaluation.profile import MeanLoss
from retnet.evaluation.report import (
    QUICK,
    THOROUGH,
    Reach,
    check_report_folder,
    find_out,
    write_report,
)
from retnet.evaluation.report.findings import history, lengths_of
from retnet.evaluation.report.summary import crossing, summary
from retnet.evaluation.speed import DecodeSpeed
from tests.evaluation.report.conftest import NASTY
from tests.generation.builders import save_checkpoint

COMMAND = ["compare.py", "runs/a", "<b>"]


class Parts(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory, findings) -> Path:
    """Written once: drawing takes a while."""
    place = tmp_path_factory.mktemp("reports") / "report"
    write_report(place, findings, COMMAND)
    return place


def test_the_page_holds_everything_and_what_is_named_there_is_text(folder) -> None:
    text = (folder / "report.html").read_text()
    page = Parts(text)
    assert not page.open
    shown = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(shown) == len(list(folder.glob("*.png"))) == 10
    for source in shown:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "b", "a", "object"}
    assert not any(key in attributes for tag, attributes in page.tags for key in ("href", "onload"))
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert NASTY.replace("\x1b", "\\x1b") in page.text and "\x1b" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )
    assert "stopped" in page.text and "not defined" in page.text


def test_markdown_names_its_pictures_and_escapes(folder) -> None:
    text = (folder / "report.md").read_text()
    for picture in folder.glob("*.png"):
        assert f"]({picture.name})" in text
    assert "<script" not in text.replace("\\<", "") and "\x1b" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    cells = [line.replace("\\|", "").count("|") for line in tables]
    assert all(count == 10 for count in cells[:5])  # head, line, three models
    assert "| a | retention | 12,345 | bf16 | 7.39 | 7.2e+86 |" in text  # 800 nats, 4 words


def test_json_has_what_is_shown(folder, findings) -> None:
    content = json.loads((folder / "report.json").read_text())
    assert content["summary"] == summary(findings)
    assert content["comparison"]["command"] == COMMAND
    first, second, third = content["models"]
    assert first["costs"]["by_context"][0]["ms_per_token"] == 1
    assert second["costs"]["by_context"][2]["peak_bytes"] == 5_096_000
    assert first["costs"]["by_batch"][3] == asdict(DecodeSpeed(512, 3.2, 0, 0, 9, 0.1, 4))
    assert second["bits_per_byte_with_state_carried"] is None and third["history"] is None
    assert first["profile"]["by_kind"]["the pair of tokens is new"]["targets"] == 150
    assert first["windows"] == [32, 64, None]
    assert first["weights"]["matrix"][1] == [1, 1, 0] and second["weights"] is None
    assert first["profile"]["by_distance"]["2"] == {"nats": 1.3, "targets": 150}


def test_sentences(findings) -> None:
    found = summary(findings)
    assert found[0].startswith("b is 10.5 % worse in perplexity than a (95 % interval over docum")
    assert found[0].endswith(", so that it may be neither.")
    clear = findings.comparison.models[1]
    gap = replace(clear.nats_difference, value=-0.1, low=-0.2, high=-0.05)
    models = [findings.comparison.models[0], replace(clear, nats_difference=gap)]
    better = replace(findings, comparison=replace(findings.comparison, models=models))
    assert summary(better)[0] == (
        "b is 9.5 % better in perplexity than a (95 % interval over documents -18.1 % to -4.9 %)."
    )
    gap = replace(gap, low=None, high=None)  # of one document
    alone = [models[0], replace(clear, nats_difference=gap)]
    alone = replace(findings, comparison=replace(findings.comparison, models=alone))
    assert summary(alone)[0] == "b is 9.5 % better in perplexity than a."
    assert found[1] == (
        "After 2,048 tokens a makes a token in 1.00 ms and keeps 0.30 MB, b in 21.48 ms with "
        "2.05 MB: 21.5 times the time and 6.8 times the memory."
    )
    assert found[2] == "The memory of a is the smaller one from about 300 tokens on."
    assert any(line.startswith("After 512 tokens a makes") for line in found), "b was stopped there"
    longer = "With 512 tokens of context instead of the 256 it was trained with, the perplexity of "
    low, high = 100 * math.expm1(-0.244), 100 * math.expm1(3 - 2.344)
    assert f"{longer}a is {-low:.1f} % lower." in found
    assert f"{longer}b is {high:.1f} % higher." in found
    assert sum(line.startswith("With") for line in found) == 2, "the third is not defined there"
    shorter = summary(replace(findings, trained=[64, 64, 64]))
    assert any("instead of the 64 it was trained with" in line for line in shorter)
    flat = replace(findings.profiles[0], by_context={256: MeanLoss(2, 9), 512: MeanLoss(2.0004, 9)})
    assert f"{longer}a is the same." in summary(replace(findings, profiles=[flat] * 3))


def test_other_tokenizers_are_told_apart_by_bits(findings) -> None:
    models = [replace(m, nats_difference=None, same_tokenizer=False)
              for m in findings.comparison.models]  # fmt: skip
    comparison = replace(findings.comparison, models=models)
    found = summary(replace(findings, comparison=comparison, profiles=None))
    assert found[0].startswith("b needs 0.050 bits per byte more than a (95 % interval")
    assert not any("perplexity" in line for line in found)


@pytest.mark.parametrize(
    ("constant", "growing", "expected"),
    [
        ((300, 300), (128, 512), 300),
        ((300, 300), (300, 1068), 128),
        ((300, 300), (500, 500), None),  # neither grows
        ((300, 400), (128, 512), None),  # both do
        ((1, 1), (128, 512), 1),
        ((0, 0), (128, 512), None),  # it always was
    ],
)
def test_where_a_state_becomes_the_smaller_one(constant, growing, expected) -> None:
    def of(sizes) -> list[DecodeSpeed]:
        contexts = zip((128, 512), sizes, strict=True)
        return [DecodeSpeed(context, cache_bytes=size) for context, size in contexts]

    assert crossing(of(constant), of(growing)) == expected
    assert crossing(of(constant)[:1], of(growing)[:1]) is None


def test_no_picture_is_blank(folder) -> None:
    for file in folder.glob("*.png"):
        image = np.asarray(Image.open(file).convert("L"))
        assert (image < 200).mean() > 0.005, file.name


def test_everything_is_found_out(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    paths = [save_checkpoint(runs[0] / "final"), save_checkpoint(runs[1] / "final", "attention")]
    lines = [{"step": 1, "train/loss": 5.0, "perf/seconds": 0.5},
             {"step": 2, "train/loss": 4.0, "perf/seconds": 0.9, "val/loss": 4.5}]  # fmt: skip
    written = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tr'
    (runs[0] / "metrics.jsonl").write_text(written)
    checkpoints = [load_checkpoint(path) for path in paths]
    text = EvaluationText("text", ["the state of the state " * 30, "abc"])
    comparison = compare_checkpoints(checkpoints, text, speed_contexts=(4, 8))
    reach = Reach(batches=(1, 2), lengths=(8,), limit_s=1e9, peaks=False)
    found = find_out(checkpoints, comparison, reach)
    assert list(found.profiles[0].by_context) == [4, 8, 16, 32, 64, 128, 256]
    assert found.carried[0] > 0 and found.carried[1] is None
    assert found.windows[0] and found.windows[1] == [] and found.trained == [16, 16]
    assert found.histories[1] is None
    assert found.histories[0].steps == [1, 2] and found.histories[0].seconds == [0.5, 0.9]
    assert found.histories[0].validation == {2: 4.5}
    assert [[e.context for e in one.by_context] for one in found.costs] == [[4, 8]] * 2
    rows = [[(e.context, e.rows) for e in one.by_batch] for one in found.costs]
    assert rows == [[(4, 1), (4, 2), (8, 1), (8, 2)]] * 2
    less = replace(reach, windows=1, beyond=(2,), carried=False)
    few = find_out(checkpoints, comparison, less)
    assert few.profiles[0].by_context.keys() == {4, 8, 16, 32} and few.carried == [None, None]
    assert few.profiles[0].by_context[4].targets < found.profiles[0].by_context[4].targets
    one, other = (replace(model, speed=[]) for model in comparison.models)
    other = replace(other, same_tokenizer=False)
    again = find_out(checkpoints, replace(comparison, models=[one, other]))
    assert again.profiles is None and again.costs == [Costs([], [], [])] * 2


@pytest.mark.parametrize(("reach", "all_of_it"), [(THOROUGH, True), (QUICK, False)])
def test_a_quick_report_has_no_peaks_and_batches_after_the_first_context(
    findings, monkeypatch, tmp_path: Path, reach: Reach, all_of_it: bool
) -> None:
    def instead(checkpoints, *, everywhere, peaks, **options):
        assert everywhere is peaks is all_of_it
        raise StopIteration

    monkeypatch.setattr("retnet.evaluation.report.findings.measure_costs", instead)
    monkeypatch.setattr("retnet.evaluation.report.findings.profile", lambda *a, **options: None)
    checkpoint = load_checkpoint(save_checkpoint(tmp_path / "attention", "attention"))
    models = [replace(model, speed=[DecodeSpeed(4)]) for model in findings.comparison.models]
    with pytest.raises(StopIteration):
        find_out([checkpoint] * 3, replace(findings.comparison, models=models), reach)


def test_histories_of_older_runs_and_of_single_checkpoints(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "step_2"
    place.mkdir(parents=True)
    assert history(place) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 5.0}\n')
    assert history(place).seconds is None and history(place).training == [5.0]
    (tmp_path / "metrics.jsonl").write_text("no\n")
    assert history(place) is None


def test_contexts_that_losses_are_told_by() -> None:
    assert lengths_of(256) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert lengths_of(2048)[:4] == [512, 1024, 2048, 4096]
    assert lengths_of(4)[:2] == [2, 4]


def test_a_report_takes_the_place_of_one_and_of_nothing_else(folder, findings, tmp_path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "my notes.txt").write_text("keep")
    check_report_folder(old)
    (old / "report.md").write_text("old")
    write_report(old, replace(findings, histories=[None] * 3, profiles=None), COMMAND)
    assert "Quality" in (old / "report.md").read_text() and (old / "my notes.txt").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    checkpoint = save_checkpoint(tmp_path / "run" / "final")
    for place, words in (
        (full, "has other files in it"),
        (full / "thesis.txt", "is a file"),
        (checkpoint, "lies in a run or checkpoint"),
        (checkpoint.parent, "lies in a run or checkpoint"),
        (checkpoint.parent / "report", "lies in a run or checkpoint"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            check_report_folder(place)
        assert str(caught.value).startswith("--report (") and "name a" in str(caught.value)
    check_report_folder(tmp_path / "new" / "report")
    assert not (tmp_path / "new").exists(), "nothing is left before there is a report"


@pytest.mark.parametrize("content", ['{"coverage": 93}', "[]", "{"])
def test_another_tools_report_is_kept(tmp_path: Path, content: str) -> None:
    """Which has the same name."""
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="has other files in it"):
        check_report_folder(tmp_path)


def test_a_report_is_a_folder_of_its_own_files(folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.html\) is to be a folder, which the page lies in as"):
        check_report_folder(tmp_path / "x.html")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):
        with pytest.raises(UserError, match=r"--json \(.*\.json\) is a file of the report: give"):
            check_report_folder(folder, place / "report.json")
    check_report_folder(folder, folder / "comparison.json")
    check_report_folder(folder, tmp_path / "report.json")


def test_a_report_is_never_corpus(folder) -> None:
    (folder / "my notes.md").write_text("text")
    (folder.parent / "report.md").write_text("somebody's own report")
    found = files_below(folder.parent, "data.source", lambda path: path.suffix == ".md")
    assert found == [folder.parent / "report.md", folder / "my notes.md"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it(folder, tmp_path: Path, width: int) -> None:
    """Every picture is loaded and nothing is wider than the window; a screenshot is kept."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(names)})")
    check = """<script>onload = () => { const wide = document.documentElement.scrollWidth;
        const all = [...document.images];
        document.title = all.filter(i => i.complete && i.naturalWidth).length + "/" + all.length
            + (wide <= innerWidth ? " fits" : " is wider"); }</script>"""
    page, picture = tmp_path / "page.html", tmp_path / f"report-{width}.png"
    text = (folder / "report.html").read_text()
    page.write_text(text.replace("</head>", check + "</head>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000"]
    command = [browser, *options, f"--screenshot={picture}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    pictures = text.count("<img ")
    assert pictures >= 8 and f"<title>{pictures}/{pictures} fits</title>" in done.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "line",
    [
        '{"step": Infinity, "train/loss": 1.0}', "[" * 100_000, '{"step": true, "train/loss": 1.0}',
        '{"step": ' + "9" * 400 + ', "train/loss": 1.0}', '{"step": 2, "train/loss": 1.7e308}',
        '{"step": 2, "train/loss": "1.0"}', '{"step": 2, "train/loss": NaN}',
    ],
    ids=range(7),
)  # fmt: skip
def test_lines_that_no_run_wrote_are_left_out(tmp_path: Path, line: str) -> None:
    good = '{"step": 1, "train/loss": 5.0, "perf/seconds": 1.0, "val/loss": Infinity}'
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n")
    found = history(tmp_path / "final")
    assert found.steps == [1] and found.training == [5.0] and found.validation == {}


def test_metrics_that_memory_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    os.truncate(tmp_path / "metrics.jsonl", 10**13)
    with pytest.raises(UserError, match=r"metrics\.jsonl has 10,000,000,000,000 bytes, and memory"):
        history(tmp_path / "final")


def test_losses_beyond_what_exp_can_hold(findings, tmp_path: Path) -> None:
    first, spoilt, *others = findings.profiles
    far, context = MeanLoss(5e4, 3), spoilt.by_context
    spoilt = replace(
        spoilt,
        by_kind=dict.fromkeys(spoilt.by_kind, far),
        by_context={n: loss and (far if n > 256 else loss) for n, loss in context.items()},
    )
    models = list(findings.comparison.models)
    models[1] = replace(models[1], nats_difference=Difference(5e4, 4e4, 6e4))
    found = replace(
        findings,
        comparison=replace(findings.comparison, models=models),
        profiles=[first, spoilt, *others],
    )
    write_report(tmp_path, found, ["compare.py"])
    assert "inf" in (tmp_path / "report.md").read_text()


def test_names_of_several_lines_make_none(findings, tmp_path: Path) -> None:
    model = replace(findings.comparison.models[0], name="x\n=====\n\n| buy | this |")
    comparison = replace(findings.comparison, models=[model, *findings.comparison.models[1:]])
    write_report(tmp_path, replace(findings, comparison=comparison), ["compare.py", "x\n===="])
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert not [line for line in lines if line.startswith(("==", "| buy", r"\| buy"))]
    assert "<br>====" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["report.html", "losses.png"])
def test_a_report_is_not_written_through_links(folder, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").write_text("years")
    shutil.copytree(folder, tmp_path / "report")
    (tmp_path / "report" / name).unlink()
    (tmp_path / "report" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name} is a link, and a report is written there"):
        check_report_folder(tmp_path / "report")
