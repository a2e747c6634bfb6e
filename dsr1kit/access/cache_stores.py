"""Where cached replies lie: a SQLite file that several processes may share, or a Redis server named by URL.

A store keeps bytes by key and forgets by count, by age and by what a place serves now. Knows nothing about
replies, requests in flight, or what a caller does when a store fails: it raises StoreTrouble and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from dsr1kit import keys
from dsr1kit.errors import MissingExtra, RunError, UsageError

T = TypeVar("T")
_REDIS_SCHEMES = ("redis", "rediss", "unix")
_OPEN_S = 2.0  # opening may take longer than a look-up: nobody waits for an answer yet
_APPLICATION_ID = 0x44535231  # "DSR1" in the file's header
_FLUSH_EVERY = 100  # hits between two writings of use counts
_DELETED_AT_ONCE = 1000  # entries, so that an operation stays short; the next one goes on
_REDIS_CONNECTIONS = 16
_PREFIX = "dsr1kit:cache:v1:"


class StoreTrouble(Exception):
    """The store failed in mid-run.

    Attributes:
        everything: whether reading and writing are both lost; else only what was tried (a full disk still reads).
    """

    def __init__(self, why: str, *, everything: bool = True) -> None:
        self.everything = everything
        super().__init__(keys.redact(why))


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a store keeps, and how long one operation may take (seconds)."""

    max_entries: int
    max_age_s: float
    limit_s: float


class Store(Protocol):
    """Bytes by key. `now` is seconds since the epoch; every operation but `open` raises StoreTrouble."""

    shown: str

    async def open(self) -> None:
        """Raises UsageError or RunError, naming the place and what to do."""
        ...

    async def close(self) -> None:
        """Write what is unwritten and let go."""
        ...

    async def get(self, key: str, now: float) -> bytes | None:
        """The entry, which counts as a use of it; None where there is none, or it is too old."""
        ...

    async def put(self, key: str, origin: str, served: str | None, data: bytes | None, now: float) -> None:
        """Keep `data`, after making room; forget all of `origin` if it served another model (a hash) until now.

        `data` None: only what is served is told; `served` None: that is not known.
        """
        ...

    async def drop(self, key: str) -> None:
        """Forget one entry."""
        ...


def store_for(place: str | Path, bounds: Bounds) -> Store:
    """The store that a path or a Redis URL means; not open yet.

    Raises:
        UsageError: neither a path nor a URL of a known kind.
        MissingExtra: a Redis URL, and the package redis is not installed.
    """
    scheme, is_url, _ = str(place).partition("://")
    if not is_url:
        if not str(place):
            raise UsageError("the cache needs a path, such as cache.sqlite, or a Redis URL")
        return SqliteStore(Path(place).expanduser(), bounds)
    if scheme.lower() not in _REDIS_SCHEMES:
        raise UsageError(f"a cache is a path or a redis://, rediss:// or unix:// URL, not {scheme}://...")
    return RedisStore(str(place), bounds)


class SqliteStore:
    """A SQLite file in WAL mode, used from one thread of its own, so that the event loop never waits for it.

    Hits only read; their counts are kept and written along with the next entry, so a reader never waits for
    another process that writes.
    """

    def __init__(self, path: Path, bounds: Bounds) -> None:
        self.shown = str(path)
        self._path, self._bounds = path, bounds
        self._worker: ThreadPoolExecutor | None = None
        self._db: sqlite3.Connection | None = None
        self._uses: dict[str, tuple[int, float]] = {}
        self._hits = 0

    async def open(self) -> None:
        """See Store; the file is made where there is none."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dsr1kit-cache")
        await asyncio.get_running_loop().run_in_executor(self._worker, self._open)

    async def close(self) -> None:
        """See Store; a disk that hangs is not waited for."""
        if self._worker is None:
            return
        with contextlib.suppress(StoreTrouble, TimeoutError):
            async with asyncio.timeout(_OPEN_S):
                await self._do(self._close)
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def get(self, key: str, now: float) -> bytes | None:
        """See Store."""
        return await self._do(lambda: self._get(key, now))

    async def put(self, key: str, origin: str, served: str | None, data: bytes | None, now: float) -> None:
        """See Store."""
        await self._do(lambda: self._put(key, origin, served, data, now), everything=False)

    async def drop(self, key: str) -> None:
        """See Store."""
        await self._do(lambda: self._drop(key), everything=False)

    async def _do(self, work: Callable[[], T], *, everything: bool = True) -> T:
        def guarded() -> T:
            try:
                return work()
            except sqlite3.Error as error:
                self._disconnect()  # the next try begins anew, whatever state this one left
                raise StoreTrouble(str(error), everything=everything) from None

        assert self._worker is not None  # noqa: S101 - open
        return await asyncio.get_running_loop().run_in_executor(self._worker, guarded)

    # In the thread.
    def _connect(self, wait_s: float) -> sqlite3.Connection:
        if self._db is None:
            if str(self._path) != ":memory:":  # made for its owner alone: answers are their own affair
                with contextlib.suppress(OSError):
                    os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            db = sqlite3.connect(self._path, timeout=wait_s, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA synchronous=NORMAL")
                self._set_up(db, wait_s)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        # A little less than the limit: SQLite's own words say more than a timeout.
        db = self._connect(0.8 * self._bounds.limit_s)
        with db:  # commits, or rolls back
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "UPDATE entries SET uses = uses + ?, used_at = max(used_at, ?) WHERE key = ?",
                [(count, at, key) for key, (count, at) in self._uses.items()],
            )
            yield db
        self._uses.clear()

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connect(_OPEN_S)
        except (OSError, ValueError) as error:  # ValueError: a character that no path can have
            raise self._unwritable(error) from None
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        finally:
            self._disconnect()  # the next connection waits as briefly as a look-up may

    def _set_up(self, db: sqlite3.Connection, wait_s: float) -> None:
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables:
            if db.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID:
                return
            raise UsageError(f"{self.shown} is a SQLite database of something else: name another file for the cache")
        until = time.monotonic() + wait_s
        while True:  # several processes may make the file at a time, and then this pragma does not wait by itself
            try:
                db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        with db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            db.execute(
                "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, origin TEXT NOT NULL, era INTEGER NOT NULL, "
                "stored_at REAL NOT NULL, uses INTEGER NOT NULL, used_at REAL NOT NULL, reply BLOB NOT NULL)"
            )
            # An era begins with another served model; entries of an old one are gone at once, and deleted by and by.
            db.execute(
                "CREATE TABLE IF NOT EXISTS origins (origin TEXT PRIMARY KEY, served TEXT, era INTEGER NOT NULL)"
            )
            for columns in ("uses, used_at", "stored_at", "origin, era"):
                name = "by_" + columns.partition(",")[0]
                db.execute(f"CREATE INDEX IF NOT EXISTS {name} ON entries ({columns})")

    def _unusable(self, error: sqlite3.Error) -> UsageError | RunError:
        if "locked" in str(error):
            return RunError(f"{self.shown} is locked by another program: end that, or name another file")
        if "not a database" in str(error):
            return UsageError(f"{self.shown} is no SQLite database: name another file for the cache")
        if isinstance(error, sqlite3.OperationalError) and "full" not in str(error) and "I/O" not in str(error):
            return self._unwritable(error)  # a folder, or in one without the right to write; a read-only file
        return RunError(f"{self.shown} cannot be used as a cache ({error}): delete it, or name another file")

    def _unwritable(self, why: object) -> UsageError:
        return UsageError(f"{self.shown} cannot be a cache ({why}): name a file in a folder that you may write")

    def _close(self) -> None:
        if self._uses:
            with self._writing():
                pass
        self._disconnect()

    def _get(self, key: str, now: float) -> bytes | None:
        db = self._connect(0.8 * self._bounds.limit_s)
        row = db.execute(
            "SELECT reply FROM entries JOIN origins USING (origin, era) WHERE key = ? AND stored_at > ?",
            (key, now - self._bounds.max_age_s),
        ).fetchone()
        if row is None:
            return None
        self._uses[key] = (self._uses.get(key, (0, 0.0))[0] + 1, now)
        self._hits += 1
        if self._hits % _FLUSH_EVERY == 0:
            with contextlib.suppress(sqlite3.OperationalError), self._writing():  # else with the next ones
                pass
        return row[0] if isinstance(row[0], bytes) else b""

    def _put(self, key: str, origin: str, served: str | None, data: bytes | None, now: float) -> None:
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO origins VALUES (?, ?, 0)", (origin, served))
            if served is not None:
                db.execute(
                    "UPDATE origins SET era = era + (served IS NOT NULL), served = ?1 "
                    "WHERE origin = ?2 AND served IS NOT ?1",
                    (served, origin),
                )
            if data is None:
                return
            (era,) = db.execute("SELECT era FROM origins WHERE origin = ?", (origin,)).fetchone()
            db.execute("DELETE FROM entries WHERE key = ?", (key,))
            self._delete(db, "WHERE origin = ? AND era < ? LIMIT ?", (origin, era, _DELETED_AT_ONCE))
            self._delete(db, "WHERE stored_at <= ? LIMIT ?", (now - self._bounds.max_age_s, _DELETED_AT_ONCE))
            over = db.execute("SELECT count(*) FROM entries").fetchone()[0] - self._bounds.max_entries + 1
            if over > 0:
                self._delete(db, "ORDER BY uses, used_at LIMIT ?", (min(over, _DELETED_AT_ONCE),))
            db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, 0, ?, ?)", (key, origin, era, now, now, data))

    def _delete(self, db: sqlite3.Connection, which: str, values: tuple[object, ...]) -> None:
        db.execute(f"DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries {which})", values)  # noqa: S608 - ours

    def _drop(self, key: str) -> None:
        with self._writing() as db:
            db.execute("DELETE FROM entries WHERE key = ?", (key,))


# KEYS: entry, uses, places. `uses` scores are hits plus the time of the last use as a fraction below 1, so that
# the set's own order is: least used first, among equals the one whose use is longest ago. `places` holds, for each
# origin, the model and an era that begins anew with another model: an entry of an old era is gone at once, and
# taken away by the sweep that goes on by some entries with every _PUT. In _GET what only keeps the books is tried
# with pcall: a full or read-only server still gives what it has. A full server refuses a script's first write
# alone, so _PUT begins with one that takes memory.
_LIVING = """
local now, oldest = tonumber(ARGV[2]), tonumber(ARGV[2]) - tonumber(ARGV[3])
local function living(name)
  local of = redis.pcall('HMGET', ARGV[4] .. name, 'origin', 'era', 'at')
  return of[1] and of[2] == (redis.call('HGET', KEYS[3], of[1] .. ':era') or '0') and (tonumber(of[3]) or 0) > oldest
end
local function forget(name)
  redis.pcall('DEL', ARGV[4] .. name); redis.pcall('ZREM', KEYS[2], name)
end
"""
_GET = f"""{_LIVING}
local reply = redis.call('HGET', KEYS[1], 'reply')
if not reply or not living(ARGV[1]) then forget(ARGV[1]); return false end
local hits = math.floor(tonumber(redis.pcall('ZSCORE', KEYS[2], ARGV[1])) or 0)
redis.pcall('ZADD', KEYS[2], string.format('%.17g', hits + 1 + now / 1e10), ARGV[1])
return reply
"""
_PUT = f"""{_LIVING}
local origin, served, reply, most = ARGV[5], ARGV[6], ARGV[7], tonumber(ARGV[8])
local known = redis.call('HGET', KEYS[3], origin)
if served ~= '' and known ~= served then
  redis.call('HSET', KEYS[3], origin, served)
  if known then redis.call('HINCRBY', KEYS[3], origin .. ':era', 1) end
end
if reply == '' then return 0 end
local era = redis.call('HGET', KEYS[3], origin .. ':era') or '0'
redis.call('HSET', KEYS[1], 'reply', reply, 'origin', origin, 'era', era, 'at', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[9])
redis.call('ZREM', KEYS[2], ARGV[1])
local swept = redis.call('ZSCAN', KEYS[2], redis.call('HGET', KEYS[3], 'sweep') or '0', 'COUNT', 20)
redis.call('HSET', KEYS[3], 'sweep', swept[1])
for i = 1, #swept[2], 2 do
  if not living(swept[2][i]) then forget(swept[2][i]) end
end
local over = math.min(redis.call('ZCARD', KEYS[2]) - most, 1000)
if over >= 0 then
  for _, least in ipairs(redis.call('ZRANGE', KEYS[2], 0, over)) do forget(least) end
end
redis.call('ZADD', KEYS[2], string.format('%.17g', now / 1e10), ARGV[1])
return 1
"""
_DROP = "redis.call('DEL', KEYS[1]); return redis.call('ZREM', KEYS[2], ARGV[1])"
_PROBE = "return redis.call('SET', KEYS[1], '1', 'EX', '60')"


class RedisStore:
    """A Redis server; everything lies under `dsr1kit:cache:v1:` and is changed by scripts, so in one piece."""

    def __init__(self, url: str, bounds: Bounds) -> None:
        try:
            from redis import asyncio as redis_asyncio
        except ImportError:
            raise MissingExtra("a cache in Redis", "redis", "redis") from None
        self.shown = _without_login(url)
        self._url, self._bounds = url, bounds
        self._redis_asyncio = redis_asyncio
        self._redis: Any = None

    async def open(self) -> None:
        """See Store; asks for what a cache needs: a server that lets this user write and run scripts."""
        from redis import exceptions
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        server = f"the Redis server {self.shown}"
        try:
            keys.remember(unquote(urlsplit(self._url).password or ""))
            pool = self._redis_asyncio.BlockingConnectionPool.from_url(
                self._url,
                max_connections=_REDIS_CONNECTIONS,
                socket_timeout=_OPEN_S,
                socket_connect_timeout=_OPEN_S,
                protocol=2,  # every server speaks it
                retry=Retry(NoBackoff(), 1),  # a kept connection may have died with a server that is back
            )
            self._redis = self._redis_asyncio.Redis.from_pool(pool)
            self._get, self._put, self._drop, probe = map(self._redis.register_script, (_GET, _PUT, _DROP, _PROBE))
            async with asyncio.timeout(_OPEN_S):
                await self._redis.ping()
                await probe(keys=[f"{_PREFIX}probe"])
        except (ValueError, TypeError):  # their words may hold the password
            raise UsageError(
                f"{self.shown} is not the URL of a Redis server: redis://[user:password@]host:port/0 "
                "(percent-encode what the password has of : / ? # @)"
            ) from None
        except exceptions.AuthenticationError as error:
            raise UsageError(
                f"{server} wants another login ({error}): put it into the URL, redis://user:password@host:port/0 "
                "(no user: redis://:password@...)"
            ) from None
        except exceptions.InvalidResponse:
            raise UsageError(f"what answers at {self.shown} is not Redis: give the address of a Redis server") from None
        except exceptions.ResponseError as error:
            raise RunError(
                f"{server} refuses what a cache needs, writing and scripts ({keys.redact(str(error))}): "
                "mend that there, or give a path for a cache in a file"
            ) from None
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            why = f"no answer in {_OPEN_S:g} s" if isinstance(error, TimeoutError) else keys.redact(str(error))
            raise RunError(
                f"{server} cannot be reached ({why}): start it (redis-server), or give a path for a cache in a file"
            ) from None

    async def close(self) -> None:
        """See Store."""
        if self._redis is not None:
            with contextlib.suppress(Exception):  # what is lost with a connection that breaks now, is lost already
                async with asyncio.timeout(_OPEN_S):
                    await self._redis.aclose()

    async def get(self, key: str, now: float) -> bytes | None:
        """See Store."""
        found = await self._do(self._get, key, now, [])
        return found if isinstance(found, bytes) else None

    async def put(self, key: str, origin: str, served: str | None, data: bytes | None, now: float) -> None:
        """See Store."""
        ttl_s = min(math.ceil(self._bounds.max_age_s), 10**9)
        await self._do(self._put, key, now, [origin, served or "", data or b"", self._bounds.max_entries, ttl_s])

    async def drop(self, key: str) -> None:
        """See Store."""
        await self._do(self._drop, key, 0.0, [])

    async def _do(self, script: Any, key: str, now: float, rest: list[str | bytes | int]) -> object:
        from redis import exceptions

        entry = f"{_PREFIX}entry:"
        now = min(max(now, 0.0), 9.9e9)  # below 1e10, or it were no fraction of a use
        try:
            return await script(
                keys=[entry + key, f"{_PREFIX}uses", f"{_PREFIX}places"],
                args=[key, now, self._bounds.max_age_s, entry, *rest],
            )
        except exceptions.ResponseError as error:
            if script is self._get and "WRONGTYPE" in str(error):
                return b""  # somebody put another thing under our name: no entry that parses
            raise StoreTrouble(str(error), everything=False) from None
        except (exceptions.RedisError, OSError) as error:
            raise StoreTrouble(str(error) or "no answer") from None


def _without_login(url: str) -> str:
    """The URL as it may be shown, even if it does not parse: no user, no password, no query."""
    scheme, _, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    if at and "?" in login:  # the @ may stand in a query that holds a password, or the ? in a password
        return f"{scheme}://..."
    return f"{scheme}://{place.partition('?')[0].partition('#')[0]}"
