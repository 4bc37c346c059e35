"""Where a search keeps its trials: an Optuna study in a database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from bevel.core.errors import SearchError, one_line
from bevel.core.recipe import Recipe, SearchSection, completed
from bevel.pipeline.folder import first_difference
from bevel.searching.objectives import OBJECTIVES


def default_storage(folder: Path) -> str:
    """The SQLite file in the search's folder."""
    return f"sqlite:///{folder / 'study.db'}"


def open_study(url: str, recipe: Recipe, section: SearchSection) -> optuna.Study:
    """The recipe's study in a database, new or taken up.

    Raises:
        SearchError: the database does not open, or it holds a search of another recipe under this
            name.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=RDBStorage(url),
            study_name=recipe.name,
            directions=[OBJECTIVES[name].direction for name in section.objectives],
            load_if_exists=True,
        )
        theirs = study.user_attrs.get("recipe")
        unused = not study.get_trials(deepcopy=False)
    except (SQLAlchemyError, ImportError, RuntimeError) as error:
        cause = getattr(error, "orig", None) or error
        raise SearchError(
            f"the storage {_without_password(url)} does not open: {one_line(cause, 160)}; "
            "expected a URL such as sqlite:///study.db or postgresql://host/name"
        ) from error
    ours: dict[str, Any] = recipe.model_dump(mode="json")
    ours["search"] = section.model_dump(mode="json")
    if theirs is None and unused:
        study.set_user_attr("recipe", ours)
    elif (difference := first_difference(completed(theirs or {}), ours)) is not None:
        raise SearchError(
            f"{_without_password(url)} holds a search '{recipe.name}' of another recipe "
            f"({one_line(difference, 160)}); choose another --out, --storage or name"
        )
    return study


def _without_password(url: str) -> str:
    """The URL as it may be shown."""
    scheme, separator, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    user = credentials.partition(":")[0]
    return f"{scheme}{separator}{user}{at}{place}"
