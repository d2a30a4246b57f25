"""Work that is done while a terminal waits for a line."""

from typing import Any, Optional

from ..errors import brief


def while_waiting(heal: Optional[Any]) -> dict[str, Any]:
    """For prompt_toolkit's prompt(): steps of ``heal`` until a key is pressed, and a line about it.

    The steps run in the thread that also types: each is short, and a key stops them.
    """
    if heal is None:
        return {}
    failed: list[str] = []

    def hook(context: Any) -> None:
        try:
            while not failed and not context.input_is_ready() and heal.step():
                pass
        except Exception as e:  # the chat matters more
            heal.forget()
            failed.append(brief(e))

    def line() -> Optional[str]:
        status = f"approximate: {failed[-1]}" if failed else heal.status
        return f" {status}" if status else None

    return {"inputhook": hook, "bottom_toolbar": line, "refresh_interval": 0.5}
