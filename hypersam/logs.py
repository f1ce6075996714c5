"""Log lines for people or for programs, each with the id of the request that it belongs to."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from hypersam.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being served here."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id", "color_message"}


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the request's id, and what ``extra`` gave."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (found := getattr(record, "request_id", None)) is not None:
            line["request_id"] = found
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line for people; the request's id stands at its end, in brackets."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without what follows it, such as a traceback."""
        found = getattr(record, "request_id", None)
        return super().formatMessage(record) + (f" [{found}]" if found is not None else "")


def configure(settings: Settings) -> None:
    """Send this process's log to standard error in the form and from the level that the settings name."""
    handler = logging.StreamHandler()
    handler.addFilter(_RequestId())
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter(form))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
