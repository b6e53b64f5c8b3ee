"""Which model a request is for. Pure: a Host header and a model name in, a model out."""

from quire_gateway import errors
from quire_gateway.backends import Backends, Model, key_of


def match_model(backends: Backends, *, host: str, model: str | None) -> Model | None:
    """Match by Host, else by the `model` field of the body.

    A Host names a model in full (`<name>.<namespace>[.svc[.…]][.]`, any port), or by its first label alone, as a pod of
    the same namespace calls it. Host wins, because a Service of one model must never answer with another; there the
    server itself refuses a `model` that it does not serve.

    Raises:
        GatewayError: models of several namespaces are meant alike; the choices are named.
    """
    labels = host.rsplit(":", 1)[0].rstrip(".").lower().split(".")
    if len(labels) == 1:
        found = backends.named(labels[0])
    else:
        in_full = backends.get(key_of(labels[1], labels[0]))
        found = () if in_full is None else (in_full,)
    if not found and model is not None:
        found = backends.serving(model)
    if len(found) > 1:
        raise errors.ambiguous_model(found)
    return found[0] if found else None
