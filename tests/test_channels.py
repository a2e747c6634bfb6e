"""The catalogue: shipped entries load, the person's own go over them, every mistake is told where it is."""

from __future__ import annotations

import asyncio
import datetime as dt

import pytest

from dsr1kit import load_channels
from dsr1kit.access.channels import Channel
from dsr1kit.access.prices import Price
from dsr1kit.errors import ConfigError, UnknownName
from dsr1kit.records import Usage

MINE = '[channel.mine]\nbase_url = "http://127.0.0.1:8000/v1"\nmodel = "r1"\n'


def test_the_shipped_catalogue_loads_and_says_where_its_facts_come_from():
    channels = load_channels()
    assert "deepseek" in channels
    assert len(channels) == len(list(channels)) > 3
    for name, channel in channels.items():
        assert channel.name == name
        assert channel.source
        assert channel.as_of
        assert channel.title


def test_own_entries_are_added_with_defaults(load):
    mine = load(MINE)["mine"]
    assert mine.base_urls == ("http://127.0.0.1:8000/v1",)
    assert (mine.title, mine.family, mine.reasoning, mine.weight) == ("mine", "other", "auto", 1.0)
    assert (mine.backup, mine.price, mine.retires, mine.max_in_flight) == (False, None, None, None)


def test_own_file_overrides_field_by_field(load):
    shipped = load_channels()["deepseek"]
    mine = load("[channel.deepseek]\nweight = 5\nmax_in_flight = 2\n")["deepseek"]
    assert (mine.weight, mine.max_in_flight) == (5.0, 2)
    assert (mine.base_urls, mine.model, mine.api_key_env) == (
        shipped.base_urls,
        shipped.model,
        shipped.api_key_env,
    )


def test_base_urls_take_the_place_of_a_shipped_base_url(load):
    mine = load('[channel.deepseek]\nbase_urls = ["http://a.example/v1/", "http://b.example"]\n')["deepseek"]
    assert mine.base_urls == ("http://a.example/v1", "http://b.example")


def test_the_environment_names_the_own_file_and_an_argument_goes_before_it(tmp_path, monkeypatch):
    (tmp_path / "env.toml").write_text(MINE)
    (tmp_path / "other.toml").write_text(MINE.replace("mine", "other"))
    monkeypatch.setenv("DSR1KIT_CHANNELS", str(tmp_path / "env.toml"))
    assert "mine" in load_channels()
    assert "mine" not in load_channels(tmp_path / "other.toml")
    monkeypatch.setenv("DSR1KIT_CHANNELS", str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError, match=r"missing\.toml: no such file"):
        load_channels()


def test_an_unknown_channel_is_told_with_the_nearest_and_is_a_key_error():
    channels = load_channels()
    with pytest.raises(UnknownName, match="did you mean 'deepseek'"):
        channels["deepsek"]
    with pytest.raises(KeyError):
        channels["deepsek"]
    assert channels.get("deepsek") is None
    assert "deepsek" not in channels


def test_every_field_is_read(load):
    mine = load(
        '[channel.mine]\ntitle = "T"\nbase_url = "https://h.example/v1"\nmodel = "m"\napi_key_env = "K"\n'
        'family = "r1"\nprotocol = "bedrock-converse"\nreasoning = "inline"\nweight = 2.5\nbackup = true\n'
        'region = "cn"\nproxy = "http://me:pw@127.0.0.1:8080"\nrequests_per_minute = 60\n'
        "tokens_per_minute = 1000\nmax_in_flight = 8\ncontext = 1000\nmax_output = 100\n"
        'price = {input = 0.5, output = 2, currency = "CNY", as_of = 2026-07-01}\ntariff = "deepseek-peak"\n'
        'retires = 2099-01-01\nsource = "s"\nas_of = 2026-11-23\nnote = "n"\n'
        'availability = 0.9995\nbalance_path = "/user/balance"\n'
    )["mine"]
    peak = load_channels()["deepseek"].peak
    assert peak is not None
    assert mine == Channel(
        name="mine", title="T", base_urls=("https://h.example/v1",), model="m", api_key_env="K", family="r1",
        protocol="bedrock-converse", reasoning="inline", weight=2.5, backup=True, region="cn",
        proxy="http://me:pw@127.0.0.1:8080", requests_per_minute=60.0, tokens_per_minute=1000.0,
        max_in_flight=8, availability=0.9995, context=1000, max_output=100,
        price=Price(0.5, 2.0, "CNY", dt.date(2026, 7, 1), peak), tariff="deepseek-peak", peak=peak,
        balance_path="/user/balance", retires=dt.date(2099, 1, 1), source="s", as_of=dt.date(2026, 11, 23), note="n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[channel.mine]\nmodel = "m"\n', "base_url: is missing"),
        ('[channel.mine]\nbase_url = "http://h"\n', "model: is missing"),
        ('[channel.mine]\nbase_url = "http://h"\nmodel = ""\n', "model: must not be empty"),
        (MINE + 'base_urls = ["http://h"]\n', "not both"),
        ('[channel.mine]\nbase_urls = []\nmodel = "m"\n', "at least one"),
        ('[channel.mine]\nbase_urls = "http://h"\nmodel = "m"\n', "list of strings"),
        (MINE + "wieght = 3\n", "did you mean 'weight'"),
        (MINE + 'weight = "heavy"\n', "weight: expected a number"),
        (MINE + "weight = -1\n", "weight: expected a number of at least 0"),
        (MINE + "requests_per_minute = 0\n", "requests_per_minute"),
        (MINE + "max_in_flight = 1.5\n", "whole number"),
        (MINE + "max_output = 0\n", "at least 1"),
        (MINE + 'family = "r2"\n', "expected one of r1"),
        (MINE + 'reasoning = "none"\n', "expected one of auto"),
        (MINE + 'retires = "2026-01-01"\n', "without quotes"),
        (MINE + "retires = 10:00:00\n", "expected a date"),
        (MINE + "price = 3\n", "must be a table"),
        (MINE + "price = {input = 1}\n", "output: is missing"),
        (MINE + "price = {input = 1, output = -2}\n", "at least 0"),
        (MINE + "price = {input = 1, output = 2, per = 3}\n", "unknown key 'per'"),
        (MINE + 'proxy = "socks5://127.0.0.1:1"\n', "proxy: .*http://"),
        ("[chanel.mine]\n", "did you mean 'channel'"),
        ("[channel]\nmine = 3\n", "channel.mine must be a table"),
        ("[channel.mine\n", "not valid TOML.*line 1"),
    ],
)
def test_mistakes_are_told_with_their_file(load, text, told):
    with pytest.raises(ConfigError, match=told) as error:
        load(text)
    assert "my.toml" in str(error.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("127.0.0.1:8000/v1", "http:// or https://"),
        ("localhost:8000", "http:// or https://"),
        ("ftp://h.example", "http:// or https://"),
        ("http://", "names a host"),
        ("http://h.example:99999/v1", "does not parse"),
        ("http://h.example:port/v1", "does not parse"),
        ("http://[::1", "does not parse"),
        ("http://h.example/v1#top", "fragment"),
        ("http://h.example/my api", "without spaces"),
        ("http://h.example/v1\\n", "without spaces"),
        ("http://模型.example/v1", "plain ASCII"),
        ("", "must not be empty"),
    ],
)
def test_urls_that_cannot_be_meant_are_refused(load, url, told):
    with pytest.raises(ConfigError, match=told):
        load(f'[channel.mine]\nmodel = "m"\nbase_url = "{url}"\n')


@pytest.mark.parametrize(
    "url", ["http://me:s3cr3tpw@h.example/v1", "http://s3cr3tpw@h.example", "ftp://a:s3cr3tpw@h#x"]
)
def test_credentials_in_a_url_are_refused_and_not_shown(load, url):
    with pytest.raises(ConfigError, match=r"credentials.*api_key_env") as error:
        load(f'[channel.mine]\nmodel = "m"\nbase_url = "{url}"\n')
    assert "s3cr3tpw" not in str(error.value)


UTC = dt.UTC


@pytest.mark.parametrize(
    ("retires", "now", "told"),
    [
        ("2026-07-01", dt.datetime(2026, 6, 30, 23, 59, tzinfo=UTC), ""),
        ("2026-07-01", dt.datetime(2026, 7, 1, tzinfo=UTC), "2026-07-01"),
        ("2026-07-01T12:00:00Z", dt.datetime(2026, 7, 1, 11, 59, tzinfo=UTC), ""),
        ("2026-07-01T12:00:00Z", dt.datetime(2026, 7, 1, 12, 0, tzinfo=UTC), "2026-07-01"),
        ("2026-07-01T12:00:00+08:00", dt.datetime(2026, 7, 1, 4, 0, tzinfo=UTC), "2026-07-01"),
        ("2026-07-01T12:00:00", dt.datetime(2026, 7, 1, 11, 59, tzinfo=UTC), ""),
    ],
)
def test_retirement_by_date_and_by_moment(load, retires, now, told):
    assert load(MINE + f"retires = {retires}\n")["mine"].retired_on(now) == told


def test_a_price_is_per_million_tokens():
    price = Price(input=1.0, output=4.0)
    assert price.cost(Usage(prompt_tokens=1000, reasoning_tokens=300, answer_tokens=200)) == pytest.approx(0.003)
    assert price.cost(Usage(prompt_tokens=1000)) == pytest.approx(0.001)
    assert price.cost(Usage()) is None


def test_key_present_says_whether_a_key_is_needed_and_there(load, monkeypatch):
    mine = load(MINE + 'api_key_env = "SOME_CHANNELS_KEY"\n')["mine"]
    monkeypatch.delenv("SOME_CHANNELS_KEY", raising=False)
    assert mine.key_present() is False
    monkeypatch.setenv("SOME_CHANNELS_KEY", "sk-0123456789abcdef0123")
    assert mine.key_present() is True
    assert load(MINE)["mine"].key_present() is None


def test_a_key_in_the_place_of_its_variable_is_refused_and_not_shown(load):
    for key in ("sk-0123456789abcdefABCDEF", "hf_abcdefghijKLMNOP0123", "my key", "clé"):
        with pytest.raises(ConfigError, match="never the key itself") as caught:
            load(MINE + f'api_key_env = "{key}"\n')
        assert key not in str(caught.value)


def test_an_own_tariff_goes_over_the_shipped_one_field_by_field(load):
    mine = load("[tariff.deepseek-peak]\nfactor = 3\n")["deepseek"]
    shipped = load_channels()["deepseek"].peak
    assert (mine.peak.factor, mine.peak.hours, mine.peak.holidays) == (3.0, shipped.hours, shipped.holidays)


def test_a_tariff_without_a_factor_is_refused(load):
    with pytest.raises(ConfigError, match=r"tariff.t\] factor: is missing"):
        load("[tariff.t]\nhours = [[1, 2]]\n")


@pytest.mark.parametrize("query", ["key=sekretq999", "api-version=1&token=sekretq999", "x=sk-0123456789abcdefABCDEF"])
def test_a_key_in_a_urls_query_is_refused_and_not_shown(load, query):
    with pytest.raises(ConfigError, match="holds a key in its query") as caught:
        load(f'[channel.mine]\nbase_url = "https://h.example/v1?{query}"\nmodel = "m"\n')
    assert "sekret" not in str(caught.value)
    assert "sk-0" not in str(caught.value)


def test_a_query_that_holds_no_key_stays(load):
    mine = load('[channel.mine]\nbase_url = "https://h.example/v1?api-version=2025-01-01"\nmodel = "m"\n')["mine"]
    assert mine.base_urls == ("https://h.example/v1?api-version=2025-01-01",)


def test_a_retired_channel_asks_for_no_key(load, monkeypatch):
    monkeypatch.delenv("MY_RETIRED_KEY", raising=False)
    mine = load(MINE + 'api_key_env = "MY_RETIRED_KEY"\nretires = 2025-01-01\n')["mine"]

    async def ask():
        async with mine.open() as r1:
            return await r1.ask([{"role": "user", "content": "?"}])

    assert asyncio.run(ask()).outcome == "retired"
