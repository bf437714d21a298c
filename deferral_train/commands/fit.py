"""`deferral-train fit`: train a head with Lightning's own command line (``--config --model.* --data.*
--trainer.*``).
"""

from __future__ import annotations

from collections.abc import Sequence

RAW_ARGUMENTS = True


def run(words: Sequence[str]) -> int:
    """Fit, test nothing else; every flag is LightningCLI's. Raises InputError on bad settings or traces."""
    from deferral_train.training.cli import main

    return main(list(words))
