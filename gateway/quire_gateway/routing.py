"""Which model a request is for. Pure: a Host header and a model name in, a model out."""

from collections.abc import Iterable

from quire_gateway.backends import Model


def match_model(models: Iterable[Model], *, host: str, model: str | None) -> Model | None:
    """Match by Host (`<name>.<namespace>[.svc[.…]]`, any port), else by the `model` field of the body.

    Host wins, because a Service of one model must never answer with another; there the server itself refuses a
    `model` that it does not serve. The first match in order of age wins where two namespaces serve one name.
    """
    known = tuple(models)
    labels = host.rsplit(":", 1)[0].lower().split(".")
    if len(labels) >= 2:
        for candidate in known:
            if labels[0] == candidate.name and labels[1] == candidate.namespace:
                return candidate
    if model is not None:
        for candidate in known:
            if model in candidate.served_names:
                return candidate
    return None
