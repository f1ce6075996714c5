"""A task's picture, from the Label Studio that the operator named and the stores that it may send to."""

from __future__ import annotations

import asyncio

import httpx

from hypersam.errors import ImageError, ImageTooLarge, SourceNotAllowed
from hypersam.settings import Settings

MOST_REDIRECTS = 5
SILENT_SECONDS = 20.0
"""Longest time in which a connection brings nothing."""
MOST_SECONDS = 90.0
"""Of all requests for a picture together: Label Studio waits 100 s for its answer."""


async def fetch(source: str, settings: Settings) -> bytes:
    """A task's picture. ``source``: its address, or its path at Label Studio.

    Redirects are followed, each address after the same look at it: only Label Studio and the origins of
    ``label_studio_stores`` are asked, and only Label Studio is shown the token. Raises SourceNotAllowed for any other
    place, ImageError where the picture cannot be had, ImageTooLarge.
    """
    if settings.label_studio_url is None:
        raise SourceNotAllowed("no Label Studio is named here (HYPERSAM_LABEL_STUDIO_URL); pictures come as data: URIs")
    try:
        async with asyncio.timeout(MOST_SECONDS):
            home = httpx.URL(settings.label_studio_url.rstrip("/") + "/")
            url = home.join(source)
            for _ in range(MOST_REDIRECTS + 1):
                found = await _asked(url, _headers(url, home, settings), settings)
                if isinstance(found, bytes):
                    return found
                url = found
    except TimeoutError as error:
        raise ImageError(f"the task's picture was not here within {MOST_SECONDS:g} s") from error
    # urljoin, by which httpx joins, has a ValueError for some of what is no address.
    except (httpx.InvalidURL, ValueError) as error:
        raise ImageError(f"the task's picture has no address: {error}") from error
    except httpx.HTTPError as error:
        raise ImageError(f"the task's picture could not be fetched: {type(error).__name__}") from error
    raise ImageError(f"more than {MOST_REDIRECTS} redirects on the way to the task's picture")


def _headers(url: httpx.URL, home: httpx.URL, settings: Settings) -> dict[str, str]:
    """What is sent there. Raises SourceNotAllowed for a place that the operator did not name."""
    if _place(url) == _place(home) and url.userinfo in (b"", home.userinfo):
        token = settings.label_studio_token
        return {"Authorization": f"Token {token}"} if token else {}
    stores = [httpx.URL(origin) for origin in settings.label_studio_stores]
    if _place(url) not in map(_place, stores) or url.userinfo:
        raise SourceNotAllowed(
            f"pictures are fetched from {_origin(home)} and the origins in HYPERSAM_LABEL_STUDIO_STORES only, "
            f"and not from {_origin(url)}"
        )
    return {}


def _place(url: httpx.URL) -> tuple[str, bytes]:
    """Scheme, and host with port, the scheme's own port left out."""
    return url.scheme, url.netloc


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii', 'backslashreplace')}"


async def _asked(url: httpx.URL, headers: dict[str, str], settings: Settings) -> bytes | httpx.URL:
    """The picture, or where it is instead. A client of its own, so that no cookie goes from one place to another."""
    async with (
        httpx.AsyncClient(timeout=SILENT_SECONDS, trust_env=False) as client,
        client.stream("GET", url, headers=headers) as response,
    ):
        if response.has_redirect_location:
            return url.join(response.headers["Location"])
        if response.status_code != 200:
            raise ImageError(f"{_origin(url)} answered {response.status_code} for the task's picture")
        data = bytearray()
        async for chunk in response.aiter_bytes():
            data += chunk
            if len(data) > settings.max_image_bytes:
                raise ImageTooLarge(f"the image has more than the {settings.max_image_bytes} bytes accepted")
        return bytes(data)
