"""What stands for the processes of a comparison in tests."""

from functools import partial


class Inline:
    """Runs in this process, and at once, what workers would run in others."""

    def __init__(self, function, jobs, threads):
        self.function, self.results, self.unfinished = function, {}, 0
        self.ticks, self.error, self.warned = 0, None, []

    def submit(self, name, *arguments):
        self.unfinished += 1
        try:
            keep = partial(self.results.__setitem__, name)
            self.results[name] = self.function(*arguments, self.tick, lambda: None, keep)
        except Exception as error:
            self.error = error

    def tick(self, count):
        self.ticks += count

    def wait(self, seconds):
        if self.error is not None:
            raise self.error
        self.unfinished = 0
        ticks, self.ticks = self.ticks, 0
        return ticks

    def stop(self, hurry):
        pass
