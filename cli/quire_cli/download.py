"""Bring a model's files into a volume, verified and complete, or check that they are there. What download Jobs run."""

import argparse
import logging
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from quire_contract import environment
from quire_contract.model_facts import DOWNLOAD_FAILED, ModelFacts, encode_facts
from quire_contract.model_uri import ModelUri, ModelUriError, Scheme, parse_model_uri
from quire_contract.paths import MODELS_MOUNT
from quire_contract.ports import DOWNLOAD_PROGRESS
from quire_contract.termination import TerminationMessage, write_termination, write_termination_log
from quire_contract.units import format_bytes
from quire_server.download.errors import STAGE, DownloadError
from quire_server.download.job import DownloadRequest, download
from quire_server.download.progress import Meter, console_reports, describe, progress_server
from quire_server.shared.logs import configure_logging

EXIT_USAGE = 2

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="hf://, s3://, gs://, http(s)://….gguf, or pvc:// (checked only)")
    parser.add_argument("--revision", help="branch, tag or commit, of a model on the Hub (default: main)")
    parser.add_argument(
        "--directory", type=Path, default=Path(MODELS_MOUNT), help="root of the volume (default: %(default)s)"
    )
    parser.add_argument(
        "--progress-port",
        type=_port,
        default=DOWNLOAD_PROGRESS,
        help="answer GET /progress and /livez here; 0: any free port (default: %(default)s)",
    )
    parser.add_argument(
        "--check-path", metavar="PATH", help="pvc:// only: where in the volume the model is (default: as the URI says)"
    )
    parser.epilog = (
        f"Tokens: ${environment.HF_TOKEN} for hf://, ${environment.HTTP_TOKEN} for http(s)://. Buckets: the usual "
        "variables and files of AWS and Google Cloud. What a stopped download has fetched is kept and used."
    )


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return port


def run(arguments: argparse.Namespace) -> int:
    """Download. Exit codes: 0 complete, 1 failed, 2 wrong arguments, 128 + signal stopped."""
    configure_logging()
    try:
        uri = parse_model_uri(arguments.uri)
    except ModelUriError as error:
        return _fail(DownloadError(f"{error}.", hint="Correct spec.model.uri."), EXIT_USAGE)
    if arguments.check_path is not None and uri.scheme is not Scheme.PVC:
        return _fail(DownloadError(f"--check-path is for pvc://, not for {uri.scheme}://."), EXIT_USAGE)
    if arguments.revision is not None and uri.scheme is not Scheme.HF:
        logger.warning("%s:// has no revisions: %r only names the directory", uri.scheme, arguments.revision)
    meter = Meter()
    _stop_on_signals(meter)
    request = DownloadRequest(
        uri=uri,
        revision=arguments.revision,
        directory=arguments.directory,
        token=_token(uri),
        check_path=arguments.check_path,
    )
    try:
        with ExitStack() as stack:
            _report(stack, arguments.progress_port, meter)
            facts = download(request, meter)
    except DownloadError as error:
        exit_code = _fail(error, 1)
        sys.stdout.flush()
        os._exit(exit_code)  # a connection that no longer answers would hold up the end
    return _succeed(facts, request)


def _token(uri: ModelUri) -> str | None:
    """Return the token for this kind of source. Two variables, so that no other host is given the Hub's."""
    name = environment.HF_TOKEN if uri.scheme is Scheme.HF else environment.HTTP_TOKEN
    return os.environ.get(name, "").strip() or None


def _report(stack: ExitStack, port: int, meter: Meter) -> None:
    try:
        actual_port = stack.enter_context(progress_server(port, meter))
    except OSError as error:
        logger.warning("No progress over HTTP: port %d: %s", port, error.strerror)
    else:
        logger.info("Progress at http://localhost:%d/progress", actual_port)
    stack.enter_context(console_reports(meter))


def _succeed(facts: ModelFacts, request: DownloadRequest) -> int:
    encoded = encode_facts(facts)
    write_termination_log(encoded)
    at = f" at {facts.revision}" if facts.revision else ""
    logger.info(
        "%s%s is complete in %s: %s",
        request.uri.shown, at, request.directory / facts.path, format_bytes(facts.bytes),
    )  # fmt: skip
    if facts.shape is None:
        logger.warning("Whether it fits a replica cannot be told: %s", facts.shape_error)
    print(encoded.decode(), flush=True)
    return 0


def _fail(error: DownloadError, exit_code: int) -> int:
    write_termination(error.termination)
    logger.error("%s: %s %s", error.termination.code, error, error.termination.hint)
    return exit_code


def _stop_on_signals(meter: Meter) -> None:
    """On SIGTERM or SIGINT end at once, whatever the connections do: what is on the disk is good at any moment."""

    def stop(number: int, frame: FrameType | None) -> None:
        message = f"Stopped by {signal.Signals(number).name} ({describe(meter.progress)}); the next try goes on there."
        write_termination(TerminationMessage(code=DOWNLOAD_FAILED, stage=STAGE, message=message))
        os.write(sys.stderr.fileno(), f"{message}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
