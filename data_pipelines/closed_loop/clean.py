"""Routes of the world on which its own driver meets no trouble."""

from data_pipelines.closed_loop.events import judge
from data_pipelines.closed_loop.route import Route, state_rows, world_route
from data_pipelines.synthetic.config import WorldConfig


def clean_routes(
    config: WorldConfig, split: str, first: int, count: int, seconds: float
) -> list[Route]:
    """The first `count` routes from scene `first` on that the world's driver drives untouched.

    In about one scene of a hundred a parked bus reaches into the mouth of a side road that is
    turned into, which the world's driver does not look out for. Such a scene is left out.
    """
    found: list[Route] = []
    index = first
    while len(found) < count:
        route = world_route(config, split, index, seconds)
        if not judge(route, state_rows(route.reference)).collision:
            found.append(route)
        index += 1
    return found
