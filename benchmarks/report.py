"""A run as tables for people and as JSON for programs."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.against_llama import summary
from benchmarks.measure import (
    DECODE,
    FAMILY,
    FORMS,
    LIMIT,
    LLAMA,
    MEMORY,
    PREFILL,
    STEPS,
    TRAIN,
    Measurement,
    Plan,
    Results,
)
from benchmarks.others import TIMM_NOTE, TORCHSCALE
from benchmarks.steps import NARROW
from benchmarks.targets import Target, targets
from retnet.evaluation.report import format_table

PACKAGES = ("torch", "transformers", "torchscale", "yet-another-retnet", "flash-linear-attention",
            "llama-cpp-python")  # fmt: skip
NOTES = {
    TRAIN: "Forward and backward pass, no optimizer. Forms of all pairs of tokens stop at T = 2048,"
    "\nthe recurrent one at 128. The limit: the matrix products of the RetNet's linear layers,"
    "\nby the library that the process uses; the same by torch.mm and MKL stands beside it.",
    PREFILL: "The RetNet and the Transformer read 1024 tokens at a time and keep their memory, as\n"
    "does Llama in one piece; torchscale (chunkwise) has none to keep, yet-another-retnet reads\n"
    "128 at a time.",
    DECODE: "Greedy. The limit: reading as many bytes as the RetNet's weights and states (these\n"
    "count twice: they are written too), as one sum by all threads; a small model fits a cache.",
    LLAMA: "Greedy, in float32 but for the weights. llama.cpp as it comes: caches of f16, and\n"
    "each text has its own.",
    FORMS: "Retention alone, forward and backward; V = 2 K.",
    FAMILY: "Every mixer. Decoding is greedy, by the fast step where the mixer has one.",
    STEPS: "The models in float32 and under autocast; the limits: the matrix products of the\n"
    "RetNet's linear layers in that type. Tokens are parameters for optimizers.",
    MEMORY: "Above what the process had before the step; a process each, see benchmarks.memory.",
}


def environment(
    plan: Plan, argv: Sequence[str], program: str = "benchmarks.speed"
) -> dict[str, Any]:
    """Machine, versions and load, as they are now."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "command": " ".join([f"python -m {program}", *argv]),
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(plan.device)
        if plan.device.type == "cuda"
        else plan.device.type,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "rounds": plan.rounds,
        "keep_memory": plan.keep_memory,
        "versions": versions,
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def format_report(plan: Plan, results: Results, about: dict[str, Any]) -> str:
    """Heading, a table per case, and the table of targets."""
    parts = [heading(results, about)]
    for benchmark in (TRAIN, PREFILL, DECODE, LLAMA, FORMS, FAMILY, STEPS):
        groups = list(results.groups(benchmark))
        if groups:
            parts.append([f"== {benchmark}", *NOTES[benchmark].splitlines()])
        parts += [[case, *times(group)] for case, group in groups]
        if groups and benchmark == LLAMA:
            parts += summary(plan, results)
    if results.peaks:
        parts.append([f"== {MEMORY}", *NOTES[MEMORY].splitlines(), "", *_peaks(results)])
    parts.append(["== targets", "", *format_targets(targets(plan, results))])
    return "\n\n".join("\n".join(lines) for lines in parts)


def heading(results: Results, about: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    loads = about["load_average"]
    lines = [
        f"command   {about['command']}",
        f"date      {about['date']}",
        f"machine   {about['processor']}, {about['cores']} cores, {about['system']}, "
        f"{about['vector_instructions']}; device {about['device']}",
        f"run       {about['threads']} threads, {about['dtype']}, {about['rounds']} rounds in turn "
        f"after one to warm up; load average {loads[0]} before, {loads[1]} after; freed memory "
        f"{'kept' if about['keep_memory'] else 'as the C library does by default'}",
        f"versions  {versions}",
    ]
    for size, counts in results.parameters.items():
        lines.append(f"models    {size}; parameters:")
        lines += [f"          {name}: {count:,}" for name, count in counts.items()]
    lines += [f"absent    {name}: {reason}" for name, reason in results.absent.items()]
    if any(one.contender.startswith(TORCHSCALE) for one in results.measurements):
        lines.append(f"note      {TIMM_NOTE}")
    lines += [f"fact      {name}: {value:,.0f}" for name, value in results.facts.items()]
    return lines


def times(group: list[Measurement]) -> list[str]:
    """Times of the contenders; the RetNet's speed over theirs, and their fraction of the limit."""
    first = group[0]
    limits = {one.contender: one.timing for one in group if one.contender.startswith(LIMIT)}
    head = ["", "ms", "quartiles", "tokens/s", f"{first.contender} is x faster"]
    rows = [[*head, "of the limit"] if limits else head]
    for one in group:
        ms = [1000 * x for x in (one.timing.median, one.timing.low, one.timing.high)]
        row = [
            one.contender,
            f"{ms[0]:.2f}",
            f"{ms[1]:.2f}-{ms[2]:.2f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.timing.ratio(first.timing):.2f}",
        ]
        if limits:
            limit = limits[LIMIT + NARROW if one.contender.endswith(NARROW) else LIMIT]
            row.append(f"{limit.ratio(one.timing):.2f}")
        rows.append(row)
    return format_table(rows)


def _peaks(results: Results) -> list[str]:
    cases = list(dict.fromkeys(one.case for one in results.peaks))
    rows = [["", *(case.rpartition(", ")[2] for case in cases)]]
    for name in dict.fromkeys(one.contender for one in results.peaks):
        peaks = [results.peak(case, name) for case in cases]
        rows.append([name, *(f"{x.num_bytes / 1e6:,.0f} MB" if x else "" for x in peaks)])
    return format_table(rows)


def format_targets(rows: Sequence[Target]) -> list[str]:
    """Target, figure reached, yes or no."""
    lines = [["", "target", "reached", ""]]
    for row in rows:
        sign = "at least" if row.at_least else "at most"
        value = "not measured" if row.value is None else f"{row.value:.2f}"
        verdict = {True: "yes", False: "no", None: "-"}[row.reached]
        gate = "" if row.gate is None else f" (gate {row.gate:g})"
        lines.append([row.title, f"{sign} {row.bound:g}{gate}", value, verdict])
    return format_table(lines)


def to_json(plan: Plan, results: Results, about: dict[str, Any]) -> dict[str, Any]:
    """Everything, the seconds of every round included."""
    return {
        "environment": about,
        "parameters": results.parameters,
        "absent": results.absent,
        "facts": results.facts,
        "measurements": [
            {**asdict(one), "tokens_per_second": one.tokens_per_second}
            for one in results.measurements
        ],
        "memory": [asdict(one) for one in results.peaks],
        "targets": [{**asdict(one), "reached": one.reached} for one in targets(plan, results)],
    }
