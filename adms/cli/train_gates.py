"""``adms train-gates``: gates of a model, for ``enable_adms_llm(adaptive_update=...)``."""

from pathlib import Path
from typing import Annotated

import typer

from adms.cli import options
from adms.evaluation.console import console, progress, user_errors
from adms.evaluation.models import load_model
from adms.evaluation.texts import collect_ids
from adms.outputs import ready_file


def main(
    output: Annotated[Path, typer.Option(help="The gates, a safetensors file.")],
    model: options.Model = options.DEFAULT_MODEL,
    text: options.Text = options.DEFAULT_TEXT,
    text_config: options.TextConfig = None,
    split: options.Split = "train",
    column: options.Column = "text",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to train on.")] = 50_000,
    offset: options.Offset = 0,
    admission: Annotated[
        float,
        typer.Option(help="Share of the tokens that keep an entry of their own, mean over layers."),
    ] = 0.6,
    block_tokens: Annotated[int, typer.Option(help="Tokens that are decided on together.")] = 64,
    recent: Annotated[int, typer.Option(help="Tokens that a query sees exactly.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens of an excerpt.")] = 1024,
    rows: Annotated[int, typer.Option(help="Excerpts a step.")] = 1,
    measured: Annotated[
        int, typer.Option(help="Excerpts on which the layers' shares are measured.")
    ] = 4,
    steps: Annotated[
        int, typer.Option(help="Steps of the optimiser; 0 sets the layers' shares alone.")
    ] = 100,
    learning_rate: Annotated[float, typer.Option(help="At the start.")] = 0.01,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Trains gates that decide which tokens are folded, by distillation of the model's own logits.

    First it measures how many tokens each layer can do without.

    The model stays as it is. A checkpoint beside the output is written every ten steps; the same
    command goes on from it.

    Example:

    - `adms train-gates --output gates.safetensors --steps 100`
    """
    with user_errors():
        # Enabling, training and the model's family take a while to import.
        from adms.gates.training import GateTraining, train_gates

        training = GateTraining(
            admission=admission,
            block_tokens=block_tokens,
            recent=recent,
            length=length,
            rows=rows,
            measured=measured,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
        )
        ready_file(output)
        loaded, tokenizer = load_model(model, dtype=dtype, device=device)
        ids = collect_ids(
            tokenizer,
            text,
            config=text_config,
            split=split,
            column=column,
            num_tokens=tokens,
            offset=offset,
        )
        checkpoint = output.with_name(output.name + ".checkpoint")
        losses: list[float] = []
        with progress(steps, "training gates", "step") as bar:

            def on_step(done: int, loss: float) -> None:
                losses.append(loss)
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}")

            def on_measure(done: int, count: int) -> None:
                bar.set_postfix_str(f"shares of layers: {done} of {count} measurements")

            gates = train_gates(
                loaded,
                ids[0],
                training,
                checkpoint=checkpoint,
                on_step=on_step,
                on_measure=on_measure,
            )
        gates.save(output)
        checkpoint.unlink(missing_ok=True)
        size = sum(value.numel() * value.element_size() for value in loaded.parameters())
        last = losses[-10:]
        loss = f"loss {sum(last) / len(last):.4f} nats, " if last else ""
        console().print(
            f"written to {output}: {loss}{gates.nbytes:,} bytes, "
            f"{gates.nbytes / size:.4%} of the model",
            markup=False,
        )
