"""From ``compressor_type`` to a compressor, refusing parameters it has no use for."""

from adms.compressors.base import COMPRESSORS, Compressor
from adms.compressors.custom import adapt
from adms.config import ADMSConfig
from adms.errors import ADMSValueError

# Parameters that some compressors use and others do not.
SPECIFIC = frozenset({"rank", "num_clusters", "svd_max_tokens"})


def resolve_compressor(config: ADMSConfig) -> Compressor | None:
    """The compressor a configuration means; None where there is no budget to compress into.

    Raises:
        ADMSTypeError: an object without the contract, given or registered.
        ADMSValueError: an unknown name, or a parameter given that the compressor does not use.
    """
    chosen = config.compressor_type
    compressor = adapt(COMPRESSORS.get(chosen) if isinstance(chosen, str) else chosen)
    unused = sorted((config.explicit & SPECIFIC) - compressor.parameters)
    if unused:
        users = [
            name
            for name in COMPRESSORS
            if unused[0] in getattr(COMPRESSORS.get(name), "parameters", ())
        ]
        raise ADMSValueError(
            f"{unused[0]} was given, but compressor {compressor.name!r} does not use it; leave it "
            f"out or choose one of: {', '.join(users)}"
        )
    return compressor if config.compressed_budget else None
