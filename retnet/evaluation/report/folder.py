"""The folder of a report: report.md with its pictures, report.html, report.json."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retnet import files
from retnet.checkpoints.format import check_outside_of_runs
from retnet.data.listing import REPORT_NAMES
from retnet.errors import UserError, os_errors
from retnet.evaluation.report.contents import page_of
from retnet.evaluation.report.findings import Findings
from retnet.evaluation.report.pages import to_html, to_markdown
from retnet.evaluation.report.table import to_json
from retnet.paths import check_folder

logger = logging.getLogger(__name__)

DATA, MARKDOWN, PAGE = REPORT_NAMES
KEYS = ("summary", "comparison", "models")  # of report.json
OTHER = "name a new folder, or that of a report to replace"


def check_report_folder(folder: Path, json: Path | None = None) -> None:
    """Find out before the long work whether a report can be written into a folder.

    A ``UserError`` where it is a checkpoint's or run's, something else's with files in it, cannot
    be written, is named as a file is, or ``json``, another output, is a file of the report.
    """
    check_folder(folder, "--report")
    if not folder.is_dir() and folder.suffix in {Path(name).suffix for name in REPORT_NAMES}:
        raise UserError(
            f"--report ({folder}) is to be a folder, which the page lies in as {PAGE}: leave "
            f"{folder.suffix} out"
        )
    beside = json is not None and os.path.realpath(json.parent) == os.path.realpath(folder)
    if json is not None and beside and json.name in REPORT_NAMES:
        raise UserError(f"--json ({json}) is a file of the report: give it another name")
    check_outside_of_runs(folder, "--report", OTHER)
    with os_errors(f"--report ({folder}) cannot be written", OTHER):
        if folder.is_dir() and any(folder.iterdir()) and not _holds_report(folder):
            raise UserError(f"--report ({folder}) has other files in it: {OTHER}")
        _check_no_links(folder)
        made = files.missing_folders(folder)  # nothing of them is left where the work ends early
        folder.mkdir(parents=True, exist_ok=True)
        try:
            files.try_to_write(folder / DATA)
        finally:
            for path in made:
                path.rmdir()


def _holds_report(folder: Path) -> bool:
    """Whether it is ours: other tools call their reports so too."""
    try:
        return files.read_json(folder / DATA, "").keys() == {*KEYS}
    except UserError:
        return False


def _check_no_links(folder: Path) -> None:
    """Raise a ``UserError`` where a part of a report that was there is no file of its own.

    What a link leads to would be written over, wherever that is.
    """
    for file in sorted(folder.glob("*")):
        ours = file.name in REPORT_NAMES or file.suffix == ".png"
        if ours and (file.is_symlink() or not file.is_file()):
            what = "a link" if file.is_symlink() else "no file"
            raise UserError(
                f"--report ({folder}): {file} is {what}, and a report is written there: {OTHER}"
            )


def write_report(folder: Path, findings: Findings, command: Sequence[str]) -> None:
    """Write the whole report, over one that was there; a ``UserError`` where that fails."""
    page = page_of(findings, command)
    with os_errors(f"--report ({folder}) cannot be written", OTHER):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / DATA, content(findings, page.summary, command))
        for picture in page.pictures:
            files.write_bytes(folder / f"{picture.name}.png", picture.png)
        files.write_text(folder / MARKDOWN, to_markdown(page))
        files.write_text(folder / PAGE, to_html(page))
    logger.info("report in %s", folder / PAGE)


def content(findings: Findings, sentences: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """Everything for programs: the comparison, and what the tables and pictures show."""
    models: list[dict[str, Any]] = []
    for i in range(len(findings.costs)):
        profile = None if findings.profiles is None else asdict(findings.profiles[i])
        history, weights = findings.histories[i], findings.weights[i]
        models.append({
            "profile": profile,
            "bits_per_byte_with_state_carried": findings.carried[i],
            "costs": asdict(findings.costs[i]),
            "history": None if history is None else asdict(history),
            "windows": findings.windows[i],
            "weights": weights and {**asdict(weights), "matrix": weights.matrix.tolist()},
        })  # fmt: skip
    comparison = to_json(findings.comparison, command)
    return dict(zip(KEYS, (list(sentences), comparison, models), strict=True))
