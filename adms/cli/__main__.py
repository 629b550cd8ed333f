"""``python -m adms.cli``, which ``accelerate launch -m adms.cli`` needs."""

from adms.cli import app

app(prog_name="adms")
