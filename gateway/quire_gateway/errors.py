"""The errors that the gateway itself answers, in OpenAI's shape. Answers of the servers pass through untouched."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from quire_gateway.backends import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayError(Exception):
    """An answer other than the model's."""

    status: int
    reason: str
    """A word for programs."""
    message: str
    retry_after_s: int | None = None

    def body(self) -> bytes:
        """The JSON body, `{"error": {...}}`, with the keys of the servers' own: `code` is the status, as in vLLM."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.status, "reason": self.reason}
        return msgspec.json.encode({"error": error})

    def sse(self) -> bytes:
        """The same as the end of a stream whose headers are already sent."""
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        return headers


def model_not_found(model: str) -> GatewayError:
    return GatewayError(status=404, reason="model_not_found", message=f"The model `{model}` does not exist.")


def no_model_named(host: str) -> GatewayError:
    message = f"No model is named: not by a field `model` in the body, nor by the host `{host}`."
    return GatewayError(status=404, reason="model_not_found", message=message)


def ambiguous_model(models: Sequence[Model]) -> GatewayError:
    hosts = ", ".join(f"{model.name}.{model.namespace}.svc" for model in models)
    message = f"Several namespaces have a model of this name. Name one by the host: {hosts}."
    return GatewayError(status=400, reason="ambiguous_model", message=message)


def model_suspended(name: str) -> GatewayError:
    return GatewayError(
        status=503, reason="model_suspended", message=f"The model `{name}` is suspended (spec.suspend is true)."
    )


def model_loading(name: str, status: str, retry_after_s: int) -> GatewayError:
    return GatewayError(
        status=503,
        reason="model_loading",
        message=f"The model `{name}` is not ready: {status}.",
        retry_after_s=retry_after_s,
    )


def queue_full(name: str, waiting: int, retry_after_s: int) -> GatewayError:
    return GatewayError(
        status=429,
        reason="queue_full",
        message=f"{waiting} requests already wait for the model `{name}`, which is as many as may.",
        retry_after_s=retry_after_s,
    )


def bad_request(message: str) -> GatewayError:
    return GatewayError(status=400, reason="invalid_request", message=message)


def replica_failed(name: str, cause: str) -> GatewayError:
    return GatewayError(
        status=502, reason="replica_failed", message=f"No replica of the model `{name}` could answer: {cause}."
    )
