"""Starts and ends the service."""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
import uvicorn

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.latency import choose_bucket, miss_sentence
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.serving.app import Service, make_app
from fastdrive_jax.serving.config import ServeConfig
from fastdrive_jax.serving.demo import DemoDrive
from fastdrive_jax.serving.metrics import Metrics
from fastdrive_jax.serving.programs import compile_programs, time_programs
from fastdrive_jax.serving.sites import is_loopback
from fastdrive_jax.serving.worker import Ready, Worker

FINISH_SECONDS = 2  # that requests in flight have; of 5, the model and Python's end need the rest

Say = Callable[[str], None]


def make_server(
    policy: DrivingPolicy,
    params: dict,
    config: ServeConfig,
    demo: Sequence[DemoDrive] = (),
    say: Say = lambda text: None,
) -> tuple[uvicorn.Server, Service]:
    """A server that `run` starts; its worker compiles once that runs.

    Args:
        policy: Model and method.
        params: {"vla": ..., "pruner": ...}.
        config: Of the service.
        demo: Drives that the page can play.
        say: Takes sentences for who started the service.
    """
    metrics = Metrics()

    def prepare(progress: Callable[[str], None]) -> Ready:
        def compiled(done: int, count: int) -> None:
            progress(f"compiling: {done} of {count} programs")

        programs = compile_programs(
            policy, params, config.ratios, config.batch_sizes, config.seed, compiled
        )
        times = time_programs(programs, progress=lambda: progress("measuring the programs"))
        ready = Ready(programs, times)
        for line in ready_lines(ready, config):
            say(line)
        return ready

    def give_up() -> None:
        server.should_exit = True

    worker = Worker(prepare, config, metrics, give_up)
    service = Service(config, policy.model.config, policy.pruner.name, worker, metrics, demo)
    server = http_server(service)  # which `give_up` means
    return server, service


def http_server(service: Service) -> uvicorn.Server:
    """What speaks HTTP for a service."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            http="h11",  # closes a connection whose body it does not want, see `serving.body`
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FINISH_SECONDS,
        )
    )


def serve(
    policy: DrivingPolicy, params: dict, config: ServeConfig, demo: Sequence[DemoDrive] = ()
) -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes what is in flight.

    Where a program is still being compiled then, this ends the process, with exit code 0.

    Raises:
        UserError: The address cannot be listened on, or the policy cannot be compiled.
    """
    listening = listen(config.host, config.port)
    server, service = make_server(policy, params, config, demo, _say)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _say(f"http://{shown}:{port} opens at once; plans come once all programs are compiled.")
    if not is_loopback(config.host):
        _say(f"Whoever reaches {config.host} can ask for plans: there is no log-in.")
    with ended_by_signals(server):
        server.run(sockets=[listening])
    if not service.worker.stop(0):
        _leave()
    if service.worker.failure is not None:
        raise service.worker.failure


def _leave() -> NoReturn:
    """Ends the process beside a thread that compiles, which nothing can stop.

    Python's own end would take such a thread from under XLA, which aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """While inside, SIGTERM and Ctrl-C end the server, and neither the process nor its exit code.

    uvicorn listens to signals once it runs, and raises them again when it has ended.
    """
    numbers = signal.SIGTERM, signal.SIGINT
    before = {number: signal.signal(number, server.handle_exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: The address is taken, or not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, UnicodeError) as error:  # a name that is no name is no OSError
        why = str(getattr(error, "strerror", None) or error).partition(" (while ")[0]
        raise UserError(
            f"{host}:{port} cannot be listened on ({why}); name another --port or --host."
        ) from error


def ready_lines(ready: Ready, config: ServeConfig) -> list[str]:
    """What was measured, and whether the target can be met."""
    buckets = ready.times[1].buckets
    lines = [f"Ready on {jax.devices()[0]}; a frame takes"]
    lines += [
        f"  {one.keep_ratio:5.0%} kept ({one.tokens} tokens): {one.median_ms:.1f} ms, "
        f"nine of ten at most {one.median_ms * ready.load:.1f} ms"
        for one in buckets
    ]
    if config.target_ms is not None:
        choice = choose_bucket(buckets, config.target_ms, ready.load)
        if choice.meets:
            lines.append(
                f"{config.target_ms:g} ms are met by {choice.bucket.keep_ratio:g} and below."
            )
        else:
            lines.append(miss_sentence(choice, config.target_ms))
    return lines


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
