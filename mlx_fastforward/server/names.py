"""mlx-lm's functions under other names: its server is a few long functions without seams."""

import types
from typing import Any, Callable


def renamed(function: Any, **names: Any) -> Callable[..., Any]:
    """A copy of a module's function, or method, in which these global names mean something else.

    Raises NameError where it does not use a name: mlx-lm has changed.
    """
    for name in names:
        if name not in _all_names(function.__code__):
            raise NameError(f"{function.__qualname__} no longer uses {name}.")
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _all_names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_all_names, inner))
