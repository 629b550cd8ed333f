"""``adms report``: scenarios and profiles, one folder each, and one report over all."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from adms.cli import options
from adms.evaluation.console import USER_ERROR, console, user_errors
from adms.evaluation.scenarios import choose_profiles, choose_scenarios
from adms.evaluation.suite import DEFAULT_ROOT, aggregate, collect, run_suite


def main(
    scenarios: Annotated[
        str,
        typer.Option(
            envvar="SCENARIOS",
            help="offline, built-in, names of scenarios, or scenarios written out: name=... "
            "model=... dataset=... task=... split=... samples=... tokens=... log_every=..., "
            "each beginning with name=. Empty: built-in.",
        ),
    ] = "",
    profiles: Annotated[
        str,
        typer.Option(
            envvar="PROFILES",
            help="balanced (memory of an eighth of the context, at most a quarter of the trained "
            "length), quality (a quarter, at most half), or both with a comma. Empty: both.",
        ),
    ] = "",
    output_root: Annotated[
        Path, typer.Option(envvar="OUTPUT_ROOT", help="Folder over all runs.")
    ] = Path(DEFAULT_ROOT),
    force_rerun: Annotated[
        bool,
        typer.Option(envvar="FORCE_RERUN", help="Run again what has a summary.json."),
    ] = False,
    only_collect: Annotated[
        bool, typer.Option("--only-collect", help="Run nothing; report over what is there.")
    ] = False,
    device: options.Device = "auto",
) -> None:
    """Runs scenarios and writes one report (CSV, Markdown, plots) over them.

    Memory is half recent window, half compressed budget, and 4 sinks; all else is the default
    configuration. A kill loses nothing: the same command goes on with what is not done, and
    scenarios with a summary.json are left alone; one of another configuration is named as not run.

    Built-in scenarios (they need a network and a GPU): TinyLlama and OPT-1.3B 2k-4k, Llama-3-8B
    8k-32k, Pythia-6.9B, Falcon-7B and MPT-7B 2k-8k, on WikiText-103. Offline: SmolLM2, and the
    models of $ADMS_TEST_ASSETS/models.

    Examples:

    - `adms report --scenarios offline`

    - `adms report --scenarios "name=mine model=smollm2 dataset=pydoc tokens=2048"
      --profiles quality`
    """
    # In full, since part of it may have come from the environment.
    words = ["adms", "report", "--output-root", str(output_root)]
    words += ["--scenarios", scenarios] if scenarios else []
    words += ["--profiles", profiles] if profiles else []
    command = shlex.join(words)
    with user_errors():
        if only_collect:
            rows = aggregate(output_root, command, []) if collect(output_root) else []
            console().print(f"{len(rows)} rows in {output_root}/report.md", markup=False)
            return
        chosen = choose_scenarios(scenarios)
        failures = run_suite(
            chosen,
            choose_profiles(profiles),
            output_root,
            command=command,
            force=force_rerun,
            device=device,
        )
        console().print(f"written to {output_root}: report.md, report.csv, plots/", markup=False)
    if failures:
        names = ", ".join(f"{one.scenario} {one.profile}" for one in failures)
        print(
            f"error: {len(failures)} not run ({names}); first reason: {failures[0].reason}",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
