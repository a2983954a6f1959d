"""The service's addresses: plans, what it is and how it is, and the page."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from importlib import resources
from typing import Any

import numpy as np
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.serving.body import BoundedBody, RefusalResponse
from fastdrive_jax.serving.config import ServeConfig
from fastdrive_jax.serving.content import STEP_SECONDS, plan_content
from fastdrive_jax.serving.demo import DemoDrive, DemoFrame
from fastdrive_jax.serving.jobs import Answer, Job
from fastdrive_jax.serving.metrics import Metrics
from fastdrive_jax.serving.pictures import read_picture
from fastdrive_jax.serving.refusals import Refusal
from fastdrive_jax.serving.requests import COMMANDS, PlanRequest, check_cameras, parse_request
from fastdrive_jax.serving.sites import check_host, check_origin, own_names
from fastdrive_jax.serving.worker import Worker, ending

log = logging.getLogger(__name__)

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
    decoders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count()))
    bodies: set[BoundedBody] = field(default_factory=set)


def make_app(service: Service) -> Starlette:
    """The ASGI application; the worker starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.worker.start()
        yield
        if not await to_thread.run_sync(service.worker.stop, STOP_SECONDS):
            log.warning("the model is still at work and is left behind")

    names = own_names(service.config.host)

    def to(handler: Callable) -> Callable:
        async def endpoint(request: Request) -> Response:
            check_host(request, names)
            return await handler(service, request)

        return endpoint

    pages = [Route(path, to(_page(*named))) for path, named in _PAGE.items()]
    routes = [
        Route("/v1/plan", to(_plan), methods=["POST"]),
        Route("/v1/info", to(_info)),
        Route("/v1/demo/{drive}/{frame}", to(_demo_frame)),
        Route("/v1/demo/{drive}/{frame}/{camera}", to(_demo_picture)),
        Route("/healthz", to(_healthz)),
        Route("/readyz", to(_readyz)),
        Route("/metrics", to(_metrics)),
    ]
    return Starlette(
        routes=pages + routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, Refusal: _refused},
    )


async def _plan(service: Service, request: Request) -> Response:
    body = BoundedBody(request.receive, service.config.limits, service.bodies)
    begun = time.perf_counter()
    try:
        check_origin(request)
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
    except asyncio.CancelledError:  # the service ends, and has waited long enough
        response = _refuse(service, ending(), None)
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
    model, loop = service.model, asyncio.get_running_loop()
    given = model.image_size, service.config.limits.megapixels
    images = await asyncio.gather(
        *(
            loop.run_in_executor(service.decoders, read_picture, encoded[name], name, *given)
            for name in model.cameras
        )
    )
    return np.stack(images)


async def _planned(
    service: Service, request: Request, body: BoundedBody, begun: float
) -> dict[str, Any]:
    seconds = service.config.limits.answer_seconds
    asked, encoded = await _received(service, request, body)
    received = time.perf_counter()
    waiting = _answered(service, asked, encoded, body, begun)
    answer, queued = await _while_connected(request, waiting, seconds)
    times = {
        "receive": 1e3 * (received - begun),
        "decode": 1e3 * (queued - received),
        "queue": answer.queue_ms,
        "model": answer.model_ms,
    }
    for stage, spent in times.items():
        service.metrics.seconds.labels(stage).observe(spent / 1e3)
    times["total"] = 1e3 * (time.perf_counter() - begun)
    content = plan_content(service.model, asked.drive, answer, times)
    service.metrics.missed.inc(content["target_met"] is False or answer.budget.met is False)
    return content


async def _answered(
    service: Service,
    asked: PlanRequest,
    encoded: dict[str, bytes],
    body: BoundedBody,
    begun: float,
) -> tuple[Answer, float]:
    """The worker's answer, and when the frame joined its queue."""
    images = await _decoded(service, encoded)
    encoded.clear()  # much larger than what waits
    body.held = 0
    job = Job(asked, images, begun, time.perf_counter())
    try:
        return await asyncio.wrap_future(service.worker.submit(job)), job.queued
    except asyncio.CancelledError:
        job.given_up.set()
        raise


async def _while_connected(
    request: Request, waiting: Coroutine[Any, Any, tuple[Answer, float]], seconds: float
) -> tuple[Answer, float]:
    """What is waited for; given up if it takes too long or the client leaves.

    Raises:
        Refusal: 504.
        ClientDisconnect: It left.
    """
    answer, left = asyncio.ensure_future(waiting), asyncio.ensure_future(request.receive())
    both = answer, left
    try:
        done, _ = await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in both:
            one.cancel()
    if answer in done:
        return answer.result()
    if left in done:  # the body is read: nothing else can come
        raise ClientDisconnect
    raise Refusal(504, "answer_slow", f"No plan within {seconds:g} s; the frame is dropped.")


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
        raise HTTPException(404, "The demo drives have no such camera.")
    return Response(frame.pictures[camera], media_type="image/jpeg")


async def _drawn(service: Service, request: Request) -> DemoFrame:
    # Looked up as text: of thousands of digits Python makes no number.
    number, frame = request.path_params["drive"], request.path_params["frame"]
    drive = {str(at): one for at, one in enumerate(service.demo)}.get(number)
    frames = {str(at): at for at in range(drive.frames)} if drive else {}
    if frame not in frames:
        raise HTTPException(404, "The demo drives have no such frame.")
    return await to_thread.run_sync(drive.draw, frames[frame])


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

    async def page(service: Service, request: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return page


async def _http_error(request: Request, error: HTTPException) -> Response:
    reason = HTTPStatus(error.status_code).name.lower()
    content = {"error": str(error.detail), "reason": reason}
    return JSONResponse(content, error.status_code, error.headers)


async def _refused(request: Request, refusal: Refusal) -> Response:
    return RefusalResponse(refusal)
