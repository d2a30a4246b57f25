"""mlx-lm's request handler, with our statistics."""

from typing import Any

from mlx_lm.server import APIHandler

from .requests import Asked


class Handler(APIHandler):
    """One request of one client."""

    asked: Asked

    def handle_chat_completions(self) -> Asked:
        return self._ask(super().handle_chat_completions())

    def handle_text_completions(self) -> Asked:
        return self._ask(super().handle_text_completions())

    def _ask(self, request: Any) -> Asked:
        self.asked = Asked(**vars(request), sparsity=self.body.get("sparsity"))
        return self.asked

    def generate_response(self, *args: Any, **kwargs: Any) -> dict:
        response = super().generate_response(*args, **kwargs)
        return self._with_report(response)

    def completion_usage_response(self, *args: Any, **kwargs: Any) -> dict:
        return self._with_report(super().completion_usage_response(*args, **kwargs))

    def _with_report(self, response: dict) -> dict:
        report = self.asked.report.rounded()
        if usage := response.get("usage"):
            del report["cached_tokens"]  # where OpenAI has it, by mlx-lm
            usage.update(report)
        elif response["choices"][0]["finish_reason"] is not None:
            response["fastforward"] = report
        return response
