"""ADMS against StreamingLLM on a data set or a text file, at equal memory.

    python examples/eval_adms_vs_streaming.py --model_name_or_path smollm2 --text_file book.txt
    python examples/eval_adms_vs_streaming.py --help

Writes config.json, environment.json, rows.csv, curve.csv, report.md and plots/ into --output_dir;
the same command goes on after an interruption. ``adms eval`` does the same and more.
"""

import argparse
from pathlib import Path

from adms.cli.options import adms_config, run_and_show
from adms.evaluation.console import user_errors
from adms.evaluation.settings import Evaluation

FLAGS = (
    ("model_name_or_path", str, "smollm2", "hub id, folder, or smollm2"),
    ("dataset_name", str, "wikitext", "data set, read as a stream"),
    ("task", str, "wikitext-2-raw-v1", "the data set's configuration"),
    ("split", str, "test", "the data set's split"),
    ("column", str, "text", "the data set's column of text"),
    ("text_file", str, None, "a file in UTF-8 (or pydoc) instead of a data set"),
    ("num_samples", int, 32, "rows joined first; with --no-concat_stream, the number of streams"),
    ("num_eval_tokens", int, 4096, "tokens of a stream; rows are added until it is reached"),
    ("start_size", int, 4, "attention sinks"),
    ("recent_size", int, 1024, "recent tokens kept exactly"),
    ("compressed_budget", int, 192, "the middle, in exact 16-bit tokens per KV head"),
    ("methods", str, "full,window,streaming,adms", "comma-separated, see adms eval --help"),
    ("log_every", int, 512, "tokens between rows of curve.csv"),
    ("output_dir", Path, Path("outputs/adms_vs_streaming"), "folder of the run"),
    ("seed", int, 0, "of intervals"),
    ("dtype", str, "auto", "float32, bfloat16, float16 or auto"),
    ("device", str, "auto", "cpu, cuda or auto"),
)
# Further parameters of ADMSConfig, at its defaults where they are not given.
PARAMETERS = (
    *("max_seq_length", "enable_dynamic_sink", "compressor_type", "rank", "num_clusters"),
    *("compression_interval", "svd_max_tokens", "importance_ratio", "importance_metric"),
    *("min_importance_tokens", "use_adaptive_budget", "coverage_segments", "coverage_priority"),
    *("anchor_mode", "enable_pos_shift", "prefill_chunk_size"),
)


def main() -> None:
    """Parses the flags and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, kind, default, about in FLAGS:
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{about} (default {default})"
        )
    for name in PARAMETERS:
        parser.add_argument(f"--{name}", metavar="VALUE", help="see ADMSConfig")
    for name, about in (
        ("concat_stream", "one stream instead of one for each sample"),
        ("equal_memory", "StreamingLLM's window is recent_size + compressed_budget"),
    ):
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=about
        )
    given = parser.parse_args()
    chosen = [f"{name}={value}" for name in PARAMETERS if (value := getattr(given, name))]
    sizes = (given.start_size, [given.compressed_budget], given.recent_size)
    with user_errors():
        evaluation = Evaluation(
            model=given.model_name_or_path,
            text=given.text_file or given.dataset_name,
            text_config=None if given.text_file else given.task,
            rows_at_a_time=given.num_samples,
            samples=1 if given.concat_stream else given.num_samples,
            tokens=given.num_eval_tokens,
            methods=tuple(given.methods.split(",")),
            config=adms_config(*sizes, chosen),
            **{name: getattr(given, name) for name in (
                "split", "column", "equal_memory", "log_every", "seed", "dtype", "device"
            )},
        )  # fmt: skip
        run_and_show(evaluation, given.output_dir, force=False)


if __name__ == "__main__":
    main()
