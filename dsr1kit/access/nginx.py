r"""A configuration for stock nginx, out of the catalogue: one local endpoint that spreads requests over channels.

Every channel has a loopback server of its own, which alone sets that place's address, Host, TLS name, key and
model id; an outer upstream over those servers weighs, fails over and falls back. So a request can move from one
channel to another, and no place ever sees another's key. What is written is a whole nginx.conf that runs without
privileges, as a template for envsubst: keys stay in the environment.

What nginx knows not: JSON. A regular expression replaces the value of the body's first top-level "model" by the
channel's own id; max_tokens, how reasoning comes back and all else pass as they are. It moves on before the first
header of an answer alone, and at the statuses it knows (429, 500, 502, 503, 504): an error inside a stream is the
client's, and so are 401, 402, 403 and 404, which a person has to mend. It cannot count tokens, and keep-alive
comments count as progress. Nearness, prices, whether an answer was any good: those are the kit's router's.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import math
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from dsr1kit.access.channels import Channel
from dsr1kit.errors import UsageError
from dsr1kit.keys import looks_secret, redact

DEBIAN_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_MOST_WEIGHT = 1000
# What may stand in the file; all else is refused, so that nothing breaks out of a directive or a comment.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:+@-]*")
_MODEL = re.compile(r"[A-Za-z0-9@~][A-Za-z0-9._:/@+~=,-]*")
_URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:\d+)?(/[\w.~:/@%+,=-]*)?(\?[\w.~:/@%+,=&-]*)?", re.A)
_SECRET_IN_QUERY = re.compile(r"key|token|secret|sig|pass|auth|cred", re.IGNORECASE)
_PATH = re.compile(r"[A-Za-z0-9._/][A-Za-z0-9._/+@=~ -]*")
_RESOLVER = re.compile(r" *((\[[0-9a-fA-F:.]+\]|[0-9]+(\.[0-9]+){3})(:\d+)?|valid=\d+[smh]?|ipv[46]=(on|off)| +)+")
# Group 1 is a JSON string, group 2 a value with the space around it; then keys and values up to the top "model".
_MODEL_AT = (
    r'(?s)(?(DEFINE)("[^"\\]*+(?:\\.[^"\\]*+)*+")'
    r"(\s*+(?:(?1)|\{(?:\s*+(?1)\s*+:(?2),?+)*+\s*+\}|\[(?:(?2),?+)*+\s*+\]|[-+.\w]++)\s*+))"
    r'^(?<r1_head>\s*+\{(?:\s*+(?1)\s*+:(?2),)*?\s*+"model"\s*+:\s*+)(?1)(?<r1_tail>.*)\z'
).replace("\\", "\\\\")

_HTTP = """\
# Chat Completions at http://%(at)s/v1, spread over: %(names)s.
# Written by dsr1kit nginx, for nginx 1.21.5 or newer with its usual modules. Nothing of it needs root.
%(use)s
#   nginx -p "$PWD" -c "$PWD/%(name)s"     starts it in this folder; -t looks whether it would, -s stop ends it
# Logs hold no Authorization and no body. The body's top-level "model" is replaced by each channel's own id:
# whatever the client asks for, it gets these. Its headers, Authorization among them, go no further than here.
# A request moves on at a broken connection, 429, 500, 502, 503 and 504, before the first header of an answer. It is
# sent again as a whole: the first place may have worked on it, and charge. Nothing moves at 401, 402, 403, 404.
# %(names_at)s
%(notes)s
worker_processes 1; worker_rlimit_nofile 16384;  # one: shares and limits are exact
pid r1.pid; error_log r1-error.log warn;
events { worker_connections 8192; }  # a request holds four

http {
    log_format r1 '$time_iso8601 $request_method $uri $status $request_time s $body_bytes_sent B '
                  '"$upstream_http_x_dsr1kit_channel" $upstream_addr $upstream_status';
    access_log off; server_tokens off; default_type application/json;
    client_body_temp_path r1-temp; proxy_temp_path r1-temp; fastcgi_temp_path r1-temp;
    uwsgi_temp_path r1-temp; scgi_temp_path r1-temp;

    # The whole body is kept in memory: "model" is replaced in it, and it is sent again where a channel fails.
    client_max_body_size 8m; client_body_buffer_size 8m; client_body_in_single_buffer on;
    map $request_body $r1_model_found { default 0; '~%(model_at)s' 1; }

    # Tokens pass as they come. X-Accel-Buffering is the one such header that a place may send.
    proxy_http_version 1.1; proxy_buffering off; proxy_cache off; gzip off; proxy_redirect off;
    proxy_pass_request_headers off; proxy_hide_header Set-Cookie;
    proxy_ignore_headers X-Accel-Redirect X-Accel-Limit-Rate X-Accel-Charset;
    proxy_ssl_server_name on; proxy_ssl_verify on; proxy_ssl_verify_depth 5; proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_ssl_trusted_certificate "%(trusted)s";

    # For a channel: the longest silence between two reads, keep-alive comments counted; and another try where the
    # place has closed a kept connection, or has more addresses.
    proxy_connect_timeout 5s; proxy_read_timeout %(read_s)ds; proxy_socket_keepalive on;
    proxy_next_upstream error non_idempotent; proxy_next_upstream_tries 2;
    limit_req_status 429; limit_conn_status 429;
%(resolver)s
    upstream r1_channels {
        zone r1_channels 256k;
%(servers)s
        keepalive 32;
    }
    # A web page in a browser here must not spend your keys: neither by another host name, nor by a plain form.
    map $host $r1_stranger { default %(stranger)d; localhost 0; 127.0.0.1 0; "[::1]" 0; }
    map $content_type $r1_not_json { default 1; "~*^application/json" 0; }
    server {
        listen %(at)s;
        access_log r1-access.log r1;
        if ($r1_stranger) { return 403; }
        location / { return 404; }
        location = /healthz { access_log off; default_type text/plain; return 200 "ok\\n"; }  # nginx's own health
        location = /v1/models { return 200 '{"object":"list","data":[{"id":"%(model)s","object":"model"}]}'; }
        location = /v1/chat/completions {
            limit_except POST { deny all; }
            if ($r1_not_json) { return 415; }
            set $args "";
            proxy_pass http://r1_channels;
            proxy_set_header Host r1_channels; proxy_set_header Connection "";
            proxy_read_timeout %(outer_s)ds;  # longer than a channel's own
            proxy_next_upstream error timeout http_429 http_500 http_502 http_503 http_504 non_idempotent;
            proxy_next_upstream_tries %(tries)d; proxy_next_upstream_timeout 120s;  # then it is the client's
            add_header X-Accel-Buffering no always;  # for a proxy in front of this one
            error_page 502 504 =503 @nobody;
        }
        location @nobody {
            add_header Retry-After 5 always;
            return 200 '{"error":{"message":"no channel can take it now: busy, resting or away","code":$status}}';
        }
    }
"""
_CHANNEL = """
    # %(name)s: model %(model)s; reasoning: %(reasoning)s%(tokens)s
    map $r1_model_found $r1_body_%(number)d { default $request_body; 1 '$r1_head"%(model)s"$r1_tail'; }
%(zones)s"""
_SERVER = """\
%(upstream)s
    server {  # %(name)s
        listen 127.0.0.1:%(port)d;
        add_header X-Dsr1kit-Channel "%(name)s" always;
        error_page 429 502 504 @own;
        location @own { return 200 '{"error":{"message":"%(name)s: busy or out of reach","code":$status}}'; }
        location / { return 404; }
        location = /v1/chat/completions {
            if ($http_host != r1_channels) { return 403; }  # from the server above alone
%(limits)s            proxy_pass "%(scheme)s://%(to)s%(target)s";
            proxy_ssl_name "%(host)s";
            proxy_set_header Host "%(netloc)s";
            proxy_set_header Authorization "%(authorization)s";
            proxy_set_header Accept "text/event-stream, application/json"; proxy_set_header User-Agent dsr1kit;
            proxy_set_header Content-Type application/json; proxy_set_header Connection "";
            proxy_set_body $r1_body_%(number)d;
        }
    }
"""


class _Door(NamedTuple):
    # One address of a channel, and the port of the loopback server that stands before it.
    number: int
    channel: Channel
    url: SplitResult
    port: int
    first: bool


def nginx_config(
    channels: Sequence[Channel],
    *,
    port: int = 8080,
    listen: str = "127.0.0.1",
    resolver: str = "",
    trusted_certificate: str = DEBIAN_BUNDLE,
    read_timeout_s: int = 300,
    allow_different_models: bool = False,
    name: str = "r1.conf",
    now: dt.datetime | None = None,
) -> str:
    """The template of an nginx.conf; its first lines say how it is used.

    Args:
        channels: weight 0 takes no requests; where all others are backups, they are promoted. Of several
            addresses of a channel the first takes the requests and the others are its backups.
        port: of the endpoint; the channels' loopback servers take the ports after it.
        listen: IP address of the endpoint. Whoever reaches it spends your keys.
        resolver: as in nginx, "127.0.0.53 valid=60s": names are looked up while it runs, and every request opens
            a connection. Without: at the start alone, and nginx does not start while a name does not resolve.
        trusted_certificate: file of the authorities that certificates are checked against.
        read_timeout_s: longest silence between two reads.
        allow_different_models: mix families, so that R1 or something else may answer.
        name: of the file that is to become of it; the template's ends in `.template`.
        now: moment by which channels are retired or not.

    Raises:
        UsageError: a channel that nginx cannot serve, or that would break the file, named with the reason.
    """
    _check(channels, allow_different_models, now)
    try:
        address = ipaddress.ip_address(listen)
    except ValueError:
        raise UsageError(f"listen takes an IP address, not {listen!r}") from None
    if resolver and not _RESOLVER.fullmatch(resolver):
        raise UsageError(f"resolver takes IP addresses, valid=60s and ipv6=off, not {resolver!r}")
    if not _PATH.fullmatch(trusted_certificate) or read_timeout_s < 1:
        raise UsageError("trusted_certificate must be a plain path, and read_timeout_s at least 1")
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise UsageError(f"the file's name must be a plain one, such as r1.conf, not {name!r}")
    doors, weights = _doors(channels, port), _whole_weights([c.weight for c in channels])
    promoted = all(c.backup for c in channels if c.weight)
    notes = ["# All are backups, so all take requests: nginx wants one that is not."] if promoted else []
    if not address.is_loopback:
        notes.append("# This listens beyond this machine and asks nobody for a key: whoever reaches it spends yours.")
    if len({c.reasoning for c in channels}) > 1:
        notes.append("# Reasoning comes in the field that each place uses, which differs from answer to answer.")
    keys = " ".join(dict.fromkeys(c.api_key_env for c in channels if c.api_key_env))
    use = f"# It holds no key, and needs none: cp {name}.template {name}"
    if keys:  # not '$A_KEY' in the command: envsubst would put the key into that very line
        use = f"""# It holds no key; with the keys in the environment, and their file readable for you alone:
#   (umask 077; envsubst "$(printf '$%s ' {keys})" < {name}.template > {name})
# A variable that is not set leaves an empty key (401); a key with a quote, $ or backslash would break the file."""
    servers = []
    for number, c, _, own_port, first in doors:
        options = (f" weight={weights[number]}" if c.weight else "") + (
            f" max_conns={c.max_in_flight}" if c.max_in_flight else ""
        )
        state = " down" if not c.weight else " backup" if not first or (c.backup and not promoted) else ""
        servers.append(f"        server 127.0.0.1:{own_port}{options} max_fails=5 fail_timeout=10s{state};  # {c.name}")
    looked_up = bool(resolver.strip())
    text = _HTTP % {
        "at": f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}", "use": use, "name": name,
        "names": ", ".join(c.name for c in channels), "notes": "\n".join(notes), "servers": "\n".join(servers),
        "names_at": "Names are looked up while it runs, so every request opens a connection." if looked_up
        else "Names are looked up at the start alone: without DNS it does not start, and a move needs -s reload.",
        "resolver": f"    resolver {resolver};\n    resolver_timeout 5s;\n" if looked_up else "",
        "trusted": trusted_certificate, "stranger": address.is_loopback, "tries": len(doors), "model_at": _MODEL_AT,
        "model": next(c.model for c in channels if c.weight), "read_s": read_timeout_s, "outer_s": read_timeout_s + 10,
    }  # fmt: skip
    text += "".join(_server(door, looked_up) for door in doors)
    return re.sub(r"\n{3,}", "\n\n", text) + "}\n"


def _check(channels: Sequence[Channel], allow_different_models: bool, now: dt.datetime | None) -> None:
    names = [c.name for c in channels]
    for c in channels:
        if why := "it is given twice" if names.count(c.name) > 1 else _unfit(c, now):
            raise UsageError(f"channel {c.name!r} cannot stand behind nginx: {why}")
    if not any(c.weight for c in channels):
        raise UsageError("no channel has a weight above 0: nothing could be asked")
    families = sorted({c.family for c in channels})
    if len(families) > 1 and not allow_different_models:
        told = "; ".join(
            f"{family}: " + ", ".join(c.name for c in channels if c.family == family) for family in families
        )
        raise UsageError(
            f"these are different models ({told}), and nobody could tell which will answer: name channels of one "
            "family (a field of the catalogue), or allow it with --allow-different-models"
        )


def _unfit(c: Channel, now: dt.datetime | None) -> str:
    """Why nginx cannot serve the channel, or must not be given its texts; empty: it can."""
    if c.fill_in:
        return f"put {' and '.join(c.fill_in)} under [channel.{c.name}] in your own file"
    if retired := c.retired_on(now):
        return f"it was retired on {retired}"
    if c.protocol != "chat-completions":
        return f"it speaks {c.protocol}, which nginx cannot translate or sign"
    if c.proxy:
        return "it is reached through a proxy, which nginx cannot go through"
    if not (math.isfinite(c.weight) and c.weight >= 0):
        return f"its weight must be at least 0, not {c.weight!r}"
    if c.requests_per_minute is not None and not 1 <= c.requests_per_minute < 1e9:
        return "nginx counts requests_per_minute in whole ones, from 1"
    key = c.api_key_env
    if key and (not (key.isascii() and key.isidentifier()) or key == key.lower() or looks_secret(key)):
        return "api_key_env must name a variable with a capital letter, which nginx's own variables lack"
    texts = [("name", c.name, _NAME), ("model", c.model, _MODEL), *(("address", url, _URL) for url in c.base_urls)]
    for what, text, allowed in texts:
        if not allowed.fullmatch(text):
            return f"its {what} holds a character that could break out of nginx's file"
        if redact(text) != text or _SECRET_IN_QUERY.search(text.partition("?")[2]):
            return f"its {what} seems to hold a key"
    if any(url.startswith("https:") and _is_ip(urlsplit(url).hostname) for url in c.base_urls):
        return "nginx checks a certificate against a name, and its https address is a number"
    return "" if c.base_urls else "it has no address"


def _is_ip(host: str | None) -> bool:
    try:
        return bool(ipaddress.ip_address(host or ""))
    except ValueError:
        return False


def _whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportion, up to 1000; 0 stays 0, and nothing else becomes it."""
    shares = [weight / max(weights) for weight in weights]
    fit = (n for n in range(1, _MOST_WEIGHT) if all(abs(s * n - max(1, round(s * n))) < 1e-6 for s in shares if s))
    top = next(fit, _MOST_WEIGHT)
    return [max(1, round(share * top)) if share else 0 for share in shares]


def _doors(channels: Sequence[Channel], port: int) -> list[_Door]:
    doors: list[_Door] = []
    for number, c in enumerate(channels):
        for i, url in enumerate(c.base_urls):
            doors.append(_Door(number, c, urlsplit(url), port + 1 + len(doors), i == 0))
    last = port + len(doors)
    if not 1 <= port < last <= 65535:
        raise UsageError(f"port {port} and the {len(doors)} after it, for the channels, must be from 1 to 65535")
    for _, c, place, *_ in doors:
        if port <= _port(place) <= last and (place.hostname or "").startswith(("127.", "localhost", "::1")):
            whose = f"channel {c.name!r} is itself at one of the ports {port} to {last}"
            raise UsageError(f"{whose}, which nginx would take: choose another --port")
    return doors


def _port(url: SplitResult) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _server(door: _Door, looked_up: bool) -> str:
    """The loopback server of one address, after what all servers of its channel share."""
    number, c, url, port, first = door
    host, rate = url.hostname or "", int(c.requests_per_minute or 0)
    looked_up &= not _is_ip(host) and host != "localhost"  # a resolver need not know this machine's own names
    literal = f"[{host}]" if ":" in host else host
    upstream = f"    upstream r1_to_{port} {{ server {literal}:{_port(url)}; keepalive 16; keepalive_timeout 30s; }}"
    zones = limits = ""
    if rate:  # a fifth of them at once, the others evenly: never more than the limit in a minute
        zones += f'    limit_req_zone "{number}" zone=r1_rate_{number}:64k rate={rate - rate // 5}r/m;\n'
        limits += (
            f"            limit_req zone=r1_rate_{number} {f'burst={rate // 5 - 1} ' if rate >= 10 else ''}nodelay;\n"
        )
    if c.max_in_flight:
        zones += f'    limit_conn_zone "{number}" zone=r1_flight_{number}:64k;\n'
        limits += f"            limit_conn r1_flight_{number} {c.max_in_flight};\n"
    facts = {
        "name": c.name, "model": c.model, "reasoning": c.reasoning, "number": number, "port": port,
        "tokens": f"; nginx cannot keep tokens_per_minute = {c.tokens_per_minute:g}" if c.tokens_per_minute else "",
        "zones": zones, "limits": limits + (f'            set $r1_to "{host}";\n' if looked_up else ""),
        "upstream": "" if looked_up else upstream, "scheme": url.scheme, "host": host, "netloc": url.netloc,
        "to": f"$r1_to:{_port(url)}" if looked_up else f"r1_to_{port}",
        "target": url.path.rstrip("/") + "/chat/completions" + f"?{url.query}" * bool(url.query),
        "authorization": f"Bearer ${{{c.api_key_env}}}" if c.api_key_env else "",
    }  # fmt: skip
    return (_CHANNEL % facts if first else "") + _SERVER % facts
