"""Runs an evaluation into its folder: resumable, and shared by several processes."""

from pathlib import Path
from typing import Any

from adms.errors import ADMSError
from adms.evaluation.console import console, progress
from adms.evaluation.models import load_model
from adms.evaluation.processes import this_process
from adms.evaluation.report import write_report
from adms.evaluation.run_folder import Row, RunFolder, environment, write_json
from adms.evaluation.settings import PERPLEXITY, SPEED, Evaluation
from adms.evaluation.summary import summarize
from adms.evaluation.units import Bench, Unit, plan
from adms.outputs import ready_folder

SUMMARY = "summary.json"


def run_evaluation(
    evaluation: Evaluation,
    folder: Path,
    *,
    command: str,
    force: bool = False,
    calibration: Any = None,
) -> list[Row]:
    """Does what is not done yet and writes everything that follows from it.

    Under ``accelerate launch`` the pieces of work are dealt out to the processes; the first one
    writes the rows, which are those of a single process.

    Args:
        evaluation: what to measure.
        folder: where results are and go.
        command: the command line, for the report.
        force: forget finished work first.
        calibration: for ADMS; what ``calibrate`` returned or wrote.

    Returns:
        The summary's rows (in every process).

    Raises:
        ADMSValueError: a wrong name, file or size; nothing finished is lost.
    """
    state = this_process()
    ready_folder(folder)
    if force and state.is_main_process:
        forget(folder)
    state.wait_for_everyone()
    with state.main_process_first():
        target = RunFolder(folder, folder_config(evaluation, calibration))
    units = plan(evaluation)
    keys = [unit.key for unit in units]
    kept = sum(map(target.is_done, keys))
    if kept and state.is_main_process:
        # Else figures of code that has changed since would pass for new ones.
        console().print(
            f"{kept} of {len(keys)} results are from an earlier run in {folder}; forced, they are "
            "measured again",
            markup=False,
        )
    # Dealt from the whole plan: what is open changes while the others work.
    dealt = units[state.process_index :: state.num_processes]
    mine = [unit for unit in dealt if not target.is_done(unit.key)]
    if mine:
        _work(evaluation, target, mine, calibration)
    state.wait_for_everyone()
    missing = [key for key in keys if not target.is_done(key)]
    if missing:
        raise ADMSError(
            f"{len(missing)} of {len(keys)} pieces of work are not done, since another process "
            "stopped; what is done is kept, run the same command to go on"
        )
    if state.is_main_process:
        rows = target.write_rows(keys)
        # A run that was complete keeps the surroundings it was made in.
        if mine or not (folder / "environment.json").is_file():
            write_json(folder / "environment.json", environment())
        summary = summarize(evaluation, target, units, rows)
        write_report(evaluation, target, units, summary, command)
        # Last: its presence says that the run is complete.
        write_json(folder / SUMMARY, summary)
    state.wait_for_everyone()
    return summarize(evaluation, target, units, target.rows(keys))


def folder_config(evaluation: Evaluation, calibration: Any = None) -> dict[str, Any]:
    """What decides a run's results, for its folder."""
    return {**evaluation.to_dict(), "calibrated": calibration is not None}


def forget(folder: Path) -> None:
    """Deletes what a run finished, and nothing that is not a run's."""
    (folder / SUMMARY).unlink(missing_ok=True)
    for pattern in ("*.json", "*.npz"):
        for file in (folder / "items").glob(pattern):
            file.unlink()


def _work(evaluation: Evaluation, folder: RunFolder, units: list[Unit], calibration: Any) -> None:
    model, tokenizer = load_model(evaluation.model, evaluation.dtype, evaluation.device)
    bench = Bench(evaluation, model, tokenizer, calibration)
    for unit in units:
        total = evaluation.tokens if unit.task in (PERPLEXITY, SPEED) else unit.length
        with progress(total, f"{unit.label:32}") as bar:
            rows, arrays = bench.run(unit, bar.update)
        folder.finish(unit.key, rows, arrays)
