"""Scenarios times profiles: a folder for each, and one report over all."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from adms.errors import ADMSError, ADMSValueError
from adms.evaluation.console import console, show
from adms.evaluation.models import model_source
from adms.evaluation.needles import KINDS
from adms.evaluation.plots.suite import plot_suite
from adms.evaluation.processes import this_process
from adms.evaluation.report import display, without_empty
from adms.evaluation.run_folder import Row, csv_text, differing, markdown_table, write_atomic
from adms.evaluation.runner import SUMMARY, folder_config, forget, run_evaluation
from adms.evaluation.scenarios import Scenario
from adms.evaluation.settings import PERPLEXITY, SPEED, Evaluation, Profile
from adms.outputs import ready_folder
from adms.patches import FAMILIES

DEFAULT_ROOT = "outputs/auto_adms_runs"


@dataclass(frozen=True)
class Failure:
    """A scenario that could not run, and why."""

    scenario: str
    profile: str
    reason: str


def trained_positions(name: str) -> int | None:
    """Positions a model was trained on, from its configuration alone; None for any distance."""
    source = model_source(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ADMSValueError(f"cannot load the configuration of {name!r}: {error}") from error
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family.max_positions(config)
    return getattr(config, "max_position_embeddings", None)


def to_evaluation(scenario: Scenario, profile: Profile, device: str) -> Evaluation:
    """What a scenario measures with a profile's memory."""
    config = profile.config(scenario.tokens, trained_positions(scenario.model))
    retrieval = bool(set(scenario.tasks) & set(KINDS))
    return Evaluation(
        model=scenario.model,
        text=scenario.dataset,
        text_config=scenario.task,
        split=scenario.split,
        tasks=scenario.tasks,
        methods=scenario.methods,
        config=config,
        tokens=scenario.tokens,
        offset=scenario.offset,
        lengths=(scenario.tokens,),
        depths=scenario.depths,
        trials=scenario.samples if retrieval else 1,
        rows_at_a_time=scenario.samples,
        log_every=scenario.log_every,
        dtype=scenario.dtype,
        device=device,
        scenario=scenario.name,
        profile=profile.name,
    )


def run_suite(
    scenarios: list[Scenario],
    profiles: list[Profile],
    root: Path,
    *,
    command: str,
    force: bool = False,
    device: str = "auto",
) -> list[Failure]:
    """Runs what has no summary.json yet, and reports over everything.

    A scenario that cannot run does not stop the others, nor does one whose folder holds results of
    another configuration.

    Returns:
        The scenarios that failed for a reason the user can put right.
    """
    failures = []
    out = console()
    is_main = this_process().is_main_process
    if force:
        # First for all, so that a kill on the way leaves nothing old among the new.
        _mark_forced(root, scenarios, profiles)
    for scenario in scenarios:
        for profile in profiles:
            folder = root / scenario.name / profile.name
            finished = (folder / SUMMARY).is_file()
            if is_main:
                state = ": finished before" if finished else ""
                style = "none" if finished else "bold"
                out.print(f"{scenario.name} {profile.name}{state}", markup=False, style=style)
            try:
                evaluation = to_evaluation(scenario, profile, device)
                if finished:
                    _require_same(evaluation, folder)
                    continue
                run_evaluation(evaluation, folder, command=command)
            except ADMSError as error:
                reason = " ".join(str(error).split())
                failures.append(Failure(scenario.name, profile.name, reason))
                if is_main:
                    out.print(f"  not run: {reason}", markup=False)
    this_process().wait_for_everyone()
    if is_main:
        # Where nothing could run, nothing has made it.
        ready_folder(root)
        aggregate(root, command, failures)
    return failures


def _require_same(evaluation: Evaluation, folder: Path) -> None:
    names = differing(folder, folder_config(evaluation))
    if names:
        raise ADMSValueError(
            f"{str(folder)!r} holds results of another configuration (different: "
            f"{', '.join(names)}); run it again with FORCE_RERUN=1, or use another folder"
        )


def _mark_forced(root: Path, scenarios: list[Scenario], profiles: list[Profile]) -> None:
    if this_process().is_main_process:
        for scenario in scenarios:
            for profile in profiles:
                forget(root / scenario.name / profile.name)
    this_process().wait_for_everyone()


def collect(root: Path) -> list[Row]:
    """The summaries of all finished runs under a folder, by path.

    Raises:
        ADMSValueError: the folder does not exist or a summary is damaged.
    """
    if not root.is_dir():
        raise ADMSValueError(f"no folder {str(root)!r}; run adms report first")
    rows: list[Row] = []
    for file in sorted(root.glob(f"**/{SUMMARY}")):
        try:
            rows += json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ADMSValueError(
                f"{str(file)!r} is damaged ({error}); delete it and run again"
            ) from error
    return rows


def aggregate(root: Path, command: str, failures: list[Failure]) -> list[Row]:
    """Writes report.csv, report.md and plots over all finished runs under ``root``."""
    rows = collect(root)
    write_atomic(root / "report.csv", csv_text(rows))
    parts = [
        "# ADMS against StreamingLLM\n",
        "Every row has model, data set and context; every comparison is at equal bytes unless "
        "`equal_memory` says no. Each folder beside this file has its own report, rows and "
        "configuration.\n",
    ]
    for task in (PERPLEXITY, *KINDS, SPEED):
        own = [row for row in rows if row["task"] == task]
        if not own:
            continue
        shown = [
            {**{name: row[name] for name in _WHERE}, **one}
            for row, one in zip(own, display(own, task), strict=True)
        ]
        parts.append(f"## {task}\n\n{markdown_table(without_empty(shown), show)}")
        if task == PERPLEXITY and any("perplexity" in row for row in own):
            plot_suite(root / "plots" / "perplexity.png", own)
            parts.append("![perplexity over StreamingLLM](plots/perplexity.png)\n")
    if failures:
        lines = "\n".join(f"- {one.scenario} {one.profile}: {one.reason}" for one in failures)
        parts.append(f"## Not run\n\n{lines}\n")
    parts.append(f"```\n{command}\n```\n")
    write_atomic(root / "report.md", "\n".join(parts))
    return rows


_WHERE = ("scenario", "profile", "model", "dataset", "context")
