"""Trains the universal codebooks that ship with the package (adms/compressors/codebooks.py)."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from adms.compressors import codebooks

STAGES = 6


def main() -> None:
    """Writes adms/compressors/codebooks.safetensors."""
    torch.set_num_threads(1)
    books, errors = codebooks.train(STAGES)
    target = Path(codebooks.__file__).with_name("codebooks.safetensors")
    save_file({"codebooks": books.half().contiguous(), "errors": errors}, target)
    print(f"{target.name}: {STAGES} stages, errors {[round(float(e), 4) for e in errors]}")


if __name__ == "__main__":
    main()
