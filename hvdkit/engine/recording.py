"""What was done, for statistics and the timeline: one recorder a channel, one track each."""

from __future__ import annotations

from collections.abc import Sequence

from hvdkit.collectives.barrier import barrier
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.engine.requests import Operation
from hvdkit.engine.stats import Stats
from hvdkit.engine.timeline import Timeline, measure_offset, merge, remove_parts
from hvdkit.errors import ArgumentError, HvdkitError


class Recording:
    """All that is recorded on this rank; the timeline comes and goes."""

    def __init__(self) -> None:
        self.stats = Stats()
        self.timeline: Timeline | None = None
        self._path = ""

    def start(self, group: Group, path: str) -> None:
        """Begin a timeline.  Collective.

        Raises:
            ArgumentError: on every rank, if there is one already, or a rank cannot write its part.
        """
        group.agree(Call("start_timeline", None, (("file_path", path),)))
        if self.timeline is not None:
            raise ArgumentError("a timeline is being written already; call stop_timeline() first")
        if group.rank == 0:
            remove_parts(path, group.size)
        offset = measure_offset(group.transport)
        trouble, timeline = "", None
        try:
            timeline = Timeline(path, rank=group.rank, size=group.size, offset_seconds=offset)
        except HvdkitError as exc:
            trouble = str(exc)
        troubles = [text for text in group.transport.allgather_object(trouble) if text]
        if troubles:
            if timeline is not None:
                timeline.close()
            raise ArgumentError(troubles[0])
        self.timeline, self._path = timeline, path

    def stop(self, group: Group) -> None:
        """End the timeline; rank 0 joins the parts.  Collective."""
        timeline, self.timeline = self.timeline, None
        assert timeline is not None
        timeline.close()
        barrier(group, name=None, algorithm="auto")
        if group.rank == 0:
            merge(self._path, group.size)

    def track(self, name: str) -> TrackRecorder:
        """Return the recorder of a channel."""
        return TrackRecorder(self, name)

    def named(self, operations: Sequence[Operation], began: float, ended: float) -> None:
        """Note named operations that have run together: how long each waited, and how it went."""
        timeline = self.timeline
        if timeline is None:
            return
        for operation in operations:
            title = operation.request.call.title
            track = f"waits: {title}"
            decided = operation.decided or began
            timeline.span(track, f"negotiate {title}", operation.submitted, decided)
            timeline.span(track, f"queue {title}", decided, began)
        if len(operations) > 1:
            titles = ", ".join(operation.request.call.title for operation in operations)
            timeline.span("progress", f"{len(operations)} together", began, ended, names=titles)


class TrackRecorder:
    """Records what one group does."""

    def __init__(self, recording: Recording, track: str) -> None:
        self._recording = recording
        self._track = track

    @property
    def tracing(self) -> bool:
        return self._recording.timeline is not None

    def operation(
        self, call: Call, algorithm: str, nbytes: int, began: float, *, counted: bool
    ) -> None:
        now = Timeline.now()
        dtype = call.dtype
        if not counted:
            self._recording.stats.add(
                call.kind, dtype, algorithm, operations=1, nbytes=nbytes, seconds=now - began
            )
        timeline = self._recording.timeline
        if timeline is not None:
            timeline.span(
                self._track, call.title, began, now, bytes=nbytes, dtype=dtype, algorithm=algorithm
            )

    def step(self, name: str, began: float, nbytes: int) -> None:
        timeline = self._recording.timeline
        if timeline is not None:
            timeline.span(self._track, name, began, Timeline.now(), bytes=nbytes)
