"""A tracker that an installed package adds: a line of tracked.txt for each step."""

from vismt.engine.trackers import TRACKERS, Tracker


@TRACKERS.register("lines")
class Lines(Tracker):
    def start(self, training, folder, settings):
        self.file = folder / "tracked.txt"

    def log(self, step, values):
        with self.file.open("a") as file:
            file.write(f"{step} {values['loss']}\n")
