"""The service's addresses: plans, what it is and how it is, and the page."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.serving.body import BoundedBody, RefusalResponse
from fastdrive_jax.serving.config import ServeConfig
from fastdrive_jax.serving.demo import DemoDrive
from fastdrive_jax.serving.jobs import Answer, Job
from fastdrive_jax.serving.metrics import Metrics
from fastdrive_jax.serving.pictures import read_picture
from fastdrive_jax.serving.refusals import Refusal
from fastdrive_jax.serving.requests import COMMANDS, PlanRequest, check_cameras, parse_request
from fastdrive_jax.serving.worker import Worker

log = logging.getLogger(__name__)

STEP_SECONDS = 0.5  # between waypoints, see `inference.policy.Plan`
STOP_SECONDS = 1.0  # that the model has to end its batch
_MOST_FILES, _MOST_JSON = 32, 2**16
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Service:
    """What the addresses answer from.

    Attributes:
        config: Of the service.
        model: Config of the driving model.
        method: Name of the pruning method.
        worker: That plans.
        metrics: Of it.
        demo: Drives that the page can play.
        decoders: Bounds how many pictures are decoded at once, and with them the memory.
        bodies: Of the requests for plans that are open; for the event loop's thread.
    """

    config: ServeConfig
    model: DrivingConfig
    method: str
    worker: Worker
    metrics: Metrics
    demo: Sequence[DemoDrive] = ()
    decoders: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(os.cpu_count() or 1))
    bodies: set[BoundedBody] = field(default_factory=set)


def make_app(service: Service) -> Starlette:
    """The ASGI application; the worker starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.worker.start()
        yield
        if not await to_thread.run_sync(service.worker.stop, STOP_SECONDS):
            log.warning("the model is still at work and is left behind")

    def to(handler: Callable) -> Callable:
        async def endpoint(request: Request) -> Response:
            return await handler(service, request)

        return endpoint

    pages = [Route(path, _page(*named)) for path, named in _PAGE.items()]
    routes = [
        Route("/v1/plan", to(_plan), methods=["POST"]),
        Route("/v1/info", to(_info)),
        Route("/v1/demo/{drive:int}/{frame:int}", to(_demo_frame)),
        Route("/v1/demo/{drive:int}/{frame:int}/{camera}", to(_demo_picture)),
        Route("/healthz", to(_healthz)),
        Route("/readyz", to(_readyz)),
        Route("/metrics", to(_metrics)),
    ]
    return Starlette(
        routes=pages + routes,
        lifespan=lifespan,
        middleware=_host_check(service.config.host),
        exception_handlers={HTTPException: _http_error},
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _plan(service: Service, request: Request) -> Response:
    body = BoundedBody(request.receive, service.config.limits)
    begun = time.perf_counter()
    try:
        with _admitted(service, body):
            content = await _planned(service, request, body, begun)
        response: Response = JSONResponse(content)
        service.metrics.seconds.labels("total").observe(time.perf_counter() - begun)
    except Refusal as refusal:
        response = _refuse(service, refusal, body)
    except HTTPException as error:  # of the multipart parser
        refusal = Refusal(error.status_code, "multipart", f"The request is damaged: {error.detail}")
        response = _refuse(service, refusal, body)
    except ClientDisconnect:
        response = _refuse(service, Refusal(400, "disconnected", "The client left."), None)
    except Exception:
        log.exception("a plan failed")
        fault = Refusal(500, "fault", "The service failed at this frame; its log says how.")
        response = _refuse(service, fault, body)
    service.metrics.requests.labels(response.status_code).inc()
    return response


def _refuse(service: Service, refusal: Refusal, body: BoundedBody | None) -> Response:
    service.metrics.refused.labels(refusal.reason).inc()
    return RefusalResponse(refusal, body)


@contextlib.contextmanager
def _admitted(service: Service, body: BoundedBody) -> Iterator[None]:
    """Counts a request as open; refuses one too many while none of its body is read.

    Not uvicorn's own limit: that counts idle connections too, and answers before this app does.
    """
    service.worker.check_open()
    if len(service.bodies) >= service.config.limits.connections:
        raise Refusal(
            503,
            "busy",
            f"{len(service.bodies)} requests are open already; come back in a second.",
            {"Retry-After": "1"},
        )
    service.bodies.add(body)
    try:
        yield
    finally:
        service.bodies.remove(body)


async def _received(
    service: Service, request: Request, body: BoundedBody
) -> tuple[PlanRequest, dict[str, bytes]]:
    """What is asked, and the pictures' files by camera."""
    body.check_announced(request.headers.get("content-length"))
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refusal(
            415,
            "multipart",
            "A plan is asked for with multipart/form-data: the part 'request' with JSON and one "
            "picture for each camera.",
        )
    parts = Request(request.scope, body)
    async with parts.form(
        max_files=_MOST_FILES, max_fields=_MOST_FILES, max_part_size=_MOST_JSON
    ) as form:
        files = [(name, value) for name, value in form.multi_items() if name != "request"]
        text = form.get("request")
        if text is None:
            raise Refusal(422, "request", "The part 'request' with the JSON is missing.")
        if isinstance(text, UploadFile):  # of which the form has no bound
            text = await text.read(_MOST_JSON + 1)
        if len(text) > _MOST_JSON:
            raise Refusal(413, "request", f"The part 'request' has over {_MOST_JSON} bytes.")
        asked = parse_request(text, service.config.ratios)
        check_cameras([name for name, _ in files], service.model.cameras)
        return asked, {
            name: await value.read() if isinstance(value, UploadFile) else value.encode()
            for name, value in files
        }


async def _decoded(service: Service, encoded: Mapping[str, bytes]) -> np.ndarray:
    """Pixels of all cameras."""
    model = service.model
    given = model.image_size, service.config.limits.megapixels
    images = await asyncio.gather(
        *(
            to_thread.run_sync(read_picture, encoded[name], name, *given, limiter=service.decoders)
            for name in model.cameras
        )
    )
    return np.stack(images)


async def _planned(
    service: Service, request: Request, body: BoundedBody, begun: float
) -> dict[str, Any]:
    limits, model = service.config.limits, service.model
    asked, encoded = await _received(service, request, body)
    received = time.perf_counter()
    images = await _decoded(service, encoded)
    del encoded  # much larger than what waits
    queued = time.perf_counter()
    job = Job(asked, images, begun, queued)
    waiting = service.worker.submit(job)
    try:
        answer = await asyncio.wait_for(asyncio.wrap_future(waiting), limits.answer_seconds)
    except TimeoutError as error:
        job.given_up.set()
        raise Refusal(
            504, "answer_slow", f"No plan within {limits.answer_seconds:g} s; the frame is dropped."
        ) from error
    times = {
        "receive": 1e3 * (received - begun),
        "decode": 1e3 * (queued - received),
        "queue": answer.queue_ms,
        "model": answer.model_ms,
    }
    for stage, spent in times.items():
        service.metrics.seconds.labels(stage).observe(spent / 1e3)
    times["total"] = 1e3 * (time.perf_counter() - begun)
    return plan_content(model, asked.drive, answer, times)


def plan_content(
    model: DrivingConfig, drive: str | None, answer: Answer, times: Mapping[str, float]
) -> dict[str, Any]:
    """The JSON of a plan.

    Args:
        model: Config of the driving model.
        drive: Its name; None without one.
        answer: Of the worker.
        times: Milliseconds of stages.
    """
    planned, budget = answer.planned, answer.budget
    steps = len(planned.waypoints)
    memory = "none"
    if drive is not None and planned.memory is not None:
        memory = "kept" if planned.remembered else "new"
    return {
        "waypoints": [[round(float(v), 3) for v in point] for point in planned.waypoints],
        "times": [STEP_SECONDS * (step + 1) for step in range(steps)],
        "kept": kept_by_camera(model, planned.kept),
        "keep_ratio": budget.keep_ratio,
        "kept_tokens": len(planned.kept),
        "visual_tokens": model.visual_tokens,
        "drive": drive,
        "frame": answer.frame,
        "memory": memory,
        "target_ms": budget.target_ms,
        "target_met": budget.target_ms and times["total"] <= budget.target_ms,
        "timings_ms": {stage: round(spent, 3) for stage, spent in times.items()},
        "batch": answer.batch,
        "notes": list(answer.notes),
    }


def kept_by_camera(model: DrivingConfig, kept: np.ndarray) -> dict[str, list[list[int]]]:
    """Row and column of each kept token, by camera."""
    rows, columns = model.token_grid
    each = rows * columns
    return {
        name: [
            list(divmod(int(place) - each * number, columns))
            for place in kept
            if number == place // each
        ]
        for number, name in enumerate(model.cameras)
    }


async def _info(service: Service, request: Request) -> Response:
    model, config, ready = service.model, service.config, service.worker.ready
    return JSONResponse(
        {
            "cameras": model.cameras,
            "image_size": model.image_size,
            "token_grid": model.token_grid,
            "visual_tokens": model.visual_tokens,
            "waypoints": model.vocabulary.steps,
            "step_seconds": STEP_SECONDS,
            "frame_of_reference": "ego: x forward, y left, metres",
            "commands": COMMANDS,
            "method": service.method,
            "ready": ready is not None,
            "progress": service.worker.progress,
            "remembers": ready is not None and ready.programs.temporal,
            "ratios": sorted(config.ratios, reverse=True),
            "target_ms": config.target_ms,
            "batch_sizes": config.batch_sizes,
            "buckets": []
            if ready is None
            else [
                {"batch": size, **asdict(bucket)}
                for size, measured in ready.times.items()
                for bucket in measured.buckets
            ],
            "limits": asdict(config.limits),
            "demo": [
                {"name": one.name, "frames": one.frames, "period": one.period}
                for one in service.demo
            ],
        }
    )


async def _demo_frame(service: Service, request: Request) -> Response:
    frame = await _drawn(service, request)
    return JSONResponse(
        {
            "speed": frame.speed,
            "command": COMMANDS[frame.command],
            "driven": [list(point) for point in frame.driven],
        }
    )


async def _demo_picture(service: Service, request: Request) -> Response:
    frame, camera = await _drawn(service, request), request.path_params["camera"]
    if camera not in frame.pictures:
        raise HTTPException(404, f"There is no camera {camera!r}.")
    return Response(frame.pictures[camera], media_type="image/jpeg")


async def _drawn(service: Service, request: Request):
    number, frame = request.path_params["drive"], request.path_params["frame"]
    if number >= len(service.demo) or frame >= service.demo[number].frames:
        raise HTTPException(404, f"There is no frame {frame} of a demo drive {number}.")
    return await to_thread.run_sync(service.demo[number].draw, frame)


async def _healthz(service: Service, request: Request) -> Response:
    return PlainTextResponse("ok\n")


async def _readyz(service: Service, request: Request) -> Response:
    if service.worker.ready is None:
        return PlainTextResponse(f"{service.worker.progress}\n", 503, {"Retry-After": "5"})
    return PlainTextResponse("ready\n")


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _page(name: str, kind: str) -> Callable:
    content = (resources.files("fastdrive_jax") / "serving" / "page" / name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return page


def _host_check(host: str) -> list[Middleware]:
    """Other sites can't reach a loopback service under a name of theirs."""
    if not is_loopback(host):
        return []
    allowed = ["127.0.0.1", "localhost", "[::1]", host]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=allowed)]


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)
