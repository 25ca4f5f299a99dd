"""The engine's events."""

import contextlib
import logging
import queue
import threading
import time
from dispatcher_docker.observe import Watch


class SlowEngine:
    """An engine that takes half a second to answer; its clock shows 00:00:10 then."""

    def __init__(self):
        self.since = queue.SimpleQueue()
        self.ended = threading.Event()

    @contextlib.contextmanager
    def call(self, doing, deadline):
        time.sleep(0.5)
        yield self

    def info(self):
        return {"SystemTime": "1970-01-01T00:00:10.000000000Z"}

    def events(self, since, **_):
        self.since.put(float(since))
        self.ended.wait(10)
        return iter(())


def test_a_change_right_after_the_beginning_of_a_watch_is_reported():
    engine = SlowEngine()
    watch = Watch(engine, "0a1b2c3d", lambda name: None, logging.getLogger("test"))
    try:
        assert 9 < engine.since.get(timeout=10) <= 9.5, "events since the watch began are requested"
    finally:
        engine.ended.set()
        watch.close()
