"""A strict parser of server-sent events."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Events:
    """`named`: the events and their data, in order. `comments`: the comments."""

    named: list[tuple[str | None, dict[str, Any]]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str | None]:
        return [name for name, _ in self.named]

    def of(self, name: str | None) -> list[dict[str, Any]]:
        return [data for found, data in self.named if found == name]


def parse(text: str) -> Events:
    """Parse a whole stream. Each event is one comment, or one line of data with or without a name."""
    events = Events()
    assert text.endswith("\n\n")
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith(":"):
            assert len(lines) == 1
            events.comments.append(lines[0].removeprefix(": "))
            continue
        *names, data = lines
        assert len(names) <= 1
        assert data.startswith("data: ")
        name = names[0].removeprefix("event: ") if names else None
        events.named.append((name, json.loads(data.removeprefix("data: "))))
    return events


def events_of(response: httpx.Response) -> Events:
    """Return the events of a streaming response."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    return parse(response.text)
