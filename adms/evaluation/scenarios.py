"""Named scenarios, the language they are written in, and runs over all of them.

A scenario is ``name=... model=... dataset=... task=... split=... samples=... tokens=...
log_every=...``; several stand in one string, each beginning with ``name=``.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from adms.errors import ADMSValueError
from adms.evaluation.methods import DEFAULT_COMPARISON, check_methods
from adms.evaluation.models import SMOLLM2
from adms.evaluation.settings import PERPLEXITY, PROFILES, TASKS, Profile
from adms.evaluation.texts import PYDOC

_WIKITEXT = "dataset=wikitext task=wikitext-103-raw-v1 split=test"

_BUILT_IN = f"""
name=tinyllama_2k model=TinyLlama/TinyLlama-1.1B-Chat-v1.0 {_WIKITEXT} samples=32 tokens=2048 log_every=256
name=tinyllama_4k model=TinyLlama/TinyLlama-1.1B-Chat-v1.0 {_WIKITEXT} samples=64 tokens=4096 log_every=256
name=opt13b_2k model=facebook/opt-1.3b {_WIKITEXT} samples=32 tokens=2048 log_every=256
name=opt13b_4k model=facebook/opt-1.3b {_WIKITEXT} samples=64 tokens=4096 log_every=256
name=llama3_8k model=meta-llama/Meta-Llama-3-8B-Instruct {_WIKITEXT} samples=64 tokens=8192 log_every=512
name=llama3_16k model=meta-llama/Meta-Llama-3-8B-Instruct {_WIKITEXT} samples=128 tokens=16384 log_every=1024
name=llama3_32k model=meta-llama/Meta-Llama-3-8B-Instruct {_WIKITEXT} samples=256 tokens=32768 log_every=2048
name=pythia69b_2k model=EleutherAI/pythia-6.9b {_WIKITEXT} samples=32 tokens=2048 log_every=256
name=pythia69b_8k model=EleutherAI/pythia-6.9b {_WIKITEXT} samples=64 tokens=8192 log_every=512
name=falcon7b_2k model=tiiuae/falcon-7b {_WIKITEXT} samples=32 tokens=2048 log_every=256
name=falcon7b_8k model=tiiuae/falcon-7b {_WIKITEXT} samples=64 tokens=8192 log_every=512
name=mpt7b_2k model=mosaicml/mpt-7b {_WIKITEXT} samples=32 tokens=2048 log_every=256
name=mpt7b_8k model=mosaicml/mpt-7b {_WIKITEXT} samples=64 tokens=8192 log_every=512
"""  # noqa: E501

_OFFLINE = f"""
name=smollm2_4k model={SMOLLM2} dataset={PYDOC} tokens=4096 log_every=256 offset=2000 methods=full,window,streaming,adms,int4
name=smollm2_passkey_1k model={SMOLLM2} dataset={PYDOC} tokens=1536 offset=2000 tasks=passkey methods=full,streaming,adms samples=1 depths=0.3,0.5
"""  # noqa: E501

_LOCAL = "dataset={text} tokens=1536 log_every=128 methods=full,window,streaming,adms"

ASSETS = "ADMS_TEST_ASSETS"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model on a text of some length.

    Attributes:
        name: of its folder and in tables.
        model, dataset, task, split: what to load; ``task`` is the data set's configuration.
        samples: rows of a data set that are joined first; more are read until ``tokens`` is
            reached. For retrieval, the number of trials.
        tokens: length of the stream.
        log_every: tokens between two rows of curve.csv.
        offset: tokens left out at the start.
        methods, tasks, depths: what is measured.
        dtype: of the weights.
    """

    name: str
    model: str
    dataset: str = "wikitext"
    task: str | None = None
    split: str = "test"
    samples: int = 64
    tokens: int = 4096
    log_every: int = 512
    offset: int = 0
    methods: tuple[str, ...] = DEFAULT_COMPARISON
    tasks: tuple[str, ...] = (PERPLEXITY,)
    depths: tuple[float, ...] = (0.3, 0.5, 0.7)
    dtype: str = "auto"


def parse_scenarios(text: str) -> list[Scenario]:
    """Scenarios from their string.

    Raises:
        ADMSValueError: an unknown or missing key, a value of the wrong kind, a name twice.
    """
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ADMSValueError(f"cannot read the scenarios: {error} in {text!r}") from error
    groups: list[dict[str, str]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ADMSValueError(
                f"a scenario is made of key=value words, got {word!r}; e.g. name=mine "
                "model=smollm2 dataset=pydoc tokens=2048"
            )
        if key == "name":
            groups.append({})
        if not groups:
            raise ADMSValueError(f"a scenario begins with name=..., got {word!r} before it")
        if key in groups[-1]:
            raise ADMSValueError(f"{key}= stands twice in scenario {groups[-1]['name']!r}")
        groups[-1][key] = value
    found = [_scenario(group) for group in groups]
    names = [scenario.name for scenario in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ADMSValueError(f"two scenarios are called {twice[0]!r}; give each its own name")
    return found


def _scenario(words: dict[str, str]) -> Scenario:
    known = Scenario.__dataclass_fields__
    unknown = sorted(set(words) - set(known))
    if unknown:
        raise ADMSValueError(
            f"scenario {words['name']!r} has an unknown key {unknown[0]!r}; the keys are "
            f"{', '.join(known)}"
        )
    if not words.get("model") or not words["name"]:
        raise ADMSValueError(f"scenario {words['name']!r} needs name=... and model=...")
    if not words["name"].replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise ADMSValueError(
            f"scenario name {words['name']!r} becomes a folder; use letters, digits, '-', '_', '.'"
        )
    values: dict[str, object] = dict(words)
    for key in ("samples", "tokens", "log_every", "offset"):
        if key in words:
            if not words[key].isdecimal():
                raise ADMSValueError(
                    f"{key} of scenario {words['name']!r} must be a whole number, got "
                    f"{words[key]!r}"
                )
            values[key] = int(words[key])
    for key in ("methods", "tasks"):
        if key in words:
            values[key] = tuple(words[key].split(","))
    if "depths" in words:
        try:
            values["depths"] = tuple(float(depth) for depth in words["depths"].split(","))
        except ValueError as error:
            raise ADMSValueError(
                f"depths of scenario {words['name']!r} must be numbers in 0..1 with commas "
                f"between, got {words['depths']!r}"
            ) from error
    scenario = Scenario(**values)  # type: ignore[arg-type]
    check_methods(list(scenario.methods))
    unknown = [task for task in scenario.tasks if task not in TASKS]
    if unknown:
        raise ADMSValueError(f"unknown task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    return scenario


def built_in() -> list[Scenario]:
    """The models and lengths of the published comparison; they need a network and a GPU."""
    return parse_scenarios(_BUILT_IN)


def offline() -> list[Scenario]:
    """What runs without a network: SmolLM2, and the models in ``$ADMS_TEST_ASSETS/models``."""
    found = parse_scenarios(_OFFLINE)
    folder = os.environ.get(ASSETS)
    models = sorted(Path(folder, "models").glob("*/config.json")) if folder else []
    for file in models:
        if any(folder == str(file.parent) for folder in (one.model for one in found)):
            continue
        text = Path(folder or "", "text", "handbook.txt")
        name = text if text.is_file() else PYDOC
        words = _LOCAL.format(text=shlex.quote(str(name)))
        model = shlex.quote(str(file.parent))
        found += parse_scenarios(f"name={file.parent.name}_1k model={model} {words}")
    return found


def choose_scenarios(wanted: str | None) -> list[Scenario]:
    """Scenarios from what SCENARIOS says.

    Args:
        wanted: None or empty for the built-in ones, ``"offline"``, names of built-in or offline
            scenarios with spaces or commas between, or scenarios written out.
    """
    if not wanted or not wanted.strip() or wanted.strip() == "built-in":
        return built_in()
    if "=" in wanted:
        return parse_scenarios(wanted)
    known = {one.name: one for one in [*built_in(), *offline()]}
    found: list[Scenario] = []
    for name in wanted.replace(",", " ").split():
        if name == "offline":
            found += offline()
        elif name in known:
            found.append(known[name])
        else:
            raise ADMSValueError(
                f"no scenario is called {name!r}; use offline, built-in, {', '.join(known)}, or "
                "write one out: name=mine model=smollm2 dataset=pydoc tokens=2048"
            )
    return found


def choose_profiles(wanted: str | None) -> list[Profile]:
    """Profiles from what PROFILES says; None or empty for all."""
    names = (wanted or "").replace(",", " ").split() or list(PROFILES)
    for name in names:
        if name not in PROFILES:
            raise ADMSValueError(f"no profile is called {name!r}; use {' or '.join(PROFILES)}")
    return [PROFILES[name] for name in dict.fromkeys(names)]
