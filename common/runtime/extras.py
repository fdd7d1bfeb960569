"""Packages that a server or worker does without: the extra `explore` of this project has them."""

from __future__ import annotations

import importlib.util

from roundtable.common.runtime.errors import UsageError

#: Names on the package index, by names that are imported.
_EXPLORE = {"PIL": "pillow", "faiss": "faiss-cpu", "matplotlib": "matplotlib", "mlxtend": "mlxtend", "sklearn": "scikit-learn"}


def require(what: str, *modules: str) -> None:
    """Raise UsageError with the command to run, unless these modules can be imported. `what` needs them."""
    missing = [_EXPLORE.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        is_one = len(missing) == 1
        raise UsageError(
            f"{what} needs {' and '.join(missing)}, which {'is' if is_one else 'are'} not installed: "
            "run pip install 'roundtable-ps[explore]' (in a checkout: pip install -e '.[explore]')."
        )
