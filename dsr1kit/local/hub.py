"""Where weights come from: the Hugging Face Hub, a mirror of it, or ModelScope, over their REST endpoints.

Says what a model holds (paths, sizes, checksums, licence, at one commit) and opens a file from any offset. The
token goes to the hub alone, never on to where it redirects. Knows nothing about folders or which files matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urljoin, urlsplit

from dsr1kit.errors import MissingKey, ModelError, UnknownName, UsageError
from dsr1kit.keys import find_key, remember
from dsr1kit.local.patience import Patience, Persistence, Temporary

if TYPE_CHECKING:
    import aiohttp

SOURCES = ("hub", "modelscope")
_ENDPOINTS = {"hub": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}
_ENDPOINT_VARIABLES = {"hub": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}
_KEYS = {"hub": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
_BRANCHES = {"hub": "main", "modelscope": "master"}
_TITLES = {"hub": "the Hugging Face Hub", "modelscope": "ModelScope"}
_MOST_LISTING_BYTES = 64 * 1024 * 1024
_MOST_HOPS = 6
_LONGEST_WAIT_S = 600.0
_LISTING_STALL_S = 10.0  # nobody knows yet whether anything will come
_READ_BYTES = 1024 * 1024
_BUFFER_BYTES = 128 * 1024  # what waits here when a connection breaks is lost, and comes again


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a hub.

    Attributes:
        path: within the repository, as the hub gave it: not yet checked.
        size: in bytes.
        digest: `sha256:HEX`, or `git:HEX` (sha1 of a git blob) for small files.
        revision: the commit at which it is fetched.
    """

    path: str
    size: int
    digest: str
    revision: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a model holds at one commit. `licence` is "" where none is stated."""

    commit: str
    licence: str
    files: tuple[RemoteFile, ...]


class Hub:
    """One source, opened: `async with Hub("hub") as hub`.

    Args:
        source: `hub` or `modelscope`.
        endpoint: its base URL; None: `HF_ENDPOINT` or `MODELSCOPE_ENDPOINT`, then the source's own.
        patience: clocks and retries.

    Raises:
        UsageError: an unknown source, an endpoint that is no URL, or `HF_HUB_OFFLINE` is set.
    """

    def __init__(self, source: str, endpoint: str | None = None, patience: Patience | None = None) -> None:
        require_source(source)
        variable = _ENDPOINT_VARIABLES[source]
        self.source, self.title, self.patience = source, _TITLES[source], patience or Patience()
        self.endpoint = (endpoint or os.environ.get(variable, "").strip() or _ENDPOINTS[source]).rstrip("/")
        if not _web_address(self.endpoint):
            raise UsageError(f"{variable}={self.endpoint!r} is no http(s):// URL, such as {_ENDPOINTS[source]}")
        if named := offline():
            raise UsageError(f"{named} is set, so nothing is downloaded: unset {named}, then run it again")
        self._token: str | None = None
        self._token_from = _KEYS[source]
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        import aiohttp

        self._token, self._token_from = await asyncio.to_thread(_token_for, self.source)
        # Cookies would carry what one host set to the next request; nothing here needs them.
        self._session = aiohttp.ClientSession(read_bufsize=_BUFFER_BYTES, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def branch(self, revision: str | None) -> str:
        """Return the revision that is meant: the source's main branch where none is named."""
        return revision or _BRANCHES[self.source]

    async def listing(self, model: str, revision: str | None = None) -> Listing:
        """Return what `model` (`org/name`) holds at a branch, tag or commit.

        Raises:
            UsageError: there is no such model or revision. MissingKey: it is gated and no token is set.
            ModelError: the hub cannot be reached, refuses, or says what cannot be understood.
        """
        try:
            if self.source == "hub":
                return await self._hub_listing(model, self.branch(revision))
            return await self._modelscope_listing(model, self.branch(revision))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{self.title} at {self.endpoint} described {model} in a way that is not understood "
                f"({type(error).__name__}: {error}); if it is a mirror, try another: {self._elsewhere()}"
            ) from None

    async def _hub_listing(self, model: str, revision: str) -> Listing:
        url = f"{self.endpoint}/api/models/{model}/revision/{quote(revision, safe='')}?blobs=true"
        told = await self._json(url, model, revision)
        card = told.get("cardData")
        licence = card.get("license") if isinstance(card, Mapping) else None
        if not licence:
            licence = next((t.removeprefix("license:") for t in told.get("tags", ()) if t.startswith("license:")), "")
        commit = str(told["sha"])
        files = []
        for entry in told["siblings"]:
            large = entry.get("lfs")
            digest = f"sha256:{large['sha256']}" if large else f"git:{entry.get('blobId') or ''}"
            files.append(RemoteFile(str(entry["rfilename"]), int(entry.get("size") or 0), digest.lower(), commit))
        return Listing(commit, str(licence), tuple(files))

    async def _modelscope_listing(self, model: str, revision: str) -> Listing:
        base = f"{self.endpoint}/api/v1/models/{model}"
        about = (await self._json(base, model))["Data"]
        told = (
            await self._json(f"{base}/repo/files?Revision={quote(revision, safe='')}&Recursive=true", model, revision)
        )["Data"]
        entries = [entry for entry in told["Files"] if entry.get("Type") != "tree"]
        newest: Mapping[str, Any] = max(entries, key=lambda entry: int(entry.get("CommittedDate") or 0), default={})
        # Some answers leave the latest commit's id empty; the newest file's commit names the same state.
        commit = str((told.get("LatestCommitter") or {}).get("Id") or newest.get("Revision") or revision)
        files = (
            RemoteFile(
                str(entry["Path"]),
                int(entry["Size"]),
                f"sha256:{entry.get('Sha256') or ''}".lower(),
                str(entry.get("Revision") or commit),
            )
            for entry in entries
        )
        return Listing(commit, str(about.get("License") or ""), tuple(files))

    def file_url(self, model: str, file: RemoteFile) -> str:
        """Return where a file is asked for; it may redirect to a content network."""
        if self.source == "hub":
            return f"{self.endpoint}/{model}/resolve/{quote(file.revision, safe='')}/{quote(file.path)}"
        asked = f"Revision={quote(file.revision, safe='')}&FilePath={quote(file.path, safe='')}"
        return f"{self.endpoint}/api/v1/models/{model}/repo?{asked}"

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, model: str, *, revision: str = "", path: str = "", offset: int = 0, stall_s: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET `url` from byte `offset` on, following redirects; status 200, 206 or 416.

        Raises:
            Temporary: worth another attempt, also when raised while the body is read in the block.
            UsageError, MissingKey, ModelError: not worth one.
        """
        import aiohttp
        from yarl import URL

        if self._session is None:
            raise UsageError("the hub is not open: async with Hub(...) as hub")
        headers = {"Accept-Encoding": "identity", "User-Agent": "dsr1kit"}
        stall_s = min(stall_s or self.patience.stall_s, self.patience.stall_s)
        clocks = aiohttp.ClientTimeout(total=None, sock_connect=self.patience.connect_s, sock_read=stall_s)
        if offset:
            headers["Range"] = f"bytes={offset}-"
        try:
            for _ in range(_MOST_HOPS):
                ours = _origin(url) == _origin(self.endpoint)
                async with self._session.get(
                    URL(url, encoded=True),  # a signed link is void once a character of it is quoted otherwise
                    headers=headers | (self._authorization() if ours else {}),
                    allow_redirects=False,
                    timeout=clocks,
                    proxy=_proxy_for(url),
                ) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        url = self._redirected(url, response.headers["Location"])
                        continue
                    if response.status not in (200, 206, 416):
                        await self._refuse(response, ours, model, revision, path)
                    yield response
                    return
            raise ModelError(f"{self.title} redirects in a circle for {path or model}; try again later")
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                raise ModelError(
                    f"the certificate of {error.host} is not trusted: where a proxy of your own signs it, export "
                    "SSL_CERT_FILE=its-authority.pem"
                ) from None
            if isinstance(error, aiohttp.ServerTimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                raise Temporary(f"no byte came for {stall_s:g} s") from None
            raise Temporary(f"{urlsplit(url).hostname}: {_why(error)}") from None

    def _redirected(self, url: str, location: str) -> str:
        with contextlib.suppress(ValueError):
            if _web_address(there := urljoin(url, location)):
                return there
        raise ModelError(f"{self.title} redirects to what is no http(s):// URL: take another (HF_ENDPOINT, --source)")

    def given_up(self, what: str, error: Temporary, kept: str = "") -> ModelError:
        """Return the error for a user when the last attempt was in vain; `kept` is what remains of the others."""
        return ModelError(
            f"{what} could not be fetched from {self.title} ({self.endpoint}): {error}, again and again. "
            f"{kept or 'Try again later'}; if it stays so: {self._elsewhere()}"
        )

    async def _json(self, url: str, model: str, revision: str = "") -> Any:
        try:
            # Nothing is lost yet, and the person waits: sooner given up than in the middle of a file.
            async for attempt in Persistence(replace(self.patience, retries=min(3, self.patience.retries))).attempts():
                with attempt:
                    async with self.open(url, model, revision=revision, stall_s=_LISTING_STALL_S) as response:
                        body = bytearray()
                        async for piece in response.content.iter_chunked(_READ_BYTES):
                            body += piece
                            if len(body) > _MOST_LISTING_BYTES:
                                raise ModelError(f"{self.title} sends an endless description of {model}")
                        told = json.loads(body)
        except Temporary as error:
            raise self.given_up(f"the list of files of {model}", error) from None
        except RecursionError:
            raise ValueError("nested too deep") from None
        if self.source == "modelscope" and told.get("Success") is False:
            raise self._unknown(model, revision, str(told.get("Message") or ""))
        return told

    async def _refuse(self, response: aiohttp.ClientResponse, ours: bool, model: str, revision: str, path: str) -> None:
        status, key = response.status, _KEYS[self.source]
        code, said = response.headers.get("X-Error-Code", ""), response.headers.get("X-Error-Message", "")[:200]
        if self.source == "modelscope" and ours:
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                said = str(json.loads(await response.content.read(_READ_BYTES)).get("Message") or "")[:200]
        if status in (408, 425, 429) or status >= 500:
            after_s = _retry_after_s(response.headers.get("Retry-After", ""))
            if after_s > _LONGEST_WAIT_S:
                raise ModelError(f"{self.title} asks to be left alone for {after_s:.0f} s (HTTP {status}): run it then")
            raise Temporary(f"HTTP {status}", after_s)
        if not ours and code != "GatedRepo":  # a signed link that has run out: the hub is asked for a new one
            raise Temporary(f"HTTP {status} from {urlsplit(str(response.url)).hostname}")
        if code == "GatedRepo" or (status == 403 and self._token is None):
            accept = f"accept its licence at {self._page(model)} and export {key}=... (a token of that account)"
            if self._token is None:
                raise MissingKey(f"{model} is gated: {accept}")
            raise ModelError(f"{model} is gated and the account of {key} has no access yet: {accept}")
        if status == 401 and self._token is not None and code != "RepoNotFound":
            raise ModelError(
                f"{self.title} refuses the token in {self._token_from} (HTTP 401): make a new one and export {key}=..."
            )
        if code == "EntryNotFound" or (status == 404 and path):
            raise ModelError(f"{self.title} lists {path} in {model} and does not have it; run the same command again")
        if status in (401, 404):
            # ModelScope has no codes; there a revision is asked for only once the model is known.
            named = code == "RevisionNotFound" if self.source == "hub" else status == 404
            raise self._unknown(model, revision if named else "", said)
        raise ModelError(f"{self.title} refuses {path or model}: HTTP {status} {said}".rstrip())

    def _unknown(self, model: str, revision: str, said: str) -> UsageError:
        told = f" ({said})" if said else ""
        if revision:
            return UsageError(
                f"{model} on {self.title} has no revision {revision!r}{told}: name a branch, tag or commit"
            )
        return UsageError(
            f"{self.title} has no model {model}, or it is private{told}: check the spelling at {self._page(model)}"
            f"; for a private one export {_KEYS[self.source]}=..."
        )

    def _page(self, model: str) -> str:
        return f"{self.endpoint}/{'models/' if self.source == 'modelscope' else ''}{model}"

    def _authorization(self) -> dict[str, str]:
        if self._token is None:
            return {}
        if not (self._token.isascii() and self._token.isprintable()):
            raise UsageError(f"the token in {self._token_from} holds a character that no token has: copy it again")
        sent = {"Authorization": f"Bearer {self._token}"}
        if self.source == "modelscope":
            sent["Cookie"] = f"m_session_id={self._token}"  # what its older endpoints know a private model's owner by
        return sent

    def _elsewhere(self) -> str:
        if self.source == "modelscope":
            return "--source hub, or the network's proxy (HTTPS_PROXY)"
        return "a mirror (export HF_ENDPOINT=https://hf-mirror.com), --source modelscope, or a proxy (HTTPS_PROXY)"


def offline() -> str:
    """The variable that forbids to ask a hub, of the two that its own client reads; empty where none does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")), "")


def hub_home() -> Path:
    """Where the hub's own client keeps what it knows: `HF_HOME`, or below the cache folder."""
    named = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(os.path.expanduser(os.path.expandvars(named)))  # noqa: PTH111 - Path's raises where there is no home


def _token_for(source: str) -> tuple[str | None, str]:
    """The token of a source and where it was, from the environment or, for the Hub, where `hf auth login` left it."""
    names = (_KEYS[source], *(["HUGGING_FACE_HUB_TOKEN"] if source == "hub" else ()))
    for name in names:
        if key := find_key(name):
            return key, name
    if source == "hub":
        file = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token")
        with contextlib.suppress(OSError, ValueError):
            if key := file.read_text(encoding="utf-8").strip():
                remember(key)
                return key, str(file)
    return None, _KEYS[source]


def require_source(source: str) -> None:
    """Raise UnknownName unless `source` is one."""
    if source not in SOURCES:
        raise UnknownName("source", source, SOURCES)


def _web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _proxy_for(url: str) -> str | None:
    parts = urlsplit(url)
    # aiohttp's trust_env would also take passwords out of ~/.netrc, and then refuse our own header beside them.
    if not parts.hostname or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and urlsplit(proxy).scheme not in ("http", "https"):
        raise UsageError(
            f"{parts.scheme.upper()}_PROXY names a {urlsplit(proxy).scheme}:// proxy; weights go through http:// and "
            "https:// proxies alone: name one of these, or unset it"
        )
    return proxy


def _why(error: BaseException) -> str:
    inner = getattr(error, "os_error", None) or error
    return str(getattr(inner, "strerror", None) or inner or type(error).__name__)[:200]


def _retry_after_s(text: str) -> float:
    if text.strip().isdigit():
        return float(text)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
