"""TOML files are read strictly: every complaint names the file, the place and what was expected."""

from __future__ import annotations

import datetime as dt

import pytest

from dsr1kit.config import Table, read_toml
from dsr1kit.emulator.weather import find_weather, load_weather
from dsr1kit.errors import ConfigError, UnknownName

MODEL = '[model]\nscript = "42"\n'


@pytest.fixture
def weather(tmp_path):
    def load(text):
        path = tmp_path / "w.toml"
        path.write_text(text, encoding="utf-8")
        return load_weather(path)

    return load


def test_a_syntax_error_names_file_and_line(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text('a = 1\nb = "unclosed\n')
    with pytest.raises(ConfigError, match=r"broken\.toml.*line 2"):
        read_toml(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(ConfigError, match="UTF-8"):
        read_toml(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("take", "value", "told"),
    [
        (lambda t: t.text("k"), 3, "expected a string, not the number 3"),
        (lambda t: t.text("k", choices=("a", "b")), "c", "expected one of a, b, not 'c'"),
        (lambda t: t.text("k", required=True), "  ", "must not be empty"),
        (lambda t: t.texts("k"), ["a", 1], "list of strings"),
        (lambda t: t.flag("k"), "yes", "true or false"),
        (lambda t: t.number("k"), True, "expected a number, not the boolean True"),
        (lambda t: t.number("k"), "3", "expected a number"),
        (lambda t: t.number("k"), -1, "of at least 0, not -1"),
        (lambda t: t.number("k", high=1), 2, "from 0 to 1, not 2"),
        (lambda t: t.number("k"), float("nan"), "expected a number"),
        (lambda t: t.number("k"), float("inf"), "expected a number"),
        (lambda t: t.whole("k"), 1.5, "whole number"),
        (lambda t: t.whole("k", low=1), 0, "of at least 1"),
        (lambda t: t.date("k"), "2026-11-23", "without quotes"),
        (lambda t: t.table("k"), 3, "must be a table"),
    ],
)
def test_wrong_values_are_told_with_file_table_key_and_expectation(take, value, told):
    with pytest.raises(ConfigError) as error:
        take(Table("my.toml", "channel.x", {"k": value}))
    assert told in str(error.value)
    assert "my.toml" in str(error.value)
    assert "channel.x" in str(error.value)
    assert "k" in str(error.value)


def test_a_missing_key_is_told():
    with pytest.raises(ConfigError, match="model: is missing"):
        Table("my.toml", "t", {}).text("model", required=True)


def test_numbers_beyond_a_float_are_told():
    with pytest.raises(ConfigError, match="expected a number"):
        Table("my.toml", "t", {"k": 10**400}).number("k")


def test_an_unknown_key_is_told_with_the_nearest():
    table = Table("my.toml", "t", {"wieght": 3})
    table.number("weight")
    with pytest.raises(ConfigError, match="'wieght'; did you mean 'weight'"):
        table.finish()


# Weather.
@pytest.mark.parametrize("name", ["calm", "busy", "scripted", "calm.toml"])
def test_shipped_weathers_load_by_name(name):
    loaded = load_weather(name)
    assert loaded.path == find_weather(name)
    assert loaded.title


def test_a_weather_needs_its_model_alone(weather):
    loaded = weather(MODEL)
    assert (loaded.scripts, loaded.first_token_s, loaded.faults, loaded.usage) == (("42",), 0.0, {}, "split")
    assert loaded.title == "w"


def test_a_weather_keeps_what_the_file_says(weather):
    loaded = weather(
        'title = "t"\n[model]\nname = "tiny-r1"\nquantization = "4bit"\ntemperature = 1.0\n'
        "[latency]\nfirst_token_s = 1\ninter_token_s = 0.5\nspread = 0.1\nseed = 3\n"
        '[peak]\nhours = ["10-12", [15, 17]]\nfactor = 3\ntimezone = "Asia/Shanghai"\n'
        "[limits]\nrequests_per_minute = 9\nmax_in_flight = 2\n[faults]\ncut = 0.5\nempty = 0.0\n"
        '[dialect]\nreasoning = "inline"\nkeep_alive = "blank"\nkeep_alive_s = 0.5\n'
        "queue_s = 3\ntokens_per_chunk = 2\n"
        "usage = false\ndone = false\ncrlf = true\n[price]\ninput = 1\noutput = 2\ncurrency = 'CNY'\n"
    )
    assert (loaded.model, loaded.quantization, loaded.temperature) == ("tiny-r1", "4bit", 1.0)
    assert (loaded.first_token_s, loaded.inter_token_s, loaded.spread, loaded.seed) == (1.0, 0.5, 0.1, 3)
    assert (loaded.peak_hours, loaded.peak_factor) == (((10.0, 12.0), (15.0, 17.0)), 3.0)
    assert loaded.timezone == "Asia/Shanghai"
    assert (loaded.requests_per_minute, loaded.max_in_flight, loaded.faults) == (9.0, 2, {"cut": 0.5})
    assert (loaded.reasoning, loaded.keep_alive, loaded.tokens_per_chunk) == ("inline", "blank", 2)
    assert (loaded.usage, loaded.done, loaded.crlf) == ("none", False, True)
    assert loaded.price.currency == "CNY"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"\[model\] is missing"),
        ("[model]\n", "either script"),
        ('[model]\nscript = "a"\nname = "b"\n', "not both"),
        ('[model]\nscript = " "\n', "some text"),
        ('[model]\nname = "b"\nquantization = "2bit"\n', "none, 8bit, 4bit"),
        ('[model]\nscript = "a"\nquantization = "4bit"\n', "unknown key 'quantization'"),
        (MODEL + "[fault]\n", "did you mean 'faults'"),
        (MODEL + "[faults]\noverload = 0.1\n", "did you mean 'overloaded'"),
        (MODEL + "[faults]\nunreachable = 0.1\n", "unknown key"),
        (MODEL + "[faults]\ncut = 0.6\nempty = 0.6\n", "add up to 1.2"),
        (MODEL + "[faults]\ncut = 1.5\n", "from 0 to 1"),
        (MODEL + "[faults]\ncut = -0.5\n", "from 0 to 1"),
        (MODEL + "[latency]\nfirst_token_s = -1\n", "at least 0"),
        (MODEL + '[latency]\nfirst_token_s = "fast"\n', "expected a number"),
        (MODEL + "[limits]\nmax_in_flight = 0\n", "at least 1"),
        (MODEL + "[limits]\nrequests_per_minute = 0\n", "at least"),
        (MODEL + '[dialect]\nreasoning = "thoughts"\n', "expected one of"),
        (MODEL + "[dialect]\nkeep_alive_s = 0\n", "at least"),
        (MODEL + '[peak]\nhours = [[1, 2]]\ntimezone = "Mars/Base"\n', "no such time zone"),
        (MODEL + '[peak]\nhours = [[1, 2]]\ntimezone = "../../etc/passwd"\n', "no such time zone"),
        (MODEL + "[peak]\nfactor = 2\n", "expected spans"),
        (MODEL + "[peak]\nfactor = 2\n", "is missing"),
        (MODEL + "[peak]\nhours = [10, 12, 15]\n", "expected spans"),
        (MODEL + "[peak]\nhours = [[12, 12]]\n", "two different hours"),
        (MODEL + '[peak]\nhours = ["ten-12"]\n', "expected spans"),
        (MODEL + "[peak]\nhours = [[20, 25]]\n", "from 0 to 24"),
        (MODEL + "[price]\ninput = 1\n", "output: is missing"),
        ("model = 3\n", "must be a table"),
    ],
)
def test_wrong_weather_is_told_with_its_file(weather, text, told):
    with pytest.raises(ConfigError, match=told) as error:
        weather(text)
    assert "w.toml" in str(error.value)


def test_an_unknown_weather_is_told_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'busy'"):
        load_weather("bussy")


def test_a_file_that_ends_too_early_names_its_last_line(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('[channel.a]\nmodel = "m"\nbase_url = [')
    with pytest.raises(ConfigError, match=r"t\.toml: not valid TOML: .*line 3"):
        read_toml(path)


@pytest.mark.parametrize(
    ("text", "table", "key", "told"),
    [
        ("[model]\nscript = []\n", "model", "script", "some text"),
        ('[model]\nscript = ["a", " "]\n', "model", "script", "some text"),
        ('[model]\nscript = ["a", 7]\n', "model", "script", "list of strings"),
        ("[model]\nscript = 7\n", "model", "script", "expected a string"),
        (MODEL + '[how]\nthrottled = "503"\n', "how", "throttled", "expected one of 429, event"),
        (MODEL + '[how]\ncut = "late"\n', "how", "cut", "expected one of anywhere, before, answer"),
        (MODEL + "[how]\nretired = 410\n", "how", "retired", "expected a string"),
        (MODEL + '[how]\nsystem = "ignore"\n', "how", "system", "expected one of accept, refuse, obey"),
        (MODEL + '[how]\nthrotled = "429"\n', "how", "throttled", "did you mean"),
        (MODEL + '[how]\nqueued = "x"\n', "how", "queued", "unknown key"),
        (MODEL + "[limits]\nmax_output = 0\n", "limits", "max_output", "at least 1"),
        (MODEL + "[limits]\nmax_output = 1.5\n", "limits", "max_output", "whole number"),
        (MODEL + "[limits]\nrefuse_above = 0\n", "limits", "refuse_above", "at least 1"),
        (MODEL + "[limits]\nbalance = -1\n", "limits", "balance", "at least 0"),
        (MODEL + '[limits]\nbalance = "much"\n', "limits", "balance", "expected a number"),
        (MODEL + "[limits]\nretry_after_s = nan\n", "limits", "retry_after_s", "expected a number"),
        (MODEL + "[retirement]\n", "retirement", "at", "either at"),
        (MODEL + "[retirement]\nshrinks_s = 5\n", "retirement", "at", "either at"),
        (MODEL + "[retirement]\nat = 2027-01-01\nin_s = 5\n", "retirement", "at", "not both"),
        (MODEL + '[retirement]\nat = "2027-01-01"\n', "retirement", "at", "without quotes"),
        (MODEL + "[retirement]\nin_s = -1\n", "retirement", "in_s", "from 0"),
        (MODEL + "[retirement]\nin_s = 1e300\n", "retirement", "in_s", "from 0"),
        (MODEL + "[retirement]\nin_s = 1\nshrinks_s = 0\n", "retirement", "shrinks_s", "at least"),
        (MODEL + "[retirement]\nin_s = 1\nshrinks = 0\n", "retirement", "shrinks_s", "did you mean"),
        (MODEL + '[dialect]\nquota_headers = "x"\n', "dialect", "quota_headers", "retry-after-ms"),
        (MODEL + '[dialect]\nmodels = "some"\n', "dialect", "models", "list, none, forbidden"),
        (MODEL + '[dialect]\nlisted = "one"\n', "dialect", "listed", "list of strings"),
        (MODEL + "[dialect]\nserves = 7\n", "dialect", "serves", "expected a string"),
        (MODEL + '[dialect]\nburst = "yes"\n', "dialect", "burst", "true or false"),
        (MODEL + '[dialect]\nusage = "all"\n', "dialect", "usage", "expected one of split, sum, none"),
        (MODEL + "[dialect]\nusage = 1\n", "dialect", "usage", "expected a string"),
        (MODEL + '[dialect]\nprotocol = "grpc"\n', "dialect", "protocol", "bedrock-converse"),
        ("how = 3\n" + MODEL, "", "how", "must be a table"),
    ],
)
def test_wrong_weather_is_told_with_file_table_and_key(weather, text, table, key, told):
    with pytest.raises(ConfigError) as error:
        weather(text)
    message = str(error.value)
    assert "w.toml" in message
    assert f"[{table}]" in message or not table
    assert key in message
    assert told in message


def test_a_weather_keeps_its_forms_limits_and_retirement(weather):
    loaded = weather(
        '[model]\nscript = ["a", "b"]\n[how]\ncut = "answer"\nsystem = "obey"\n'
        "[limits]\nmax_output = 7\nrefuse_above = 9\nbalance = 2\nretry_after_s = 0.5\n"
        "[retirement]\nat = 2027-01-01\nshrinks_s = 60\n"
        '[dialect]\nusage = true\nburst = true\nserves = "x"\nlisted = ["y"]\nmodels = "none"\n'
        'quota_headers = "openai"\nprotocol = "bedrock-converse"\n'
    )
    assert (loaded.scripts, loaded.how, loaded.system) == (("a", "b"), {"cut": "answer"}, "obey")
    assert (loaded.form("cut"), loaded.form("stalled"), loaded.form("queued"), loaded.form(None)) == (
        "answer", "between", "", "",
    )  # fmt: skip
    assert (loaded.max_output, loaded.refuse_above, loaded.balance, loaded.retry_after_s) == (7, 9, 2.0, 0.5)
    assert (loaded.usage, loaded.burst, loaded.serves, loaded.listed) == ("split", True, "x", ("y",))
    assert (loaded.models, loaded.quota_headers, loaded.protocol) == ("none", "openai", "bedrock-converse")
    at = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
    assert loaded.retirement(at) == at
    seconds = dt.timedelta(seconds=1)
    left = [loaded.quota_left(at, at + n * seconds) for n in (-120, -60, -30, 0, 60)]
    assert left == [1.0, 1.0, 0.5, 0.0, 0.0]
    plain = weather(MODEL)
    assert (plain.retirement(at), plain.quota_left(at, at), plain.balance, plain.listed) == (None, 1.0, None, None)
