"""The file that tells a gateway which models there are and where they answer, for a gateway that watches no cluster.

Owns the file's shape and its checks; knows no process. Every model of it is ready: a static gateway never waits for a
replica to come, so a model without one is an error of the file.
"""

from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import yaml

from quire_contract.nesting import bounded_nesting
from quire_gateway.backends import Backend, Model

HTTP_PORT = 80


class ConfigError(ValueError):
    """The file cannot be used. The message names the file and the field."""


class StaticModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    name: str
    namespace: str
    served_names: tuple[str, ...] = ()
    """What clients may say in `model`. Empty: the name."""
    backends: tuple[str, ...]
    """Base URLs, `http://host[:port]`."""


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    models: tuple[StaticModel, ...] = ()


def load_models(path: Path) -> tuple[Model, ...]:
    """Read the file.

    Raises:
        ConfigError: it is missing or no YAML, a field is unknown or wrong, or a model is there twice.
    """
    try:
        with bounded_nesting():
            loaded = yaml.safe_load(path.read_text())
            config = msgspec.convert({} if loaded is None else loaded, GatewayConfig)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    models: dict[str, Model] = {}
    for index, entry in enumerate(config.models):
        where = f"{path}: models[{index}]"
        model = _build_model(entry, where)
        if model.key in models:
            raise ConfigError(f"{where}: {model.key} is there twice; give one entry all of its backends")
        models[model.key] = model
    return tuple(models.values())


def _build_model(entry: StaticModel, where: str) -> Model:
    for field in ("name", "namespace"):
        if not getattr(entry, field):
            raise ConfigError(f"{where}.{field}: must not be empty")
    if not entry.backends:
        raise ConfigError(f"{where}.backends: must name at least one URL, such as http://{entry.name}:8000")
    return Model(
        namespace=entry.namespace,
        name=entry.name,
        served_names=entry.served_names or (entry.name,),
        backends=tuple(_parse_backend(url, f"{where}.backends[{i}]") for i, url in enumerate(entry.backends)),
    )


def _parse_backend(url: str, where: str) -> Backend:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{where}: {url!r}: {error}") from error
    if parts.scheme != "http" or not host or parts.path not in ("", "/") or parts.query or parts.username:
        raise ConfigError(f"{where}: must be http://host[:port] and nothing else, and is {url!r}")
    return Backend(host=f"[{host}]" if ":" in host else host, port=HTTP_PORT if port is None else port)
