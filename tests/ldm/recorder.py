"""A tracker that notes what it is given."""

from typing import ClassVar

from accelerate import tracking
from accelerate.tracking import GeneralTracker


class Recorder(GeneralTracker):
    """A class as accelerate's, under the name "recorder"."""

    name, requires_logging_directory, main_process_only = "recorder", False, False
    made: ClassVar[list["Recorder"]] = []

    def __init__(self, project: str, **options: object) -> None:
        super().__init__()
        self.project, self.options, self.calls = project, options, []
        self.made.append(self)

    @classmethod
    def register(cls, monkeypatch) -> type["Recorder"]:
        """Let accelerate know it, in this test."""
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", cls)
        monkeypatch.setattr(cls, "made", [])
        return cls

    tracker = property(lambda self: self)

    def start(self):
        self.calls.append(("start",))

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step=None, **more):
        self.calls.append(("log", values, step))

    def log_images(self, values, step=None, **more):
        self.calls.append(("images", values, step))

    def finish(self):
        self.calls.append(("finish",))
