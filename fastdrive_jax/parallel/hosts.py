"""Joining the hosts of a job, and what they must agree on.

Call `connect` before anything else that uses JAX's devices.
"""

import functools
import hashlib
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError

_REFUSAL_BYTES = 4096  # of a sentence that a host tells the others


@dataclass(frozen=True)
class HostsConfig:
    """Which hosts (processes) train together; by default this one alone.

    Attributes:
        coordinator: "host:port" of host 0, the same on all of them; the port must be free there.
        count: Number of hosts.
        index: Index of this host, from 0.
        auto: Let JAX find all three: on TPU pods, SLURM, Open MPI and Kubernetes.
        start_seconds: How long to wait for the others at the start.
        heartbeat_seconds: A host that is silent for this long is considered dead, which ends all
            others, whatever they are waiting for, so that the whole job can be restarted.
        end_seconds: How long a host that has finished waits for the others, which may still be
            writing; a host that failed with an error ends them after that time.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    auto: bool = False
    start_seconds: int = 300
    heartbeat_seconds: int = 60
    end_seconds: int = 300

    def __post_init__(self):
        named = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        given = [name for name, value in named.items() if value is not None]
        if self.auto and given:
            raise UserError(
                f"auto finds all by itself, so {', '.join(given)} must not be given beside it."
            )
        if given and len(given) < len(named):
            absent = ", ".join(name for name in named if name not in given)
            raise UserError(
                f"{absent} must be given too: several hosts need coordinator, count and index, or "
                "auto alone."
            )
        if given:
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isdecimal() and 0 < int(port) < 2**16):
                raise UserError(f"coordinator={self.coordinator!r} must read HOST:PORT.")
            check_least(self, count=1)
            if not 0 <= self.index < self.count:
                raise UserError(
                    f"index={self.index} must be at least 0 and less than count={self.count}."
                )
        check_least(self, start_seconds=1, heartbeat_seconds=1, end_seconds=1)

    @property
    def several(self) -> bool:
        """Whether hosts are to be joined."""
        return self.auto or self.coordinator is not None


def connect(config: HostsConfig) -> None:
    """Joins the hosts of a job if `config` asks for it; afterwards `jax.devices` are those of all.

    Once joined, the same call does nothing. JAX ends a process whose others do not come in time or
    die later, so that is no exception here.

    Raises:
        UserError: `auto` found nothing, the port is taken, or this process belongs to another job.
        RuntimeError: JAX's devices were used before.
    """
    if not config.several:
        return
    if jax.distributed.is_initialized():
        _check_same(config)
        return
    # CPUs run programs that do not wait for each other at once, in an order of their own on each
    # host; two that both talk to the other hosts then wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    start = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=config.start_seconds,
        heartbeat_timeout_seconds=config.heartbeat_seconds,
        shutdown_timeout_seconds=config.end_seconds,
    )
    if config.auto:
        try:
            start()
        except ValueError as error:
            raise UserError(
                f"auto found no job of several hosts here ({error}); give coordinator, count and "
                "index."
            ) from error
        return
    if config.index == 0:
        _check_port(config)
    # Said before, since JAX ends the process if they do not come.
    note = f"host {config.index} of {config.count}: waiting for the others at {config.coordinator}"
    print(f"{note}, at most {config.start_seconds} s", file=sys.stderr, flush=True)
    # What a cluster says of itself is not mixed with what was given.
    start(config.coordinator, config.count, config.index, cluster_detection_method="deactivate")


def _check_port(config: HostsConfig) -> None:
    """Host 0 listens there, and JAX may crash where it cannot."""
    port = int(config.coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"Host 0 cannot listen at port {port} of coordinator={config.coordinator!r} "
            f"({error.strerror}); choose a free one."
        ) from error


def _check_same(config: HostsConfig) -> None:
    here = (jax.process_count(), jax.process_index())
    if not config.auto and here != (config.count, config.index):
        raise UserError(
            f"This process is host {here[1]} of {here[0]} already, so it cannot become host "
            f"{config.index} of {config.count}; start another process."
        )


def refuse_together(check: Callable[[], None]) -> None:
    """Runs a check on every host; if one refuses, all do.

    Without this the others would wait for that one until JAX ends them.

    Args:
        check: may do something else on each host.

    Raises:
        UserError: what the first host that refuses has raised.
    """
    refusal = ""
    try:
        check()
    except UserError as error:
        refusal = str(error)
        if jax.process_count() == 1:
            raise
    text = np.zeros(_REFUSAL_BYTES, np.uint8)
    content = refusal.encode()[:_REFUSAL_BYTES]
    text[: len(content)] = list(content)
    for told in np.asarray(multihost_utils.process_allgather(text)).reshape(-1, _REFUSAL_BYTES):
        if told.any():
            raise UserError(bytes(told.tolist()).rstrip(b"\0").decode(errors="ignore"))


def on_first(check: Callable[[], None]) -> None:
    """Runs something on host 0 that may refuse to go on; then all hosts refuse alike.

    Raises:
        UserError: what host 0 raised.
    """
    refuse_together(check if jax.process_index() == 0 else lambda: None)


def all_alike(what: str, value: Any) -> None:
    """Refuses hosts that were started with different settings, weights or data.

    They would train what is meant to be one copy apart, without an error.

    Args:
        what: names the value in the refusal.
        value: anything whose `repr` tells it apart.

    Raises:
        UserError: on all hosts, if it differs.
    """
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1, digest.size)
    other = [host for host, own in enumerate(found) if not np.array_equal(own, found[0])]
    if other:
        raise UserError(
            f"{what} of host {', '.join(map(str, other))} differs from host 0's; start all hosts "
            "with the same command, library, weights and data."
        )


def sees_what_first_wrote(path: Path) -> None:
    """Refuses hosts that do not share a folder.

    Args:
        path: a file that host 0 has written.

    Raises:
        UserError: on all hosts, if one does not see it.
    """
    found = np.asarray(multihost_utils.process_allgather(np.array([path.exists()]))).reshape(-1)
    if not found.all():
        raise UserError(
            f"Host {int(np.argmin(found))} does not see {path}, which host 0 has written: all "
            "hosts must share the folder of the run."
        )
