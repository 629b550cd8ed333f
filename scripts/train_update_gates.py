"""Trains admission gates of a model; the same as ``adms train-gates``, whose options it takes.

python scripts/train_update_gates.py --output gates.safetensors [--model ...] [--steps 100]
"""

import typer

from adms.cli.train_gates import main

if __name__ == "__main__":
    typer.run(main)
