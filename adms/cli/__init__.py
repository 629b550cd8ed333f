"""The command ``adms``: one subcommand a file, registered by one line here."""

import typer

from adms.cli import bench, chat, evaluate, inspect, passkey, report, stream, train_gates

app = typer.Typer(
    name="adms",
    help="Endless streams in bounded memory: measure what a cache remembers, and look inside one.",
    no_args_is_help=True,
    # Paragraphs of the docstrings are filled to the terminal's width.
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("eval")(evaluate.main)
app.command("report")(report.main)
app.command("bench")(bench.main)
app.command("passkey")(passkey.main)
app.command("inspect")(inspect.main)
app.command("chat")(chat.chat)
app.command("stream")(stream.stream)
app.command("train-gates")(train_gates.main)
