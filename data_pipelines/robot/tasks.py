"""The tabletop's tasks: which object, and whether it is lifted or put in the tray."""

from dataclasses import dataclass

SHAPES = ("cube", "ball", "cylinder")
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.80, 0.10),
    "purple": (0.50, 0.15, 0.65),
}
DISTRACTORS = (3, 5)  # fewest and most


@dataclass(frozen=True)
class Thing:
    """A small object, known by what it looks like."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        """As in instructions."""
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
        target: The object.
        place: Into the tray; otherwise it is to be lifted.
    """

    target: Thing
    place: bool

    @property
    def instruction(self) -> str:
        """As a person would say it."""
        if self.place:
            return f"put the {self.target.name} in the tray"
        return f"pick up the {self.target.name}"


# Frozen: a task is known by its number in this list, and so are results and demonstrations.
TASKS = (
    Task(Thing("red", "cube"), place=False),
    Task(Thing("green", "ball"), place=False),
    Task(Thing("blue", "cylinder"), place=False),
    Task(Thing("yellow", "cube"), place=True),
    Task(Thing("blue", "ball"), place=True),
    Task(Thing("red", "cylinder"), place=True),
)
